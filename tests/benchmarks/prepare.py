"""The whole of prepare() and verify() by stage, on a synthetic corpus in DailyTalk's layout: what bounds them?

    python -m tests.benchmarks.prepare [--dialogs 200] [--clip_seconds 0.5] [--unit_model FOLDER]

Without --unit_model the toy of the tests is used, so that the time of all but the forward passes shows. With --clip_seconds, all
utterances have this length; `--dialogs 2532 --clip_seconds 0.1` has DailyTalk's number of files and few forward passes.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

import usdm_sft.prepare.prepare as pipeline
from tests.benchmarks.common import TURNS, convert_toy, lengths, machine, speechlike, table
from tests.benchmarks.scale import Meter
from usdm_sft.folder import verify, writer
from usdm_sft.prepare import open_run, token_shards
from usdm_sft.template.tokenizer import load_tokenizer

STAGES = (
    (open_run, "open_corpus", "split lists, digests and headers of the audio"),
    (open_run, "plan_shards", "plan"),
    (pipeline, "load_rows", "builder (Arrow)"),
    (pipeline, "_tokenize_audio", "units"),
    (token_shards, "make_tokens", "template and max_length"),
    (pipeline, "fit_splits", "counts"),
    (writer, "write_parquet", "Parquet files with statistics and digests"),
    (writer, "draw_pictures", "pictures"),
    (writer, "write_folder", "card, tokenizer and digests"),
    (verify, "verify", "verify"),
)


def write_corpus(root: Path, num_dialogs: int, clip_seconds: float | None) -> tuple[int, float]:
    """-> utterances, hours"""
    rng, seconds = np.random.default_rng(0), iter(lengths(num_dialogs * 30))
    lists, num, total = {"train": [], "test": []}, 0, 0.0
    for dialog in range(num_dialogs):
        (root / "data" / str(dialog)).mkdir(parents=True)
        for turn in range(max(2, rng.poisson(TURNS))):
            name, length = f"{turn}_{turn % 2}_d{dialog}", clip_seconds or next(seconds)
            soundfile.write(root / "data" / str(dialog) / f"{name}.wav", speechlike(int(length * 22_050), rng), 22_050)
            lists["test" if dialog % 20 == 0 else "train"].append(
                f"{name}|{turn % 2}|{{P}}|how about some coffee.|none"
            )
            num, total = num + 1, total + length
    for split, lines in lists.items():
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return num, total / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogs", type=int, default=200)
    parser.add_argument("--clip_seconds", type=float)
    parser.add_argument("--unit_model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        num, hours = write_corpus(root / "corpus", args.dialogs, args.clip_seconds)
        unit_model = args.unit_model or convert_toy(root / "model")
        load_tokenizer("mistral-common")  # its imports are no stage
        results = []
        for run in ("first", "second, other folder"):
            meter, start = Meter(), time.perf_counter()
            with meter.watch_all(STAGES), meter.measure():
                pipeline.prepare(
                    data_dir=str(root / "corpus"),
                    output_path=str(root / run),
                    unit_model=str(unit_model),
                    pretrained_model_name_or_path="mistral-common",
                    cache_dir=str(root / "cache"),
                )
                verify.verify(root / run)
            spent = {stage: each.seconds for stage, each in meter.stages.items()}
            results.append(spent | {"whole": time.perf_counter() - start})
    print(f"{machine()}\n{args.dialogs} dialogs, {num:,} utterances, {hours:.2f} h\n")
    stages = list(results[0])
    table(["stage", "first run, s", "second run, s"], [[s, *(f"{r.get(s, 0):.2f}" for r in results)] for s in stages])


if __name__ == "__main__":
    main()
