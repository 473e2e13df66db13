"""The whole of prepare() by stage, on a synthetic corpus in DailyTalk's layout: what bounds it?

    python -m tests.benchmarks.prepare [--dialogs 200] [--unit_model FOLDER]

Without --unit_model the toy of the tests is used, so that the time of all but the forward passes shows.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

import dailytalk_usdm
from tests.benchmarks.common import TURNS, lengths, machine, speechlike, table
from tests.helpers import DEMO
from usdm_sft.convert.convert import convert
from usdm_sft.dataset_folder import writer
from usdm_sft.prepare import prepare
from usdm_sft.shards import rows, tokens, units


def write_corpus(root: Path, num_dialogs: int) -> float:
    """-> hours"""
    rng, seconds = np.random.default_rng(0), iter(lengths(num_dialogs * 30))
    lists, total = {"train": [], "test": []}, 0.0
    for dialog in range(num_dialogs):
        (root / "data" / str(dialog)).mkdir(parents=True)
        for turn in range(max(2, rng.poisson(TURNS))):
            name, length = f"{turn}_{turn % 2}_d{dialog}", next(seconds)
            soundfile.write(root / "data" / str(dialog) / f"{name}.wav", speechlike(int(length * 22_050), rng), 22_050)
            lists["test" if dialog % 20 == 0 else "train"].append(
                f"{name}|{turn % 2}|{{P}}|how about some coffee.|none"
            )
            total += length
    for split, lines in lists.items():
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return total / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogs", type=int, default=200)
    parser.add_argument("--unit_model")
    args = parser.parse_args()
    spent: dict[str, float] = {}

    def watch(owner: object, name: str, stage: str) -> None:
        function = getattr(owner, name)

        def timed(*positional, **named):
            start = time.perf_counter()
            try:
                return function(*positional, **named)
            finally:
                spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)

    watch(dailytalk_usdm.DailyTalkUSDM, "__init__", "split lists, digests and headers of the audio")
    watch(rows, "load_rows", "builder (Arrow)")
    watch(units, "make_units", "units")
    watch(tokens, "make_tokens", "template")
    watch(writer, "write_folder", "dataset folder")

    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        hours = write_corpus(root / "corpus", args.dialogs)
        toy = DEMO / "unit_model"
        unit_model = args.unit_model or convert(
            toy / "checkpoint.pt", toy / "kmeans.npy", root / "model", model_config=toy / "config.json"
        )
        results = []
        for run in ("first", "second, other folder"):
            spent.clear()
            start = time.perf_counter()
            prepare(
                data_dir=str(root / "corpus"),
                output_path=str(root / run),
                unit_model=str(unit_model),
                pretrained_model_name_or_path="mistral-common",
                cache_dir=str(root / "cache"),
            )
            whole = time.perf_counter() - start
            results.append(spent | {"imports, tokenizer and the rest": whole - sum(spent.values()), "whole": whole})
    print(f"{machine()}\n{args.dialogs} dialogs, {hours:.2f} h\n")
    stages = list(results[0])
    table(["stage", "first run, s", "second run, s"], [[s, *(f"{r.get(s, 0):.2f}" for r in results)] for s in stages])


if __name__ == "__main__":
    main()
