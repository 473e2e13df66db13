"""Rows with more tokens than max_length: dropped, truncated between two exchanges, or split into several rows.

Only these rows change, and only their exchanges are encoded again. Audio, forward passes and the cache of work shards do not
depend on max_length.

The lengths of exchanges add up. The template puts fixed ids before the first exchange, between two exchanges and after the
last one, and `TemplateEncoder` gives the text of each exchange to the tokenizer as a separate string. No id of an exchange
therefore depends on its neighbours, and one encoding of each exchange gives the length of every run of exchanges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.corpus.examples import example_id
from usdm_sft.folder.statistics import TOO_LONG
from usdm_sft.template.encoder import COLUMNS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from usdm_sft.template.encoder import TemplateEncoder


class Overflowed(NamedTuple):
    """What `max_length` leaves of a table.

    Attributes:
        kept: The range of all rows if none is too long. Otherwise (num_kept, 3) int32: the position of each row that is left,
            and the first and the end of the exchanges that it keeps; 0 and 0 if it is whole.
        cut: The rows that lose exchanges: id -> what is kept, and why.
        left_out: The pairs that are labelled in no row any more: id -> why.
    """

    kept: range | NDArray[np.int32]
    cut: dict[str, str]
    left_out: dict[str, str]


def find_cuts(rows: pa.Table, encoder: TemplateEncoder, max_length: int, overflow: str) -> Overflowed:
    """Decide what is kept of each row with more than `max_length` tokens; the others are kept whole.

    drop leaves out a row that is too long. truncate keeps the longest run of leading exchanges that fits; where only the last
    exchange is labelled, it drops the oldest exchanges instead. split keeps one such run after the other, each as a row of its
    own with the id of its first user turn. An exchange that is too long by itself is left out.

    Args:
        rows: Rows with `input_ids` and `labels`, and with the columns that they were encoded from.
        encoder: The encoder that made `input_ids` and `labels`.
        max_length: Largest number of tokens in a row, BOS and EOS included.
        overflow: One of `OVERFLOWS`.
    """
    lengths = pc.list_value_length(rows["input_ids"]).to_numpy()
    too_long = np.flatnonzero(lengths > max_length)
    if not len(too_long):
        return Overflowed(range(len(rows)), {}, {})
    runs_of: dict[int, list[range]] = {}
    cut: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for position, row in zip(too_long.tolist(), rows.take(too_long).to_pylist(), strict=True):
        reason = f"{lengths[position]} tokens, {TOO_LONG} {max_length}"
        if not isinstance(row["user_text"], list):  # one pair
            runs_of[position], left_out[row["id"]] = [], reason
            continue
        exchanges = {"id": [row["id"]] * len(row["user_text"])} | {name: row[name] for name in COLUMNS}
        alone = np.array([len(ids) for ids in encoder(exchanges)["input_ids"]])
        ends, room = _add_up(alone, lengths[position], max_length)
        if overflow == "drop":
            runs = []
        elif encoder.last_exchange_only:
            runs = _latest_run(ends, room)
        else:
            runs = _leading_runs(ends, room, every=overflow == "split")
        runs_of[position] = runs
        if runs:
            cut[row["id"]] = f"{_describe_kept(row, runs, encoder, overflow)} ({reason})"
        labelled = range(len(alone))[-1:] if encoder.last_exchange_only else range(len(alone))
        for number in labelled:
            if not any(number in run for run in runs):
                left_out[_name(row, number, encoder)["id"]] = (
                    f"{alone[number]} tokens, {TOO_LONG} {max_length}"
                    if alone[number] > max_length
                    else f"row {row['id']} has {reason}"
                )
    kept = [
        (position, run.start, run.stop) for position in range(len(rows)) for run in runs_of.get(position, [range(0)])
    ]
    return Overflowed(np.array(kept, np.int32).reshape(-1, 3), cut, left_out)


def take_rows(rows: pa.Table, kept: range | NDArray[np.int32], encoder: TemplateEncoder | None) -> pa.Table:
    """Take rows as `find_cuts` decided. Only rows that lose exchanges are encoded again.

    Args:
        rows: The rows, as given to `find_cuts`.
        kept: Some of `Overflowed.kept`, in the order to take them.
        encoder: The encoder that made `input_ids` and `labels`; None if no row loses exchanges.
    """
    if isinstance(kept, range):
        return rows.slice(kept.start, len(kept))
    positions = kept[:, 0].copy()
    pieces: list[dict[str, Any]] = []
    for index in np.flatnonzero(kept[:, 2]).tolist():
        assert encoder is not None  # a row loses exchanges
        position, start, stop = kept[index].tolist()
        [row] = rows.slice(position, 1).to_pylist()
        positions[index] = len(rows) + len(pieces)
        pieces.append(_make_row(row, range(start, stop), encoder))
    if pieces:
        rows = pa.concat_tables([rows, pa.Table.from_pylist(pieces, rows.schema)])
    return rows.take(positions)


def _add_up(alone: NDArray[np.int64], whole: int, max_length: int) -> tuple[NDArray[np.int64], int]:
    """Add up the lengths, so that exchanges `start` to `stop` fit into a row if `ends[stop] - ends[start]` is at most `room`.

    As a row of its own, each exchange has the opening and closing ids of the template around it. In a common row, two exchanges
    have the heading of the second between them. The difference is the same for every two exchanges and follows from `whole`.

    Args:
        alone: (num_exchanges,) lengths of the exchanges as rows of their own.
        whole: Length of the row with all exchanges.
        max_length: Largest length of a row.

    Returns:
        (num_exchanges + 1,) `ends`, increasing from 0, and `room`.
    """
    shared = int(alone.sum() - whole) // (len(alone) - 1) if len(alone) > 1 else 0
    return np.concatenate([[0], np.cumsum(alone - shared)]), max_length - shared


def _leading_runs(ends: NDArray[np.int64], room: int, *, every: bool) -> list[range]:
    """Find the longest leading run of exchanges that fits; with `every`, also the runs that follow it."""
    runs, start = [], 0
    while start < len(ends) - 1:
        stop = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
        if stop > start:
            runs.append(range(start, stop))
        if not every:
            break
        start = max(stop, start + 1)
    return runs


def _latest_run(ends: NDArray[np.int64], room: int) -> list[range]:
    """Find the longest run that fits, ends with the last exchange and is not the whole row."""
    last = len(ends) - 1
    start = max(1, int(np.searchsorted(ends, ends[last] - room)))
    return [range(start, last)] if start < last else []


def _make_row(row: dict[str, Any], run: range, encoder: TemplateEncoder) -> dict[str, Any]:
    """Make a row of some of the exchanges of a row."""
    lists = {name: values[run.start : run.stop] for name, values in row.items() if name.startswith(("user_", "agent_"))}
    encoded = encoder({"id": [row["id"]], **{name: [lists[name]] for name in COLUMNS}})
    return row | lists | _name(row, run.start, encoder) | {name: values[0] for name, values in encoded.items()}


def _name(row: dict[str, Any], start: int, encoder: TemplateEncoder) -> dict[str, Any]:
    """Return `id` and `turn` of a row that begins with exchange `start` of a row."""
    turn = row["turn"] if encoder.last_exchange_only else row["turn"] + 2 * start
    return {"id": example_id(row["dialog_id"], turn), "turn": turn}


def _describe_kept(row: dict[str, Any], runs: list[range], encoder: TemplateEncoder, overflow: str) -> str:
    if overflow == "split":
        return f"kept as {', '.join(_name(row, run.start, encoder)['id'] for run in runs)}"
    before, after = len(row["user_text"]), len(runs[0])
    if encoder.last_exchange_only:
        return f"kept {after - 1} of {before - 1} earlier exchanges"
    return f"kept {after} of {before} exchanges"
