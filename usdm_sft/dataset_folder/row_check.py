"""Compare the rows of a batch with their encoded columns and with the template, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.corpus.features import TRAINER_COLUMNS
from usdm_sft.dataset_folder.durations import find_wrong_durations
from usdm_sft.template.encoder import IGNORE_INDEX, TemplateEncoder
from usdm_sft.template.exchanges import has_lists
from usdm_sft.template.parts import RowLayout


def find_doubtful_rows(batch: pa.RecordBatch, encoder: TemplateEncoder, max_length: int) -> set[int]:
    """Find the rows of a batch in which something may be wrong; the others are correct.

    A row is correct if its ids and labels are those of its encoded columns, each label is the id or -100, `TRAINER_COLUMNS`
    fit, and the ids decode to the template; collapsed units must restore the frames of their recordings as well. To decode fast, each run of unit tokens is compared as numbers and shortened to
    its first token, in the ids and in the template alike. `check_tokenizer` has checked the name of every unit token.

    Args:
        batch: Rows with all columns of a dataset folder.
        encoder: Has the tokenizer and the template of the folder.
        max_length: Largest number of tokens in a row.

    Returns:
        The positions of these rows in the batch.
    """
    names = encoder.template.parts
    columns = {name: _to_lists(batch[name]) for name in ("id", *names, "input_ids", "labels", *TRAINER_COLUMNS)}
    try:
        encoded = encoder({name: columns[name] for name in ("id", *names)})
    except ValueError:  # of one row, or of several
        return set(range(len(batch)))
    doubtful = find_wrong_durations(batch) if encoder.unit_repetition == "collapse" else set()
    for row, (ids, labels) in enumerate(zip(columns["input_ids"], columns["labels"], strict=True)):
        if (
            len(ids) > max_length
            or columns["length"][row] != len(ids)
            or not np.array_equal(columns["attention_mask"][row], np.ones(len(ids), np.int8))
            or not np.array_equal(ids, encoded["input_ids"][row])
            or not np.array_equal(labels, encoded["labels"][row])
            or ((labels != ids) & (labels != IGNORE_INDEX)).any()
            or not _same_units(ids, {name: columns[name][row] for name in names}, encoder.layout)
        ):
            doubtful.add(row)
    rows = [row for row in range(len(batch)) if row not in doubtful]  # the ids of the others may be no tokens
    shortened = [_shorten_runs(columns["input_ids"][row], encoder.layout) for row in rows]
    texts = [render({name: columns[name][row] for name in names}, encoder, max_units=1) for row in rows]
    stand = stand_for(shortened, texts, encoder)
    return doubtful | {row for row, is_right in zip(rows, stand, strict=True) if not is_right}


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
            part: value.lower() if isinstance(value, str) else _unit_tokens(value[:max_units])
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


def _shorten_runs(ids: npt.NDArray[np.int32], layout: RowLayout) -> list[int]:
    """The ids without the unit tokens that follow another unit token."""
    units = layout.is_unit(ids)
    follows = np.zeros_like(units)
    follows[1:] = units[1:] & units[:-1]
    shortened: list[int] = ids[~follows].tolist()
    return shortened


def _same_units(ids: npt.NDArray[np.int32], columns: Mapping[str, Any], layout: RowLayout) -> bool:
    """True if the unit tokens are the units of the user's and the agent's turns, in order."""
    spoken = [columns[name] for name in columns if name.endswith("_units")]
    if spoken and has_lists(columns):
        spoken = [units for exchange in zip(*spoken, strict=True) for units in exchange]
    found = ids[layout.is_unit(ids)] - layout.tokens.unit_0
    return np.array_equal(found, np.concatenate([np.zeros(0, np.int64), *spoken]))


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
