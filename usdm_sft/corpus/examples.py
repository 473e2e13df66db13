"""The examples that each config makes from a dialog: the user/agent pairs of each row, in order.

    single_turn             (0 1) (1 2) (2 3) (3 4)           every two neighbouring turns, as USDM is trained
    single_turn, history 1  (0 1) (1 2) (0 1 2 3) (1 2 3 4)   the pair, after up to 1 earlier one
    multi_turn              (0 1 2 3) (1 2 3 4)               whole conversations, from the even start and from the odd one

The builder and the plan of work shards both use this module, so they agree on every row.
"""

from collections.abc import Container, Iterator
from itertools import takewhile
from typing import Final, NamedTuple

from usdm_sft.corpus.dialogs import Dialog, Utterance

SINGLE_TURN: Final = "single_turn"
MULTI_TURN: Final = "multi_turn"
CONFIGS = (SINGLE_TURN, MULTI_TURN)


class Example(NamedTuple):
    """The content of one row: its exchanges (a user utterance and an agent utterance each) and the user turn in its id."""

    dialog_id: str
    turn: int
    exchanges: tuple[tuple[Utterance, Utterance], ...]

    @property
    def id(self) -> str:
        """The id of the row, such as "d23_0"; it is unique within a config."""
        return example_id(self.dialog_id, self.turn)


def example_id(dialog_id: str, turn: int) -> str:
    """Return the id of the row of a dialog and a user turn, such as "d23_0"."""
    return f"{dialog_id}_{turn}"


def check_config(name: str, history: int) -> None:
    """Check a config name and its history.

    Raises:
        ValueError: The config does not exist, or it does not support this history.
    """
    if name not in CONFIGS:
        raise ValueError(f"config {name!r} is unknown: choose one of {', '.join(CONFIGS)}")
    if history < 0:
        raise ValueError(f"history is {history}: give the number of earlier exchanges, 0 or more")
    if history and name != SINGLE_TURN:
        raise ValueError(f"history is {history}, but {name} holds whole conversations: set it with {SINGLE_TURN} only")


def config_has_lists(name: str, history: int) -> bool:
    """Return True if the user and agent columns of the config are lists, one entry per exchange."""
    return name == MULTI_TURN or history > 0


def first_turn(turn: int, num_exchanges: int, history: int) -> int:
    """Return the first turn of a row: a row with history is named after its last pair, every other row after its first.

    Args:
        turn: The turn in the id of the row, or its position in the dialog.
        num_exchanges: Number of exchanges of the row.
        history: As in the config.
    """
    return turn - 2 * (num_exchanges - 1) if history else turn


def make_examples(dialog: Dialog, name: str, history: int = 0) -> Iterator[Example]:
    """Yield the examples of a dialog, by turn.

    Args:
        dialog: A dialog of two turns or more.
        name: One of `CONFIGS`.
        history: Number of earlier exchanges before the pair in a single_turn row, oldest first; fewer at the start of a dialog.
    """
    pairs = {pair[0].turn: pair for pair in dialog.pairs()}
    if name == MULTI_TURN:
        # A conversation takes every second pair; a last turn without an answer is left out.
        runs = [_chain(pairs, start, +2, len(pairs)) for start in pairs if start - 2 not in pairs]
    else:
        runs = [_chain(pairs, last, -2, history + 1)[::-1] for last in pairs]
    for turns in runs:
        named_after = turns[-1] if history else turns[0]  # `first_turn`
        yield Example(dialog.id, named_after, tuple(pairs[turn] for turn in turns))


def _chain(turns: Container[int], first: int, step: int, limit: int) -> list[int]:
    """Return `first` and the turns that follow it in steps, up to a missing one and at most `limit`."""
    return list(takewhile(turns.__contains__, range(first, first + step * limit, step)))
