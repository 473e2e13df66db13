"""The exchanges of a row, checked: texts lower-cased, units as token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from usdm_sft.template.tokenizer import UNIT_0
from usdm_sft.utils.texts import text_problem

COLUMNS = ("user_units", "user_text", "agent_text", "agent_units")


class Exchange(NamedTuple):
    """A checked user turn and the answer to it: texts lower-cased, units as (num_units,) arrays of token ids."""

    user_units: npt.NDArray[np.int32]
    user_text: str
    agent_text: str
    agent_units: npt.NDArray[np.int32]


@dataclass(frozen=True)
class ExchangeReader:
    """Reads the exchanges of a row and refuses what a tokenizer would turn into other ids.

    Args:
        num_units: Number of units in the vocabulary.
        other_tokens: Matches added tokens of the tokenizer that `text_problem` does not know, or None.
    """

    num_units: int
    other_tokens: re.Pattern[str] | None

    def exchanges(self, batch: Mapping[str, Sequence[Any]], i: int) -> list[Exchange]:
        """The exchanges of row `i` of a batch.

        Args:
            batch: The `COLUMNS`, and `id` for error messages. A row has one value per column, or a list per column.
            i: Position of the row.

        Raises:
            ValueError: A value is missing, the columns have different numbers of exchanges, or a text or unit is not
                allowed.
        """
        row = f"row {batch['id'][i]}" if "id" in batch else f"row {i} of the batch"
        values = [batch[column][i] for column in COLUMNS]
        for column, value in zip(COLUMNS, values, strict=True):
            if value is None:
                raise ValueError(f"{row}: {column} is missing")
        if isinstance(values[1], str):
            values = [[value] for value in values]
        if len({len(value) for value in values}) != 1:
            lengths = ", ".join(f"{column} {len(value)}" for column, value in zip(COLUMNS, values, strict=True))
            raise ValueError(f"{row}: the columns have different numbers of exchanges ({lengths})")
        if not len(values[1]):
            raise ValueError(f"{row}: it has no exchange")
        return [
            Exchange(
                self.unit_ids(user_units, f"{row}: user_units"),
                self.text(user_text, f"{row}: user_text"),
                self.text(agent_text, f"{row}: agent_text"),
                self.unit_ids(agent_units, f"{row}: agent_units"),
            )
            for user_units, user_text, agent_text, agent_units in zip(*values, strict=True)
        ]

    def text(self, text: str, place: str) -> str:
        """The text lower-cased.

        Raises:
            ValueError: The template cannot contain it.
        """
        problem = text_problem(text)
        # Follows the Unicode version of Python: 3.11 and later lower-case 40 letters that 3.10, which the reference used, does
        # not (U+2C2F, U+A7C0, U+A7D0, U+A7D6, U+A7D8 and 35 of Vithkuqi, all new in Unicode 14). DailyTalk has none of them.
        text = text.lower()
        if problem is None and self.other_tokens is not None and (match := self.other_tokens.search(text)):
            problem = f"contains {match.group()!r}, an added token of the tokenizer"
        if problem is not None:
            raise ValueError(f"{place} {text[:80]!r} {problem}: correct the text")
        return text

    def unit_ids(self, units: npt.ArrayLike, place: str) -> npt.NDArray[np.int32]:
        """(num_units,) int32 token ids of units.

        Raises:
            ValueError: They are not a flat list of integers, or the tokenizer does not have one of them.
        """
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
        ids: npt.NDArray[np.int32] = units.astype(np.int32) + UNIT_0
        return ids


def match_other_tokens(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """A pattern for the added tokens that `text_problem` lets through, the longest first; None where there are none."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    other = [content for content in added if text_problem(f"a{content}") is None]
    return re.compile("|".join(map(re.escape, sorted(other, key=len, reverse=True)))) if other else None
