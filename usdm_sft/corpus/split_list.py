"""DailyTalk as it is published: where its recordings and split lists lie, and what a list says.

A list has one utterance a line, `<turn>_<speaker>_d<dialog>|<speaker>|{phones}|<text>|<emotion>`. The recordings lie in a folder or
in the zip archive that DailyTalk is downloaded as, which is read without unpacking it.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from usdm_sft.audio.addresses import AddressError, list_members, zip_address
from usdm_sft.corpus.dialogs import Utterance
from usdm_sft.corpus.problems import note
from usdm_sft.utils.texts import quote, text_problem

# Names under which the two lists lie beside the data: renamed as the reference asks, or as DailyTalk ships them.
LIST_NAMES = ({"train": "train.txt", "test": "test.txt"}, {"train": "train_phone.txt", "test": "val_phone.txt"})

MAX_LINE = 1_000_000  # characters; DailyTalk's longest line has 752

_UTTERANCE_ID = re.compile(r"([0-9]{1,9})_([0-9]{1,9})_d([0-9]{1,9})")
_UNDECODED = re.compile(r"[\udc80-\udcff]")
_MEMBER = re.compile(r"((?:[^\n]*/)?)[0-9]+/[0-9]+_[0-9]+_d[0-9]+\.wav")


def check_data_dir(data_dir: str | Path) -> Path:
    """Return `data_dir` as a path, with `~` expanded.

    Raises:
        FileNotFoundError: It does not exist.
    """
    path = Path(data_dir).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"data_dir {path} does not exist: give the folder of the corpus, or DailyTalk's zip archive"
        )
    return path


def find_data_folder(data_dir: str | Path) -> Path:
    """The folder that holds `<dialog>/<turn>_<speaker>_d<dialog>.wav`.

    Args:
        data_dir: DailyTalk's folder (with `data/`) or, as the reference takes it, its `data` folder.

    Raises:
        FileNotFoundError: `data_dir` does not exist, or holds no such folder.
    """
    data_dir = check_data_dir(data_dir)
    if (data_dir / "data").is_dir():
        return data_dir / "data"
    if data_dir.is_dir() and any(entry.name.isdecimal() and entry.is_dir() for entry in data_dir.iterdir()):
        return data_dir
    raise FileNotFoundError(
        f"{data_dir} holds neither a folder 'data' nor numbered dialog folders: "
        "give the folder that DailyTalk was unpacked into as data_dir"
    )


def find_recordings(data_dir: str | Path) -> Callable[[str], str]:
    """The way from an `audio_name`, such as "23/0_1_d23.wav", to the address of the recording.

    Args:
        data_dir: As `find_data_folder` takes it, or DailyTalk's zip archive.

    Raises:
        FileNotFoundError: `data_dir` does not exist or holds no such folder, or the archive holds no recordings of DailyTalk.
    """
    archive = check_data_dir(data_dir)
    if not archive.is_file():
        folder = find_data_folder(data_dir).resolve()
        return lambda name: os.path.join(folder, name)
    try:
        match = next(filter(None, map(_MEMBER.fullmatch, list_members(archive))), None)
    except AddressError as error:
        raise FileNotFoundError(f"{archive} is no folder and {error}: give DailyTalk's folder or its zip") from error
    if match is None:
        raise FileNotFoundError(
            f"{archive} holds no recordings such as data/23/0_1_d23.wav: give the archive that DailyTalk is downloaded as"
        )
    return lambda name: zip_address(archive.resolve(), match[1] + name)


def find_split_lists(data_dir: str | Path) -> dict[str, Path] | None:
    """The lists that lie beside the `data` folder, or beside the zip archive, under either pair of names; None without.

    Raises:
        FileNotFoundError: `data_dir` does not exist, or only one list of a pair is there.
    """
    data = check_data_dir(data_dir)
    data = data if data.is_file() else find_data_folder(data_dir)
    folder = Path(os.path.abspath(data)).parent  # of the link, where `data` is one
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


def read_split_list(path: Path, problems: list[str], address: Callable[[str], str]) -> dict[str, dict[Utterance, str]]:
    """Dialogs of a list in order of their number.

    Args:
        path: The list.
        problems: What is wrong is added.
        address: From an `audio_name` to where the recording lies.

    Returns:
        Dialog id -> {utterance: its place, as file:line}.
    """
    dialogs: dict[str, dict[Utterance, str]] = {}
    seen: dict[str, int] = {}
    broken: set[str] = set()  # dialogs with an unreadable line: not accused of a missing turn as well
    before = len(problems)
    for number, line in enumerate(_read_lines(path), start=1):
        place = f"{path}:{number}"
        if (problem := _no_text(line)) is not None:
            problems[before:] = []  # told alone: what else is wrong may come of it
            note(problems, f"{place}: {problem}")
            return {}
        utterance = _parse_line(line, place, problems, address)
        if utterance is None:
            if match := _UTTERANCE_ID.match(line):
                broken.add(f"d{match[3]}")
            continue
        if utterance.id in seen:
            note(
                problems,
                f"{place}: id {utterance.id} stands already at line {seen[utterance.id]}: delete one of the two lines",
            )
            continue
        seen[utterance.id] = number
        dialogs.setdefault(utterance.dialog_id, {})[utterance] = place
    whole = [dialog_id for dialog_id in dialogs if dialog_id not in broken]
    return {dialog_id: dialogs[dialog_id] for dialog_id in sorted(whole, key=lambda name: (int(name[1:]), name))}


def _read_lines(path: Path) -> Iterator[str]:
    """The lines without their ends; bytes that are not UTF-8 come as surrogates, a line that is too long not whole."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=None) as file:
        while line := file.readline(MAX_LINE + 1):
            yield line.removesuffix("\n")


def _no_text(line: str) -> str | None:
    """Why `line` is not of a text file in UTF-8, or None."""
    if len(line) > MAX_LINE:
        return f"line of more than {MAX_LINE:,} characters, {quote(line)}: name a split list"
    if match := _UNDECODED.search(line):
        return f"not UTF-8 (byte 0x{ord(match.group()) - 0xDC00:02X} in {quote(line)}): save the list as UTF-8"
    if "\0" in line:
        return f"a NUL in {quote(line)}: save the list as UTF-8"
    return None


def _parse_line(line: str, place: str, problems: list[str], address: Callable[[str], str]) -> Utterance | None:
    if not line.strip():
        note(problems, f"{place}: blank line: delete it")
        return None
    fields = line.split("|")
    if len(fields) != 5:
        note(
            problems,
            f"{place}: {len(fields)} fields instead of 5 (id|speaker|phones|text|emotion) in {quote(line)}: "
            "take '|' out of the text, or complete the line",
        )
        return None
    utterance_id, speaker, _, text, emotion = fields
    match = _UTTERANCE_ID.fullmatch(utterance_id)
    if match is None:
        note(problems, f"{place}: id {quote(utterance_id)} is not <turn>_<speaker>_d<dialog>: correct the first field")
        return None
    if match[2] != speaker:
        note(
            problems,
            f"{place}: speaker {quote(speaker)} is not the speaker of id {utterance_id}: correct one of the two fields",
        )
        return None
    if problem := text_problem(text):
        note(problems, f"{place}: text {quote(text)} of {utterance_id} {problem}: correct the text")
    audio = address(f"{match[3]}/{utterance_id}.wav")
    return Utterance(utterance_id, f"d{match[3]}", int(match[1]), speaker, text, emotion, audio)
