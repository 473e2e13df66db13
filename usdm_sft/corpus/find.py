"""Find the split lists or manifests of a corpus, and its recordings."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from usdm_sft.audio.addresses import AddressError, list_members, zip_address
from usdm_sft.corpus.manifest import SUFFIXES
from usdm_sft.corpus.published_lists import cached_split_lists, fetch_split_lists

# Names of the two lists beside the data: renamed as the reference asks, or as DailyTalk ships them.
LIST_NAMES = ({"train": "train.txt", "test": "test.txt"}, {"train": "train_phone.txt", "test": "val_phone.txt"})
SPLITS = ("train", "test", "validation")  # a manifest is named after its split

# What datasets makes of DailyTalk's own names (`LIST_NAMES`) by their prefixes: the test list would be the validation split.
_GUESSED = {"train": ["train_phone.txt"], "validation": ["val_phone.txt"]}
_MEMBER = re.compile(r"((?:[^\n]*/)?)[0-9]+/[0-9]+_[0-9]+_d[0-9]+\.wav")

FilePath = str | os.PathLike[str]
DataFiles = FilePath | Sequence[FilePath] | Mapping[str, FilePath | Sequence[FilePath]]


def find_lists(
    data_dir: FilePath | None,
    data_files: DataFiles | None = None,
    *,
    cache_dir: str | Path | None = None,
    resolved: bool = False,
) -> dict[str, Path]:
    """Find the split list or manifest of each split.

    Args:
        data_dir: The folder of the corpus, or DailyTalk's zip archive; None is the current folder.
        data_files: The lists by split, relative to `data_dir`. If None: the manifests in the folder, or else the split lists
            beside the data, or else DailyTalk's own lists, which are downloaded once.
        cache_dir: Where downloaded lists are kept; this package's cache by default.
        resolved: True if datasets has resolved `data_files`. It may have guessed them, and a guess is ignored.

    Returns:
        The path of the list of each split.

    Raises:
        FileNotFoundError: `data_dir` does not exist, or only one list of a pair is there.
        ValueError: A split has several lists.
        OSError: DailyTalk's own lists cannot be downloaded.
    """
    folder = check_data_dir(data_dir or "")
    if data_files is not None:
        lists = _name_lists(folder, data_files)
        if not (resolved and _is_guess(lists)):
            for split, files in lists.items():
                if len(files) != 1:
                    raise ValueError(f"data_files names {len(files)} split lists for {split}: name one")
            return {split: files[0] for split, files in lists.items()}
    return find_lists_here(folder, cache_dir) or fetch_split_lists(cache_dir)


def find_lists_here(data_dir: FilePath, cache_dir: str | Path | None = None) -> dict[str, Path] | None:
    """Find the lists as `find_lists` does where none is named, but without a download; None if one would be needed."""
    folder = check_data_dir(data_dir)
    return find_manifests(folder) or find_split_lists(folder) or cached_split_lists(cache_dir)


def _name_lists(folder: Path, data_files: DataFiles) -> dict[str, list[Path]]:
    by_split = data_files if isinstance(data_files, Mapping) else {"train": data_files}
    lists = {}
    for split, files in by_split.items():
        files = [files] if isinstance(files, str | os.PathLike) else files
        lists[str(split)] = [Path(folder, Path(file).expanduser()) for file in files]
    return lists


def _is_guess(lists: Mapping[str, Sequence[Path]]) -> bool:
    """Return True for the files that datasets finds in `data_dir` if the user names none: audio, or lists as other splits."""
    if any(file.suffix == ".wav" for files in lists.values() for file in files):
        return True
    return {split: [file.name for file in files] for split, files in lists.items()} == _GUESSED


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


def find_manifests(folder: FilePath) -> dict[str, Path] | None:
    """Find the manifests in a folder, such as train.jsonl and test.csv.

    Returns:
        The manifest of each split, or None if there is none.

    Raises:
        ValueError: A split has two manifests.
    """
    found: dict[str, Path] = {}
    for path in (Path(folder, f"{split}{suffix}") for split in SPLITS for suffix in SUFFIXES):
        if path.is_file() and found.setdefault(path.stem, path) != path:
            raise ValueError(f"{path} stands beside {found[path.stem].name}: keep one, or name the one to use")
    return found or None


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
    if folder.is_dir() and any(entry.name.isdecimal() and entry.is_dir() for entry in folder.iterdir()):
        return folder
    raise FileNotFoundError(
        f"{folder} holds neither a folder 'data' nor numbered dialog folders: "
        "give the folder that DailyTalk was unpacked into as data_dir"
    )


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
