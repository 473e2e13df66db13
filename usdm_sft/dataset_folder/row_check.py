"""Compare the rows of a batch with their encoded columns and with the template, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.corpus.features import TRAINER_COLUMNS
from usdm_sft.template.config import Template
from usdm_sft.template.encoder import COLUMNS, IGNORE_INDEX, TemplateEncoder
from usdm_sft.template.tokenizer import UNIT_0


def find_doubtful_rows(batch: pa.RecordBatch, encoder: TemplateEncoder, max_length: int) -> set[int]:
    """Find the rows of a batch in which something may be wrong; the others are correct.

    A row is correct if its ids and labels are those of its encoded columns, each label is the id or -100, `TRAINER_COLUMNS`
    fit, and the ids decode to the template. To decode fast, each run of unit tokens is compared as numbers and shortened to
    its first token, in the ids and in the template alike. `check_tokenizer` has checked the name of every unit token.

    Args:
        batch: Rows with all columns of a dataset folder.
        encoder: Has the tokenizer and the template of the folder.
        max_length: Largest number of tokens in a row.

    Returns:
        The positions of these rows in the batch.
    """
    columns = {name: _to_lists(batch[name]) for name in ("id", *COLUMNS, "input_ids", "labels", *TRAINER_COLUMNS)}
    try:
        encoded = encoder({name: columns[name] for name in ("id", *COLUMNS)})
    except ValueError:  # of one row, or of several
        return set(range(len(batch)))
    doubtful = set()
    for row, (ids, labels) in enumerate(zip(columns["input_ids"], columns["labels"], strict=True)):
        if (
            len(ids) > max_length
            or columns["length"][row] != len(ids)
            or not np.array_equal(columns["attention_mask"][row], np.ones(len(ids), np.int8))
            or not np.array_equal(ids, encoded["input_ids"][row])
            or not np.array_equal(labels, encoded["labels"][row])
            or ((labels != ids) & (labels != IGNORE_INDEX)).any()
            or not _same_units(ids, [columns[name][row] for name in COLUMNS], encoder.num_units)
        ):
            doubtful.add(row)
    rows = [row for row in range(len(batch)) if row not in doubtful]  # the ids of the others may be no tokens
    decoded = encoder.decode_batch(_shorten_runs(columns["input_ids"][row], encoder.num_units) for row in rows)
    for row, text in zip(rows, decoded, strict=True):
        if text != render({name: columns[name][row] for name in COLUMNS}, encoder.template, max_units=1):
            doubtful.add(row)
    return doubtful


def render(row: Mapping[str, Any], template: Template, *, max_units: int | None = None) -> str:
    """The text of the template for one row, written independently of the encoder. A "▁" becomes a space, as in `decode`.

    Args:
        row: The `COLUMNS`.
        template: The words of the template.
        max_units: Leave out the units after the first ones of each turn; by default none.
    """
    columns = [row[name] for name in COLUMNS]
    exchanges = zip(*columns, strict=True) if isinstance(row["user_text"], list) else [columns]
    blocks = []
    for user_units, user_text, agent_text, agent_units in exchanges:
        user, agent = ("".join(f"<|unit{unit}|>" for unit in units[:max_units]) for units in (user_units, agent_units))
        texts = f"{user_text.lower()}\n{template.agent_heading}{agent_text.lower()}"
        blocks.append(f"{template.user_heading}{user}<|correspond|>{texts}<|correspond|>{agent}\n")
    return f"{template.instruction}{''.join(blocks)}</s>".replace("▁", " ")


def _is_unit(ids: npt.NDArray[np.int32], num_units: int) -> npt.NDArray[np.bool_]:
    return (ids >= UNIT_0) & (ids < UNIT_0 + num_units)


def _shorten_runs(ids: npt.NDArray[np.int32], num_units: int) -> list[int]:
    """The ids without the unit tokens that follow another unit token."""
    units = _is_unit(ids, num_units)
    follows = np.zeros_like(units)
    follows[1:] = units[1:] & units[:-1]
    shortened: list[int] = ids[~follows].tolist()
    return shortened


def _same_units(ids: npt.NDArray[np.int32], columns: list[Any], num_units: int) -> bool:
    """True if the unit tokens are the units of the user's and the agent's turns, in order."""
    user_units, user_text, _, agent_units = columns
    if isinstance(user_text, list):
        expected = [units for exchange in zip(user_units, agent_units, strict=True) for units in exchange]
    else:
        expected = [user_units, agent_units]
    found = ids[_is_unit(ids, num_units)] - UNIT_0
    return np.array_equal(found, np.concatenate(expected))


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
