"""Find the split files of a corpus and the recipe that reads them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from usdm_sft.audio.addresses import is_remote
from usdm_sft.corpus import dailytalk, hub_corpus, manifest, remote
from usdm_sft.corpus.dailytalk import DAILYTALK, are_published_lists, check_data_dir
from usdm_sft.corpus.dialogs import FilePath, Recipe

RECIPES = (hub_corpus.RECIPE, manifest.RECIPE, dailytalk.RECIPE)  # the first one that fits

# What datasets makes of DailyTalk's own names (`LIST_NAMES`) by their prefixes: the test list would be the validation split.
_GUESSED = {"train": ["train_phone.txt"], "validation": ["val_phone.txt"]}

DataFiles = FilePath | Sequence[FilePath] | Mapping[str, FilePath | Sequence[FilePath]]


def recipe_of(path: FilePath) -> Recipe:
    """Return the recipe that reads a split file."""
    return next(recipe for recipe in RECIPES if recipe.reads(Path(path)))


def find_lists(
    data_dir: FilePath | None,
    data_files: DataFiles | None = None,
    *,
    cache_dir: str | Path | None = None,
    resolved: bool = False,
    may_download: bool = True,
    with_units: bool = False,
) -> dict[str, Path]:
    """Find the split list or manifest of each split.

    Args:
        data_dir: The folder of the corpus, DailyTalk's zip archive, "hub:USER/NAME", or the address of a remote manifest or folder of
            manifests; None is the current folder.
        data_files: The lists by split, relative to `data_dir`. If None: the manifests in the folder, or else the split lists
            beside the data, or else DailyTalk's own lists, which are downloaded once.
        cache_dir: Where downloaded lists are kept; this package's cache by default.
        resolved: True if datasets has resolved `data_files`. It may have guessed them, and a guess is ignored.
        may_download: If False, DailyTalk's own lists are taken from the cache only.
        with_units: Read the column `units` of a corpus of the Hub as well.

    Returns:
        The path of the list of each split; nothing if the lists would have to be downloaded.

    Raises:
        FileNotFoundError: `data_dir` does not exist, or only one list of a pair is there.
        ValueError: A split has several lists.
        OSError: DailyTalk's own lists cannot be downloaded.
    """
    is_on_hub = hub_corpus.is_hub_corpus(data_dir)
    folder = Path() if is_on_hub or is_remote(data_dir or "") else check_data_dir(data_dir or "")
    if data_files is not None and not is_on_hub:
        lists = _name_lists(folder, remote.fetch_named(data_files, cache_dir))
        if not (resolved and _is_guess(lists)):
            for split, files in lists.items():
                if len(files) != 1:
                    raise ValueError(f"data_files names {len(files)} split lists for {split}: name one")
            return {split: files[0] for split, files in lists.items()}
    if is_remote(data_dir or ""):
        return remote.find_manifests(str(data_dir), cache_dir)
    found = (recipe.find(data_dir or "", cache_dir, may_download, with_units) for recipe in RECIPES)
    return next(filter(None, found), {})


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


def find_root(data_dir: FilePath | None, lists: Mapping[str, Path]) -> Path:
    """Return one absolute path for all spellings of `data_dir`; without it, the folder of the first split file."""
    if data_dir is None or hub_corpus.is_hub_corpus(data_dir) or is_remote(data_dir):
        return next(iter(lists.values())).parent.resolve()
    root = Path(data_dir).expanduser()
    for recipe in dict.fromkeys(map(recipe_of, lists.values())):
        root = recipe.root(root)
    return root.resolve()


def describe_corpus(lists: Mapping[str, Path], digests: Mapping[str, str]) -> str:
    """Return the kind of corpus that the lists describe.

    Args:
        lists: Split list or manifest of each split.
        digests: sha256 of each split's list.

    Returns:
        "DailyTalk" for the published lists; otherwise "split list", "manifest", or "manifest and split list".
    """
    if are_published_lists(digests):
        return DAILYTALK
    return " and ".join(sorted({recipe_of(path).kind for path in lists.values()}))
