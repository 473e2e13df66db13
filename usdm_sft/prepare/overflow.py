"""Rows with more tokens than max_length: dropped, truncated between two exchanges, or split into several rows.

Only these rows change, and only their exchanges are encoded again. Audio, forward passes and the cache of work shards do not
depend on max_length.

The lengths of exchanges add up. The template puts fixed ids before the first exchange, between two exchanges and after the
last one, and `TemplateEncoder` gives the text of each exchange to the tokenizer as a separate string. No id of an exchange
therefore depends on its neighbours, and one encoding of each exchange gives the length of every run of exchanges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.corpus.examples import config_has_lists, example_id
from usdm_sft.folder.statistics import TOO_LONG
from usdm_sft.template.encoder import COLUMNS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from usdm_sft.template.encoder import TemplateEncoder

OVERFLOWS = ("drop", "truncate", "split")


class Overflowed(NamedTuple):
    """The rows of a table that `max_length` cuts or drops."""

    runs: dict[int, list[tuple[int, int]]]  # position of a row that is too long -> the runs of exchanges to keep
    cut: dict[str, str]  # rows that lose exchanges: id -> what is kept, and why
    left_out: dict[str, str]  # pairs that are labelled in no row any more: id -> why


def choose_overflow(overflow: str | None, config_name: str, history: int) -> str:
    """Choose what to do with rows that are too long, and check that the config allows it.

    Args:
        overflow: One of `OVERFLOWS`, or None: drop where a row is one pair, truncate where it has several exchanges.
        config_name: Such as "single_turn".
        history: Number of earlier exchanges in a row.

    Raises:
        ValueError: The value is unknown, or the rows of this config cannot be truncated or split.
    """
    if overflow is None:
        return "truncate" if config_has_lists(config_name, history) else "drop"
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow {overflow!r} is unknown: choose one of {', '.join(OVERFLOWS)}")
    if overflow != "drop" and not config_has_lists(config_name, history):
        raise ValueError(f"overflow is {overflow}, but a row of {config_name} is one pair and cannot be cut: use drop")
    if overflow == "split" and history:
        raise ValueError(
            "overflow is split, but with history only the last pair of a row is labelled: use truncate or drop"
        )
    return overflow


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
    cuts = Overflowed({}, {}, {})
    lengths = list_lengths(rows, "input_ids")
    too_long = np.flatnonzero(lengths > max_length)
    for index, row in zip(too_long.tolist(), rows.take(too_long).to_pylist(), strict=True):
        reason = f"{lengths[index]} tokens, {TOO_LONG} {max_length}"
        alone = _lengths_alone(row, encoder)
        runs = [] if overflow == "drop" else _find_runs(alone, lengths[index], encoder, max_length, overflow)
        cuts.runs[index] = [(run.start, run.stop) for run in runs]
        if runs:
            cuts.cut[row["id"]] = f"{_describe_kept(row, runs, encoder, overflow)} ({reason})"
        cuts.left_out.update(_pairs_outside(row, runs, alone, encoder, max_length, reason))
    return cuts


def take_rows(
    rows: pa.Table,
    runs: Mapping[int, Sequence[tuple[int, int]]],
    encoder: TemplateEncoder | None,
    chosen: range | NDArray[np.int64] | None = None,
) -> pa.Table:
    """Take rows as `find_cuts` decided. Only cut rows are encoded again.

    Args:
        rows: The rows, as given to `find_cuts`.
        runs: As in `Overflowed`.
        encoder: The encoder that made `input_ids` and `labels`; None if no row was cut.
        chosen: Positions among the kept and cut rows, in the order to take them; by default all of them.
    """
    if not runs and isinstance(chosen, range | None):
        return rows if chosen is None else rows.slice(chosen.start, len(chosen))
    num_pieces = np.ones(len(rows), np.int64)
    num_pieces[list(runs)] = [len(row_runs) for row_runs in runs.values()]
    sources = np.repeat(np.arange(len(rows)), num_pieces)
    numbers = np.arange(len(sources)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    taken = np.arange(len(sources)) if chosen is None else np.asarray(chosen, np.int64)
    places = sources[taken]
    pieces: list[dict[str, Any]] = []
    for position in np.flatnonzero(np.isin(places, list(runs))).tolist():
        assert encoder is not None  # a row was cut
        source = int(places[position])
        [row] = rows.slice(source, 1).to_pylist()
        places[position] = len(rows) + len(pieces)
        pieces.append(_make_row(row, range(*runs[source][numbers[taken[position]]]), encoder))
    if pieces:
        rows = pa.concat_tables([rows, pa.Table.from_pylist(pieces, rows.schema)])
    return rows.take(places)


def list_lengths(rows: pa.Table, column: str) -> NDArray[np.int64]:
    """Return the (num_rows,) lengths of the lists in a column."""
    lengths: NDArray[np.int64] = pc.list_value_length(rows[column]).to_numpy().astype(np.int64)
    return lengths


def _lengths_alone(row: dict[str, Any], encoder: TemplateEncoder) -> NDArray[np.int64]:
    """Return the (num_exchanges,) numbers of tokens of rows with one exchange each; empty where the row is one pair."""
    if not isinstance(row["user_text"], list):
        return np.zeros(0, np.int64)
    exchanges = {"id": [row["id"]] * len(row["user_text"])} | {name: row[name] for name in COLUMNS}
    return np.array([len(ids) for ids in encoder(exchanges)["input_ids"]])


def _find_runs(
    alone: NDArray[np.int64], whole: int, encoder: TemplateEncoder, max_length: int, overflow: str
) -> list[range]:
    """Find the runs of exchanges of a long row to keep."""
    ends, shared = _add_up(alone, whole)
    if encoder.last_exchange_only:
        return _latest_run(ends, max_length - shared)
    return _leading_runs(ends, max_length - shared, every=overflow == "split")


def _add_up(alone: NDArray[np.int64], whole: int) -> tuple[NDArray[np.int64], int]:
    """Add up the lengths, so that exchanges `start` to `stop` have `ends[stop] - ends[start] + shared` tokens.

    As a row of its own, each exchange has the opening and closing ids of the template around it. In a common row, two exchanges
    have the heading of the second between them. The difference, `shared`, is the same for every two exchanges and follows
    from `whole`.

    Args:
        alone: (num_exchanges,) lengths of the exchanges as rows of their own.
        whole: Length of the row with all exchanges.

    Returns:
        (num_exchanges + 1,) `ends`, increasing from 0, and `shared`.
    """
    shared = int(alone.sum() - whole) // (len(alone) - 1) if len(alone) > 1 else 0
    return np.concatenate([[0], np.cumsum(alone - shared)]), shared


def _leading_runs(ends: NDArray[np.int64], room: int, *, every: bool) -> list[range]:
    """Find the longest leading run of exchanges in `room` tokens; with `every`, also the runs that follow it."""
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
    """Find the longest run in `room` tokens that ends with the last exchange and is not the whole row."""
    last = len(ends) - 1
    start = max(1, int(np.searchsorted(ends, ends[last] - room)))
    return [range(start, last)] if start < last else []


def _encode(row: dict[str, Any], run: range, encoder: TemplateEncoder) -> dict[str, NDArray[Any]]:
    batch = {name: [row[name][run.start : run.stop]] for name in COLUMNS}
    return {name: values[0] for name, values in encoder({"id": [row["id"]], **batch}).items()}


def _make_row(row: dict[str, Any], run: range, encoder: TemplateEncoder) -> dict[str, Any]:
    """Make a row of some of the exchanges of a row."""
    lists = {name: values[run.start : run.stop] for name, values in row.items() if name.startswith(("user_", "agent_"))}
    return row | lists | _name(row, run, encoder) | _encode(row, run, encoder)


def _name(row: dict[str, Any], run: range, encoder: TemplateEncoder) -> dict[str, Any]:
    """Return `id` and `turn` of a row of some of the exchanges of a row."""
    turn = row["turn"] if encoder.last_exchange_only else row["turn"] + 2 * run.start
    return {"id": example_id(row["dialog_id"], turn), "turn": turn}


def _describe_kept(row: dict[str, Any], runs: Sequence[range], encoder: TemplateEncoder, overflow: str) -> str:
    if overflow == "split":
        return f"kept as {', '.join(_name(row, run, encoder)['id'] for run in runs)}"
    before, after = len(row["user_text"]), len(runs[0])
    if encoder.last_exchange_only:
        return f"kept {after - 1} of {before - 1} earlier exchanges"
    return f"kept {after} of {before} exchanges"


def _pairs_outside(
    row: dict[str, Any],
    runs: Sequence[range],
    alone: NDArray[np.int64],
    encoder: TemplateEncoder,
    max_length: int,
    reason: str,
) -> dict[str, str]:
    """List the labelled pairs of a long row that are in no run: id -> reason."""
    if not isinstance(row["user_text"], list):
        return {row["id"]: reason}
    positions = range(len(row["user_text"]))
    left_out = {}
    for position in positions[-1:] if encoder.last_exchange_only else positions:
        if any(position in run for run in runs):
            continue
        left_out[_name(row, range(position, position + 1), encoder)["id"]] = (
            f"{alone[position]} tokens, {TOO_LONG} {max_length}"
            if alone[position] > max_length
            else f"row {row['id']} has {reason}"
        )
    return left_out
