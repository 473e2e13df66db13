"""Rows of more tokens than max_length: left out, cut between two exchanges, or split into further rows.

Only the few long rows are touched, and only by encoding their exchanges again: no audio, no forward pass, and the
cache of work shards knows nothing of max_length.

The lengths of exchanges add up. The template puts fixed ids before the first exchange, between two exchanges and after the
last one, and `TemplateEncoder` gives the text of each exchange to the tokenizer as a string of its own, so that no id of an
exchange depends on its neighbours. The length of every run of exchanges thus follows from one encoding of each exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from usdm_sft.corpus.examples import example_id, has_lists
from usdm_sft.template.encoder import COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset

    from usdm_sft.template.encoder import TemplateEncoder

OVERFLOWS = ("drop", "truncate", "split")


class Fitted(NamedTuple):
    """The rows that fit, in order, and what became of the others."""

    rows: Dataset
    cut: dict[str, str]  # rows that hold fewer exchanges than they did: id -> what was kept, and why
    left_out: dict[str, str]  # pairs that bear loss in no row any more: id -> why


def choose_overflow(overflow: str | None, config_name: str, history: int) -> str:
    """What happens to rows that are too long, and whether it makes sense for the config.

    Args:
        overflow: One of `OVERFLOWS`, or None: drop where a row is one pair, truncate where it holds several exchanges.
        config_name: Such as "single_turn".
        history: Earlier exchanges in a row.

    Raises:
        ValueError: It is unknown, or there is nothing in a row that could be cut or split.
    """
    if overflow is None:
        return "truncate" if has_lists(config_name, history) else "drop"
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow {overflow!r} is unknown: choose one of {', '.join(OVERFLOWS)}")
    if overflow != "drop" and not has_lists(config_name, history):
        raise ValueError(f"overflow is {overflow}, but a row of {config_name} is one pair, which goes whole: use drop")
    if overflow == "split" and history:
        raise ValueError("overflow is split, but a row with history is about its last pair: use truncate or drop")
    return overflow


def fit_rows(rows: Dataset, encoder: TemplateEncoder, max_length: int, overflow: str) -> Fitted:
    """Bring every row to `max_length` tokens or fewer.

    drop leaves out a row that is too long. truncate keeps the longest run of leading exchanges that fits; where only the last
    exchange bears loss, it is the oldest ones that go. split keeps such runs one after the other, each a row of its own that is
    named after its first user turn. An exchange that is too long by itself is left out.

    Args:
        rows: With `input_ids` and `labels`, and the columns that they were made of.
        encoder: What made them.
        max_length: The number of tokens that a row may have, BOS and EOS counted.
        overflow: One of `OVERFLOWS`.
    """
    from datasets import Dataset, concatenate_datasets

    lengths = list_lengths(rows, "input_ids")
    fits, too_long = np.flatnonzero(lengths <= max_length), np.flatnonzero(lengths > max_length)
    cut: dict[str, str] = {}
    left_out: dict[str, str] = {}
    pieces: list[dict[str, Any]] = []
    owners: list[int] = []
    for index, row in zip(too_long, rows.select(too_long), strict=True):
        reason = f"{lengths[index]} tokens, more than max_length {max_length}"
        alone = _lengths_alone(row, encoder)
        runs = [] if overflow == "drop" else _find_runs(alone, lengths[index], encoder, max_length, overflow)
        its_pieces = [_make_row(row, run, encoder) for run in runs]
        if runs:
            cut[row["id"]] = f"{_what_was_kept(row, its_pieces, encoder, overflow)} ({reason})"
        left_out |= _pairs_outside(row, runs, alone, encoder, max_length, reason)
        pieces += its_pieces
        owners += [index] * len(runs)
    if not pieces:
        return Fitted(rows.select(fits), cut, left_out)
    both = concatenate_datasets([rows, Dataset.from_list(pieces, features=rows.features)])
    numbers = np.concatenate([fits, len(rows) + np.arange(len(pieces))])
    order = np.argsort(np.concatenate([fits, owners]), kind="stable")
    # Put together, columns would stand in the order of the features.
    return Fitted(both.select(numbers[order]).select_columns(rows.column_names), cut, left_out)


def list_lengths(rows: Dataset, column: str) -> np.ndarray:
    """(num_rows,) lengths of the lists in a column."""
    batches = rows.select_columns([column]).with_format("arrow").iter(batch_size=1000)
    return np.concatenate([np.zeros(0, np.int64)] + [pc.list_value_length(b[column]).to_numpy() for b in batches])


def _lengths_alone(row: dict[str, Any], encoder: TemplateEncoder) -> np.ndarray:
    """(num_exchanges,) numbers of tokens that the exchanges of a long row have as rows of one exchange; none for a pair."""
    if not isinstance(row["user_text"], list):
        return np.zeros(0, np.int64)
    exchanges = {"id": [row["id"]] * len(row["user_text"])} | {name: row[name] for name in COLUMNS}
    return np.array([len(ids) for ids in encoder(exchanges)["input_ids"]])


def _find_runs(alone: np.ndarray, whole: int, encoder: TemplateEncoder, max_length: int, overflow: str) -> list[range]:
    """The runs of exchanges of a long row that are kept."""
    ends, shared = _add_up(alone, whole)
    if encoder.last_exchange_only:
        return _latest_run(ends, max_length - shared)
    return _leading_runs(ends, max_length - shared, every=overflow == "split")


def _add_up(alone: np.ndarray, whole: int) -> tuple[np.ndarray, int]:
    """What gives the length of every run of exchanges: `ends[stop] - ends[start] + shared` tokens.

    In a row of its own, each exchange has the ids that open and close the template around it; in one row, two exchanges have
    the heading of the second between them. The difference, `shared`, is the same for any two exchanges, and `whole` tells it.

    Args:
        alone: (num_exchanges,) lengths of the exchanges as rows of one exchange.
        whole: Length of the row that holds them all.

    Returns:
        (num_exchanges + 1,) ends, increasing from 0, and the number of tokens that are shared.
    """
    shared = int(alone.sum() - whole) // (len(alone) - 1) if len(alone) > 1 else 0
    return np.concatenate([[0], np.cumsum(alone - shared)]), shared


def _leading_runs(ends: np.ndarray, room: int, *, every: bool) -> list[range]:
    """The longest leading run of exchanges in `room` tokens, or `every` such run one after the other."""
    runs, start = [], 0
    while start < len(ends) - 1:
        stop = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
        if stop > start:
            runs.append(range(start, stop))
        if not every:
            break
        start = max(stop, start + 1)
    return runs


def _latest_run(ends: np.ndarray, room: int) -> list[range]:
    """The longest run of exchanges in `room` tokens that ends with the last one, which is not the whole row."""
    last = len(ends) - 1
    start = max(1, int(np.searchsorted(ends, ends[last] - room)))
    return [range(start, last)] if start < last else []


def _encode(row: dict[str, Any], run: range, encoder: TemplateEncoder) -> dict[str, np.ndarray]:
    batch = {name: [row[name][run.start : run.stop]] for name in COLUMNS}
    return {name: values[0] for name, values in encoder({"id": [row["id"]], **batch}).items()}


def _make_row(row: dict[str, Any], run: range, encoder: TemplateEncoder) -> dict[str, Any]:
    """The row with some of its exchanges only."""
    lists = {name: values[run.start : run.stop] for name, values in row.items() if name.startswith(("user_", "agent_"))}
    turn = row["turn"] if encoder.last_exchange_only else row["turn"] + 2 * run.start
    return row | lists | {"id": example_id(row["dialog_id"], turn), "turn": turn} | _encode(row, run, encoder)


def _what_was_kept(
    row: dict[str, Any], pieces: Sequence[dict[str, Any]], encoder: TemplateEncoder, overflow: str
) -> str:
    if overflow == "split":
        return f"kept as {', '.join(piece['id'] for piece in pieces)}"
    before, after = len(row["user_text"]), len(pieces[0]["user_text"])
    if encoder.last_exchange_only:
        return f"kept {after - 1} of {before - 1} earlier exchanges"
    return f"kept {after} of {before} exchanges"


def _pairs_outside(
    row: dict[str, Any],
    runs: Sequence[range],
    alone: np.ndarray,
    encoder: TemplateEncoder,
    max_length: int,
    reason: str,
) -> dict[str, str]:
    """The pairs of a long row that no run holds, and why: id -> reason."""
    if not isinstance(row["user_text"], list):
        return {row["id"]: reason}
    positions = range(len(row["user_text"]))
    left_out = {}
    for position in positions[-1:] if encoder.last_exchange_only else positions:
        if any(position in run for run in runs):
            continue
        turn = row["turn"] if encoder.last_exchange_only else row["turn"] + 2 * position
        left_out[example_id(row["dialog_id"], turn)] = (
            f"{alone[position]} tokens, more than max_length {max_length}"
            if alone[position] > max_length
            else f"row {row['id']} has {reason}"
        )
    return left_out
