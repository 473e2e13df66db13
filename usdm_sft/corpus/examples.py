"""A dialog -> the examples that each config makes of it: which user/agent pairs a row holds, one after the other.

    single_turn             (0 1) (1 2) (2 3) (3 4)           every two neighbouring turns, as USDM is trained
    single_turn, history 1  (0 1) (1 2) (0 1 2 3) (1 2 3 4)   the pair, after as many earlier ones as there are, up to 1
    multi_turn              (0 1 2 3) (1 2 3 4)               whole conversations, from the even start and from the odd one

Standard library only. The builder and the plan of work shards both read this module, so they agree on every row.
"""

from collections.abc import Container, Iterator
from itertools import takewhile
from typing import NamedTuple

from usdm_sft.corpus.dialogs import Dialog, Utterance

SINGLE_TURN = "single_turn"
MULTI_TURN = "multi_turn"
CONFIGS = (SINGLE_TURN, MULTI_TURN)


class Example(NamedTuple):
    """What a row is made of: its exchanges, each a user's and an agent's utterance, and the user turn that names it."""

    dialog_id: str
    turn: int
    exchanges: tuple[tuple[Utterance, Utterance], ...]

    @property
    def id(self) -> str:
        """Such as "d23_0"; each id occurs once in a config."""
        return example_id(self.dialog_id, self.turn)


def example_id(dialog_id: str, turn: int) -> str:
    return f"{dialog_id}_{turn}"


def check_config(name: str, history: int) -> None:
    """
    Raises:
        ValueError: There is no such config, or it takes no such history.
    """
    if name not in CONFIGS:
        raise ValueError(f"config {name!r} is unknown: choose one of {', '.join(CONFIGS)}")
    if history < 0:
        raise ValueError(f"history is {history}: give the number of earlier exchanges, 0 or more")
    if history and name != SINGLE_TURN:
        raise ValueError(f"history is {history}, but {name} holds whole conversations: set it with {SINGLE_TURN} only")


def has_lists(name: str, history: int) -> bool:
    """Whether the user and agent columns of the config hold lists, one entry an exchange."""
    return name == MULTI_TURN or history > 0


def make_examples(dialog: Dialog, name: str, history: int = 0) -> Iterator[Example]:
    """The examples of a dialog, by turn.

    Args:
        dialog: Of two turns or more.
        name: One of `CONFIGS`.
        history: Earlier exchanges that a pair of single_turn brings along, oldest first, where there are so many.
    """
    pairs = {pair[0].turn: pair for pair in dialog.pairs()}
    if name == MULTI_TURN:
        # Every other pair goes on where the one before ended; a last lone turn is left out.
        runs = [_chain(pairs, start, +2, len(pairs)) for start in pairs if start - 2 not in pairs]
    else:
        runs = [_chain(pairs, last, -2, history + 1)[::-1] for last in pairs]
    for turns in runs:
        named_after = turns[0] if name == MULTI_TURN else turns[-1]
        yield Example(dialog.id, named_after, tuple(pairs[turn] for turn in turns))


def _chain(turns: Container[int], first: int, step: int, limit: int) -> list[int]:
    """`first` and the turns that follow it in steps, up to one that is not there."""
    return list(takewhile(turns.__contains__, range(first, first + step * limit, step)))
