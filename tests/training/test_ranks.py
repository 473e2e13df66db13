"""The training recipes on two ranks."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("trl", reason="needs the extra 'train'")

import datasets

from tests.code_blocks import find_code, small_environment
from tests.test_docs import shrink

pytestmark = pytest.mark.slow


def run_on_two_ranks(workplace, code):
    """Run code on two ranks; return what each of them wrote into the file that `OUT` names."""
    script = workplace / "train.py"
    script.write_text(f"import os\nOUT = 'seen-' + os.environ['RANK']\n{code}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = small_environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((workplace / f"seen-{rank}").read_text()) for rank in range(2)]


RECORD = """
import json
seen = []
for batch in trainer.get_train_dataloader():
    if "attention_mask" in batch:  # padded
        seen += [ids[: sum(mask)] for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist())]
    else:
        starts = [i for i, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
        [ids] = batch["input_ids"].tolist()
        seen += [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)])]
with open(OUT, "w") as file:
    json.dump(seen, file)
"""


@pytest.mark.parametrize("padding_free", [False, True])
def test_trainer_reads_every_row_of_a_stream_once(workplace, padding_free):
    code = shrink(find_code("pad_to_multiple_of=8")).replace("max_steps=1, ", "max_steps=3, ")
    if padding_free:
        code = code.replace("PaddingCollator(tokenizer, pad_to_multiple_of=8)", "PaddingFreeCollator()")
        code = code.replace("import PaddingCollator,", "import PaddingFreeCollator,")
    seen = run_on_two_ranks(workplace, code + RECORD)
    rows = datasets.load_dataset(str(workplace / "dailytalk-usdm-data"), split="train")["input_ids"][:]
    assert [len(each) for each in seen] == [5, 5] and sorted(seen[0] + seen[1]) == sorted(rows)


def test_trainer_with_map_style_rows_repeats_some(workplace):
    code = shrink(find_code("pad_to_multiple_of=8"))
    code = code.replace(", streaming=True).shuffle(seed=1, buffer_size=1000)", ")")
    code = code.replace("max_steps=1, ", "max_steps=1, per_device_train_batch_size=4, ")
    seen = run_on_two_ranks(workplace, code + RECORD)
    rows = datasets.load_dataset(str(workplace / "dailytalk-usdm-data"), split="train")["input_ids"][:]
    assert [len(each) for each in seen] == [8, 8]  # two batches of 4 for each rank, of 10 rows
    assert {*map(tuple, seen[0] + seen[1])} == {*map(tuple, rows)}


def test_trl_recipe_runs(workplace):
    code = shrink(find_code("LoraConfig"))
    steps = "\nimport json\nwith open(OUT, 'w') as file:\n    json.dump(trainer.state.global_step, file)\n"
    assert run_on_two_ranks(workplace, code + steps) == [1, 1]


def test_samplers_of_plain_pytorch_give_each_rank_its_own_rows(workplace):
    """The two ways of docs/training/pytorch.md."""
    code = """
import json
import torch.distributed
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

torch.distributed.init_process_group("gloo")
rows = load_dataset("dailytalk-usdm-data", split="train").select_columns("id")
sampled = [name for batch in DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows)) for name in batch["id"]]
stream = load_dataset("dailytalk-usdm-data", split="train", streaming=True).select_columns("id")
part = split_dataset_by_node(stream, torch.distributed.get_rank(), 2)
with open(OUT, "w") as file:
    json.dump([sampled, [row["id"] for row in part]], file)
torch.distributed.destroy_process_group()
"""
    first, second = run_on_two_ranks(workplace, code)
    names = sorted(datasets.load_dataset(str(workplace / "dailytalk-usdm-data"), split="train")["id"][:])
    for way in range(2):
        assert sorted(first[way] + second[way]) == names
