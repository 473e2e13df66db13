"""Compare the rows of a batch with their encoded columns and with the template, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.folder.durations import find_wrong_durations
from usdm_sft.template.encoder import IGNORE_INDEX, TemplateEncoder
from usdm_sft.template.exchanges import has_lists


def find_doubtful_rows(
    batch: pa.RecordBatch, encoder: TemplateEncoder, max_length: int, normalization: str
) -> set[int]:
    """Find the rows of a batch in which something may be wrong; the others are correct.

    A row is correct if its ids and labels are those of its encoded columns, each label is the id or -100, `attention_mask` and
    `length` fit, and the ids decode to the template; collapsed units must restore the frames of their recordings as well. To
    decode fast, each run of unit tokens is compared as numbers and shortened to its first token, in the ids and in the template
    alike. `check_tokenizer` has checked the name of every unit token.

    Args:
        batch: Rows with all columns of a dataset folder.
        encoder: Has the tokenizer and the template of the folder.
        max_length: Largest number of tokens in a row.
        normalization: How the unit model normalizes waveforms.

    Returns:
        The positions of these rows in the batch.
    """
    names = encoder.template.parts
    columns = {name: _to_lists(batch[name]) for name in ("id", *names)}
    try:
        encoded = encoder(columns)
    except ValueError:  # of one row, or of several
        return set(range(len(batch)))
    ids, lengths = _flat(batch["input_ids"])
    doubtful = lengths > max_length
    if encoder.unit_repetition == "collapse":
        doubtful[list(find_wrong_durations(batch, normalization))] = True
    for name in ("input_ids", "labels"):
        doubtful |= _compare(*_flat(batch[name]), np.concatenate(encoded[name]), _sizes(encoded[name]))
    doubtful |= batch["length"].to_numpy() != lengths
    doubtful |= _compare(*_flat(batch["attention_mask"]), np.ones(len(ids), np.int8), lengths)
    labels, label_lengths = _flat(batch["labels"])
    if np.array_equal(lengths, label_lengths):  # the others are doubtful already
        doubtful |= _any_in_row((labels != ids) & (labels != IGNORE_INDEX), lengths)
    is_unit = encoder.layout.is_unit(ids)
    doubtful |= _have_other_units(ids[is_unit] - encoder.layout.tokens.unit_0, _count_in_row(is_unit, lengths), columns)
    rows = np.flatnonzero(~doubtful).tolist()  # the ids of the others may be no tokens
    shortened = _shorten_runs(ids, is_unit, lengths)
    texts = [render({name: columns[name][row] for name in names}, encoder, max_units=1) for row in rows]
    doubtful[rows] = ~np.array(stand_for([shortened[row] for row in rows], texts, encoder), np.bool_)
    return set(np.flatnonzero(doubtful).tolist())


def stand_for(rows: Sequence[Sequence[int]], texts: Sequence[str], encoder: TemplateEncoder) -> list[bool]:
    """True for each row whose ids stand for its text: they decode to it, or are those of the whole text of a chat template."""
    if encoder.template.tokenization == "chat":
        encoded = encoder.encode_whole(texts)
        return [list(ids) == whole for ids, whole in zip(rows, encoded, strict=True)]
    return [found == text for found, text in zip(encoder.decode_batch(rows), texts, strict=True)]


def render(row: Mapping[str, Any], encoder: TemplateEncoder, *, max_units: int | None = None) -> str:
    """The text of the template for one row, written independently of the encoder's ids.

    Args:
        row: The columns of the template's parts.
        encoder: Has the words of the template, and says how a text comes back from its ids.
        max_units: Leave out the units after the first ones of each turn; by default none.
    """
    template = encoder.template
    values = {part: row[part] for part in template.parts}
    if not has_lists(values):
        values = {part: [value] for part, value in values.items()}
    exchanges = [
        {
            part: template.fold_case(value) if isinstance(value, str) else _unit_tokens(value[:max_units])
            for part, value in zip(template.parts, exchange, strict=True)
        }
        for exchange in zip(*values.values(), strict=True)
    ]
    if template.tokenization == "chat":
        return encoder.render_chat(exchanges)
    blocks = []
    for exchange in exchanges:
        parts = {part: encoder.spell(text) if part.endswith("_text") else text for part, text in exchange.items()}
        turns = [
            (heading, "<|correspond|>".join(parts[name] for name in names if name in parts))
            for heading, names in (
                (template.user_heading.strip("\n"), ("user_units", "user_text")),
                (template.agent_heading.strip("\n"), ("agent_text", "agent_units")),
            )
            if any(name in parts for name in names)
        ]
        blocks.append("\n" + "".join(f"{encoder.spell(heading)}\n{turn}\n" for heading, turn in turns))
    instruction = "\n".join(encoder.spell(line) for line in template.instruction.split("\n"))
    return f"{instruction}{''.join(blocks)}{encoder.end}"


def _unit_tokens(units: Iterable[int]) -> str:
    return "".join(f"<|unit{unit}|>" for unit in units)


def _shorten_runs(
    ids: npt.NDArray[np.int32], is_unit: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64]
) -> list[list[int]]:
    """The ids of each row without the unit tokens that follow another unit token."""
    kept = np.append(True, ~(is_unit[1:] & is_unit[:-1]))[: len(ids)]
    starts = np.cumsum(lengths) - lengths
    kept[starts[starts < len(ids)]] = True
    flat: list[int] = ids[kept].tolist()
    ends = np.cumsum(_count_in_row(kept, lengths)).tolist()
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _have_other_units(
    found: npt.NDArray[np.int32], counts: npt.NDArray[np.int64], columns: Mapping[str, Sequence[Any]]
) -> npt.NDArray[np.bool_]:
    """True for each row whose unit tokens are not the units of the user's and the agent's turns, in order.

    Args:
        found: The units of all rows, one after the other.
        counts: (num_rows,) number of units of each row.
        columns: The columns of the batch.
    """
    names = [name for name in columns if name.endswith("_units")]
    rows = zip(*(columns[name] for name in names), strict=True) if names else [()] * len(counts)
    if names and len(counts) and has_lists({name: column[0] for name, column in columns.items() if name != "id"}):
        turns = [[units for exchange in zip(*row, strict=True) for units in exchange] for row in rows]
    else:
        turns = [list(row) for row in rows]
    flat = [units for row in turns for units in row]
    expected = np.concatenate([np.zeros(0, np.int32), *flat])
    sizes = np.array([sum(map(len, row)) for row in turns], np.int64)
    return _compare(found, counts, expected, sizes)


def _compare(
    found: npt.NDArray[Any], lengths: npt.NDArray[np.int64], expected: npt.NDArray[Any], sizes: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    if np.array_equal(lengths, sizes):
        return _any_in_row(found != expected, lengths)
    ends, expected_ends = np.cumsum(lengths), np.cumsum(sizes)
    rows = zip(np.split(found, ends[:-1]), np.split(expected, expected_ends[:-1]), strict=True)
    return np.array([not np.array_equal(*row) for row in rows])


def _any_in_row(marks: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    if not marks.any():
        return np.zeros(len(lengths), np.bool_)
    return _count_in_row(marks, lengths) > 0


def _count_in_row(marks: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    sums = np.append(0, np.cumsum(marks))
    ends = np.cumsum(lengths)
    counts: npt.NDArray[np.int64] = sums[ends] - sums[ends - lengths]
    return counts


def _sizes(lists: Sequence[Any]) -> npt.NDArray[np.int64]:
    return np.array([len(each) for each in lists], np.int64)


def _flat(column: pa.Array) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The values of a column of lists, one list after the other, and the length of each list."""
    return pc.list_flatten(column).to_numpy(), pc.list_value_length(column).to_numpy().astype(np.int64)


def _to_lists(column: pa.Array) -> list[Any]:
    """The values of a column as Python objects, but lists of numbers as arrays."""
    if not pa.types.is_list(column.type):
        values: list[Any] = column.to_pylist()
        return values
    lengths = pc.list_value_length(column).to_numpy()
    ends = np.cumsum(lengths)
    flat = pc.list_flatten(column)
    inner = flat.to_numpy() if pa.types.is_integer(flat.type) else _to_lists(flat)
    return [inner[end - length : end] for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)]
