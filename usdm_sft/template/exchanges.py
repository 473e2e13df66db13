"""The exchanges of a row, checked: texts as the template has them, units as token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from usdm_sft.template.config import Template, UnitRepetition
from usdm_sft.template.repetition import drop_repeats
from usdm_sft.utils.texts import text_problem

# A checked user turn and the answer to it, by part: texts as in the template, units as (num_units,) int32 arrays of token ids.
Exchange = dict[str, Any]


@dataclass(frozen=True)
class ExchangeReader:
    """Reads the exchanges of a row and refuses what a tokenizer would turn into other ids.

    Its methods raise a ValueError with the place and the remedy.

    Args:
        template: Its parts are the columns to read.
        unit_0: The id of unit 0.
        num_units: Number of units in the vocabulary.
        other_tokens: Matches added tokens of the tokenizer that `text_problem` does not know, or None.
        unit_repetition: "keep", or "collapse" to read one unit for each run of equal units.

    Raises:
        ValueError: `unit_repetition` is unknown.
    """

    template: Template
    unit_0: int
    num_units: int
    other_tokens: re.Pattern[str] | None
    unit_repetition: str = "keep"

    def __post_init__(self) -> None:
        if self.unit_repetition not in get_args(UnitRepetition):
            raise ValueError(
                f"unit_repetition is {self.unit_repetition!r}: give {' or '.join(get_args(UnitRepetition))}"
            )

    def exchanges(self, batch: Mapping[str, Sequence[Any]], i: int) -> list[Exchange]:
        """The exchanges of row `i` of a batch, whose columns have one value per row, or a list per row."""
        row = row_name(batch, i)
        values = {part: batch[part][i] for part in self.template.parts}
        for part, value in values.items():
            if value is None:
                raise ValueError(f"{row}: {part} is missing")
        if not values_have_lists(values):
            values = {part: [value] for part, value in values.items()}
        if len({len(value) for value in values.values()}) != 1:
            lengths = ", ".join(f"{part} {len(value)}" for part, value in values.items())
            raise ValueError(f"{row}: the columns have different numbers of exchanges ({lengths})")
        read = [
            self._read(dict(zip(values, exchange, strict=True)), f"{row}: ")
            for exchange in zip(*values.values(), strict=True)
        ]
        if not read:
            raise ValueError(f"{row}: it has no exchange")
        return read

    def prompt(self, given: Mapping[str, Any], history: Sequence[Sequence[Any]]) -> list[Exchange]:
        """The exchanges of a prompt.

        Args:
            given: The leading parts of the last exchange, whose transcript, which a model generated, may be empty.
            history: All parts of each earlier exchange.
        """
        parts = self.template.parts
        for number, each in enumerate(history):
            if len(each) != len(parts):
                raise ValueError(f"history[{number}] has {len(each)} parts: give {', '.join(parts)}")
        for part in given:
            if part not in parts:
                raise ValueError(f"the template has no {part}: give one or more of {', '.join(parts[:-1])}")
        if parts[-1] in given:
            raise ValueError(f"{parts[-1]} is the last part of the template: leave it out, the model generates it")
        for before, part in pairwise(parts):
            if part in given and before not in given:
                raise ValueError(f"{part} comes without {before}: give {before} as well")
        if not given:
            raise ValueError(f"{parts[0]} is missing: every prompt begins with it")
        exchanges = [self._read(dict(zip(parts, each, strict=True))) for each in history]
        empty = {"user_text": ""} if given.get("user_text") == "" and parts[0] != "user_text" else {}
        return [*exchanges, self._read({part: value for part, value in given.items() if part not in empty}) | empty]

    def _read(self, values: Mapping[str, Any], place: str = "") -> Exchange:
        """Check the parts of one exchange; `place` is what error messages begin with."""
        exchange: Exchange = {}
        for part, value in values.items():
            if part.endswith("_text"):
                exchange[part] = self._read_text(value, f"{place}{part}")
                continue
            exchange[part] = self._read_units(value, f"{place}{part}")
            if not len(exchange[part]) and part.replace("units", "text") not in self.template.parts:
                # The ids of the turn would be those of a line with a space.
                raise ValueError(f"{place}{part} is empty, and the template has no text in this turn: leave it out")
        return exchange

    def _read_text(self, text: str, place: str) -> str:
        """The text as the template has it."""
        problem = text_problem(text)
        text = self.template.fold_case(text)
        if problem is None and self.other_tokens is not None and (match := self.other_tokens.search(text)):
            problem = f"contains {match.group()!r}, an added token of the tokenizer"
        if problem is not None:
            raise ValueError(f"{place} {text[:80]!r} {problem}: correct the text")
        return text

    def _read_units(self, units: npt.ArrayLike, place: str) -> npt.NDArray[np.int32]:
        """(num_units,) int32 token ids of units; where they are collapsed, of each run of equal units."""
        units = np.asarray(units)
        if units.size == 0:
            return np.zeros(0, dtype=np.int32)
        if units.ndim != 1 or units.dtype.kind not in "iu":
            raise ValueError(f"{place} is not a flat list of integers")
        low, high = int(units.min()), int(units.max())
        if low < 0 or high >= self.num_units:
            raise ValueError(
                f"{place} contains unit {low if low < 0 else high}, but the tokenizer has units 0 to "
                f"{self.num_units - 1}: use the unit model and the tokenizer that belong together"
            )
        if self.unit_repetition == "collapse":
            units = drop_repeats(units)
        ids: npt.NDArray[np.int32] = units.astype(np.int32) + self.unit_0
        return ids


def row_name(batch: Mapping[str, Sequence[Any]], i: int) -> str:
    """The name of row `i` of a batch in error messages."""
    return f"row {batch['id'][i]}" if "id" in batch else f"row {i} of the batch"


def values_have_lists(values: Mapping[str, Any]) -> bool:
    """True if each value, by part, is a list of exchanges. A list of units is one exchange; a list of lists is several."""
    for part, value in values.items():
        if part.endswith("_text"):
            return not isinstance(value, str)
    first = next(iter(values.values()))
    return len(first) > 0 and np.ndim(first[0]) > 0


def match_other_tokens(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """A pattern for the added tokens that `text_problem` lets through, the longest first; None where there are none."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    # Added tokens for white space, which some tokenizers have, belong to texts.
    other = [content for content in added if content.strip("▁ ") and text_problem(f"a{content}") is None]
    return re.compile("|".join(map(re.escape, sorted(other, key=len, reverse=True)))) if other else None
