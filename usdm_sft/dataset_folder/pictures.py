"""The statistics as pictures. The same numbers make the same bytes, whatever the user's matplotlib is set to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from usdm_sft.dataset_folder.statistics import SplitStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTIONS = {
    "lengths.png": "Length of the rows in tokens and of the audio in seconds.",
    "labels.png": "Share of labelled tokens per row, and number of pairs per dialog.",
    "units.png": "Number of occurrences of each unit, the most frequent first, and the most frequent emotions of the turns.",
}
MAX_BINS = 40
MAX_EMOTIONS = 12
_DPI = 100


def draw_pictures(statistics: Mapping[str, SplitStatistics], num_units: int, folder: Path) -> None:
    """Write a PNG for each of `CAPTIONS` into `folder`.

    Args:
        statistics: Of each split.
        num_units: How many units there are, such as 10,000.
        folder: Where they go; made if need be.
    """
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        for name in CAPTIONS:
            figure = Figure(figsize=(11, 4), layout="constrained", dpi=_DPI)
            _DRAW[name](figure, statistics, num_units)
            figure.savefig(folder / name, metadata={"Software": None})


def _lengths(figure: Figure, statistics: Mapping[str, SplitStatistics], num_units: int) -> None:
    tokens, seconds = figure.subplots(1, 2)
    _histogram(tokens, {split: its.arrays()["tokens"] for split, its in statistics.items()}, "tokens a row")
    both = {
        f"{split}, {role}": its.arrays()[f"{role} seconds"]
        for split, its in statistics.items()
        for role in ("user", "agent")
    }
    _histogram(seconds, both, "seconds of an audio")


def _labels(figure: Figure, statistics: Mapping[str, SplitStatistics], num_units: int) -> None:
    share, pairs = figure.subplots(1, 2)
    shares = {split: its.arrays()["labelled share"] for split, its in statistics.items()}
    _histogram(share, shares, "labelled share of a row's tokens")
    dialogs = {split: its.arrays()["pairs a dialog"] for split, its in statistics.items()}
    top = max(counts.max() for counts in dialogs.values())
    _histogram(pairs, dialogs, "pairs a dialog", np.arange(0.5, top + 1))


def _units(figure: Figure, statistics: Mapping[str, SplitStatistics], num_units: int) -> None:
    ranks, emotions = figure.subplots(1, 2)
    for split, its in statistics.items():
        counts = np.sort(its.unit_counts[its.unit_counts > 0])[::-1]
        ranks.plot(np.arange(1, len(counts) + 1), counts, label=f"{split}: {len(counts):,} of {num_units:,} occur")
    ranks.set(xscale="log", yscale="log", xlabel="rank of the unit", ylabel="occurrences")
    ranks.legend()
    together = sum((its.emotions for its in statistics.values()), Counter())
    names = sorted(name for name, _ in together.most_common(MAX_EMOTIONS))
    for number, (split, its) in enumerate(statistics.items()):
        total = sum(its.emotions.values())
        shares = [its.emotions[name] / total for name in names]
        height = 0.8 / len(statistics)
        emotions.barh(np.arange(len(names)) + number * height, shares, height, label=split)
    labels = [name[:30] or "(none)" for name in names]
    emotions.set_yticks(np.arange(len(names)) + 0.4 - 0.4 / len(statistics), labels, parse_math=False)
    emotions.invert_yaxis()
    emotions.set(xlabel="share of the turns")
    emotions.legend()


def _histogram(axes: Axes, values: Mapping[str, np.ndarray], label: str, bins: np.ndarray | None = None) -> None:
    """Shares, so that splits of other sizes can be compared; the bins are those of all values."""
    together = np.concatenate(list(values.values()))
    edges = np.histogram_bin_edges(together, min(MAX_BINS, math.isqrt(len(together)) + 1) if bins is None else bins)
    for name, its in values.items():
        axes.hist(its, edges, weights=np.full(len(its), 1 / len(its)), histtype="step", linewidth=1.5, label=name)
    axes.set(xlabel=label, ylabel="share")
    axes.legend()


_DRAW = {"lengths.png": _lengths, "labels.png": _labels, "units.png": _units}
