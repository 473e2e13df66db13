"""Plots of the statistics. Equal statistics give equal bytes, independent of the user's matplotlib settings."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from usdm_sft.corpus.features import ROLES
from usdm_sft.folder.layout import CAPTIONS
from usdm_sft.folder.statistics import SplitStatistics, Weighted
from usdm_sft.template.parts import ROW_PARTS
from usdm_sft.template.streams import UnitStreams, read_streams
from usdm_sft.utils.files import write_then_replace
from usdm_sft.utils.texts import printable

MAX_BINS = 30
MAX_EMOTIONS = 10
LONGEST_RUN = 10  # longer runs of a unit share a bar
_DPI = 100

# The background is drawn and opaque, so that the pictures are readable on a dark page too. Blue and orange of Okabe and Ito
# differ in lightness and for every kind of colour blindness.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e3e6ea",
    "axes.edgecolor": "#8a94a0", "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.labelcolor": "#3d4752", "xtick.color": "#3d4752", "ytick.color": "#3d4752", "font.size": 9.5,
    "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


def draw_pictures(statistics: Mapping[str, SplitStatistics], counts: Mapping[str, Any], folder: Path) -> None:
    """Write the PNG files of `CAPTIONS`.

    Args:
        statistics: The statistics of each split.
        counts: The content of counts.json, which tells what the units are.
        folder: Output folder; created if it does not exist.
    """
    about = UnitAxes(counts["num_units"], read_streams(counts), counts.get("unit_model") is None)
    with matplotlib.rc_context(matplotlib.rcParamsDefault), matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # An emotion in a script that the font does not have is drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        for name in CAPTIONS:
            figure = Figure(figsize=(12, 4), layout="constrained", dpi=_DPI)
            _PLOTS[name](figure, statistics, about)
            with write_then_replace(folder / name, "wb") as file:
                figure.savefig(file, format="png", metadata={"Software": None})


class UnitAxes(NamedTuple):
    """What the axes say of the units."""

    num_units: int
    streams: UnitStreams
    given: bool

    @property
    def speech(self) -> str:
        """What the seconds of a turn are of."""
        return "turn" if self.given else "recording"

    @property
    def run(self) -> str:
        """The name of a run of equal units, with the length of a unit."""
        if len(self.streams.kept) > 1:
            return f"equal units in a row ({len(self.streams.kept)} streams, flattened)"
        return f"equal units in a row ({1000 / self.streams.rate:g} ms each)"


def _plot_lengths(figure: Figure, statistics: Mapping[str, SplitStatistics], about: UnitAxes) -> None:
    tokens, *recordings = figure.subplots(1, 3)
    numbers = {split: split_statistics.distributions() for split, split_statistics in statistics.items()}
    _histogram(
        tokens, {split: values["tokens"] for split, values in numbers.items()}, "Length of the rows", "tokens per row"
    )
    tokens.set_ylabel("share of rows")
    for axes, role in zip(recordings, ROLES, strict=True):
        seconds = {split: values[f"{role} seconds"] for split, values in numbers.items()}
        _histogram(axes, seconds, f"The {role}'s {about.speech}s", f"seconds per {about.speech}")
        axes.set_ylabel(f"share of {about.speech}s")


def _plot_labels(figure: Figure, statistics: Mapping[str, SplitStatistics], about: UnitAxes) -> None:
    loss, share, pairs = figure.subplots(1, 3)
    numbers = {split: split_statistics.distributions() for split, split_statistics in statistics.items()}
    parts = {split: values.labelled_parts / max(values.labelled_parts.sum(), 1) for split, values in statistics.items()}
    _bars(loss, np.arange(len(ROW_PARTS)), parts, list(ROW_PARTS.values()))
    loss.set(title="Where the loss falls", xlabel="share of the labelled tokens")
    shares = {split: values["labelled share"] for split, values in numbers.items()}
    _histogram(share, shares, "Labelled tokens", "labelled share of a row's tokens")
    share.set_ylabel("share of rows")
    share.xaxis.set_major_formatter(_percent)
    dialogs = {split: values["pairs per dialog"] for split, values in numbers.items()}
    top = int(max(each.values.max() for each in dialogs.values()))
    if top <= MAX_BINS:
        counts = {
            split: np.bincount(each.values, each.counts, minlength=top + 1)[1:] / each.total
            for split, each in dialogs.items()
        }
        _bars(pairs, np.arange(1, top + 1), counts)
        pairs.set(title="Pairs", xlabel="pairs per dialog")
    else:
        _histogram(pairs, dialogs, "Pairs", "pairs per dialog")
    pairs.set_ylabel("share of dialogs")


def _plot_units(figure: Figure, statistics: Mapping[str, SplitStatistics], about: UnitAxes) -> None:
    ranks, runs, emotions = figure.subplots(1, 3)
    for number, (split, split_statistics) in enumerate(statistics.items()):
        counts = np.sort(split_statistics.numbers["units"].counts)[::-1]
        label = f"{split}: {len(counts):,} of {about.num_units:,} occur"
        ranks.plot(np.arange(1, len(counts) + 1), counts, label=label, color=_color(number))
    ranks.set(
        xscale="log", yscale="log", title="How often units occur", xlabel="rank of the unit", ylabel="occurrences"
    )
    ranks.legend(loc="lower left")
    lengths = {}
    for split, split_statistics in statistics.items():
        together = np.zeros(LONGEST_RUN)
        found = split_statistics.numbers["units in a run"]
        np.add.at(together, np.clip(found.values, 1, LONGEST_RUN) - 1, found.counts)
        lengths[split] = together / max(together.sum(), 1)
    _bars(runs, np.arange(1, LONGEST_RUN + 1), lengths)
    runs.set_xticks(range(1, LONGEST_RUN + 1), [*map(str, range(1, LONGEST_RUN)), f"{LONGEST_RUN}+"])
    runs.set(title="How long a unit repeats", xlabel=about.run, ylabel="share of runs")
    _plot_emotions(emotions, statistics)


def _plot_emotions(axes: Axes, statistics: Mapping[str, SplitStatistics]) -> None:
    together = sum((split_statistics.emotions for split_statistics in statistics.values()), Counter[str]())
    names = sorted((name for name, _ in together.most_common(MAX_EMOTIONS)), key=lambda name: (-together[name], name))
    shares = {
        split: np.array([values.emotions[name] / max(values.emotions.total(), 1) for name in names])
        for split, values in statistics.items()
    }
    _bars(axes, np.arange(len(names)), shares, [printable(name[:30]) or "(none)" for name in names])
    axes.set(title="Emotions", xlabel="share of the turns")


def _percent(share: float, position: float) -> str:
    """The label of a tick, with as many digits as it has: 0.475 is 47.5 %."""
    return f"{100 * share:.6g}%"


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _bars(
    axes: Axes, places: npt.NDArray[Any], shares: Mapping[str, npt.NDArray[Any]], names: Sequence[str] | None = None
) -> None:
    """Bars side by side at whole numbers, one per split; with names, horizontal ones with the first name on top."""
    draw, across, along = (axes.bar, axes.xaxis, axes.yaxis) if names is None else (axes.barh, axes.yaxis, axes.xaxis)
    width = 0.84 / len(shares)
    for number, (split, values) in enumerate(shares.items()):
        offset = (number - (len(shares) - 1) / 2) * width
        draw(places + offset, values, width, label=split, color=_color(number))
    if names is None:
        across.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_yticks(places, names, parse_math=False)
        axes.set_ylim(1.16 * len(names) - 0.4, -0.6)  # the first name on top, and room for the legend below the last
    along.set_major_formatter(_percent)
    across.grid(visible=False)
    axes.legend(loc="upper right" if names is None else "lower right", ncols=1 if names is None else len(shares))


def _histogram(axes: Axes, numbers: Mapping[str, Weighted], title: str, label: str) -> None:
    """Plot shares, so that splits of different sizes can be compared. All splits have the same bins, and none hides another."""
    together = np.concatenate([each.values for each in numbers.values()])
    edges = np.histogram_bin_edges(
        together, min(MAX_BINS, math.isqrt(sum(each.total for each in numbers.values())) + 1)
    )
    for number, (name, each) in enumerate(numbers.items()):
        array, weights = each.values, each.counts / each.total
        if number == 0:
            axes.hist(array, edges.tolist(), weights=weights, color=_color(0), alpha=0.3)
        axes.hist(
            array, edges.tolist(), weights=weights, histtype="step", linewidth=1.8, color=_color(number), label=name
        )
    axes.set(title=title, xlabel=label)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.15)  # room for the legend
    axes.yaxis.set_major_formatter(_percent)
    axes.legend(loc="upper right")


_PLOTS = {"lengths.png": _plot_lengths, "labels.png": _plot_labels, "units.png": _plot_units}
