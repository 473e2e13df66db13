"""The data of the page: examples, the spelling of their tokens, and what was left out, as JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer

from usdm_sft.corpus.features import ROLES, SPEECH, TEXTS, are_collapsed
from usdm_sft.folder.durations import expand_rows
from usdm_sft.template.parts import REFERENCE_LAYOUT, ROW_PARTS, RowLayout, find_parts
from usdm_sft.template.special_tokens import NEWLINE_TOKENS
from usdm_sft.utils.texts import printable


def describe_row(row: Mapping[str, Any], layout: RowLayout = REFERENCE_LAYOUT) -> dict[str, Any]:
    """A row of a dataset folder as the page shows it.

    Args:
        row: The columns of a dataset folder.
        layout: Tells the parts of the row.

    Returns:
        `id`; `turns`, user and agent in turn, each with `left_out`, those of text and units that the template leaves out; `ids` and
        `labels`; `parts`, the runs of tokens of one part as [name, first token, number of tokens].

    Raises:
        ValueError: The numbers of ids and labels differ.
    """
    row = expand_rows(row) if are_collapsed(row) else row  # a unit of a turn is 20 ms of its sound
    ids, labels = row["input_ids"], row["labels"]
    if len(ids) != len(labels):
        raise ValueError(f"a row has {len(ids)} input_ids, but {len(labels)} labels: verify its folder")
    names = tuple(ROW_PARTS)
    parts, start = [], 0
    for part, run in groupby(find_parts(ids, layout).tolist()):
        parts.append([names[part], start, length := sum(1 for _ in run)])
        start += length
    turns = _describe_turns(row, layout.template.parts)
    return {"id": row["id"], "turns": turns, "ids": ids, "labels": labels, "parts": parts}


def _describe_turns(row: Mapping[str, Any], parts: Sequence[str]) -> list[dict[str, Any]]:
    """The turns of all exchanges. A row holds one value or one list per column. `parts` are those of the template."""
    columns = {
        (role, name): row[f"{role}_{name}"] if isinstance(row["user_text"], list) else [row[f"{role}_{name}"]]
        for role in ROLES
        for name in (*TEXTS, *SPEECH)
    }
    return [
        {"role": role, "left_out": [name for name in ("text", "units") if f"{role}_{name}" not in parts]}
        | {name: values[exchange] for (owner, name), values in columns.items() if owner == role}
        for exchange in range(len(columns["user", "text"]))
        for role in ROLES
    ]


def spell_tokens(
    examples: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, layout: RowLayout = REFERENCE_LAYOUT
) -> dict[int, str]:
    """The spelling of every id of the examples that is not a unit, with nothing hidden."""
    first, stop = layout.tokens.unit_0, layout.tokens.unit_0 + layout.tokens.num_units
    ids = sorted({token_id for example in examples for token_id in example["ids"] if not first <= token_id < stop})
    return {token_id: _spell(token_id, tokenizer) for token_id in ids}


def _spell(token_id: int, tokenizer: Tokenizer) -> str:
    token = tokenizer.id_to_token(token_id) if token_id >= 0 else None
    if token is None:
        return f"no token {token_id}"
    return "⏎" if token in NEWLINE_TOKENS else printable(token)


def list_left_out(split: Mapping[str, Any]) -> list[list[str]]:
    """Name and reason of every dialog and pair of a split in counts.json that was left out."""
    reasons: Sequence[Mapping[str, Any]] = [split.get(name) or {} for name in ("dialogs_left_out", "pairs_left_out")]
    return [[name, str(reason)] for group in reasons for name, reason in group.items()]
