"""A device that never waits? The idle share of a simulated device, fed with real files.

    python -m tests.benchmarks.feeding [--speeds 700 2000 4200] [--shards 12] [--shard_utterances 600] [--rounds 3]

The goal is at most 5 % idle as long as the readers could have the cores that they need; on a busy machine they cannot.

The device has a queue, as a CUDA stream has: a forward pass returns at once, its result comes when the device would have computed it
and all passes before it. In between, this process sleeps and lets the readers work. All other work is that of `prepare`:
digests, decoding, resampling, normalization, padding, and the unit shards that are written. The first work shard, in which the readers
start and before which nothing can be read ahead, is not counted. The files are 16-bit WAV at 22.05 kHz with DailyTalk's distribution of lengths.
"""

import argparse
import hashlib
import multiprocessing
import os
import resource
import tempfile
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch

from tests.benchmarks.common import MEAN_SECONDS, lengths, machine, speechlike, table
from usdm_sft.audio.digests import audio_digests
from usdm_sft.audio.frames import SAMPLE_RATE, num_frames
from usdm_sft.prepare.unit_shards import UnitShard, make_unit_shards
from usdm_sft.units.tokenizer import UnitTokenizer
from usdm_sft.utils.shard_cache import ShardCache

NUM_UNITS = 10_000


class Result:
    """A result of the device, which is there at a time of `time.perf_counter`."""

    def __init__(self, value: torch.Tensor, end: float):
        self.value, self.end = value, end

    def cpu(self) -> torch.Tensor:
        time.sleep(max(0.0, self.end - time.perf_counter()))
        return self.value


class Device:
    """In place of a `UnitModel`: `speed` audio seconds per second, padding included."""

    rows_alone = False
    centroids = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, speed: float):
        self.speed = speed
        self.end = time.perf_counter()  # of the last forward pass so far
        self.busy = self.idle = 0.0

    def forward(self, padded: torch.Tensor, frames: torch.Tensor) -> tuple[Result, Result]:
        now, seconds = time.perf_counter(), padded.numel() / SAMPLE_RATE / self.speed
        self.idle += max(0.0, now - self.end)
        self.busy += seconds
        self.end = max(now, self.end) + seconds
        units = torch.zeros(len(padded), num_frames(padded.shape[1]), dtype=torch.uint16)
        return Result(units, self.end), Result(torch.ones(len(padded), dtype=torch.bool), self.end)


def write_shards(folder: Path, num_shards: int, shard_utterances: int) -> list[UnitShard]:
    """Write the files once; each shard has its own, because a file that was read is in memory anyway."""
    rng, seconds = np.random.default_rng(0), lengths(num_shards * shard_utterances)
    noise = speechlike(30 * 22_050, rng)
    paths = [str(folder / f"{index}.wav") for index in range(len(seconds))]
    for path, length in zip(paths, seconds, strict=True):
        start = rng.integers(len(noise) - int(length * 22_050))
        soundfile.write(path, noise[start : start + int(length * 22_050)], 22_050)
    digests = audio_digests(paths, folder / "digests")
    parts = [paths[start : start + shard_utterances] for start in range(0, len(paths), shard_utterances)]
    keys = [
        hashlib.sha256(part[0].encode()).hexdigest() for part in parts
    ]  # by their beginnings, shards share lock files
    return [UnitShard(key, part, {p: digests[p].sha256 for p in part}) for key, part in zip(keys, parts, strict=True)]


def feed(shards: list[UnitShard], speed: float, cache: Path) -> tuple[float, float, float, float]:
    """Return the idle share, the CPU seconds per file and per second, readers included, and the cores that there were for them."""
    settings = {"device": "cuda", "precision": "fp32", "resampler": "soxr", "batch_seconds": 160.0}
    tokenizer = UnitTokenizer(Path(), "benchmark", settings, "cuda")
    tokenizer.normalization = "fairseq"  # this model has no folder that names it
    device = Device(speed)
    tokenizer._model = device
    with closing(make_unit_shards(shards, tokenizer, ["cuda"], ShardCache(cache))) as made:
        next(made)
        idle, busy, used, start = device.idle, device.busy, _cpu_seconds(), time.perf_counter()
        unused = _unused_seconds()
        for _ in made:
            pass
    idle, busy, used = device.idle - idle, device.busy - busy, _cpu_seconds() - used
    unused, elapsed = _unused_seconds() - unused, time.perf_counter() - start
    num_files = sum(len(shard.audio) for shard in shards[1:])
    return idle / (idle + busy), used / num_files, used / elapsed, (used + unused) / elapsed


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its children, those that have ended and those that run."""
    ended = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in ended) + sum(
        sum(map(int, Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        for child in multiprocessing.active_children()
    ) / os.sysconf("SC_CLK_TCK")


def _unused_seconds() -> float:
    """Seconds in which cores of the machine had nothing to do, since it started."""
    with open("/proc/stat") as stat:
        return float(stat.readline().split()[4]) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", type=float, nargs="+", default=[700, 2000, 4200])
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--shard_utterances", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        shards = write_shards(Path(work), args.shards, args.shard_utterances)
        for speed in args.speeds:
            runs = [feed(shards, speed, Path(work) / f"{speed}-{index}") for index in range(args.rounds)]
            idle, per_file, cores, available = np.median(runs, axis=0)
            needed = per_file * speed / MEAN_SECONDS
            cells = [f"{idle:.1%}", f"{per_file * 1000:.2f} ms", f"{needed:.2f}", f"{cores:.2f}", f"{available:.2f}"]
            rows.append([f"{speed:,.0f}", *cells])
    print(f"{machine()}\n{args.shards} work shards of {args.shard_utterances} files; median of {args.rounds} rounds\n")
    table(["audio s / s of the device", "idle", "CPU per file", "cores needed", "cores used", "cores at hand"], rows)


if __name__ == "__main__":
    main()
