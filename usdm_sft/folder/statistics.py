"""Statistics of a dataset folder, computed from its Parquet files alone, and what a command says of a folder."""

from __future__ import annotations

import glob
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.corpus.features import ROLES, are_collapsed
from usdm_sft.folder.rows import RowRange, count_processes, divide_rows
from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.template.parts import REFERENCE_LAYOUT, ROW_PARTS, RowLayout, find_parts_of_rows
from usdm_sft.utils.processes import ProcessPool, in_order
from usdm_sft.utils.texts import count_noun, printable

QUANTILES = {"min": 0.0, "median": 0.5, "95 %": 0.95, "max": 1.0}
_BATCH = 512
_BINS, _BAR = 10, 40  # bars of a histogram in the terminal, and characters of the longest


class Weighted(NamedTuple):
    """Numbers of which many are equal.

    Attributes:
        values: (num_values,) different numbers, in ascending order.
        counts: (num_values,) int64, how often each occurs.
    """

    values: npt.NDArray[Any]
    counts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.counts.sum())


@dataclass
class SplitStatistics:
    """Counts of one split, added up batch by batch. A recording in several rows counts several times."""

    tokens: list[npt.NDArray[np.int32]] = field(default_factory=list)  # of each row, by batch
    labelled_tokens: list[npt.NDArray[np.int64]] = field(default_factory=list)  # likewise
    labelled_units: int = 0
    labelled_parts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(ROW_PARTS), np.int64))
    run_counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # by the length of a run
    seconds: dict[str, list[npt.NDArray[np.float32]]] = field(default_factory=lambda: {role: [] for role in ROLES})
    unit_counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # up to the largest unit
    pairs: Counter[str] = field(default_factory=Counter)  # exchanges in the rows of each dialog
    emotions: Counter[str] = field(default_factory=Counter)  # of the user's and agent's turns
    layout: RowLayout = REFERENCE_LAYOUT

    def add(self, rows: pa.RecordBatch) -> None:
        """Count a batch of rows with all columns of a dataset folder."""
        labels, tokens = rows["labels"], np.asarray(pc.list_value_length(rows["input_ids"]))
        values, ids = np.asarray(pc.list_flatten(labels)), np.asarray(pc.list_flatten(rows["input_ids"]))
        rows_of = np.asarray(pc.list_parent_indices(labels))
        labelled = np.bincount(rows_of[values != IGNORE_INDEX], minlength=len(rows))
        self.tokens.append(tokens)
        self.labelled_tokens.append(labelled)
        self.labelled_units += int(self.layout.is_unit(values).sum())
        parts = find_parts_of_rows(ids, tokens, self.layout)
        if len(parts) != len(values):  # a damaged row
            parts, values = _align(parts, tokens, values, np.asarray(pc.list_value_length(labels)))
        self.labelled_parts += np.bincount(parts[values != IGNORE_INDEX], minlength=len(self.labelled_parts))
        for role in ROLES:
            self.seconds[role].append(_values(rows[f"{role}_seconds"]))
            self.unit_counts = _add_up(self.unit_counts, np.bincount(_values(rows[f"{role}_units"])))
            self.emotions.update(_values(rows[f"{role}_emotion"]).tolist())
            collapsed = are_collapsed(rows.schema.names)
            runs = _values(rows[f"{role}_durations"]) if collapsed else _run_lengths(rows[f"{role}_units"])
            self.run_counts = _add_up(self.run_counts, np.bincount(runs))
        texts, dialogs = rows["user_text"], rows["dialog_id"].dictionary_encode()
        exchanges = np.asarray(pc.list_value_length(texts)) if pa.types.is_list(texts.type) else np.ones(len(rows))
        pairs = np.bincount(np.asarray(dialogs.indices), exchanges).astype(np.int64)
        self.pairs.update(dict(zip(dialogs.dictionary.to_pylist(), pairs.tolist(), strict=True)))

    def merge(self, following: SplitStatistics) -> None:
        """Add the counts of the rows that follow."""
        self.tokens += following.tokens
        self.labelled_tokens += following.labelled_tokens
        self.labelled_units += following.labelled_units
        self.labelled_parts += following.labelled_parts
        self.run_counts = _add_up(self.run_counts, following.run_counts)
        for role in ROLES:
            self.seconds[role] += following.seconds[role]
        self.unit_counts = _add_up(self.unit_counts, following.unit_counts)
        self.pairs.update(following.pairs)
        self.emotions.update(following.emotions)

    def distributions(self) -> dict[str, Weighted]:
        """The numbers by name.

        One per row (tokens, labelled share), recording (seconds), dialog (pairs) or run of equal units (repeats).
        """
        tokens, labelled = _join(self.tokens, np.int64), _join(self.labelled_tokens, np.int64)
        lengths = np.flatnonzero(self.run_counts)
        runs = Weighted(lengths, self.run_counts[lengths])
        return {
            "tokens": _weigh(tokens),
            "labelled share": _weigh(labelled / np.maximum(tokens, 1)),
            **{f"{role} seconds": _weigh(_join(self.seconds[role], np.float32)) for role in ROLES},
            "pairs per dialog": _weigh(np.array([*self.pairs.values()], np.int64)),
            "units in a run": runs if len(runs) else Weighted(np.array([0]), np.array([1])),
        }

    def summary(self) -> dict[str, Any]:
        """The statistics as JSON values; `distributions` has mean and quantiles of each."""
        return {
            "rows": sum(map(len, self.tokens)),
            "dialogs": len(self.pairs),
            "tokens": sum(int(tokens.sum()) for tokens in self.tokens),
            "labelled_tokens": sum(int(labelled.sum()) for labelled in self.labelled_tokens),
            "labelled_units": self.labelled_units,
            "labelled_parts": dict(zip(ROW_PARTS, self.labelled_parts.tolist(), strict=True)),
            "units": int(self.unit_counts.sum()),
            "distinct_units": int((self.unit_counts > 0).sum()),
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
    """
    statistics = {split: SplitStatistics(layout=layout) for split in files}
    ranges = [each for split, paths in files.items() for path in paths for each in divide_rows(path, split)]
    with ProcessPool(count_processes(ranges, num_proc)) as pool:
        for index, found in in_order(pool.map(partial(_add_range, layout), ranges, name="statistics")):
            statistics[ranges[index].split].merge(found)
    return statistics


def _add_range(layout: RowLayout, rows: RowRange) -> SplitStatistics:
    statistics = SplitStatistics(layout=layout)
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
        numbers = split_statistics.distributions()["tokens"]
        tokens = numbers.values
        edges = np.unique(np.linspace(tokens.min(), tokens.max() + 1, _BINS + 1).astype(int))
        counts = np.histogram(tokens, edges, weights=numbers.counts)[0].astype(int)
        lines += ["", f"tokens per row, {split}"]
        for first, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
            bar = "#" * math.ceil(_BAR * count / counts.max())
            lines.append(f"{first:>8,} to {stop - 1:>7,}  {bar:<{_BAR}}  {count:,}")
    return "\n".join(lines[1:])


def _distribution(numbers: Weighted) -> dict[str, float]:
    values, counts = numbers.values.astype(np.float64), numbers.counts
    found = {"mean": (values * counts).sum() / len(numbers)}
    found |= {name: _quantile(values, counts, quantile) for name, quantile in QUANTILES.items()}
    return {name: round(float(value), 4) for name, value in found.items()}


def _quantile(values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], quantile: float) -> np.float64:
    """As `np.quantile` of the repeated values, which interpolates between two neighbours."""
    place = (int(counts.sum()) - 1) * quantile
    last = np.cumsum(counts) - 1  # place of the last of each group of equal values
    neighbours = values[np.searchsorted(last, [math.floor(place), math.ceil(place)])]
    return np.float64(np.quantile(neighbours, place - math.floor(place)))


def _add_up(counts: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the sums of two arrays of counts, the shorter of which ends with zeros that are left out."""
    shorter, longer = sorted((counts, others), key=len)
    together = longer.copy()
    together[: len(shorter)] += shorter
    return together


def _join(parts: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _weigh(numbers: npt.NDArray[Any]) -> Weighted:
    return Weighted(*np.unique(numbers, return_counts=True))


def _align(
    parts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.integer[Any]],
    labels: npt.NDArray[np.int32],
    label_lengths: npt.NDArray[np.integer[Any]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Cut the parts and the labels of each row to the shorter of both."""

    def keep(own: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        place = np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)
        kept: npt.NDArray[np.bool_] = place < np.repeat(np.minimum(lengths, label_lengths), own)
        return kept

    return parts[keep(lengths)], labels[keep(label_lengths)]


def _values(column: pa.Array) -> npt.NDArray[Any]:
    """The innermost values of a column, whose rows have one exchange or a list of exchanges."""
    while pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _run_lengths(column: pa.Array) -> npt.NDArray[np.int64]:
    """Lengths of the runs of equal neighbours within the innermost lists of a column."""
    while pa.types.is_list(column.type.value_type):
        column = pc.list_flatten(column)
    values, lengths = np.asarray(pc.list_flatten(column)), np.asarray(pc.list_value_length(column))
    if not len(values):
        return np.zeros(0, np.int64)
    is_start = np.append(True, values[1:] != values[:-1])
    starts = np.cumsum(lengths) - lengths
    is_start[starts[starts < len(values)]] = True
    return np.diff(np.append(np.flatnonzero(is_start), len(values)))


def summarize_split(split: Mapping[str, Any]) -> str:
    """One line on a split of counts.json: its counts, and the number of rows and dialogs that were left out."""
    bad_audio, dialogs = split["pairs_with_bad_audio"], split["dialogs_left_out"]
    left_out = [f"{count_noun(len(split['pairs_left_out']) - bad_audio, 'row')} too long"]
    if bad_audio:
        left_out.append(f"{count_noun(bad_audio, 'pair')} with bad audio")
    reasons = ", ".join(f"{dialog}: {reason}" for dialog, reason in dialogs.items())
    left_out.append(count_noun(len(dialogs), "dialog") + (f" ({reasons})" if reasons else ""))
    cut = f"; shortened: {count_noun(len(split['rows_cut']), 'row')}" if split["rows_cut"] else ""
    return (
        f"{count_noun(split['rows'], 'row')} from {count_noun(split['dialogs'], 'dialog')} ({split['hours']:.2f} h), "
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
