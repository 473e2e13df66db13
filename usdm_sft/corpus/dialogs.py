"""Utterances, dialogs and splits: the data that reading a corpus returns; and the interface of what reads one."""

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from string import digits
from typing import TYPE_CHECKING, Literal, NamedTuple

from usdm_sft.corpus.problems import add_problem

if TYPE_CHECKING:
    import numpy as np

FilePath = str | os.PathLike[str]
CorpusName = Literal["manifest", "dailytalk", "lhotse", "nemo", "kaldi", "rttm", "alignments", "segments", "dataset"]


class BadRow(NamedTuple):
    """Why a turn cannot be used: the reason under which it is counted, and what is wrong with this turn."""

    reason: str
    problem: str


@dataclass(frozen=True, slots=True)
class Utterance:
    """One line of a split list or manifest.

    Attributes:
        audio: The address of the recording (`usdm_sft.audio.addresses`); "" where the corpus has units and no recording.
        units: (num_units,) uint16, the units that the corpus has already, as a row has them (`usdm_sft.corpus.unit_reader`); None if a
            unit model makes them.
        more: Further columns of a manifest that are read, as texts; None if there are none.
        bad: Why the turn is to be left out; None if it is good.
        lines: Number of its line or row, in order of a joined turn; of a bad one, that of the bad row (`Split.locate`).
    """

    id: str
    dialog_id: str
    turn: int
    speaker: str
    text: str
    emotion: str
    audio: str = field(default="", compare=False)
    units: "np.ndarray | None" = field(default=None, compare=False, repr=False)
    more: Mapping[str, str] | None = field(default=None, compare=False)
    bad: BadRow | None = field(default=None, compare=False)
    lines: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Dialog:
    """The utterances of one dialog by turn. Two neighbours have the same speaker only if a long pause is between them (`Rules.max_gap`).

    If `agent` is set, only the turns of this speaker are the agent's half of a pair.
    """

    id: str
    utterances: tuple[Utterance, ...]
    agent: str | None = None

    def pairs(self) -> Iterator[tuple[Utterance, Utterance]]:
        """Yield every two neighbouring turns, the earlier as the user and the later as the agent."""
        for user, agent in pairwise(self.utterances):
            if self.agent in (None, agent.speaker) and user.speaker != agent.speaker:
                yield user, agent


class Turns:
    """The turns of one split list or manifest, in any order.

    Args:
        place: Returns the place of a line or row in errors, such as file:line, from its number.

    Attributes:
        dialogs: Dialog id -> its turns, each with the number of its line, in the order in which they were added.
        further: Names of columns beside those of a manifest, in the order in which they were found.
    """

    def __init__(self, place: Callable[[int], str]):
        self.place = place
        self.dialogs: dict[str, list[tuple[Utterance, int]]] = {}
        self._numbers: dict[Hashable, int] = {}  # utterance id, or dialog and segment -> number of its line
        self._segments: dict[
            str, list[tuple[float, float, str, int, Utterance]]
        ] = {}  # dialog id -> turns without a number
        self.further: dict[str, None] = {}
        self._incomplete: set[str | None] = set()  # dialogs of wrong rows; None for a row whose dialog is unknown

    def mark_incomplete(self, dialog_id: str | None) -> None:
        """Remember that a row of this dialog, or of an unknown one, is wrong, so that its turn may be missing."""
        self._incomplete.add(dialog_id)

    def may_lack(self, dialog_id: str) -> bool:
        """Return True if a turn of the dialog may be missing because a row is wrong."""
        return not self._incomplete.isdisjoint((dialog_id, None))

    def add(self, utterance: Utterance, number: int) -> int | None:
        """Add the turn of a line or row, or return the number of an earlier one with its id."""
        first = self._numbers.setdefault(utterance.id, number)
        if first != number:
            return first
        self.dialogs.setdefault(utterance.dialog_id, []).append((utterance, number))
        return None

    def add_segment(self, utterance: Utterance, number: int, start: float, end: float) -> int | None:
        """Add a turn that has no number yet, or return the number of an earlier line with the same segment of the same speaker.

        Args:
            utterance: The turn; its `id` and `turn` do not count.
            number: Number of its line or row.
            start: Start in seconds.
            end: End in seconds.
        """
        name = (utterance.dialog_id, utterance.speaker, utterance.audio, start, end)
        first = self._numbers.setdefault(name, number)
        if first != number:
            return first
        self.dialogs.setdefault(utterance.dialog_id, [])  # the place of the dialog among the others
        segments = self._segments.setdefault(utterance.dialog_id, [])
        segments.append((start, end, utterance.speaker, number, utterance))
        return None

    def number_segments(self, problems: list[str]) -> None:
        """Number the turns that have no number from 0 in each dialog, by start, then end, speaker and line."""
        for dialog_id, segments in self._segments.items():
            if self.dialogs[dialog_id]:
                place, [(first, line), *_] = self.place(segments[0][3]), self.dialogs.pop(dialog_id)
                problem = f"turn missing, but dialog {dialog_id} has turn {first.turn} at {self.place(line)}"
                add_problem(problems, f"{place}: {problem}: number all turns of a dialog, or none")
                continue
            segments.sort(key=lambda segment: segment[:4])
            self.dialogs[dialog_id] = [
                (replace(utterance, id=f"{dialog_id}_{turn}", turn=turn), number)
                for turn, (*_, number, utterance) in enumerate(segments)
            ]
        self._segments.clear()


@dataclass(frozen=True)
class RowOptions:
    """How the rows of a manifest are read.

    Attributes:
        columns: Names of further columns that are read; None for all.
        skips_bad: Rows that `Utterance.bad` has a reason for are turns. Otherwise they are problems.
        needs_text: The template has texts, so that each row needs one.
    """

    columns: tuple[str, ...] | None = ()
    skips_bad: bool = False
    needs_text: bool = True


DEFAULT = RowOptions()


class Recipe(NamedTuple):
    """How one kind of corpus is found and read. Nothing else asks which kind a corpus is (`usdm_sft.corpus.find.RECIPES`).

    Attributes:
        name: Its name for the option `corpus`.
        kind: The kind of its split files, as counts.json names it.
        looks_for: What `find` looks for, in words.
        reads: Returns True if a file is such a split file.
        find: Returns the split files of a corpus by split, or None if it is of another kind. Its arguments are `data_dir`, the folder
            of the cache or None, True if files may be downloaded, and True if the units of the corpus are wanted.
        read: Reads the turns of a split file. Its arguments are the file, a list to which problems are added, and `data_dir` or None.
        read_units: The same with the units of the turns, which its last argument checks; None if such files have none.
        takes_options: True if `read` and `read_units` take `options`, a `RowOptions`.
        root: Returns one path for all spellings of `data_dir`.
        files: Returns all files that decide the turns of a split file; its second argument is `data_dir` or None.
        needs_data_dir: True if the split files alone do not say where recordings are.
        first_turn: Number of the first turn of every dialog; None for any number.
        max_speakers: Number of speakers of a dialog in which each side is the agent in turn; None for any number.
    """

    name: CorpusName
    kind: str
    looks_for: str
    reads: Callable[[Path], bool]
    find: Callable[[FilePath, str | Path | None, bool, bool], dict[str, Path] | None]
    read: Callable[..., Turns]
    read_units: Callable[..., Turns] | None = None
    takes_options: bool = False
    root: Callable[[Path], Path] = lambda data_dir: data_dir
    files: Callable[[Path, FilePath | None], list[Path]] = lambda path, data_dir: [path]
    needs_data_dir: bool = False
    first_turn: int | None = None
    max_speakers: int | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """The dialogs of one split in order, and why the others were left out.

    Attributes:
        name: Such as "train".
        dialogs: The dialogs that have a pair. Bad audio cuts a dialog into parts, which keep its id (`usdm_sft.corpus.left_out`).
        left_out: Dialog id -> the reason.
        dialog_ids: The id of each dialog before bad audio was left out, once.
        pairs_left_out: Id of the pair ("d23_0") -> what is wrong with its audio or its rows.
        turns_left_out: Reason -> number of turns that were left out for it, other than bad audio.
        num_mergeable: Number of the dialogs in `left_out` that have a pair once neighbouring turns of a speaker are joined.
        pairs_with_bad_rows: Number of the pairs in `pairs_left_out` whose audio is good.
        turns_clipped: Id of the turn ("d23_0") -> what was wrong with its end, which was cut at that of the recording.
        columns: Further columns that the dataset keeps.
        ignored: Further columns of the manifest that were not read.
        place: As in `Turns`.
        is_dataset: Whether `place` names rows of a dataset, and not lines of a file.
        reasons: As `pairs_left_out`, with ids of utterances in place of files and lines: what `corpus_digest` covers.
    """

    name: str
    dialogs: Sequence[Dialog]
    left_out: Mapping[str, str]
    dialog_ids: tuple[str, ...]
    pairs_left_out: Mapping[str, str] = field(default_factory=dict)
    turns_left_out: Mapping[str, int] = field(default_factory=dict)
    num_mergeable: int = 0
    pairs_with_bad_rows: int = 0
    turns_clipped: Mapping[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    place: Callable[[int], str] = field(default=str, compare=False)
    is_dataset: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_pairs(self) -> int:
        """Number of pairs in all dialogs."""
        return sum(1 for dialog in self.dialogs for _ in dialog.pairs())

    def utterances(self) -> Iterator[Utterance]:
        """Yield the utterances of all dialogs, in order."""
        return (utterance for dialog in self.dialogs for utterance in dialog.utterances)

    def locate(self, utterance: Utterance, *, short: bool = False) -> str:
        """Return the place of a turn, such as "calls/train.jsonl:3", "...:3 to 5" or "...:3, 90" where turns were joined.

        Args:
            utterance: The turn.
            short: Leave out the folder; a dataset folder holds no paths.
        """
        lines = sorted({*utterance.lines})
        places = [self.short_place(line) if short else self.place(line) for line in lines]
        numbers = [place[len(place.rstrip(digits)) :] for place in places[1:]]
        is_run = len(lines) > 1 and lines[-1] - lines[0] == len(lines) - 1
        return places[0] + (f" to {numbers[-1]}" if is_run else "".join(f", {number}" for number in numbers))

    def short_place(self, line: int) -> str:
        """Return the place of a line without its folder; of a row of a dataset, its number."""
        place = self.place(line)
        return f"row {place.rpartition(' ')[2]}" if self.is_dataset else os.path.basename(place)
