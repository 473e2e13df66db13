"""Plots of the statistics. Equal statistics give equal bytes, independent of the user's matplotlib settings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from usdm_sft.dataset_folder.statistics import ROLES, SplitStatistics
from usdm_sft.utils.texts import printable

CAPTIONS = {
    "lengths.png": "Length of the rows in tokens and of the audio in seconds.",
    "labels.png": "Share of labelled tokens per row, and number of pairs per dialog.",
    "units.png": "Number of occurrences of each unit, the most frequent first, and the most frequent emotions of the turns.",
}
MAX_BINS = 40
MAX_EMOTIONS = 12
_DPI = 100


def draw_pictures(statistics: Mapping[str, SplitStatistics], num_units: int, folder: Path) -> None:
    """Write the PNG files of `CAPTIONS`.

    Args:
        statistics: The statistics of each split.
        num_units: Number of units of the unit model, such as 10,000.
        folder: Output folder; created if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        for name in CAPTIONS:
            figure = Figure(figsize=(11, 4), layout="constrained", dpi=_DPI)
            _PLOTS[name](figure, statistics, num_units)
            figure.savefig(folder / name, metadata={"Software": None})


def _plot_lengths(figure: Figure, statistics: Mapping[str, SplitStatistics], num_units: int) -> None:
    tokens, seconds = figure.subplots(1, 2)
    arrays = {split: split_statistics.arrays() for split, split_statistics in statistics.items()}
    _histogram(tokens, {split: values["tokens"] for split, values in arrays.items()}, "tokens per row")
    recordings = {f"{split}, {role}": arrays[split][f"{role} seconds"] for split in arrays for role in ROLES}
    _histogram(seconds, recordings, "seconds per recording")


def _plot_labels(figure: Figure, statistics: Mapping[str, SplitStatistics], num_units: int) -> None:
    share, pairs = figure.subplots(1, 2)
    arrays = {split: split_statistics.arrays() for split, split_statistics in statistics.items()}
    shares = {split: values["labelled share"] for split, values in arrays.items()}
    _histogram(share, shares, "labelled share of a row's tokens")
    dialogs = {split: values["pairs per dialog"] for split, values in arrays.items()}
    top = max(counts.max() for counts in dialogs.values())
    _histogram(pairs, dialogs, "pairs per dialog", np.arange(0.5, top + 1))


def _plot_units(figure: Figure, statistics: Mapping[str, SplitStatistics], num_units: int) -> None:
    ranks, emotions = figure.subplots(1, 2)
    for split, split_statistics in statistics.items():
        unit_counts = split_statistics.unit_counts
        counts = np.sort(unit_counts[unit_counts > 0])[::-1]
        ranks.plot(np.arange(1, len(counts) + 1), counts, label=f"{split}: {len(counts):,} of {num_units:,} occur")
    ranks.set(xscale="log", yscale="log", xlabel="rank of the unit", ylabel="occurrences")
    ranks.legend()
    all_emotions = sum((split_statistics.emotions for split_statistics in statistics.values()), Counter[str]())
    names = sorted(name for name, _ in all_emotions.most_common(MAX_EMOTIONS))
    height = 0.8 / len(statistics)
    for number, (split, split_statistics) in enumerate(statistics.items()):
        total = split_statistics.emotions.total()
        shares = [split_statistics.emotions[name] / total for name in names]
        emotions.barh(np.arange(len(names)) + number * height, shares, height, label=split)
    labels = [printable(name[:30]) or "(none)" for name in names]
    emotions.set_yticks(np.arange(len(names)) + 0.4 - height / 2, labels, parse_math=False)
    emotions.invert_yaxis()
    emotions.set(xlabel="share of the turns")
    emotions.legend()


def _histogram(
    axes: Axes, values: Mapping[str, npt.NDArray[Any]], label: str, edges: npt.NDArray[np.float64] | None = None
) -> None:
    """Plot shares, so that splits of different sizes can be compared. All splits have the same bins."""
    if edges is None:
        together = np.concatenate(list(values.values()))
        edges = np.histogram_bin_edges(together, min(MAX_BINS, math.isqrt(len(together)) + 1))
    for name, array in values.items():
        weights = np.full(len(array), 1 / len(array))
        axes.hist(array, edges.tolist(), weights=weights, histtype="step", linewidth=1.5, label=name)
    axes.set(xlabel=label, ylabel="share")
    axes.legend()


_PLOTS = {"lengths.png": _plot_lengths, "labels.png": _plot_labels, "units.png": _plot_units}
