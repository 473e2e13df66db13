"""Utterances, dialogs and splits: the data that reading a corpus returns."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise


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

    Where an agent is named, only what this speaker answers makes a pair.
    """

    id: str
    utterances: tuple[Utterance, ...]
    agent: str | None = None

    def pairs(self) -> Iterator[tuple[Utterance, Utterance]]:
        """Every two neighbouring turns, the earlier as the user and the later as the agent."""
        for user, agent in pairwise(self.utterances):
            if self.agent in (None, agent.speaker):
                yield user, agent


@dataclass(frozen=True, slots=True)
class Split:
    """One split: the dialogs in order, and why each of the others was left out.

    Where audio is bad (`usdm_sft.corpus.bad_audio`), `dialogs` holds the parts of a dialog before and after it under the same id;
    `dialog_ids` holds each of the dialogs that were there before, once.
    """

    name: str
    dialogs: tuple[Dialog, ...]
    left_out: Mapping[str, str]
    dialog_ids: tuple[str, ...]
    pairs_left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_pairs(self) -> int:
        return sum(1 for dialog in self.dialogs for _ in dialog.pairs())
