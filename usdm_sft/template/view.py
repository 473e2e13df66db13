"""Show an example to people: the text of the template with the labelled tokens marked.

The marks follow the labels and nothing else, so the stop tokens are marked as well.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.utils.texts import printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHOWN_UNITS = 2  # at each end of a run of units
BLUE, PLAIN = "\x1b[1;34m", "\x1b[0m"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class LabelledSpan(NamedTuple):
    """A run of tokens that are all labelled or all unlabelled."""

    labelled: bool
    ids: list[int]
    text: str  # runs of units abbreviated, unprintable characters escaped


def split_parts(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Tokenizer) -> list[LabelledSpan]:
    """Split a row into labelled and unlabelled parts.

    Args:
        input_ids: The ids of the row.
        labels: One per id; unlabelled tokens have -100.
        tokenizer: The tokenizer of the ids.

    Raises:
        ValueError: The numbers of ids and labels differ.
    """
    if len(input_ids) != len(labels):
        raise ValueError(f"a row has {len(input_ids)} input_ids, but {len(labels)} labels: verify its folder")
    parts = []
    tokens = zip(input_ids, labels, strict=True)
    for labelled, run in groupby(tokens, key=lambda token: token[1] != IGNORE_INDEX):
        ids = [token_id for token_id, _ in run]
        parts.append(LabelledSpan(labelled, ids, _text(ids, tokenizer)))
    return parts


def format_example(row: Mapping[str, Any], tokenizer: Tokenizer, *, color: bool, ids: bool = False) -> str:
    """Lines for a terminal. Labelled lines begin with "loss".

    Args:
        row: Columns `id`, `input_ids` and `labels`.
        tokenizer: The tokenizer of the ids.
        color: Print labelled lines in blue.
        ids: Print the ids below each part.
    """
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
    """The text of the tokens with nothing hidden: newlines as ⏎, the "▁" after the agent's units as itself."""
    pieces: list[str] = []
    for is_unit, run in groupby(ids, key=lambda token_id: _token(token_id, tokenizer).startswith("<|unit")):
        if not is_unit:
            pieces.append(printable(_spell([*run], tokenizer)).replace("\n", "⏎\n"))
            continue
        units = [_token(token_id, tokenizer) for token_id in run]
        if len(units) > 2 * SHOWN_UNITS + 1:
            left_out = f" … {len(units) - 2 * SHOWN_UNITS} units … "
            units = [*units[:SHOWN_UNITS], left_out, *units[-SHOWN_UNITS:]]
        pieces += units
    return "".join(pieces)


def _token(token_id: int, tokenizer: Tokenizer) -> str:
    token = tokenizer.id_to_token(token_id) if token_id >= 0 else None
    return f"<no token {token_id}>" if token is None else token


def _spell(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of tokens that are not units; an id outside the vocabulary becomes "<no token N>"."""
    decoder = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b""
    if b"ByteLevel" in decoder or b"WordPiece" in decoder:  # tokens are no text themselves, as "Ġyes" and "##ing"
        added, size = tokenizer.get_added_tokens_decoder(), tokenizer.get_vocab_size()
        spelled = ""
        for are_added, run in groupby(ids, key=added.__contains__):
            tokens = [*run]
            if are_added or not all(0 <= token_id < size for token_id in tokens):
                spelled += "".join(_token(token_id, tokenizer) for token_id in tokens)
            else:
                spelled += tokenizer.decode(tokens, skip_special_tokens=False)
        return spelled
    content = b""
    for position, token_id in enumerate(ids):
        token = _token(token_id, tokenizer)
        if byte := _BYTE.fullmatch(token):
            content += bytes([int(byte[1], 16)])
        else:
            content += (token if token == "▁" and not position else token.replace("▁", " ")).encode()
    return content.decode(errors="backslashreplace")
