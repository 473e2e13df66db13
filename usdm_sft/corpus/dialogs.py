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
    dialogs: tuple[Dialog, ...]
    left_out: Mapping[str, str]
    dialog_ids: tuple[str, ...]
    pairs_left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_pairs(self) -> int:
        """Number of pairs in all dialogs."""
        return sum(1 for dialog in self.dialogs for _ in dialog.pairs())
