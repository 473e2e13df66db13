"""Read a corpus: split lists or manifests as dialogs, and the rules that decide which dialogs are kept.

All problems of split lists (`usdm_sft.corpus.dailytalk`) and manifests (`usdm_sft.corpus.manifest`) are found before any audio is
opened, and are reported together with file and line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_sft.audio.addresses import join_addresses
from usdm_sft.corpus.dialogs import CorpusName, Dialog, FilePath, Recipe, Split, Turns, Utterance
from usdm_sft.corpus.find import recipe_of
from usdm_sft.corpus.problems import CorpusError, add_problem
from usdm_sft.utils.texts import quote

if TYPE_CHECKING:
    from usdm_sft.corpus.streams import UnitReader

# Why a dialog is left out; counts.json and the card show these texts.
SAME_SPEAKER = "one speaker speaks twice in a row"
SINGLE_TURN = "a single turn makes no pair"
NO_ANSWER = "the agent answers nobody in it"


@dataclass(frozen=True, slots=True)
class Rules:
    """The user's choices that decide which pairs a corpus has.

    Attributes:
        agent: The speaker who is the agent in every pair. If None, each speaker is the agent in turn, as in the reference.
        merge_speaker_turns: Join neighbouring turns of one speaker. The reference leaves out dialogs with such turns.
    """

    agent: str | None = None
    merge_speaker_turns: bool = False


DAILYTALK = Rules()


def read_corpus(
    lists: Mapping[str, str | Path],
    rules: Rules = DAILYTALK,
    *,
    data_dir: FilePath | None = None,
    units: "UnitReader | None" = None,
    corpus: CorpusName | None = None,
) -> dict[str, Split]:
    """Read and validate split lists and manifests.

    Args:
        lists: Path of the list or manifest (.jsonl, .csv or .parquet) of each split.
        rules: The user's choices.
        data_dir: DailyTalk's folder or zip archive. For a manifest: the folder where relative paths of its recordings start, by
            default the manifest's own.
        units: Reads the units of manifests. If None, turns have recordings, and their units are made.
        corpus: The name of the recipe that reads them. If None, each file tells its own.

    Returns:
        The splits by name. A dialog in which one speaker speaks twice in a row is left out, as in the reference
        (preprocess/fine-tuning/dailytalk_single_turn.py of naver-ai/usdm), unless the turns are merged. A dialog without a pair
        is left out as well.

    Raises:
        FileNotFoundError: A list or `data_dir` does not exist.
        CorpusError: A list is wrong; the message names each problem.
        ValueError: Units are to be read, and a list is not a manifest.
    """
    problems: list[str] = []
    splits: dict[str, Split] = {}
    first: dict[str, str] = {}  # dialog id -> the place of its first line
    for name, path in lists.items():
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"the {name} split list {path} is not a file: name an existing split list")
        recipe = recipe_of(path, corpus)
        if units is None:
            turns = recipe.read(path, problems, data_dir)
        elif recipe.read_units is None:
            raise ValueError(f"{path} is a {recipe.kind}, which has no units: leave out unit_rate, or name a manifest")
        else:
            turns = recipe.read_units(path, problems, data_dir, units)
        places = {dialog_id: turns.place(lines[0][1]) for dialog_id, lines in turns.dialogs.items()}
        for dialog_id, place in places.items():
            if dialog_id in first:
                add_problem(
                    problems,
                    f"{place}: dialog {dialog_id} is in two splits, first at {first[dialog_id]}: "
                    "delete its lines from one of the lists",
                )
        first = places | first
        splits[name] = _make_split(name, turns, problems, rules, recipe)
    if problems:
        raise CorpusError(problems)
    return splits


def _make_split(name: str, turns: Turns, problems: list[str], rules: Rules, recipe: Recipe) -> Split:
    kept: list[Dialog] = []
    left_out: dict[str, str] = {}
    for dialog_id, lines in turns.dialogs.items():
        lines.sort(key=lambda line: line[0].turn)
        utterances = [utterance for utterance, _ in lines]
        if wrong := _turn_problem(lines, utterances[0].turn if recipe.first_turn is None else recipe.first_turn):
            number, problem = wrong
            add_problem(problems, f"{turns.place(number)}: dialog {dialog_id} {problem}")
            continue
        speakers = sorted({utterance.speaker for utterance in utterances})
        most = recipe.max_speakers if rules.agent is None else None
        if most is not None and len(speakers) > most:
            add_problem(
                problems,
                f"{turns.place(lines[0][1])}: dialog {dialog_id} has {len(speakers)} speakers "
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
    return Split(name, kept, left_out, tuple(dialog.id for dialog in kept))


def _turn_problem(lines: Sequence[tuple[Utterance, int]], first: int) -> tuple[int, str] | None:
    """Return the line and the problem of the sorted turns of a dialog, or None if they count up from `first`."""
    for expected, (utterance, number) in enumerate(lines, start=first):
        if utterance.turn < expected:
            return number, f"has turn {utterance.turn} twice: delete one of the two lines"
        if utterance.turn > expected:
            return number, f"has no turn {expected}: add the line, or delete the dialog"
    return None


def _merge(utterances: list[Utterance]) -> list[Utterance]:
    """Join neighbouring turns of one speaker, keep the emotion of the first, and number the turns again."""
    merged: list[Utterance] = []
    for utterance in utterances:
        if merged and merged[-1].speaker == utterance.speaker:
            utterance = _join(merged.pop(), utterance)
        merged.append(utterance)
    return [replace(utterance, turn=turn) for turn, utterance in enumerate(merged, start=utterances[0].turn)]


def _join(before: Utterance, after: Utterance) -> Utterance:
    # A turn that has units may have no recording; then the joined turn has none either.
    audio = join_addresses(before.audio, after.audio) if before.audio and after.audio else ""
    units = None
    if before.units is not None and after.units is not None:
        import numpy as np  # the command line reads this module

        units = np.concatenate([before.units, after.units])
    return replace(before, text=f"{before.text} {after.text}", audio=audio, units=units)
