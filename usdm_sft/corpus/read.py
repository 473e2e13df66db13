"""Utterances, dialogs and user/agent pairs, and the rules that make a corpus of them.

Everything that is wrong with split lists (`usdm_sft.corpus.split_list`) or manifests (`usdm_sft.corpus.manifest`) is found before any audio is opened,
and told all at once with file and line. Standard library only: the loading script, the command line and the template all read this
module.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from usdm_sft.audio.addresses import join_addresses

SAME_SPEAKER = "one speaker speaks twice in a row"
SINGLE_TURN = "a single turn makes no pair"
NO_ANSWER = "the agent answers nobody in it"

MAX_PROBLEMS_SHOWN = 20
MAX_PROBLEMS = 1000  # of what is no split list not every line is told

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # Unicode category Cc, and unpaired surrogates
_MARKERS = ("<|", "|>", "<s>", "</s>", "<unk>", "<pad>")


class CorpusError(ValueError):
    """Bad split lists. One line a problem, each with file, line, the offending value and the remedy."""

    def __init__(self, problems: list[str]):
        stopped = ", where reading stopped" if len(problems) >= MAX_PROBLEMS else ""
        super().__init__(tell_problems(problems) + stopped)
        self.problems = problems


def tell_problems(problems: list[str]) -> str:
    """One line a problem, the first 20 of them."""
    shown = problems[:MAX_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more problems")
    return "\n".join(shown)


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


def text_problem(text: str) -> str | None:
    """What keeps `text` out of the template, or None. The text is judged lower-cased, as the template sees it.

    A control character would end a line of the template, and a special-token string would become the token.
    """
    text = text.lower()
    if not text.strip():
        return "is empty or white space only"
    if control := CONTROL.search(text):
        return f"holds the control character {control.group()!r}"
    for marker in _MARKERS:
        if marker in text:
            return f"holds {marker!r}, which is part of a special token"
    return None


@dataclass(frozen=True, slots=True)
class Rules:
    """What the user decides of a corpus.

    Attributes:
        agent: The speaker who is the agent in every pair; where None, both sides are the agent in turn, as in the reference.
        merge_speaker_turns: Make one turn of neighbouring ones of a speaker; the reference leaves out such dialogs whole.
    """

    agent: str | None = None
    merge_speaker_turns: bool = False


DAILYTALK = Rules()


def read_corpus(
    lists: Mapping[str, str | Path], rules: Rules = DAILYTALK, *, data_dir: str | Path | None = None
) -> dict[str, Split]:
    """Read and validate split lists and manifests.

    Args:
        lists: Path of the list or manifest (.jsonl, .csv or .parquet) of each split.
        rules: What the user decides.
        data_dir: DailyTalk's folder or zip archive; of a manifest the folder that its recordings are named from, which is
            the manifest's own by default.

    Returns:
        The splits by name. A dialog in which one speaker speaks twice in a row is left out whole, as in the reference
        (preprocess/fine-tuning/dailytalk_single_turn.py of naver-ai/usdm), unless the turns are merged; and so is one without a
        pair.

    Raises:
        FileNotFoundError: A list does not exist.
        CorpusError: Anything is wrong in any of the lists; the message names each problem.
    """
    from usdm_sft.corpus.manifest import is_manifest, read_manifest
    from usdm_sft.corpus.split_list import find_recordings, read_split_list

    problems: list[str] = []
    splits: dict[str, Split] = {}
    origin: dict[str, str] = {}  # dialog -> where it stands first, in an earlier list
    for name, path in lists.items():
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"the {name} split list {path} is not a file: name an existing split list")
        if manifest := is_manifest(path):
            dialogs = read_manifest(path, problems, path.parent if data_dir is None else Path(data_dir).expanduser())
        else:
            dialogs = read_split_list(path, problems, str if data_dir is None else find_recordings(data_dir))
        for dialog_id, lines in dialogs.items():
            place = next(iter(lines.values()))
            if dialog_id in origin:
                note(
                    problems,
                    f"{place}: dialog {dialog_id} is in two splits, first at {origin[dialog_id]}: "
                    "delete its lines from one of the lists",
                )
            origin.setdefault(dialog_id, place)
        splits[name] = _make_split(name, dialogs, problems, rules, is_dailytalk=not manifest)
    if problems:
        raise CorpusError(problems)
    return splits


def note(problems: list[str], problem: str) -> None:
    """Add a problem; of what is no list at all, reading stops at the thousandth."""
    problems.append(problem)
    if len(problems) >= MAX_PROBLEMS:
        raise CorpusError(problems)


def _make_split(
    name: str, dialogs: dict[str, dict[Utterance, str]], problems: list[str], rules: Rules, *, is_dailytalk: bool
) -> Split:
    kept: list[Dialog] = []
    left_out: dict[str, str] = {}
    for dialog_id, lines in dialogs.items():
        utterances = sorted(lines, key=lambda utterance: utterance.turn)
        if problem := _turn_problem(utterances, lines, 0 if is_dailytalk else utterances[0].turn):
            note(problems, problem)
            continue
        speakers = sorted({utterance.speaker for utterance in utterances})
        if len(speakers) > 2 and rules.agent is None and not is_dailytalk:  # the reference pairs them all
            note(
                problems,
                f"{lines[utterances[0]]}: dialog {dialog_id} has {len(speakers)} speakers "
                f"({quote(', '.join(speakers))}): say with --agent which of them is the agent",
            )
            continue
        if rules.merge_speaker_turns:
            utterances = _merge(utterances)
        dialog = Dialog(dialog_id, tuple(utterances), rules.agent)
        if len(utterances) == 1:
            left_out[dialog_id] = SINGLE_TURN
        elif any(a.speaker == b.speaker for a, b in pairwise(utterances)):
            left_out[dialog_id] = SAME_SPEAKER
        elif not any(dialog.pairs()):
            left_out[dialog_id] = NO_ANSWER
        else:
            kept.append(dialog)
    return Split(name, tuple(kept), left_out, tuple(dialog.id for dialog in kept))


def _turn_problem(utterances: list[Utterance], lines: dict[Utterance, str], first: int) -> str | None:
    """What is wrong with the turns of a dialog, sorted: there is one for each number from `first` on."""
    for expected, (position, utterance) in enumerate(enumerate(utterances), start=first):
        if utterance.turn == expected:
            continue
        if position and utterance.turn == utterances[position - 1].turn:
            problem = f"has turn {utterance.turn} twice: delete one of the two lines"
        else:
            problem = f"has no turn {expected}: add the line, or delete the dialog"
        return f"{lines[utterance]}: dialog {utterance.dialog_id} {problem}"
    return None


def _merge(utterances: list[Utterance]) -> list[Utterance]:
    """Neighbouring turns of a speaker become one, which keeps the first one's emotion; turns are numbered anew."""
    merged: list[Utterance] = []
    for utterance in utterances:
        if merged and merged[-1].speaker == utterance.speaker:
            before = merged.pop()
            audio = join_addresses(before.audio, utterance.audio)
            utterance = replace(before, text=f"{before.text} {utterance.text}", audio=audio)
        merged.append(utterance)
    return [replace(utterance, turn=turn) for turn, utterance in enumerate(merged, start=utterances[0].turn)]


def quote(value: str, limit: int = 80) -> str:
    """A value for an error message."""
    return repr(value if len(value) <= limit else value[:limit] + "...")
