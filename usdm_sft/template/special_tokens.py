"""The ids that the template puts around texts and units, read from a tokenizer and proved by probes.

`read_tokens` serves every tokenizer of transformers that has tokens for units, whatever its algorithm. The ids of USTM, which the
reference uses in its own form, are those of `ustm_tokens` in tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import Tokenizer

from usdm_sft.template.config import OFFLINE
from usdm_sft.utils.errors import is_panic
from usdm_sft.utils.texts import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CORRESPOND_TOKEN, CONTINUE_TOKEN = "<|correspond|>", "<|continue|>"
BYTE_NEWLINE = "<0x0A>"
NEWLINE_TOKENS = ("\n", "Ċ", BYTE_NEWLINE)  # as itself, in a byte-level tokenizer, and as a byte
OR_OFFLINE = f", or use {OFFLINE!r}"
_ADD_UNITS = "add the tokens for units with `dailytalk-usdm tokenizer`"


class TemplateTokens(NamedTuple):
    """The ids around texts and units.

    Attributes:
        opening: What the tokenizer puts before every text, such as BOS; or nothing.
        closing: EOS, or nothing.
        newline: A newline.
        end_of_units: After units that end a turn; the first id is the stop token.
        correspond: `<|correspond|>`.
        continue_: `<|continue|>`.
        unit_0: Unit 0; the other units follow.
        num_units: Number of units.
        unknown: What stands for characters that the tokenizer does not know; byte-level tokenizers have nothing.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    newline: int
    end_of_units: tuple[int, ...]
    correspond: int
    continue_: int
    unit_0: int
    num_units: int
    unknown: tuple[int, ...] = ()


def unit_token(unit: int) -> str:
    return f"<|unit{unit}|>"


@contextmanager
def naming_errors(name: str = "this tokenizer", instead: str = "") -> Iterator[None]:
    """Turn the errors of tokenizers into a ValueError with the name of the tokenizer. Other errors pass.

    tokenizers raises plain `Exception`, and panics where a tokenizer.json contradicts itself, often not before the first text.

    Raises:
        ValueError: tokenizers raised an error.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and not is_panic(error):
            raise
        raise ValueError(
            f"{name} has a tokenizer that cannot be used ({first_line(error)}): download it again{instead}"
        ) from error


def plain_copy(tokenizer: Tokenizer) -> Tokenizer:
    """A copy without padding and truncation."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def without_padding(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself if it has neither padding nor truncation, else a plain copy, which takes a quarter of a second."""
    return tokenizer if tokenizer.padding is None and tokenizer.truncation is None else plain_copy(tokenizer)


def read_tokens(tokenizer: PreTrainedTokenizerFast, name: str = "this tokenizer") -> TemplateTokens:
    """Read the ids of the template from a tokenizer, and prove with probes what `TemplateEncoder` relies on.

    Args:
        tokenizer: A tokenizer with tokens for units, as `build_tokenizer` returns it.
        name: Its name in error messages.

    Raises:
        ValueError: A token is missing, the ids of units have a gap, a token for units is not read as one id, or a newline is not
            one id. The message says which.
    """
    backend = without_padding(tokenizer.backend_tokenizer)
    correspond, continue_, unit_0 = (
        _require_token(backend, token, name) for token in (CORRESPOND_TOKEN, CONTINUE_TOKEN, unit_token(0))
    )
    num_units = _count_units(backend, unit_0, name)
    for text, expected in (
        (unit_token(0) + CORRESPOND_TOKEN + CONTINUE_TOKEN, [unit_0, correspond, continue_]),
        (unit_token(num_units - 1) * 2, [unit_0 + num_units - 1] * 2),
    ):
        if (found := backend.encode(text, add_special_tokens=False).ids) != expected:
            raise ValueError(
                f"{name} gives {found[:20]} for {text!r} instead of {expected}: it does not read a token for units as one id; "
                f"{_ADD_UNITS}"
            )
    if (newline := find_newline(backend)) is None:
        found = backend.encode("\n", add_special_tokens=False).ids
        raise ValueError(f"{name} gives {found[:20]} for a newline, which must be one id: {_ADD_UNITS}")
    return TemplateTokens(
        opening=_find_opening(backend),
        closing=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
        newline=newline,
        end_of_units=(newline,),
        correspond=correspond,
        continue_=continue_,
        unit_0=unit_0,
        num_units=num_units,
        unknown=() if tokenizer.unk_token_id is None else (tokenizer.unk_token_id,),
    )


def find_newline(tokenizer: Tokenizer) -> int | None:
    """The id of a newline, or None where it is several ids or is lost.

    Many tokenizers put a space ("▁" or "Ġ") before every string, which is not part of the newline.
    """
    tokens = tokenizer.encode("\n", add_special_tokens=False).tokens
    if not tokens or not {*tokens[:-1]} <= {"▁", "Ġ"} or tokens[-1] not in NEWLINE_TOKENS:
        return None
    return tokenizer.token_to_id(tokens[-1])


def _require_token(tokenizer: Tokenizer, token: str, name: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"{name} has no {token}: {_ADD_UNITS}")
    return token_id


def _count_units(tokenizer: Tokenizer, unit_0: int, name: str) -> int:
    num_units = 1
    while (found := tokenizer.token_to_id(unit_token(num_units))) == unit_0 + num_units:
        num_units += 1
    if found is not None:
        raise ValueError(
            f"{name} has id {found} for {unit_token(num_units)} instead of {unit_0 + num_units}: the ids of units must follow "
            f"each other; {_ADD_UNITS}"
        )
    return num_units


def _find_opening(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that the tokenizer itself puts before a text."""
    marked = tokenizer.encode("a", add_special_tokens=True)
    before = marked.special_tokens_mask.index(0) if 0 in marked.special_tokens_mask else 0
    return tuple(marked.ids[:before])
