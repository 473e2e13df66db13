"""Statistics of a dataset folder, computed from its Parquet files alone, and what a command says of a folder."""

from __future__ import annotations

import glob
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.corpus.features import ROLES, are_collapsed
from usdm_sft.corpus.problems import count_reasons, describe_left_out
from usdm_sft.folder.rows import RowRange, count_exchanges, divide_files, flatten_lists, map_ranges
from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.template.parts import REFERENCE_LAYOUT, ROW_PARTS, RowLayout, find_parts_of_rows
from usdm_sft.utils.texts import count_noun, format_hours, printable

TOO_LONG = "more than max_length"  # in the reason of a pair that `prepare.overflow` leaves out
DROPPED = "dropped by dailytalk-usdm edit"  # the reason of a pair that `folder.edit` leaves out
SHOWN = 20  # entries of a list that a command prints
QUANTILES = {"min": 0.0, "median": 0.5, "95 %": 0.95, "max": 1.0}
_BATCH = 512
_BINS, _BAR = 10, 40  # bars of a histogram in the terminal, and characters of the longest


@dataclass(frozen=True, eq=False)
class Weighted:
    """Numbers of which many are equal.

    Attributes:
        values: (num_values,) different numbers, in ascending order.
        counts: (num_values,) int64, how often each occurs.
    """

    values: npt.NDArray[Any]
    counts: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        """How many numbers there are."""
        return int(self.counts.sum())


@dataclass
class SplitStatistics:
    """Counts of one split, added up batch by batch. A recording in several rows counts several times."""

    layout: RowLayout = REFERENCE_LAYOUT
    labelled_units: int = 0
    # The labelled tokens of each of `ROW_PARTS`.
    labelled_parts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(ROW_PARTS), np.int64))
    pairs: Counter[str] = field(default_factory=Counter)  # exchanges by their dialog
    emotions: Counter[str] = field(default_factory=Counter)  # of the user's and agent's turns
    # One number per row (tokens, labelled share), recording (seconds), unit, or run of equal units.
    numbers: dict[str, Weighted] = field(default_factory=dict)

    def add(self, rows: pa.RecordBatch) -> None:
        """Count a batch of rows with all columns of a dataset folder.

        Raises:
            ValueError: The numbers of ids and labels of a row differ.
        """
        lengths, num_labels = (np.asarray(pc.list_value_length(rows[name])) for name in ("input_ids", "labels"))
        if (uneven := np.flatnonzero(lengths != num_labels)).size:
            found = f"{lengths[uneven[0]]} input_ids, but {num_labels[uneven[0]]} labels"
            raise ValueError(f"row {rows['id'][uneven[0]]} has {found}: verify its folder")
        ids, labels = (np.asarray(pc.list_flatten(rows[name])) for name in ("input_ids", "labels"))
        is_labelled = labels != IGNORE_INDEX
        labelled = np.bincount(np.repeat(np.arange(len(rows)), lengths)[is_labelled], minlength=len(rows))
        self.labelled_units += int(self.layout.is_unit(labels).sum())
        parts = find_parts_of_rows(ids, lengths, self.layout)[is_labelled]
        self.labelled_parts += np.bincount(parts, minlength=len(ROW_PARTS))
        for dialog, exchanges in zip(rows["dialog_id"].to_pylist(), count_exchanges(rows).tolist(), strict=True):
            self.pairs[dialog] += exchanges
        self._count("tokens", lengths)
        self._count("labelled share", labelled / np.maximum(lengths, 1))
        for role in ROLES:
            units = rows[f"{role}_units"]
            collapsed = are_collapsed(rows.schema.names)
            self.emotions.update(flatten_lists(rows[f"{role}_emotion"]).to_pylist())
            self._count(f"{role} seconds", flatten_lists(rows[f"{role}_seconds"]))
            self._count("units", flatten_lists(units))
            runs = flatten_lists(rows[f"{role}_durations"]) if collapsed else _run_lengths(units)
            self._count("units in a run", runs)

    def _count(self, name: str, values: pa.Array | npt.NDArray[Any]) -> None:
        found = pc.value_counts(values)
        self._add_up(name, Weighted(*(np.asarray(found.field(each)) for each in ("values", "counts"))))

    def _add_up(self, name: str, more: Weighted) -> None:
        added = [self.numbers[name], more] if name in self.numbers else [more]
        values, counts = (np.concatenate([getattr(each, part) for each in added]) for part in ("values", "counts"))
        values, places = np.unique(values, return_inverse=True)
        self.numbers[name] = Weighted(values, np.bincount(places, counts, len(values)).astype(np.int64))

    def merge(self, other: SplitStatistics) -> None:
        """Add the counts of other rows."""
        self.labelled_units += other.labelled_units
        self.labelled_parts += other.labelled_parts
        self.pairs.update(other.pairs)
        self.emotions.update(other.emotions)
        for name, numbers in other.numbers.items():
            self._add_up(name, numbers)

    def distributions(self) -> dict[str, Weighted]:
        """The numbers by name.

        One per row (tokens, labelled share), recording (seconds), dialog (pairs) or run of equal units (repeats).
        """
        pairs = np.unique(np.array([*self.pairs.values()], np.int64), return_counts=True)
        runs = self.numbers["units in a run"]
        return {
            **{name: self.numbers[name] for name in ("tokens", "labelled share", "user seconds", "agent seconds")},
            "pairs per dialog": Weighted(*pairs),
            "units in a run": runs if runs.total else Weighted(np.array([0]), np.array([1])),
        }

    def summary(self) -> dict[str, Any]:
        """The statistics as JSON values; `distributions` has mean and quantiles of each."""
        tokens, units = self.numbers["tokens"], self.numbers["units"]
        return {
            "rows": tokens.total,
            "dialogs": len(self.pairs),
            "tokens": int((tokens.values.astype(np.int64) * tokens.counts).sum()),
            "labelled_tokens": int(self.labelled_parts.sum()),
            "labelled_units": self.labelled_units,
            "labelled_parts": dict(zip(ROW_PARTS, self.labelled_parts.tolist(), strict=True)),
            "units": units.total,
            "distinct_units": len(units.values),
            "distributions": {name: _distribution(numbers) for name, numbers in self.distributions().items()},
            "emotions": dict(sorted(self.emotions.items(), key=lambda item: (-item[1], item[0]))),
        }


def compute_statistics(
    files: Mapping[str, Sequence[Path]], layout: RowLayout, *, num_proc: int | None = 1
) -> dict[str, SplitStatistics]:
    """The statistics of each split, from its Parquet files, with one batch of rows in memory at a time.

    Args:
        files: The files of each split.
        layout: The ids and the template of the rows.
        num_proc: Largest number of processes; None means one per core that this process may use. The result does not depend on it.

    Raises:
        ValueError: A split has no rows, or rows are not what `SplitStatistics.add` counts.
    """
    statistics = {split: SplitStatistics(layout) for split in files}
    count = partial(_count_range, layout)
    for rows, found in map_ranges(count, divide_files(files), name="statistics", num_proc=num_proc):
        statistics[rows.split].merge(found)
    if empty := [split for split, found in statistics.items() if not found.numbers]:
        raise ValueError(f"split {empty[0]} has no rows: verify its folder")
    return statistics


def _count_range(layout: RowLayout, rows: RowRange) -> SplitStatistics:
    statistics = SplitStatistics(layout)
    for batch in rows.read(batch_size=_BATCH):
        statistics.add(batch)
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
    parts = [part for part in ROW_PARTS if any(summary["labelled_parts"][part] for summary in summaries.values())]
    emotions = sorted({emotion for summary in summaries.values() for emotion in summary["emotions"]})

    def cells(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        labelled = summary["labelled_tokens"]
        for name in ("rows", "dialogs", "tokens"):
            yield name, f"{summary[name]:,}"
        yield "labelled tokens", f"{labelled:,} ({labelled / summary['tokens']:.1%})"
        yield "labelled tokens that are units", f"{summary['labelled_units']:,}"
        for part in parts:
            yield f"share of the loss, {ROW_PARTS[part]}", f"{summary['labelled_parts'][part] / max(labelled, 1):.1%}"
        yield "units", f"{summary['units']:,}"
        yield f"distinct units of {num_units:,}", f"{summary['distinct_units']:,}"
        for name, numbers in summary["distributions"].items():
            for quantile, number in numbers.items():
                yield f"{name}, {quantile}", f"{number:g}"
        for emotion in emotions:
            yield f"emotion {printable(emotion) or '(none)'}", f"{summary['emotions'].get(emotion, 0):,}"
        if utterances is not None:
            yield "turns with a recording", f"{summary['recordings']:,}"
            yield "hours of audio", f"{summary['hours']:,.2f}"
            yield "bytes of audio", f"{summary['audio_bytes']:,}"

    columns = [cells({**summary, **(utterances or {}).get(split, {})}) for split, summary in summaries.items()]
    rows = [("", *summaries)]
    rows += [(row[0][0], *(text for _, text in row)) for row in zip(*columns, strict=True)]
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(first), *(text.rjust(width) for text, width in zip(texts, widths, strict=True))])
        for name, *texts in rows
    )


def format_histograms(statistics: Mapping[str, SplitStatistics]) -> str:
    """A small histogram of the tokens per row of each split, for the terminal."""
    lines = []
    for split, split_statistics in statistics.items():
        numbers = split_statistics.distributions()["tokens"]
        tokens, weights = numbers.values, numbers.counts
        edges = np.unique(np.linspace(tokens.min(), tokens.max() + 1, _BINS + 1).astype(int))
        counts = np.histogram(tokens, edges, weights=weights)[0].astype(int)
        lines += ["", f"tokens per row, {split}"]
        for first, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
            bar = "#" * math.ceil(_BAR * count / counts.max())
            lines.append(f"{first:>8,} to {stop - 1:>7,}  {bar:<{_BAR}}  {count:,}")
    return "\n".join(lines[1:])


def _distribution(numbers: Weighted) -> dict[str, float]:
    values, counts = numbers.values.astype(np.float64), numbers.counts
    found = {"mean": (values * counts).sum() / numbers.total}
    found |= {name: _quantile(values, counts, quantile) for name, quantile in QUANTILES.items()}
    return {name: round(float(value), 4) for name, value in found.items()}


def _quantile(values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], quantile: float) -> np.float64:
    """As `np.quantile` of the repeated values, which interpolates between two neighbours."""
    place = (int(counts.sum()) - 1) * quantile
    last = np.cumsum(counts) - 1  # place of the last of each group of equal values
    neighbours = values[np.searchsorted(last, [math.floor(place), math.ceil(place)])]
    return np.float64(np.quantile(neighbours, place - math.floor(place)))


def _run_lengths(column: pa.Array) -> npt.NDArray[np.int64]:
    """Lengths of the runs of equal neighbours within the innermost lists of a column."""
    while pa.types.is_list(column.type.value_type):
        column = pc.list_flatten(column)
    values, lengths = np.asarray(pc.list_flatten(column)), np.asarray(pc.list_value_length(column))
    is_start = np.ones(len(values) + 1, np.bool_)  # with the end of the last run
    is_start[1:-1] = values[1:] != values[:-1]
    is_start[np.cumsum(lengths)] = True
    return np.diff(np.flatnonzero(is_start))


def count_too_long(split: Mapping[str, Any]) -> int:
    """Count the pairs of a split of counts.json that did not fit into `max_length` tokens, by the reason that it gives for each."""
    return sum(TOO_LONG in reason for reason in split["pairs_left_out"].values())


def count_dropped(split: Mapping[str, Any]) -> int:
    """Count the pairs of a split of counts.json that `edit` dropped."""
    return sum(reason == DROPPED for reason in split["pairs_left_out"].values())


def summarize_split(split: Mapping[str, Any]) -> str:
    """One line on a split of counts.json: its counts, and the number of rows and dialogs that were left out."""
    bad_audio, dialogs = split["pairs_with_bad_audio"], split["dialogs_left_out"]
    left_out = [f"{count_noun(count_too_long(split), 'row')} too long"]
    if bad_audio:
        left_out.append(f"{count_noun(bad_audio, 'pair')} with bad audio")
    if dropped := count_dropped(split):
        left_out.append(f"{count_noun(dropped, 'pair')} dropped")
    if "turns_left_out" in split:
        turns = count_reasons(split["turns_left_out"])
        left_out.append(f"{count_noun(split['pairs_with_bad_rows'], 'pair')} for their turns ({turns})")
    reasons = describe_left_out(dialogs)
    left_out.append(count_noun(len(dialogs), "dialog") + (f" ({reasons})" if reasons else ""))
    cut = f"; shortened: {count_noun(len(split['rows_cut']), 'row')}" if split["rows_cut"] else ""
    if clipped := split.get("turns_clipped"):
        cut += f"; cut at the end of the recording: {count_noun(len(clipped), 'turn')}"
    return (
        f"{count_noun(split['rows'], 'row')} from {count_noun(split['dialogs'], 'dialog')} ({format_hours(split['hours'])} h), "
        f"{count_noun(split['tokens'], 'token')}, {split['labelled_tokens']:,} labelled; left out: {', '.join(left_out)}{cut}"
    )


def load_call(dataset_dir: str | Path, counts: Mapping[str, Any]) -> str:
    """Return the call of `datasets.load_dataset` that opens a dataset folder.

    datasets takes the folder's path for a part of a glob pattern, and finds nothing in a folder such as "runs[1]".

    Args:
        dataset_dir: The folder.
        counts: Its counts.json.
    """
    absolute = os.path.abspath(dataset_dir)
    if (escaped := glob.escape(absolute)) == absolute:
        return f"load_dataset({os.fspath(dataset_dir)!r})"
    files = {split: os.path.join(escaped, counts["config"], f"{split}-*.parquet") for split in counts["splits"]}
    return f"load_dataset('parquet', data_files={files!r})"
