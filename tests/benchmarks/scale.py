"""Does each stage of prepare() and verify() cost the same per utterance in a larger corpus, and what memory do they take?

    python -m tests.benchmarks.scale [--utterances 2400 24000 240000] [--rounds 3] [--manifest parquet]

A corpus is a manifest that cuts recordings of ten minutes into turns with DailyTalk's lengths, so that files are few. Units are drawn
at random instead of computed. Everything else is that of `prepare` and `verify` in one process; each command has a fresh process.

- Memory is that of this process. `RssAnon` of Linux is what only this process can give back; a thread samples it every 5 ms. Mapped
  files, such as the Arrow files of the cache, do not count, because the kernel may drop them at any time.
- Files are the `open` events of Python's audit hook: what Python opens itself. Those that Arrow, SQLite and SentencePiece open are not
  seen.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import usdm_sft.prepare.prepare as pipeline
from tests.benchmarks.common import TURNS, WORDS, convert_toy, lengths, machine, table
from tests.benchmarks.template import VOCABULARY
from usdm_sft.audio.addresses import parse_address
from usdm_sft.audio.frames import FRAMINGS, SAMPLE_RATE
from usdm_sft.corpus import left_out as bad_audio
from usdm_sft.corpus import read
from usdm_sft.folder import writer
from usdm_sft.folder.verify import verify
from usdm_sft.prepare import open_run, token_shards
from usdm_sft.template.tokenizer import NUM_UNITS, load_tokenizer
from usdm_sft.units.folder import unit_model_digest
from usdm_sft.units.settings import make_settings
from usdm_sft.units.tokenizer import UnitTokenizer
from usdm_sft.utils.memory import use_system_allocator

STAGES = (
    (read, "read_corpus", "manifest"),
    (bad_audio, "screen_audio", "audio digests"),
    (open_run, "plan_shards", "plan"),
    (pipeline, "describe_run", "key of the run"),
    (pipeline, "load_rows", "builder rows"),
    (pipeline, "_tokenize_audio", "units, without the model"),
    (token_shards, "make_tokens", "tokens and max_length"),
    (pipeline, "fit_splits", "counts"),
    (writer, "write_parquet", "Parquet files, statistics"),
    (writer, "write_folder", "card, pictures, digests"),
)
VERIFY = "verify"  # in a process of its own, as the command
OTHER = "everything else"
RECORDING_SECONDS, RATE = 600, 1000  # the lowest rate that is accepted: the files are hashed, and nothing is decoded
TEST_SHARE = 20  # every twentieth dialog belongs to the test split
MEGABYTE = 1_000_000


@dataclass
class Spent:
    """What a stage took."""

    seconds: float = 0.0
    processor: float = 0.0  # seconds of all threads; another program does not change it as much
    opens: int = 0
    anonymous: int = 0  # peak of RssAnon, bytes


@dataclass
class Meter:
    """Adds up time and files of each stage, and keeps its peak of memory."""

    stages: dict[str, Spent] = field(default_factory=dict)
    running: list[str] = field(default_factory=lambda: [OTHER])
    opened: int = 0
    since: tuple[float, float] = (0.0, 0.0)

    def switch(self, enter: str | None) -> None:
        """Begin the stage `enter`, or end the current one."""
        now = time.perf_counter(), time.process_time()
        spent = self.stages.setdefault(self.running[-1], Spent())
        spent.seconds += now[0] - self.since[0]
        spent.processor += now[1] - self.since[1]
        spent.opens += self.opened
        spent.anonymous = max(spent.anonymous, anonymous_bytes())
        self.since, self.opened = now, 0
        if enter is None:
            self.running.pop()
        else:
            self.running.append(enter)

    @contextmanager
    def measure(self) -> Iterator[None]:
        global _meter
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(0.005):
                spent = self.stages.setdefault(self.running[-1], Spent())
                spent.anonymous = max(spent.anonymous, anonymous_bytes())

        thread = threading.Thread(target=sample, daemon=True)
        self.since, _meter = (time.perf_counter(), time.process_time()), self
        thread.start()
        try:
            yield
            self.switch(OTHER)
        finally:
            _meter = None
            stop.set()
            thread.join()

    def watch(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """Return the function, which is a stage: its calls count for it, but not the stages inside it."""

        @functools.wraps(function)
        def watched(*positional: Any, **named: Any) -> Any:
            self.switch(stage)
            try:
                return function(*positional, **named)
            finally:
                self.switch(None)

        return watched

    @contextmanager
    def watch_all(self, stages: Iterable[tuple[object, str, str]]) -> Iterator[None]:
        """Watch functions, each given by its owner, its name and its stage."""
        with ExitStack() as patches:
            for owner, name, stage in stages:
                patches.enter_context(mock.patch.object(owner, name, self.watch(getattr(owner, name), stage)))
            yield


_STATUS = "/proc/self/status"
_meter: Meter | None = None


def _count_open(event: str, arguments: tuple[Any, ...]) -> None:
    if _meter is not None and event == "open" and arguments[0] != _STATUS:
        _meter.opened += 1


sys.addaudithook(_count_open)  # it cannot be removed, and does nothing outside of `Meter.measure`


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    with open(_STATUS, "rb") as status:
        line = next(line for line in status if line.startswith(b"RssAnon"))
    return int(line.split()[1]) * 1024


class RandomUnits(UnitTokenizer):
    """Units of the right number without audio or a model."""

    _POOL = np.random.default_rng(0).integers(0, NUM_UNITS, 1 << 20, dtype=np.uint16)
    num_units = NUM_UNITS

    def read_ahead(self, sources: Any, digests: Any = None) -> None:
        pass

    def forget(self, sources: Any) -> None:
        pass

    def start_files(
        self, sources: Any, digests: Mapping[str, str] | None = None
    ) -> Callable[[], tuple[list[Any], Any]]:
        assert digests is not None
        seconds = [segment.end - segment.start for source in sources for segment in parse_address(source)]
        starts = [int(digests[source][:5], 16) >> 1 for source in sources]
        units = [
            self._POOL[start : start + FRAMINGS["fairseq"].count(round(length * SAMPLE_RATE))]
            for start, length in zip(starts, seconds, strict=True)
        ]
        return lambda: (units, np.array(seconds, np.float32))


def make_turns(num: int) -> Iterator[dict[str, Any]]:
    """Yield `num` turns of a manifest, with the split of their dialog."""
    rng, seconds = np.random.default_rng(0), iter(lengths(num).round(2).tolist())
    words = rng.poisson(WORDS, num).clip(1).tolist()
    recording, start, number = 0, 0.0, 0
    dialog = -1
    while number < num:
        dialog += 1
        for turn in range(min(max(2, rng.poisson(TURNS)), num - number)):
            length = max(next(seconds), 0.3)
            if start + length > RECORDING_SECONDS:
                recording, start = recording + 1, 0.0
            chosen = rng.integers(0, len(VOCABULARY), words[number])
            yield {
                "split": "train" if dialog % TEST_SHARE else "test",
                "dialog": f"call_{dialog:07d}",
                "turn": turn,
                "speaker": "AB"[turn % 2],
                "text": " ".join(VOCABULARY[index] for index in chosen) + ".",
                "audio": f"recordings/{recording:06d}.wav",
                "start": round(start, 2),
                "end": round(start + length, 2),
            }
            start, number = start + length, number + 1


def write_inputs(root: Path, num: int, suffix: str) -> int:
    """Write a unit model, the manifests and the recordings, which are one number over and over; return how many recordings."""
    convert_toy(root / "model")
    root = root / "corpus"
    (root / "recordings").mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for row in make_turns(num):
        rows[row.pop("split")].append(row)
    for split, turns in rows.items():
        path = root / f"{split}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(turns), path, row_group_size=10_000)
        else:
            path.write_text("".join(f"{json.dumps(turn)}\n" for turn in turns))
    names = {turn["audio"] for turns in rows.values() for turn in turns}
    for index, name in enumerate(sorted(names)):
        with wave.open(str(root / name), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(index.to_bytes(4, "little") * (RATE * RECORDING_SECONDS // 2))
    return len(names)


def run_prepare(root: Path, num_proc: int = 1) -> dict[str, Any]:
    """Run `prepare` on the corpus of `write_inputs`; return what the stages took."""
    model, imported = root / "model", anonymous_bytes()
    load_tokenizer("mistral-common")  # its imports are no stage
    meter, base = Meter(), anonymous_bytes()
    units = RandomUnits(
        model, unit_model_digest(model, root / "cache"), make_settings("cpu", "fp32", "soxr", None), "cpu"
    )
    with meter.watch_all(STAGES), mock.patch.object(open_run, "_open_unit_model", lambda *_: units), meter.measure():
        counts = pipeline.prepare(
            data_dir=str(root / "corpus"),
            output_path=str(root / "out"),
            unit_model=str(model),
            pretrained_model_name_or_path="mistral-common",
            cache_dir=str(root / "cache"),
            num_proc=num_proc,
        )
    return {
        "rows": sum(split["rows"] for split in counts["splits"].values()),
        "imported": imported,
        "base": base,
        "stages": {stage: vars(spent) for stage, spent in meter.stages.items()},
    }


def run_verify(root: Path, num_proc: int = 1) -> dict[str, Any]:
    """Run `verify` on the folder of `run_prepare`; return what it took."""
    meter = Meter(running=[VERIFY])
    with meter.measure():
        verify(root / "out", num_proc=num_proc)
    return {"stages": {VERIFY: vars(meter.stages[VERIFY])}}


def merge_rounds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median of each number of several runs of one size."""
    merged = {name: statistics.median(result[name] for result in results) for name in results[0] if name != "stages"}
    stages = {
        stage: {name: statistics.median(result["stages"][stage][name] for result in results) for name in spent}
        for stage, spent in results[0]["stages"].items()
    }
    return merged | {"stages": stages}


def report(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of time, of memory and of files."""
    sizes = [result["utterances"] for result in results]
    stages = [*(stage for _, _, stage in STAGES), OTHER, VERIFY]
    each = [[result["stages"][stage] for result in results] for stage in stages]
    last = [f"last / before, {sizes[-1] / sizes[-2]:g} times the utterances"] if len(sizes) > 1 else []

    def per_thousand(values: Sequence[float]) -> list[str]:
        rates = [1e6 * value / size for value, size in zip(values, sizes, strict=True)]
        return [*(f"{rate:.1f}" for rate in rates), *([f"{rates[-1] / rates[-2]:.2f}"] if len(rates) > 1 else [])]

    head = [f"{size:,}" for size in sizes]
    for name, title in (("seconds", "milliseconds"), ("processor", "milliseconds of processor time")):
        rows = [[stage, *per_thousand([s[name] for s in spent])] for stage, spent in zip(stages, each, strict=True)]
        sums = [sum(spent[name] for spent in result["stages"].values()) for result in results]
        print(f"\n{title} per 1,000 utterances\n")
        table(["stage", *head, *last], [*rows, ["sum", *per_thousand(sums)]])
    print("\npeak of RssAnon, MB\n")
    rows = [["imports", *(f"{result['imported'] / MEGABYTE:.0f}" for result in results)]]
    rows += [["imports and tokenizer", *(f"{result['base'] / MEGABYTE:.0f}" for result in results)]]
    rows += [
        [stage, *(f"{s['anonymous'] / MEGABYTE:.0f}" for s in spent)] for stage, spent in zip(stages, each, strict=True)
    ]
    table(["stage", *head], rows)
    print("\nfiles opened by Python\n")
    rows = [[stage, *(f"{s['opens']:,}" for s in spent)] for stage, spent in zip(stages, each, strict=True)]
    table(["stage", *head], [["recordings there are", *(f"{result['recordings']:,}" for result in results)], *rows])


COMMANDS = {"prepare": run_prepare, "verify": run_verify}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, nargs="+", default=[2_400, 24_000, 240_000])
    parser.add_argument("--rounds", type=int, default=3, help="the sizes take turns; each number is the median")
    parser.add_argument("--manifest", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--num_proc", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="run in this process on the corpus that lies there, and print JSON")
    parser.add_argument("--command", choices=COMMANDS, default="prepare", help="what to run on --folder")
    args = parser.parse_args(arguments)
    if args.folder is not None:
        print(json.dumps(COMMANDS[args.command](args.folder, args.num_proc)))
        return
    use_system_allocator()  # for the processes below, as the command line does
    rounds: dict[int, list[dict[str, Any]]] = {size: [] for size in args.utterances}
    for size in args.utterances * args.rounds:
        with tempfile.TemporaryDirectory() as work:
            recordings = write_inputs(Path(work), size, f".{args.manifest}")
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.scale",
                f"--folder={work}",
                f"--num_proc={args.num_proc}",
            ]
            found, verified = (
                json.loads(subprocess.check_output([*command, f"--command={name}"]).splitlines()[-1])
                for name in COMMANDS
            )
        found["stages"] |= verified["stages"]
        rounds[size].append({"utterances": size, "recordings": recordings, **found})
    print(machine())
    report([merge_rounds(results) for results in rounds.values()])


if __name__ == "__main__":
    main()
