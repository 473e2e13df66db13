"""Find the split files of a corpus and the recipe that reads them."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from usdm_sft.audio.addresses import is_remote
from usdm_sft.corpus import (
    alignments,
    dailytalk,
    hub_corpus,
    kaldi,
    lhotse,
    manifest,
    remote,
    rttm,
    saved_dataset,
    segment_tables,
)
from usdm_sft.corpus.dailytalk import DAILYTALK, are_published_lists, check_data_dir
from usdm_sft.corpus.dialogs import CorpusName, FilePath, Recipe
from usdm_sft.corpus.tables import FIELDS, list_lacking, split_of, stem_of
from usdm_sft.utils.files import sha256_file
from usdm_sft.utils.texts import quote

# The first one that fits is taken.
RECIPES = (
    hub_corpus.RECIPE,
    saved_dataset.RECIPE,
    manifest.RECIPE,
    dailytalk.RECIPE,
    lhotse.RECIPE,
    segment_tables.NEMO,
    kaldi.RECIPE,
    rttm.RECIPE,
    alignments.RECIPE,
    segment_tables.RECIPE,
)
_SHOWN = 5  # names of files in the message of a folder that is not known

# What datasets makes of DailyTalk's own names (`LIST_NAMES`) by their prefixes: the test list would be the validation split.
_GUESSED = {"train": ["train_phone.txt"], "validation": ["val_phone.txt"]}

DataFiles = FilePath | Sequence[FilePath] | Mapping[str, FilePath | Sequence[FilePath]]


def recipe_of(path: FilePath, corpus: CorpusName | None = None) -> Recipe:
    """Return the recipe that reads a split file: the one with the name `corpus`, or the first that does; split lists may have any name."""
    if corpus is not None:
        return next(recipe for recipe in RECIPES if recipe.name == corpus)
    return next((recipe for recipe in RECIPES if recipe.reads(Path(path))), dailytalk.RECIPE)


def find_lists(
    data_dir: FilePath | None,
    data_files: DataFiles | None = None,
    *,
    corpus: CorpusName | None = None,
    cache_dir: str | Path | None = None,
    resolved: bool = False,
    may_download: bool = True,
    with_units: bool = False,
) -> dict[str, Path]:
    """Find the split list or manifest of each split.

    Args:
        data_dir: The folder of the corpus, one of its files, DailyTalk's zip archive, "hub:USER/NAME", or the address of a remote manifest or
            folder of manifests; None is the current folder.
        data_files: The lists by split, relative to `data_dir`, or to the folder of the archive. If None: what the first of `RECIPES` finds in the folder, such as manifests
            or split lists. DailyTalk's own lists are downloaded once where it has none.
        corpus: The name of the only recipe to ask.
        cache_dir: Where downloaded lists are kept; this package's cache by default.
        resolved: True if datasets has resolved `data_files`. It may have guessed them, and a guess is ignored.
        may_download: If False, DailyTalk's own lists are taken from the cache only, and the recordings of a dataset are not unpacked to it.
        with_units: Read the column `units` of a corpus of the Hub as well.

    Returns:
        The path of the list of each split; nothing if the lists would have to be downloaded or unpacked.

    Raises:
        FileNotFoundError: `data_dir` does not exist or is not a corpus of a known kind, or only one list of a pair is there.
        ValueError: A split has several lists.
        OSError: DailyTalk's own lists cannot be downloaded.
    """
    is_on_hub = hub_corpus.is_hub_corpus(data_dir)
    folder = Path() if is_on_hub or is_remote(data_dir or "") else check_data_dir(data_dir or "")
    if data_files is not None and not is_on_hub:
        lists = _name_lists(folder.parent if folder.is_file() else folder, remote.fetch_named(data_files, cache_dir))
        if not (resolved and _is_guess(lists)):
            for split, files in lists.items():
                if len(files) != 1:
                    raise ValueError(f"data_files names {len(files)} split lists for {split}: name one")
            return {split: files[0] for split, files in lists.items()}
    if is_on_hub:
        return hub_corpus.RECIPE.find(str(data_dir), cache_dir, may_download, with_units) or {}
    if is_remote(data_dir or ""):
        return remote.find_manifests(str(data_dir), cache_dir)
    for recipe in RECIPES if folder.is_dir() or folder.is_file() else ():  # opening a FIFO would block
        if corpus in (None, recipe.name):
            found = recipe.find(folder, cache_dir, may_download, with_units)
            if found is not None:
                return found
    if corpus is not None and folder.is_file():  # whose columns tell another kind, or none
        return {split_of(stem_of(folder)) or "train": folder}
    raise FileNotFoundError(_describe_unknown(folder, corpus))


def _describe_unknown(path: Path, corpus: CorpusName | None) -> str:
    """Say which kinds of corpora a folder or file is not, and what it holds."""
    kinds = [recipe for recipe in RECIPES if corpus in (None, recipe.name)]
    what = f"no corpus of the kind {corpus}" if corpus is not None else "no corpus of a known kind"
    holds = ""
    if path.is_dir():
        names = sorted(f"{each.name}{'/' if each.is_dir() else ''}" for each in path.iterdir())
        shown = ", ".join(map(quote, names[:_SHOWN])) or "nothing"
        holds = f" It holds {shown}{f' and {len(names) - _SHOWN:,} more' if names[_SHOWN:] else ''}."
    tables = [path] if path.is_file() else sorted(each for each in path.glob("*") if each.is_file())
    lacking = [
        f" {each.name} has no column for {_list_fields(fields)}." for each in tables if (fields := list_lacking(each))
    ]
    remedy = "give its folder or file as data_dir, or its split files (--train_metadata_path)"
    return "\n".join(
        [
            f"{path} holds {what}: {remedy}.{holds}{''.join(lacking[:1])}",
            "What was looked for:",
            *(f"  {each.name:<12}{each.looks_for}" for each in kinds),
        ]
    )


def _list_fields(fields: Sequence[str]) -> str:
    return " or ".join(f"{field} (such as {', '.join(FIELDS[field][:4])})" for field in fields)


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


def digest_list(path: Path, data_dir: FilePath | None = None, corpus: CorpusName | None = None) -> str:
    """Return the sha256 of a split file, or over those of all files that its turns are read from."""
    files = recipe_of(path, corpus).files(path, data_dir)
    digests = [sha256_file(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def find_root(data_dir: FilePath | None, lists: Mapping[str, Path], corpus: CorpusName | None = None) -> Path:
    """Return one absolute path for all spellings of `data_dir`; without it, the folder of the first split file.

    Raises:
        ValueError: The path holds a newline.
    """
    if data_dir is None or hub_corpus.is_hub_corpus(data_dir) or is_remote(data_dir):
        root = next(iter(lists.values())).parent
    else:
        root = Path(data_dir).expanduser()
        for recipe in dict.fromkeys(recipe_of(path, corpus) for path in lists.values()):
            root = recipe.root(root)
    if "\n" in str(root := root.resolve()):
        raise ValueError(
            f"data_dir {str(root)!r} holds a newline, which separates recordings of a turn: rename the folder"
        )
    return root


def describe_corpus(lists: Mapping[str, Path], digests: Mapping[str, str], corpus: CorpusName | None = None) -> str:
    """Return the kind of corpus that the lists describe.

    Args:
        lists: Split list or manifest of each split.
        digests: sha256 of each split's list.
        corpus: The name of their recipe, if it is given.

    Returns:
        "DailyTalk" for the published lists; otherwise "split list", "manifest", "manifest and split list", or another `kind` of a recipe.
    """
    if are_published_lists(digests):
        return DAILYTALK
    return " and ".join(sorted({recipe_of(path, corpus).kind for path in lists.values()}))
