"""The turns of a list as they are read: in compact form, each with its line, and grouped into dialogs at the end."""

import marshal
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter

from usdm_sft.corpus.dialogs import Utterance
from usdm_sft.utils.records import Records


class Turns:
    """The turns of one split list or manifest, in any order.

    Args:
        place: From the number of a line or row to its place in errors, such as file:line.
    """

    def __init__(self, place: Callable[[int], str]):
        self.place = place
        self._records = Records()
        self._dialogs, self._turns, self._numbers = array("q"), array("q"), array("Q")  # a value for each turn
        self._ids: dict[str, int] = {}  # dialog id -> its index, in order of appearance
        self._firsts = array("Q")  # number of the first line of each dialog
        self._starts, self._stops = array("q"), array("q")  # a range of turns that each dialog has without a gap
        self._others: dict[int, set[int]] = {}  # its other turns
        self._order: list[int] | None = None  # indices of the dialogs that `dialogs` yields

    def add(self, utterance: Utterance, number: int) -> None:
        """Add a turn.

        Args:
            utterance: The turn.
            number: Number of its line or row.
        """
        index = self._ids.setdefault(utterance.dialog_id, len(self._ids))
        if index == len(self._firsts):
            self._firsts.append(number)
            self._starts.append(utterance.turn)
            self._stops.append(utterance.turn)
        if utterance.turn == self._stops[index]:
            self._stops[index] += 1
        else:
            self._others.setdefault(index, set()).add(utterance.turn)
        self._dialogs.append(index)
        self._turns.append(utterance.turn)
        self._numbers.append(number)
        values = (utterance.id, utterance.turn, utterance.speaker, utterance.text, utterance.emotion, utterance.audio)
        self._records.append(marshal.dumps(values))

    def find(self, dialog_id: str, turn: int) -> int | None:
        """Return the number of the first line with a turn of a dialog, or None."""
        index = self._ids.get(dialog_id)
        if index is None:
            return None
        if not self._starts[index] <= turn < self._stops[index] and turn not in self._others.get(index, ()):
            return None
        lines = zip(self._dialogs, self._turns, self._numbers, strict=True)
        return next(number for *key, number in lines if key == [index, turn])

    def first_lines(self) -> Iterator[tuple[str, int]]:
        """Yield the id of each dialog, and the number of its first line."""
        ids = list(self._ids)
        return ((ids[index], self._firsts[index]) for index in self._indices())

    def arrange(self, dialog_ids: Iterable[str]) -> None:
        """Let `dialogs` yield these dialogs in this order, and no others."""
        self._order = [self._ids[dialog_id] for dialog_id in dialog_ids]

    def dialogs(self) -> Iterator[tuple[str, list[tuple[Utterance, int]]]]:
        """Yield the id of each dialog, and its turns in order, each with the number of its line."""
        # Imported here because the command line reads this module, and numpy is slow to import.
        import numpy as np

        ranks = np.full(len(self._ids), -1)
        ranks[self._indices()] = np.arange(len(self._indices()))
        ranked = ranks[np.frombuffer(self._dialogs, np.int64)] if self._dialogs else ranks[:0]
        order = np.lexsort((np.frombuffer(self._turns, np.int64), ranked)) if len(ranked) else ranked
        ids = list(self._ids)
        order = order[ranked[order] >= 0]
        keys = ((self._dialogs[position], position) for position in map(int, order))
        for index, group in groupby(keys, key=itemgetter(0)):
            yield ids[index], [(self._load(ids[index], position), self._numbers[position]) for _, position in group]

    def _indices(self) -> "range | list[int]":
        return range(len(self._ids)) if self._order is None else self._order

    def _load(self, dialog_id: str, position: int) -> Utterance:
        utterance_id, *values = marshal.loads(self._records[position])
        return Utterance(utterance_id, dialog_id, *values)
