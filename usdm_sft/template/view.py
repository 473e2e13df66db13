"""An example for people: the template as it is trained on, with what bears loss set apart.

What is shown follows the labels and nothing else, so the stop tokens are marked as well.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.template.tokenizer import SPACE, UNIT_0
from usdm_sft.utils.texts import printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHOWN_UNITS = 2  # at either end of a run of units
BLUE, PLAIN = "\x1b[1;34m", "\x1b[0m"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Part(NamedTuple):
    """A stretch of an example in which either every token bears loss or none does."""

    labelled: bool
    ids: list[int]
    text: str  # units abbreviated, what cannot be printed escaped


def split_parts(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer) -> list[Part]:
    """Cut an example where its labels begin and end.

    Args:
        input_ids: Of one row.
        labels: As many, -100 where no loss falls.
        tokenizer: The one that the ids belong to.

    Raises:
        ValueError: There are not as many.
    """
    if len(input_ids) != len(labels):
        raise ValueError(f"a row has {len(input_ids)} input_ids, but {len(labels)} labels: verify its folder")
    parts = []
    tokens = zip(input_ids, labels, strict=True)
    for labelled, run in groupby(tokens, key=lambda token: token[1] != IGNORE_INDEX):
        ids = [token_id for token_id, _ in run]
        parts.append(Part(labelled, ids, _text(ids, tokenizer)))
    return parts


def format_example(row: Mapping[str, Any], tokenizer: Tokenizer, *, color: bool, ids: bool = False) -> str:
    """One row -> lines for a terminal; "loss" stands before what is labelled, which is blue as well where `color` is set."""
    parts = split_parts(row["input_ids"], row["labels"], tokenizer)
    lines = [title(row)]
    for part in parts:
        margin = "loss  " if part.labelled else "      "
        for line in part.text.splitlines():
            lines.append(margin + (f"{BLUE}{line}{PLAIN}" if color and part.labelled else line))
        if ids:
            lines += textwrap.wrap(" ".join(map(str, part.ids)), 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def title(row: Mapping[str, Any]) -> str:
    """Name and size of a row."""
    labelled = sum(label != IGNORE_INDEX for label in row["labels"])
    return f"{printable(row['id'])}: {len(row['input_ids'])} tokens, {labelled} labelled"


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Every token as it is spelled, so that nothing is hidden: newlines as ⏎, the "▁" that ends the speech as itself."""
    pieces: list[str] = []
    for is_unit, run in groupby(ids, key=lambda token_id: _is_unit(token_id, tokenizer)):
        if is_unit:
            units = [tokenizer.id_to_token(token_id) for token_id in run]
            if len(units) > 2 * SHOWN_UNITS + 1:
                left_out = f" … {len(units) - 2 * SHOWN_UNITS} units … "
                units = [*units[:SHOWN_UNITS], left_out, *units[-SHOWN_UNITS:]]
            pieces += units
        else:
            pieces.append(_spell(list(run), tokenizer))
    return "".join(pieces)


def _is_unit(token_id: int, tokenizer: Tokenizer) -> bool:
    return token_id >= UNIT_0 and (tokenizer.id_to_token(token_id) or "").startswith("<|unit")


def _spell(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    spelled = b""
    for position, token_id in enumerate(ids):
        token = tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            token = f"<no token {token_id}>"
        if byte := _BYTE.fullmatch(token):
            spelled += bytes([int(byte[1], 16)])
        else:
            spelled += (token if token_id == SPACE and not position else token.replace("▁", " ")).encode()
    return printable(spelled.decode(errors="backslashreplace")).replace("\n", "⏎\n")
