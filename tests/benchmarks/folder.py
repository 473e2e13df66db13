"""verify(), the statistics and export() of a dataset folder: milliseconds per row, and memory of the calling process.

    python -m tests.benchmarks.folder [--rows 21100] [--num_proc 1 2] [--folder FOLDER]

The rows have DailyTalk's number of words and units. With --folder, the folder of an earlier run is measured, or made there.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, disable_progress_bars

from tests.benchmarks.common import WORDS, convert_toy, lengths, machine, table
from tests.benchmarks.template import VOCABULARY
from tests.helpers import DEMO
from usdm_sft.audio.frames import FRAMINGS, SAMPLE_RATE
from usdm_sft.corpus.features import TRAINER_COLUMNS, folder_features
from usdm_sft.folder.export import export
from usdm_sft.folder.layout import COUNTS, data_files, read_layout
from usdm_sft.folder.statistics import compute_statistics
from usdm_sft.folder.verify import verify
from usdm_sft.folder.writer import write_folder
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import NUM_UNITS, load_tokenizer
from usdm_sft.utils.processes import ProcessPool, num_cores

PAIRS = 8  # pairs of a dialog of DailyTalk


def make_rows(start: int, stop: int, encoder: TemplateEncoder) -> Dataset:
    """Rows whose ids continue those of the rows before `start`."""
    rng, num = np.random.default_rng(start), stop - start

    def texts() -> list[str]:
        return [" ".join(rng.choice(VOCABULARY, max(1, rng.poisson(WORDS)))) + "." for _ in range(num)]

    columns = {
        "id": [f"d{row // PAIRS}_{2 * (row % PAIRS)}" for row in range(start, stop)],
        "dialog_id": [f"d{row // PAIRS}" for row in range(start, stop)],
        "turn": [2 * (row % PAIRS) for row in range(start, stop)],
    }
    for side, role in enumerate(("user", "agent")):
        seconds = lengths(num, start + side)
        columns[f"{role}_speaker"] = [str(side)] * num
        columns[f"{role}_text"] = texts()
        columns[f"{role}_emotion"] = rng.choice(["none", "happiness", "surprise"], num).tolist()
        samples = [int(each * SAMPLE_RATE) for each in seconds]
        sizes = [FRAMINGS["fairseq"].count(each) for each in samples]
        columns[f"{role}_units"] = [rng.integers(NUM_UNITS, size=size).astype(np.uint16) for size in sizes]
        columns[f"{role}_seconds"] = np.array(samples, np.float32) / SAMPLE_RATE
    features = folder_features(lists=False)
    names = [name for name in features if name not in TRAINER_COLUMNS]
    columns |= encoder(columns)
    return Dataset.from_dict(
        {name: columns[name] for name in names}, features=type(features)({name: features[name] for name in names})
    )


class Rows:
    """Rows in memory, as `write_folder` takes them."""

    def __init__(self, rows: Dataset):
        self.num_rows, self.num_tokens = len(rows), sum(map(len, rows["input_ids"]))
        self._table = rows.data.table

    def loader(self, part: pa.Table) -> pa.Table:
        return part

    def part(self, start: int, stop: int) -> pa.Table:
        return self._table.slice(start, stop - start)


def make_folder(folder: Path, num_rows: int) -> None:
    """Write a dataset folder with an eighth of its rows in the split test."""
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        options = {"unit_model": str(convert_toy(root / "model")), "pretrained_model_name_or_path": "mistral-common"}
        counts = prepare(
            data_dir=str(DEMO / "corpus"), output_path=str(root / "out"), cache_dir=str(root / "cache"), **options
        )
    tokenizer = load_tokenizer("mistral-common")
    encoder = TemplateEncoder(tokenizer)
    cut = num_rows * 7 // 8
    splits = {"train": make_rows(0, cut, encoder), "test": make_rows(cut, num_rows, encoder)}
    for split, rows in splits.items():
        units = sum(map(len, rows["user_units"])) + sum(map(len, rows["agent_units"]))
        labels = [np.asarray(each) for each in rows["labels"]]
        counts["splits"][split] |= {
            "rows": len(rows),
            "pairs": len(rows),
            "utterances": 2 * len(rows),
            "hours": round((sum(rows["user_seconds"]) + sum(rows["agent_seconds"])) / 3600, 6),
            "dialogs_left_out": {},
            "units": units,
            "tokens": sum(map(len, labels)),
            "labelled_tokens": int(sum((each != -100).sum() for each in labels)),
        }
    with ProcessPool(1) as pool:
        written = {split: Rows(rows) for split, rows in splits.items()}
        write_folder(
            folder, "single_turn", written, tokenizer, counts | {"num_units": NUM_UNITS}, pool, key="benchmark"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=21_100)
    parser.add_argument("--num_proc", type=int, nargs="+", default=[1, num_cores()])
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as work:
        folder = args.folder or Path(work) / "folder"
        if not (folder / "counts.json").is_file():  # in a process of its own, whose memory is not that of the commands
            make = multiprocessing.get_context("spawn").Process(target=make_folder, args=(folder, args.rows))
            make.start()
            make.join()
        counts = json.loads((folder / "counts.json").read_text())
        num_rows = sum(split["rows"] for split in counts["statistics"].values())
        files, layout = data_files(folder, counts), read_layout(folder / COUNTS, counts)

        runs = {
            "verify": lambda num_proc: verify(folder, num_proc=num_proc),
            "statistics": lambda num_proc: compute_statistics(files, layout, num_proc=num_proc),
            "export usdm": lambda num_proc: export(folder, Path(work) / "usdm", num_proc=num_proc),
            "export megatron": lambda num_proc: export(
                folder, Path(work) / "packs", format="megatron", num_proc=num_proc
            ),
        }
        results = []
        for name, run in runs.items():
            row = [name]
            for num_proc in args.num_proc:
                start = time.perf_counter()
                run(num_proc)
                row.append(f"{1000 * (time.perf_counter() - start) / num_rows:.4f}")
            results.append(row)
    print(f"{machine()}\n{num_rows:,} rows\n")
    table(["ms per row", *(f"{num_proc} process(es)" for num_proc in args.num_proc)], results)
    print(f"\nmemory of the calling process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f} MB")


if __name__ == "__main__":
    main()
