"""Stream the dataset of the demo in two worker processes, as a training run reads a dataset that is larger than the memory.

    dailytalk-usdm demo
    python examples/stream.py

The workers share out the Parquet files, so a split needs at least as many files as workers. A dataset on the Hub is streamed in the same way:
put USER/NAME in place of the folder.
"""

from datasets import load_dataset
from torch.utils.data import DataLoader

from dailytalk_usdm import PaddingCollator, load_tokenizer

DATASET = "dailytalk-usdm-demo/dataset"


def main() -> None:
    rows = load_dataset(DATASET, split="train", streaming=True).shuffle(seed=0, buffer_size=100)
    print(f"{rows.num_shards} files for 2 workers")
    collate = PaddingCollator(load_tokenizer(f"{DATASET}/tokenizer"))
    count = 0
    for batch in DataLoader(rows, batch_size=2, num_workers=2, collate_fn=collate):
        count += len(batch["input_ids"])
        print({name: tuple(tensor.shape) for name, tensor in batch.items()})
    print(f"{count} rows")


if __name__ == "__main__":  # each worker may import this file
    main()
