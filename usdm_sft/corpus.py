"""From DailyTalk's split lists to dialogs and user/agent pairs.

A split list has one utterance a line, `<turn>_<speaker>_d<dialog>|<speaker>|{phones}|<text>|<emotion>`. Everything that is
wrong with the lists is found here, before any audio is opened, and told all at once with file and line. Standard
library only: the loading script, the command line and the template all read this module.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

# Names under which the two lists lie beside the data: renamed as the reference asks, or as DailyTalk ships them.
LIST_NAMES = ({"train": "train.txt", "test": "test.txt"}, {"train": "train_phone.txt", "test": "val_phone.txt"})

SAME_SPEAKER = "one speaker speaks twice in a row"
SINGLE_TURN = "a single turn makes no pair"

MAX_PROBLEMS_SHOWN = 20
MAX_PROBLEMS = 1000  # of what is no split list not every line is told
MAX_LINE = 100_000  # characters; DailyTalk's longest line has 752

_UTTERANCE_ID = re.compile(r"([0-9]{1,9})_([0-9]{1,9})_d([0-9]{1,9})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # Unicode category Cc, and unpaired surrogates
_UNDECODED = re.compile(r"[\udc80-\udcff]")
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
    """One line of a split list."""

    id: str
    dialog_id: str
    turn: int
    speaker: str
    text: str
    emotion: str

    @property
    def audio_name(self) -> str:
        """Path of the recording below the `data` folder, such as `23/0_1_d23.wav`."""
        return f"{self.dialog_id[1:]}/{self.id}.wav"


@dataclass(frozen=True, slots=True)
class Dialog:
    """The utterances of one dialog by turn; two neighbours never have the same speaker."""

    id: str
    utterances: tuple[Utterance, ...]

    def pairs(self) -> Iterator[tuple[Utterance, Utterance]]:
        """Every two neighbouring turns, the earlier as the user and the later as the agent."""
        return pairwise(self.utterances)


@dataclass(frozen=True, slots=True)
class Split:
    """One split: the dialogs in order of their number, and why each of the others was left out.

    Where audio is bad (`usdm_sft.bad_audio`), `dialogs` holds the parts of a dialog before and after it under the same id;
    `dialog_ids` holds each of the dialogs that were there before, once.
    """

    name: str
    dialogs: tuple[Dialog, ...]
    left_out: Mapping[str, str]
    dialog_ids: tuple[str, ...]
    pairs_left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_pairs(self) -> int:
        return sum(len(dialog.utterances) - 1 for dialog in self.dialogs)


def text_problem(text: str) -> str | None:
    """What keeps `text` out of the template, or None. The text is judged lower-cased, as the template sees it.

    A control character would end a line of the template, and a special-token string would become the token.
    """
    text = text.lower()
    if not text.strip():
        return "is empty or white space only"
    if control := _CONTROL.search(text):
        return f"holds the control character {control.group()!r}"
    for marker in _MARKERS:
        if marker in text:
            return f"holds {marker!r}, which is part of a special token"
    return None


def find_data_folder(data_dir: str | Path) -> Path:
    """The folder that holds `<dialog>/<turn>_<speaker>_d<dialog>.wav`.

    Args:
        data_dir: DailyTalk's folder (with `data/`) or, as the reference takes it, its `data` folder.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    data_dir = Path(data_dir).expanduser()
    if (data_dir / "data").is_dir():
        return data_dir / "data"
    if data_dir.is_dir() and any(entry.name.isdecimal() and entry.is_dir() for entry in data_dir.iterdir()):
        return data_dir
    raise FileNotFoundError(
        f"{data_dir} holds neither a folder 'data' nor numbered dialog folders: "
        "give the folder that DailyTalk was unpacked into as data_dir"
    )


def find_split_lists(data_dir: str | Path) -> dict[str, Path] | None:
    """The lists that lie beside the `data` folder under either pair of names, or None where there are none.

    Raises:
        FileNotFoundError: Only one list of a pair is there.
    """
    folder = Path(os.path.abspath(find_data_folder(data_dir))).parent  # of the link, where `data` is one
    pairs = [{split: folder / name for split, name in names.items()} for names in LIST_NAMES]
    for lists in pairs:
        if all(path.is_file() for path in lists.values()):
            return lists
    for lists in pairs:
        if there := [path for path in lists.values() if path.is_file()]:
            [missing] = set(lists.values()) - set(there)
            raise FileNotFoundError(
                f"{there[0]} has no {missing.name} beside it: add it, or name the split lists to use"
            )
    return None


def read_corpus(lists: Mapping[str, str | Path]) -> dict[str, Split]:
    """Read and validate the split lists.

    Args:
        lists: Path of the list of each split. Lines end at `\\n`, `\\r` or `\\r\\n` and nowhere else.

    Returns:
        The splits by name. A dialog in which one speaker speaks twice in a row is left out whole, as in the reference
        (preprocess/fine-tuning/dailytalk_single_turn.py of naver-ai/usdm), and so is one of a single turn.

    Raises:
        FileNotFoundError: A list does not exist.
        CorpusError: Anything is wrong in any of the lists; the message names each problem.
    """
    problems: list[str] = []
    splits: dict[str, Split] = {}
    origin: dict[str, tuple[Path, int]] = {}  # dialog -> where it stands first, in an earlier list
    for name, path in lists.items():
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"the {name} split list {path} is not a file: name an existing split list")
        dialogs = _read_list(path, problems)
        for dialog_id, lines in dialogs.items():
            line = min(lines.values())
            if dialog_id in origin:
                other, other_line = origin[dialog_id]
                _note(
                    problems,
                    f"{path}:{line}: dialog {dialog_id} is in two splits, first at {other}:{other_line}: "
                    "delete its lines from one of the lists",
                )
            origin.setdefault(dialog_id, (path, line))
        splits[name] = _make_split(name, path, dialogs, problems)
    if problems:
        raise CorpusError(problems)
    return splits


def _read_list(path: Path, problems: list[str]) -> dict[str, dict[Utterance, int]]:
    """-> dialog id -> {utterance: its line number}; what is wrong goes into `problems`."""
    dialogs: dict[str, dict[Utterance, int]] = {}
    seen: dict[str, int] = {}
    broken: set[str] = set()  # dialogs with an unreadable line: not accused of a missing turn as well
    before = len(problems)
    for number, line in enumerate(_read_lines(path), start=1):
        place = f"{path}:{number}"
        if (problem := _no_text(line)) is not None:
            problems[before:] = []  # told alone: what else is wrong may come of it
            _note(problems, f"{place}: {problem}")
            return {}
        utterance = _parse_line(line, place, problems)
        if utterance is None:
            if match := _UTTERANCE_ID.match(line):
                broken.add(f"d{match[3]}")
            continue
        if utterance.id in seen:
            _note(
                problems,
                f"{place}: id {utterance.id} stands already at line {seen[utterance.id]}: delete one of the two lines",
            )
            continue
        seen[utterance.id] = number
        dialogs.setdefault(utterance.dialog_id, {})[utterance] = number
    return {dialog_id: lines for dialog_id, lines in dialogs.items() if dialog_id not in broken}


def _read_lines(path: Path) -> Iterator[str]:
    """The lines without their ends; bytes that are not UTF-8 come as surrogates, a line that is too long not whole."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=None) as file:
        while line := file.readline(MAX_LINE + 1):
            yield line.removesuffix("\n")


def _no_text(line: str) -> str | None:
    """Why `line` is not of a text file in UTF-8, or None."""
    if len(line) > MAX_LINE:
        return f"line of more than {MAX_LINE:,} characters, {_quote(line)}: name a split list"
    if match := _UNDECODED.search(line):
        return f"not UTF-8 (byte 0x{ord(match.group()) - 0xDC00:02X} in {_quote(line)}): save the list as UTF-8"
    if "\0" in line:
        return f"a NUL in {_quote(line)}: save the list as UTF-8"
    return None


def _note(problems: list[str], problem: str) -> None:
    problems.append(problem)
    if len(problems) >= MAX_PROBLEMS:
        raise CorpusError(problems)


def _parse_line(line: str, place: str, problems: list[str]) -> Utterance | None:
    if not line.strip():
        _note(problems, f"{place}: blank line: delete it")
        return None
    fields = line.split("|")
    if len(fields) != 5:
        _note(
            problems,
            f"{place}: {len(fields)} fields instead of 5 (id|speaker|phones|text|emotion) in {_quote(line)}: "
            "take '|' out of the text, or complete the line",
        )
        return None
    utterance_id, speaker, _, text, emotion = fields
    match = _UTTERANCE_ID.fullmatch(utterance_id)
    if match is None:
        _note(
            problems, f"{place}: id {_quote(utterance_id)} is not <turn>_<speaker>_d<dialog>: correct the first field"
        )
        return None
    if match[2] != speaker:
        _note(
            problems,
            f"{place}: speaker {_quote(speaker)} is not the speaker of id {utterance_id}: correct one of the two fields",
        )
        return None
    if problem := text_problem(text):
        _note(problems, f"{place}: text {_quote(text)} of {utterance_id} {problem}: correct the text")
    return Utterance(utterance_id, f"d{match[3]}", int(match[1]), speaker, text, emotion)


def _make_split(name: str, path: Path, dialogs: dict[str, dict[Utterance, int]], problems: list[str]) -> Split:
    kept: list[Dialog] = []
    left_out: dict[str, str] = {}
    for dialog_id in sorted(dialogs, key=lambda dialog_id: (int(dialog_id[1:]), dialog_id)):
        lines = dialogs[dialog_id]
        utterances = sorted(lines, key=lambda utterance: utterance.turn)
        turns = [utterance.turn for utterance in utterances]
        if turns != list(range(len(turns))):
            position = next(i for i, turn in enumerate(turns) if turn != i)
            if position and turns[position] == turns[position - 1]:
                problem = f"has turn {turns[position]} twice: delete one of the two lines"
            else:
                problem = f"has no turn {position}: add the line, or delete the dialog"
            _note(problems, f"{path}:{lines[utterances[position]]}: dialog {dialog_id} {problem}")
        elif len(turns) == 1:
            left_out[dialog_id] = SINGLE_TURN
        elif any(a.speaker == b.speaker for a, b in pairwise(utterances)):
            left_out[dialog_id] = SAME_SPEAKER
        else:
            kept.append(Dialog(dialog_id, tuple(utterances)))
    return Split(name, tuple(kept), left_out, tuple(dialog.id for dialog in kept))


def _quote(value: str, limit: int = 80) -> str:
    return repr(value if len(value) <= limit else value[:limit] + "...")
