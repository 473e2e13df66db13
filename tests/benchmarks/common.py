"""Helpers of the benchmarks: facts of the machine, DailyTalk's size, medians of alternating runs, a table."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

# DailyTalk has 23,676 utterances of 3.04 s and 2,532 dialogs of 9.35 turns; a turn has 43.8 characters and 8.6 words. The lengths
# are log-normal with the sigma of the transcripts' lengths.
MEAN_SECONDS, SIGMA, TURNS, WORDS = 3.04, 0.66, 9.35, 8.6


def convert_toy(folder: Path) -> Path:
    """Convert the toy unit model of the demo."""
    from tests.helpers import DEMO  # imports pyarrow, which tests.benchmarks.gpu does without
    from usdm_sft.units.convert import convert

    toy = DEMO / "unit_model"
    return convert(toy / "checkpoint.pt", toy / "kmeans.npy", folder, model_config=toy / "config.json")


def lengths(num: int, seed: int = 0) -> np.ndarray:
    """Draw the seconds of `num` utterances from DailyTalk's distribution."""
    drawn = np.random.default_rng(seed).lognormal(0, SIGMA, num) * MEAN_SECONDS / np.exp(SIGMA**2 / 2)
    return drawn.clip(0.3, 20)


def speechlike(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Make (num_samples,) float32 noise with the slope of a speech spectrum and syllables at 5 Hz."""
    walk = np.convolve(rng.standard_normal(num_samples + 31), np.exp(-np.arange(32) / 8), mode="valid")
    syllables = 0.6 + 0.4 * np.sin(np.arange(num_samples) * (2 * np.pi * 5 / 16_000) + rng.uniform(0, 6))
    return (0.1 * walk * syllables).astype(np.float32)


def alternate(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Run everything once per round and return the median result of each run."""
    results: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(run())
    return {name: statistics.median(values) for name, values in results.items()}


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def machine() -> str:
    facts = [platform.platform(), f"Python {platform.python_version()}", f"{len(os.sched_getaffinity(0))} cores"]
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            facts.append(next(line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")))
    except (OSError, StopIteration):
        facts.append(platform.processor())
    facts.append(time.strftime("%Y-%m-%d"))
    return ", ".join(facts)
