"""The form of rows as data: which ids stand before, between and after the parts of exchanges, and how texts are encoded there.

`text_encoder.make_heading_form` makes the form with headings, as the reference has it, and `chat.make_chat_form` that of a chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from usdm_sft.template.exchanges import Exchange

Ids = npt.NDArray[np.int32]
NO_IDS = np.zeros(0, dtype=np.int32)

# Of an exchange: is it the first of its row, and is it the last.
_PLACES = ((True, True), (True, False), (False, False), (False, True))


def place_of(position: int, number: int) -> int:
    """The index in `RowForm.exchanges` of an exchange, from its position among a number of exchanges."""
    return _PLACES.index((position == 0, position == number - 1))


def as_ids(ids: Sequence[int]) -> Ids:
    """(num_tokens,) int32 ids."""
    return np.array(ids, dtype=np.int32)


class Surroundings(NamedTuple):
    """What a tokenizer gets to read before and after a text, whose ids it may change, and the ids of both.

    Attributes:
        before: The string before the text.
        before_ids: Its ids.
        after: The string after the text.
        after_ids: Its ids.
        strips_left: True if white space at the beginning of the text would be lost in the template.
        strips_right: True if white space at its end would be lost.
    """

    before: str = ""
    before_ids: tuple[int, ...] = ()
    after: str = ""
    after_ids: tuple[int, ...] = ()
    strips_left: bool = False
    strips_right: bool = False

    def cut(self, text: str, ids: Sequence[int]) -> Ids | None:
        """The ids of a text from those of the whole string; None if the text would change, or shares a token with its neighbours."""
        if (self.strips_left and text != text.lstrip()) or (self.strips_right and text != text.rstrip()):
            return None
        start, stop = len(self.before_ids), len(ids) - len(self.after_ids)
        if start > stop or tuple(ids[:start]) != self.before_ids or tuple(ids[stop:]) != self.after_ids:
            return None
        return as_ids(ids[start:stop])


class Piece(NamedTuple):
    """A piece of an exchange: the part that it belongs to, or None; and its ids, or None where those of the part stand."""

    part: str | None
    ids: Ids | None = None


@dataclass(frozen=True)
class RowForm:
    """Everything in a row besides the ids of its texts and units.

    Attributes:
        opening: The ids before the first exchange.
        exchanges: The pieces of an exchange, for the only, the first, a middle and the last one of a row. The token that ends a part
            belongs to it.
        closing: The ids after the last exchange.
        surroundings: Of each text, by its part and the place of its exchange (`place_of`).
    """

    opening: Ids
    exchanges: tuple[tuple[Piece, ...], ...]
    closing: Ids
    surroundings: Mapping[tuple[str, int], Surroundings]

    def lay_out(self, exchange: Exchange, position: int, number: int) -> Iterator[tuple[Ids, str | None]]:
        """The ids of an exchange with the part that they belong to, up to the first part that the exchange lacks.

        Its texts are ids; `position` is its place among the `number` of exchanges of the row.
        """
        for part, ids in self.exchanges[place_of(position, number)]:
            if ids is None:
                if part not in exchange:
                    return
                ids = exchange[part]
            yield ids, part
