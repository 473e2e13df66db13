"""Read a corpus: split lists or manifests as dialogs, and the rules that decide which dialogs are kept.

All problems of split lists (`usdm_sft.corpus.dailytalk`) and manifests (`usdm_sft.corpus.manifest`) are found before any audio is
opened, and are reported together with file and line.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.audio.addresses import parse_address
from usdm_sft.corpus.dialogs import DEFAULT, CorpusName, Dialog, FilePath, Recipe, RowOptions, Split, Turns, Utterance
from usdm_sft.corpus.find import recipe_of
from usdm_sft.corpus.further import RESERVED
from usdm_sft.corpus.merging import MergeError, merge_turns
from usdm_sft.corpus.problems import CorpusError, add_problem, describe_left_out
from usdm_sft.utils.texts import count_noun, quote

if TYPE_CHECKING:
    from usdm_sft.corpus.unit_reader import UnitReader

# Why a dialog is left out; counts.json and the card show these texts.
SAME_SPEAKER = "one speaker speaks twice in a row"
SINGLE_TURN = "a single turn makes no pair"
NO_ANSWER = "the agent answers nobody in it"
ALONE = "its turns are of one speaker, with pauses longer than max_gap"

ON_BAD_ROWS = ("error", "skip", "clip")
ALL_COLUMNS = "all"
LARGE_SHARE = 0.1  # of the dialogs; above it, a warning tells that so many are left out
_MAX_NAMES = 10  # speakers, channels or columns that an error lists
_CHANNEL = re.compile(r"channel=([0-9]+)")
_COLUMN = re.compile(r"column=(.+)")


@dataclass(frozen=True, slots=True)
class Rules:
    """The user's choices that decide which pairs a corpus has.

    Attributes:
        agent: The speaker who is the agent in every pair; "channel=1" for the one on this channel in each dialog, "column=NAME" for the one
            that a further column names. If None, each speaker is the agent in turn, as in the reference.
        merge_speaker_turns: Join neighbouring turns of one speaker. The reference leaves out dialogs with such turns.
        merge: How they are joined, "join" or "span" (`usdm_sft.corpus.merging`).
        max_gap: Seconds of the longest pause over which they are joined; None for any. A longer one ends a part of the dialog.
        on_bad_rows: "error" for a list of all bad rows of manifests; "skip" leaves out the pairs that use them; "clip" does the same, and
            cuts segments at the end of their recording.
        min_seconds, max_seconds: Turns of another length are left out; None for any length.
        keep_columns: Further columns of manifests that the dataset keeps, separated by commas; "all" for all of them.
        needs_text: False if no part of the template is a text, so that manifests need none.
    """

    agent: str | None = None
    merge_speaker_turns: bool = False
    merge: str = "join"
    max_gap: float | None = None
    on_bad_rows: str = "error"
    min_seconds: float | None = None
    max_seconds: float | None = None
    keep_columns: str | None = None
    needs_text: bool = True

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Rules":
        """Take the rules from options, of which those that are None have their default."""
        given: dict[str, Any] = {field.name: options.get(field.name) for field in fields(cls)}
        rules = cls(**{name: value for name, value in given.items() if value is not None})
        return rules if rules.agent is None else replace(rules, agent=str(rules.agent))  # a name may be a number

    def changes(self) -> dict[str, Any]:
        """Return the rules that are not the default."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in values if value != field.default}

    @property
    def columns(self) -> list[str]:
        """The further columns that are named."""
        names = (self.keep_columns or "").split(",")
        return [name for name in dict.fromkeys(each.strip() for each in names) if name]

    def row_options(self) -> RowOptions:
        """Return how the rows of manifests are read."""
        agent = _COLUMN.fullmatch(self.agent or "")
        columns = None if self.columns == [ALL_COLUMNS] else (*self.columns, *([agent[1]] if agent else []))
        return RowOptions(columns, self.on_bad_rows != "error", self.needs_text)


DAILYTALK = Rules()


def check_rules(rules: Rules) -> None:
    """Check the rules.

    Raises:
        ValueError: A value is unknown, or two contradict each other.
    """
    if rules.on_bad_rows not in ON_BAD_ROWS:
        raise ValueError(f"on_bad_rows {rules.on_bad_rows!r} is unknown: choose one of {', '.join(ON_BAD_ROWS)}")
    given = [name for name in ("merge", "max_gap") if name in rules.changes()]
    if given and not rules.merge_speaker_turns:
        raise ValueError(
            f"{' and '.join(given)} say{'' if given[1:] else 's'} how turns are joined: add --merge_speaker_turns, or leave {'them' if given[1:] else 'it'} out"
        )
    if (rules.min_seconds or 0) > (rules.max_seconds or math.inf):
        raise ValueError(f"min_seconds is {rules.min_seconds}, but max_seconds {rules.max_seconds}: give a range")
    if reserved := [name for name in rules.columns if name in RESERVED]:
        raise ValueError(
            f"keep_columns names {', '.join(reserved)}, which {'are no further columns' if reserved[1:] else 'is no further column'} of a "
            f"manifest: leave {'them' if reserved[1:] else 'it'} out"
        )


def check_kinds(
    lists: Mapping[str, str | Path], rules: Rules, *, with_units: bool = False, corpus: CorpusName | None = None
) -> None:
    """Check that the kind of corpus has what the options ask for. Same arguments and errors as `read_corpus`."""
    agent = rules.agent or ""
    wanted = {
        f"on_bad_rows {rules.on_bad_rows}": rules.on_bad_rows != "error",
        "keep_columns": bool(rules.columns),
        f"agent {agent}": bool(_COLUMN.fullmatch(agent) or _CHANNEL.fullmatch(agent)),
        "a template without texts": not rules.needs_text,
    }
    given = [name for name, is_given in wanted.items() if is_given]
    for name, path in lists.items():
        if not Path(path).is_file():
            raise FileNotFoundError(f"the {name} split list {path} is not a file: name an existing split list")
        recipe = recipe_of(path, corpus)
        if given and not recipe.takes_options:
            what = f"{' and '.join(given)} {'are' if given[1:] else 'is'} for manifests and files of other tools"
            raise ValueError(f"{path} is a {recipe.kind}, and {what}: leave {'them' if given[1:] else 'it'} out")
        if with_units and recipe.read_units is None:
            raise ValueError(f"{path} is a {recipe.kind}, which has no units: leave out unit_rate, or name a manifest")


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
    check_rules(rules)
    check_kinds(lists, rules, with_units=units is not None, corpus=corpus)
    problems: list[str] = []
    splits: dict[str, Split] = {}
    first: dict[str, str] = {}  # dialog id -> the place of its first line
    for name, path in lists.items():
        path = Path(path)
        recipe = recipe_of(path, corpus)
        turns = _read_turns(recipe, path, problems, data_dir, units, rules.row_options())
        _check_columns(path, turns, problems, rules)
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
        if not problems and turns.dialogs:
            _check_agent(path, turns, problems, rules.agent)
    if problems:
        raise CorpusError(problems)
    columns = tuple(dict.fromkeys(column for split in splits.values() for column in split.columns))
    return {name: replace(split, columns=columns) for name, split in splits.items()}


def _read_turns(
    recipe: Recipe,
    path: Path,
    problems: list[str],
    data_dir: FilePath | None,
    units: "UnitReader | None",
    options: RowOptions,
) -> Turns:
    more = {} if options == DEFAULT else {"options": options}
    if units is None:
        return recipe.read(path, problems, data_dir, **more)
    assert recipe.read_units is not None  # as `check_kinds` found
    return recipe.read_units(path, problems, data_dir, units, **more)


def _check_columns(path: Path, turns: Turns, problems: list[str], rules: Rules) -> None:
    """Add a problem if columns that are named are missing."""
    wanted = rules.row_options().columns or ()
    if missing := [name for name in wanted if name not in turns.further] if turns.dialogs else []:
        has = f"its further columns are {_list_names(turns.further)}" if turns.further else "it has no further columns"
        add_problem(problems, f"{path} has no column {', '.join(missing)}: {has}")


def _check_agent(path: Path, turns: Turns, problems: list[str], agent: str | None) -> None:
    """Add a problem if nobody in a split is the agent."""
    utterances = [utterance for lines in turns.dialogs.values() for utterance, _ in lines]
    if agent is None or _COLUMN.fullmatch(agent):
        return
    if match := _CHANNEL.fullmatch(agent):
        channels = {_find_channel(utterance) for utterance in utterances} - {None}
        if int(match[1]) not in channels:
            has = f"the channels are {_list_names(map(str, channels))}" if channels else "its turns have no channel"
            add_problem(problems, f"{path}: no turn is on channel {match[1]}, that of the agent: {has}")
    elif agent not in (speakers := {utterance.speaker for utterance in utterances}):
        add_problem(
            problems, f"{path}: no turn is by the agent {quote(agent)}: the speakers are {_list_names(speakers)}"
        )


def _list_names(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return f"{quote(', '.join(names[:_MAX_NAMES]), 400)}{more}"


def _find_channel(utterance: Utterance) -> int | None:
    return parse_address(utterance.audio)[0].channel if utterance.audio else None


def _find_agent(utterances: Sequence[Utterance], agent: str | None) -> str | None:
    """Return the speaker who is the agent of a dialog, or None if each side is.

    Raises:
        ValueError: A channel or a column names several speakers, or nobody; the message does not name the line.
    """
    if match := _CHANNEL.fullmatch(agent or ""):
        found = {each.speaker for each in utterances if _find_channel(each) == int(match[1])}
        if len(found) > 1:
            raise ValueError(
                f"has several speakers on channel {match[1]} ({_list_names(found)}): name the agent in a column"
            )
        return next(iter(found), "")  # of a dialog without this channel, nobody
    if match := _COLUMN.fullmatch(agent or ""):
        found = {each.more[match[1]] for each in utterances if each.more and match[1] in each.more}
        speakers = {each.speaker for each in utterances}
        if len(found) != 1 or not found <= speakers:
            role = "agents" if len(found) > 1 else "the agent"
            names = f"names {_list_names(found)} as {role}" if found else "names no agent"
            raise ValueError(
                f"{names} in column {match[1]}: give one of its speakers {_list_names(speakers)} in its rows"
            )
        return next(iter(found))
    return agent


def take_validation(splits: Mapping[str, Split], val_dialogs: int | float, seed: int = 0) -> dict[str, Split]:
    """Make a split "validation" of whole dialogs of "train".

    Whether a dialog is chosen follows from the seed, its id and the ids of the others, and not from their order: the dialogs whose
    sha256 of "SEED ID" is smallest are chosen.

    Args:
        splits: The splits by name.
        val_dialogs: Number of dialogs, or a share below 1 of those that have a pair, at least one dialog.
        seed: Another seed chooses other dialogs.

    Returns:
        The splits; "validation" follows "train", and dialogs stay in order.

    Raises:
        ValueError: There is no train split, there is a validation split already, or no dialog would be left for train.
    """
    if isinstance(val_dialogs, bool) or not 0 < val_dialogs < (1 if isinstance(val_dialogs, float) else math.inf):
        raise ValueError(f"val_dialogs is {val_dialogs}: give a whole number of dialogs, or a share below 1")
    if "train" not in splits:
        raise ValueError(
            f"val_dialogs is {val_dialogs}, but the corpus has no split train: name its list, or leave it out"
        )
    if "validation" in splits:
        raise ValueError(
            f"val_dialogs is {val_dialogs}, but the corpus has a split validation already: leave one of them out"
        )
    dialogs = splits["train"].dialogs
    number = val_dialogs if isinstance(val_dialogs, int) else max(1, round(val_dialogs * len(dialogs)))
    if number >= len(dialogs):
        raise ValueError(
            f"val_dialogs is {val_dialogs}, but train has {count_noun(len(dialogs), 'dialog')} with a pair: give less"
        )
    ids = sorted((dialog.id for dialog in dialogs), key=lambda name: sha256(f"{seed} {name}".encode()).digest())
    chosen = set(ids[:number])
    parts = [tuple(dialog for dialog in dialogs if (dialog.id in chosen) is is_chosen) for is_chosen in (False, True)]
    train, validation = (tuple(dialog.id for dialog in part) for part in parts)
    divided = {
        "train": replace(splits["train"], dialogs=parts[0], dialog_ids=train),
        "validation": replace(
            splits["train"], name="validation", dialogs=parts[1], left_out={}, dialog_ids=validation, ignored=()
        ),
    }
    return divided | {name: split for name, split in splits.items() if name != "train"}


def _make_split(name: str, turns: Turns, problems: list[str], rules: Rules, recipe: Recipe) -> Split:
    kept: list[Dialog] = []
    left_out: dict[str, str] = {}
    num_mergeable = 0
    for dialog_id, lines in turns.dialogs.items():
        lines.sort(key=lambda line: line[0].turn)
        utterances = [utterance for utterance, _ in lines]
        if wrong := _turn_problem(lines, utterances[0].turn if recipe.first_turn is None else recipe.first_turn):
            number, problem = wrong
            if not turns.may_lack(dialog_id):
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
        try:
            agent = _find_agent(utterances, rules.agent)
            if rules.merge_speaker_turns:
                utterances = merge_turns(utterances, rules.merge, rules.max_gap)
        except ValueError as error:
            between = ":" if isinstance(error, MergeError) else ""
            add_problem(problems, f"{turns.place(lines[0][1])}: dialog {dialog_id}{between} {error}")
            continue
        dialog = Dialog(dialog_id, tuple(utterances), agent)
        if len(utterances) == 1:
            left_out[dialog_id] = SINGLE_TURN
        elif rules.max_gap is None and any(a.speaker == b.speaker for a, b in pairwise(utterances)):
            left_out[dialog_id] = SAME_SPEAKER
            num_mergeable += any(dialog.pairs())  # which are pairs of the joined turns as well
        elif not any(dialog.pairs()):
            left_out[dialog_id] = ALONE if len({utterance.speaker for utterance in utterances}) == 1 else NO_ANSWER
        else:
            kept.append(dialog)
    read, ignored = rules.row_options().columns, list[str]()
    if read is not None:
        ignored = [column for column in turns.further if column not in read]
    columns = tuple(turns.further) if read is None else tuple(rules.columns)
    return Split(
        name,
        kept,
        left_out,
        tuple(dialog.id for dialog in kept),
        columns=columns,
        ignored=tuple(ignored),
        num_mergeable=num_mergeable,
        place=turns.place,
    )


def find_large_share(split: Split) -> str | None:
    """Return a warning if more than a tenth of the dialogs of a split are left out, or None."""
    left_out, total = split.left_out, len({*split.dialog_ids, *split.left_out})
    if len(left_out) <= LARGE_SHARE * total:
        return None
    verb = "is" if len(left_out) == 1 else "are"
    text = f"{split.name}: {len(left_out):,} of {count_noun(total, 'dialog')} {verb} left out ({describe_left_out(left_out)})"
    return f"{text}: {find_merge_remedy(split) or 'counts.json names each'}"


def describe_ignored(split: Split) -> str:
    """Name the columns of the manifest of a split that are ignored."""
    if len(split.ignored) == 1:
        return f"{split.name}: column {split.ignored[0]} is ignored: keep it with --keep_columns {split.ignored[0]}"
    return f"{split.name}: columns {', '.join(split.ignored)} are ignored: keep them with --keep_columns all, or name some of them"


def find_merge_remedy(split: Split) -> str | None:
    """Return what keeps dialogs in which one speaker speaks twice in a row, and how many, or None if it keeps none."""
    if not split.num_mergeable:
        return None
    return f"join neighbouring turns with --merge_speaker_turns, which keeps {split.num_mergeable:,} of them"


def _turn_problem(lines: Sequence[tuple[Utterance, int]], first: int) -> tuple[int, str] | None:
    """Return the line and the problem of the sorted turns of a dialog, or None if they count up from `first`."""
    for expected, (utterance, number) in enumerate(lines, start=first):
        if utterance.turn < expected:
            return number, f"has turn {utterance.turn} twice: delete one of the two lines"
        if utterance.turn > expected:
            return number, f"has no turn {expected}: add the line, or delete the dialog"
    return None
