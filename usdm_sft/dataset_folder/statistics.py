"""Statistics of a dataset folder, computed from its Parquet files alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.corpus.features import are_collapsed
from usdm_sft.dataset_folder.rows import iter_rows
from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.template.parts import REFERENCE_LAYOUT, ROW_PARTS, RowLayout, find_parts
from usdm_sft.template.tokenizer import MAX_UNITS
from usdm_sft.utils.texts import printable

ROLES = ("user", "agent")
QUANTILES = {"min": 0.0, "median": 0.5, "95 %": 0.95, "max": 1.0}
_BATCH = 512
_BINS, _BAR = 10, 40  # bars of a histogram in the terminal, and characters of the longest


@dataclass
class SplitStatistics:
    """Counts of one split, added up batch by batch. A recording in several rows counts several times."""

    tokens: list[npt.NDArray[np.integer[Any]]] = field(default_factory=list)  # number per row
    labelled: list[npt.NDArray[np.integer[Any]]] = field(default_factory=list)  # labelled tokens per row
    labelled_units: int = 0
    labelled_parts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(ROW_PARTS), np.int64))
    run_counts: Counter[int] = field(default_factory=Counter)  # length of a run of one unit -> number of runs
    seconds: dict[str, list[npt.NDArray[np.float32]]] = field(default_factory=lambda: {role: [] for role in ROLES})
    unit_counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_UNITS, np.int64))
    pairs: Counter[str] = field(default_factory=Counter)  # dialog -> exchanges in its rows
    emotions: Counter[str] = field(default_factory=Counter)  # of the user's and agent's turns
    layout: RowLayout = REFERENCE_LAYOUT

    def add(self, rows: pa.RecordBatch) -> None:
        """Count a batch of rows with all columns of a dataset folder."""
        labels = rows["labels"]
        self.tokens.append(np.asarray(pc.list_value_length(rows["input_ids"])))
        rows_of = np.asarray(pc.list_parent_indices(labels))
        values = np.asarray(pc.list_flatten(labels))
        self.labelled.append(np.bincount(rows_of[values != IGNORE_INDEX], minlength=len(rows)))
        self.labelled_units += int(self.layout.is_unit(values).sum())
        for ids, row_labels in zip(_lists(rows["input_ids"]), _lists(labels), strict=True):
            parts = find_parts(ids, self.layout)[: len(row_labels)]  # verify counts damaged rows as well
            labelled = parts[row_labels[: len(parts)] != IGNORE_INDEX]
            self.labelled_parts += np.bincount(labelled, minlength=len(self.labelled_parts))
        for role in ROLES:
            self.seconds[role].append(_values(rows[f"{role}_seconds"]))
            self.unit_counts += np.bincount(_values(rows[f"{role}_units"]), minlength=MAX_UNITS)
            self.emotions.update(_values(rows[f"{role}_emotion"]).tolist())
            if are_collapsed(rows.schema.names):
                self.run_counts.update(_values(rows[f"{role}_durations"]).tolist())
                continue
            for units in _lists(rows[f"{role}_units"]):
                self.run_counts.update(_run_lengths(units).tolist())
        texts = rows["user_text"]
        exchanges = pc.list_value_length(texts).to_pylist() if pa.types.is_list(texts.type) else [1] * len(rows)
        for dialog, count in zip(rows["dialog_id"].to_pylist(), exchanges, strict=True):
            self.pairs[dialog] += count

    def merge(self, following: SplitStatistics) -> None:
        """Add the counts of the rows that follow."""
        self.tokens += following.tokens
        self.labelled += following.labelled
        self.labelled_units += following.labelled_units
        self.labelled_parts += following.labelled_parts
        self.run_counts.update(following.run_counts)
        for role in ROLES:
            self.seconds[role] += following.seconds[role]
        self.unit_counts += following.unit_counts
        self.pairs.update(following.pairs)
        self.emotions.update(following.emotions)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """1-D arrays by name.

        One value per row (tokens, labelled share), recording (seconds) or dialog (pairs).
        """
        tokens, labelled = np.concatenate(self.tokens), np.concatenate(self.labelled)
        return {
            "tokens": tokens,
            "labelled share": labelled / tokens,
            **{f"{role} seconds": np.concatenate(self.seconds[role]) for role in ROLES},
            "pairs per dialog": np.array(list(self.pairs.values())),
        }

    def summary(self) -> dict[str, Any]:
        """The statistics as JSON values; `distributions` has mean and quantiles of every array, and of the runs of equal units."""
        labelled = int(np.concatenate(self.labelled).sum())
        arrays = self.arrays()
        return {
            "rows": len(arrays["tokens"]),
            "dialogs": len(self.pairs),
            "tokens": int(arrays["tokens"].sum()),
            "labelled_tokens": labelled,
            "labelled_units": self.labelled_units,
            "labelled_parts": dict(zip(ROW_PARTS, self.labelled_parts.tolist(), strict=True)),
            "units": int(self.unit_counts.sum()),
            "distinct_units": int((self.unit_counts > 0).sum()),
            "distributions": {
                **{name: _distribution(values) for name, values in arrays.items()},
                "units in a run": _counted_distribution(self.run_counts or {0: 1}),
            },
            "emotions": dict(sorted(self.emotions.items(), key=lambda item: (-item[1], item[0]))),
        }


def merge_statistics(parts: Iterable[SplitStatistics]) -> SplitStatistics:
    """The statistics of a split from those of its files, in order."""
    merged = SplitStatistics()
    for part in parts:
        merged.merge(part)
    return merged


def compute_statistics(files: Mapping[str, Sequence[Path]], layout: RowLayout) -> dict[str, SplitStatistics]:
    """The statistics of each split, from its Parquet files, with one batch of rows in memory at a time."""
    statistics = {}
    for split, paths in files.items():
        statistics[split] = SplitStatistics(layout=layout)
        for path in paths:
            for rows in iter_rows(path, batch_size=_BATCH):
                statistics[split].add(rows)
    return statistics


def format_table(
    summaries: Mapping[str, Mapping[str, Any]],
    num_units: int,
    utterances: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The summaries of the splits as a table for the terminal.

    Args:
        summaries: The summary of each split.
        num_units: Number of units of the unit model.
        utterances: The counts of each split's utterances, if the folder keeps the audio.
    """
    rows: list[tuple[str, ...]] = [("", *summaries)]

    def add(name: str, value: Any) -> None:
        rows.append((name, *(value(summary) for summary in summaries.values())))

    for name in ("rows", "dialogs", "tokens"):
        add(name, lambda summary, name=name: f"{summary[name]:,}")
    add("labelled tokens", lambda s: f"{s['labelled_tokens']:,} ({s['labelled_tokens'] / s['tokens']:.1%})")
    add("labelled tokens that are units", lambda s: f"{s['labelled_units']:,}")
    for part, name in ROW_PARTS.items():
        if any(summary["labelled_parts"][part] for summary in summaries.values()):
            add(
                f"share of the loss, {name}",
                lambda s, part=part: f"{s['labelled_parts'][part] / max(s['labelled_tokens'], 1):.1%}",
            )
    add("units", lambda s: f"{s['units']:,}")
    add(f"distinct units of {num_units:,}", lambda s: f"{s['distinct_units']:,}")
    first = next(iter(summaries.values()))
    for name in first["distributions"]:
        for quantile in first["distributions"][name]:
            add(f"{name}, {quantile}", lambda s, name=name, key=quantile: f"{s['distributions'][name][key]:g}")
    for emotion in sorted({emotion for summary in summaries.values() for emotion in summary["emotions"]}):
        add(
            f"emotion {printable(emotion) or '(none)'}", lambda s, emotion=emotion: f"{s['emotions'].get(emotion, 0):,}"
        )
    for split, numbers in (utterances or {}).items():
        summaries = {**summaries, split: {**summaries[split], **numbers}}
    if utterances is not None:
        add("turns with a recording", lambda s: f"{s['recordings']:,}")
        add("hours of audio", lambda s: f"{s['hours']:,.2f}")
        add("bytes of audio", lambda s: f"{s['audio_bytes']:,}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def format_histograms(statistics: Mapping[str, SplitStatistics]) -> str:
    """A small histogram of the tokens per row of each split, for the terminal."""
    lines = []
    for split, split_statistics in statistics.items():
        tokens = np.concatenate(split_statistics.tokens)
        edges = np.unique(np.linspace(tokens.min(), tokens.max() + 1, _BINS + 1).astype(int))
        counts, _ = np.histogram(tokens, edges)
        lines += ["", f"tokens per row, {split}"]
        for first, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
            bar = "#" * math.ceil(_BAR * count / counts.max())
            lines.append(f"{first:>8,} to {stop - 1:>7,}  {bar:<{_BAR}}  {count:,}")
    return "\n".join(lines[1:])


def _distribution(values: npt.NDArray[Any]) -> dict[str, float]:
    found = {"mean": values.mean(dtype=np.float64)}
    found |= {name: np.quantile(values.astype(np.float64), quantile) for name, quantile in QUANTILES.items()}
    return {name: round(float(value), 4) for name, value in found.items()}


def _counted_distribution(counts: Mapping[int, int]) -> dict[str, float]:
    """Return what `_distribution` returns for an array that has each value as often as `counts` says.

    There are 80 runs of equal units in a row, so that an array of them would be larger than everything else.
    """
    values, numbers = np.array(sorted(counts.items())).T
    ends = np.cumsum(numbers)
    found = {"mean": (values * numbers).sum() / ends[-1]}
    for name, quantile in QUANTILES.items():
        place = quantile * (ends[-1] - 1)
        lower = math.floor(place)
        neighbours = values[np.searchsorted(ends, [lower, min(lower + 1, ends[-1] - 1)], side="right")]
        found[name] = np.interp(place, [lower, lower + 1], neighbours)
    return {name: round(float(value), 4) for name, value in found.items()}


def _values(column: pa.Array) -> npt.NDArray[Any]:
    """The innermost values of a column, whose rows have one exchange or a list of exchanges."""
    while pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _lists(column: pa.Array) -> Iterator[npt.NDArray[Any]]:
    """The innermost lists of a column, each as an array."""
    while pa.types.is_list(column.type.value_type):
        column = pc.list_flatten(column)
    values, ends = np.asarray(pc.list_flatten(column)), np.cumsum(np.asarray(pc.list_value_length(column)))
    yield from np.split(values, ends[:-1]) if len(ends) else ()


def _run_lengths(units: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Lengths of the runs of equal neighbours."""
    if not len(units):
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], units[1:] != units[:-1]]))
    return np.diff(np.append(starts, len(units)))
