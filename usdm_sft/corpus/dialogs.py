"""Utterances, dialogs and splits: the data that reading a corpus returns."""

import marshal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import overload

from usdm_sft.utils.records import Records


@dataclass(frozen=True, slots=True)
class Utterance:
    """One line of a split list or manifest; `audio` is the address of the recording (`usdm_sft.audio.addresses`)."""

    id: str
    dialog_id: str
    turn: int
    speaker: str
    text: str
    emotion: str
    audio: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Dialog:
    """The utterances of one dialog by turn; two neighbours never have the same speaker.

    If `agent` is set, only the turns of this speaker are the agent's half of a pair.
    """

    id: str
    utterances: tuple[Utterance, ...]
    agent: str | None = None

    def pairs(self) -> Iterator[tuple[Utterance, Utterance]]:
        """Yield every two neighbouring turns, the earlier as the user and the later as the agent."""
        for user, agent in pairwise(self.utterances):
            if self.agent in (None, agent.speaker):
                yield user, agent


class CompactDialogs(Sequence[Dialog]):
    """Dialogs as records of 200 bytes for an utterance, most of them on the disk; the objects would take 600 bytes of memory.

    Each access makes new objects.

    Args:
        dialogs: The first dialogs.
    """

    def __init__(self, dialogs: Iterable[Dialog] = ()):
        self._records = Records()
        for dialog in dialogs:
            self.append(dialog)

    def append(self, dialog: Dialog) -> None:
        """Add a dialog at the end."""
        turns = [(turn.id, turn.turn, turn.speaker, turn.text, turn.emotion, turn.audio) for turn in dialog.utterances]
        self._records.append(marshal.dumps((dialog.id, dialog.agent, turns)))

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Dialog: ...
    @overload
    def __getitem__(self, index: slice) -> list[Dialog]: ...
    def __getitem__(self, index: int | slice) -> Dialog | list[Dialog]:
        chosen = range(len(self))[index]
        return self._load(chosen) if isinstance(chosen, int) else [self._load(each) for each in chosen]

    def __iter__(self) -> Iterator[Dialog]:
        return map(self._load, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Dialog.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # it grows

    def _load(self, index: int) -> Dialog:
        dialog_id, agent, turns = marshal.loads(self._records[index])
        return Dialog(dialog_id, tuple(Utterance(turn[0], dialog_id, *turn[1:]) for turn in turns), agent)


@dataclass(frozen=True, slots=True)
class Split:
    """The dialogs of one split in order, and why the others were left out.

    Attributes:
        name: Such as "train".
        dialogs: The dialogs that have a pair. Bad audio cuts a dialog into parts, which keep its id (`usdm_sft.corpus.bad_audio`).
        left_out: Dialog id -> the reason.
        dialog_ids: The id of each dialog before bad audio was left out, once.
        pairs_left_out: Id of the pair ("d23_0") -> what is wrong with its audio.
    """

    name: str
    dialogs: Sequence[Dialog]
    left_out: Mapping[str, str]
    dialog_ids: tuple[str, ...]
    pairs_left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_pairs(self) -> int:
        """Number of pairs in all dialogs."""
        return sum(1 for dialog in self.dialogs for _ in dialog.pairs())

    def utterances(self) -> Iterator[Utterance]:
        """Yield the utterances of all dialogs, in order."""
        return (utterance for dialog in self.dialogs for utterance in dialog.utterances)
