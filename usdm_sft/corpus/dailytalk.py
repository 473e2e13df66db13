"""DailyTalk: a folder or zip archive of recordings, and two split lists, its own or those of the user.

A line of a split list is one utterance: `<turn>_<speaker>_d<dialog>|<speaker>|{phones}|<text>|<emotion>`. The lists that DailyTalk
publishes are recognized by sha256, and downloaded if the data has no lists.
"""

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from usdm_sft.audio.addresses import AddressError, list_members, zip_address
from usdm_sft.corpus.dialogs import FilePath, Recipe, Turns, Utterance
from usdm_sft.corpus.problems import add_problem
from usdm_sft.corpus.tables import place_of
from usdm_sft.utils.cache_keys import cache_root
from usdm_sft.utils.download import download
from usdm_sft.utils.files import sha256_file
from usdm_sft.utils.locks import file_lock
from usdm_sft.utils.texts import CONTROL, LineError, quote, read_limited_lines, text_problem

DAILYTALK = "DailyTalk"

# The split lists in the DailyTalk repository (github.com/keonlee9420/DailyTalk).
SPLIT_LISTS_URL = (
    "https://raw.githubusercontent.com/keonlee9420/DailyTalk/"
    "05a0173dac8e68fb2b22190cfc5c22248538a1a6/preprocessed_data/DailyTalk"
)
SPLIT_LISTS = {
    "train": ("train_phone.txt", "defdf666637a16db3ea353e2e9477a5e2d20e6a686fb687de62425b7be6fa92e"),
    "test": ("val_phone.txt", "72337e7247a10818af5100f768edb0082b2407b21c99a910a8ad9401969ad9c7"),
}

# What `datasets.DatasetInfo` says of the published lists.
INFO = {
    "homepage": "https://github.com/keonlee9420/DailyTalk",
    "license": "CC BY-SA 4.0, offered for academic use; the texts come from DailyDialog, CC BY-NC-SA 4.0 (not confirmed)",
    "citation": "Keon Lee, Kyumin Park, Daeyoung Kim: DailyTalk: Spoken Dialogue Dataset for Conversational Text-to-Speech. "
    "2022, arXiv:2207.01063",
}

# Names of the two lists beside the data: renamed as the reference asks, or as DailyTalk ships them.
LIST_NAMES = ({"train": "train.txt", "test": "test.txt"}, {"train": "train_phone.txt", "test": "val_phone.txt"})

_UTTERANCE_ID = re.compile(r"([0-9]{1,9})_([0-9]{1,9})_d([0-9]{1,9})")
_MEMBER = re.compile(r"((?:[^\n]*/)?)[0-9]+/[0-9]+_[0-9]+_d[0-9]+\.wav")


def check_data_dir(data_dir: FilePath) -> Path:
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


def find_split_lists(data_dir: FilePath) -> dict[str, Path] | None:
    """Find the split lists beside the `data` folder or the zip archive, under either pair of names.

    Returns:
        The list of each split, or None if there is none.

    Raises:
        FileNotFoundError: `data_dir` does not exist, or only one list of a pair is there.
    """
    data = check_data_dir(data_dir)
    data = data if data.is_file() else find_data_folder(data_dir)
    folder = Path(os.path.abspath(data)).parent  # the folder of the link if `data` is a symlink
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


def find_data_folder(data_dir: FilePath) -> Path:
    """Find the folder of `<dialog>/<turn>_<speaker>_d<dialog>.wav`.

    Args:
        data_dir: DailyTalk's folder (with `data/`) or, as the reference takes it, its `data` folder.

    Raises:
        FileNotFoundError: `data_dir` does not exist or has no such folder.
    """
    folder = check_data_dir(data_dir)
    if (folder / "data").is_dir():
        return folder / "data"
    if folder.is_dir() and _has_dialogs(folder):
        return folder
    raise FileNotFoundError(
        f"{folder} holds neither a folder 'data' nor numbered dialog folders: "
        "give the folder that DailyTalk was unpacked into as data_dir"
    )


def _has_dialogs(folder: Path) -> bool:
    return any(entry.name.isdecimal() and entry.is_dir() for entry in folder.iterdir())


def find_recordings(data_dir: FilePath) -> Callable[[str], str]:
    """Return the function from an audio name, such as "23/0_1_d23.wav", to the address of the recording.

    Args:
        data_dir: A folder as `find_data_folder` takes it, or DailyTalk's zip archive.

    Raises:
        FileNotFoundError: `data_dir` does not exist or has no recordings of DailyTalk.
    """
    archive = check_data_dir(data_dir)
    if not archive.is_file():
        folder = find_data_folder(data_dir).resolve()
        return lambda name: os.path.join(folder, name)
    try:
        match = next(filter(None, map(_MEMBER.fullmatch, list_members(archive))), None)
    except AddressError as error:
        raise FileNotFoundError(f"{archive} {error}: give DailyTalk's folder or its zip archive") from error
    if match is None:
        raise FileNotFoundError(
            f"{archive} holds no recordings such as data/23/0_1_d23.wav: give the archive that DailyTalk is downloaded as"
        )
    prefix = match[1]
    return lambda name: zip_address(archive.resolve(), prefix + name)


def fetch_split_lists(
    cache_dir: str | Path | None = None, *, may_download: bool = True, url: str = SPLIT_LISTS_URL
) -> dict[str, Path] | None:
    """Return DailyTalk's own split lists, from the cache or else from its repository at a fixed commit.

    Args:
        cache_dir: Where the lists are kept; this package's cache by default.
        may_download: If False, None is returned for lists that are not in the cache.
        url: The place to download from.

    Raises:
        OSError: There is no network, or offline mode is on.
        ValueError: A downloaded file has another sha256.
    """
    folder = cache_root(cache_dir) / "split_lists"
    lists = {split: folder / name for split, (name, _) in SPLIT_LISTS.items()}

    def find_missing() -> list[str]:
        return [
            split
            for split, (_, sha256) in SPLIT_LISTS.items()
            if not lists[split].is_file() or sha256_file(lists[split]) != sha256
        ]

    if not may_download:
        return None if find_missing() else lists
    with file_lock(folder / "lock"):
        for split in find_missing():
            name, sha256 = SPLIT_LISTS[split]
            download(f"{url}/{name}", lists[split], sha256=sha256)
    return lists


def are_published_lists(digests: Mapping[str, str]) -> bool:
    """Return True if every list is one that DailyTalk publishes, under any name.

    Args:
        digests: sha256 of each split's list.
    """
    return set(digests.values()) <= {sha256 for _, sha256 in SPLIT_LISTS.values()}


def check_not_swapped(lists: Mapping[str, str | Path], digests: Mapping[str, str]) -> None:
    """Check that DailyTalk's own train and test lists are not swapped; other lists are not known.

    Args:
        lists: Path of the list of each split. A single list may have any split name: datasets calls it "train".
        digests: sha256 of each split's list.

    Raises:
        ValueError: The train list is named as test, or the test list as train.
    """
    for split, other in (("train", "test"), ("test", "train")) if len(lists) > 1 else ():
        if digests.get(split) == SPLIT_LISTS[other][1]:
            raise ValueError(f"{lists[split]} is DailyTalk's {other} list, but is named as {split}: swap the lists")


def read_split_list(path: Path, problems: list[str], data_dir: FilePath | None) -> Turns:
    """Read the turns of a split list, whose dialogs are in order of their number.

    Args:
        path: The list.
        problems: Problems are appended to this list.
        data_dir: A folder as `find_data_folder` takes it, or DailyTalk's zip archive. If None, addresses are names such as
            "23/0_1_d23.wav".

    Returns:
        The turns, each with its line. A dialog with an unreadable line is absent, so that its other lines cause no further
        problems.
    """
    address = str if data_dir is None else find_recordings(data_dir)
    turns = Turns(place_of(path))
    broken: set[str] = set()
    before = len(problems)
    try:
        for number, line in read_limited_lines(path):
            utterance, wrong = _parse_line(line.removesuffix("\n"), number, address)
            if utterance is None:
                if match := _UTTERANCE_ID.match(line):
                    broken.add(f"d{match[3]}")
            elif (first := turns.add(utterance, number)) is not None:
                wrong.append(f"id {utterance.id} stands already at line {first}: delete one of the two lines")
            for problem in wrong:
                add_problem(problems, f"{turns.place(number)}: {problem}")
    except LineError as error:
        problems[before:] = []  # earlier problems of the file may be a consequence
        add_problem(problems, str(error))
        turns.dialogs = {}
        return turns
    whole = turns.dialogs.keys() - broken
    turns.dialogs = {name: turns.dialogs[name] for name in sorted(whole, key=lambda name: (int(name[1:]), name))}
    return turns


def _parse_line(line: str, number: int, address: Callable[[str], str]) -> tuple[Utterance | None, list[str]]:
    """Return the utterance of a line, or None if it is unreadable, and what is wrong with the line."""
    if not line.strip():
        return None, ["blank line: delete it"]
    fields = line.split("|")
    if len(fields) != 5:
        return None, [
            f"{len(fields)} fields instead of 5 (id|speaker|phones|text|emotion) in {quote(line)}: "
            "take '|' out of the text, or complete the line"
        ]
    utterance_id, speaker, _, text, emotion = fields
    match = _UTTERANCE_ID.fullmatch(utterance_id)
    if match is None:
        return None, [f"id {quote(utterance_id)} is not <turn>_<speaker>_d<dialog>: correct the first field"]
    if match[2] != speaker:
        return None, [
            f"speaker {quote(speaker)} is not the speaker of id {utterance_id}: correct one of the two fields"
        ]
    wrong = []
    if problem := text_problem(text):
        wrong.append(f"text {quote(text)} of {utterance_id} {problem}: correct the text")
    if CONTROL.search(emotion):
        wrong.append(f"emotion {quote(emotion)} holds a control character: correct it")
    audio = address(f"{match[3]}/{utterance_id}.wav")
    return Utterance(utterance_id, f"d{match[3]}", int(match[1]), speaker, text, emotion, audio, lines=(number,)), wrong


def _find(
    data_dir: FilePath, cache_dir: str | Path | None, may_download: bool, with_units: bool
) -> dict[str, Path] | None:
    path = Path(data_dir).expanduser()
    if path.is_dir():
        if not (path / "data").is_dir() and not _has_dialogs(path):
            return None
    elif path.suffix.lower() != ".zip" and not zipfile.is_zipfile(path):
        return None
    if (lists := find_split_lists(data_dir)) is not None:
        return lists
    if path.is_dir() and not _has_dialogs(find_data_folder(path)):
        return None  # a folder 'data' of another corpus
    if path.is_file():
        find_recordings(path)
    return fetch_split_lists(cache_dir, may_download=may_download) or {}


RECIPE = Recipe(
    "dailytalk",
    "split list",
    "data/<dialog>/*.wav with train.txt and test.txt beside data, or DailyTalk.zip",
    reads=lambda path: False,  # the reference takes any name: a file that no other recipe reads is a split list
    find=_find,
    read=read_split_list,
    root=lambda data_dir: find_data_folder(data_dir) if data_dir.is_dir() else data_dir,
    needs_data_dir=True,
    first_turn=0,  # and any number of speakers: the reference does not count them
)
