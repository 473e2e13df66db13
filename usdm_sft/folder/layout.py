"""The dataset folder: Parquet files and a README that `load_dataset` and the Hub read, the tokenizer, and counts.json.

    README.md                                    dataset card; its YAML names the files and the features
    counts.json                                  counts, statistics, what was left out and why, digests, versions
    single_turn/train-00000-of-00064.parquet     ...
    utterances/train-00000-of-00012.parquet      with keep_audio: each recording once, with its text and units
    tokenizer/                                   for `AutoTokenizer.from_pretrained` and the trainers
    pictures/                                    an example and plots of the statistics, which the card shows
    .unfinished/<key>/                           files of the run with this key, until they are moved into place
    .lock                                        locked by the run that checks or writes the folder

counts.json is removed first and written last: a folder that has it is complete. No file depends on the time or on paths. `prepare`
follows a link to the folder itself, but none inside it: it removes or replaces the link, and never changes what it points to.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock

from usdm_sft.audio.frames import Framing, framing_of
from usdm_sft.corpus.dialogs import CorpusName
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.template.chat import ChatIds, Frames
from usdm_sft.template.config import MAX_UNITS, Template
from usdm_sft.template.parts import RowLayout
from usdm_sft.template.special_tokens import TemplateTokens
from usdm_sft.template.streams import read_streams
from usdm_sft.template.tokenizer import ustm_tokens
from usdm_sft.utils.files import describe_bad_json, remove_path
from usdm_sft.utils.locks import file_lock, require_locks

logger = logging.getLogger(__name__)

COUNTS = "counts.json"
UNFINISHED = ".unfinished"
LOCK = ".lock"
PICTURES = "pictures"
CAPTIONS = {
    "lengths.png": "Length of the rows in tokens and of the recordings in seconds.",
    "labels.png": "Where the loss falls, the share of labelled tokens per row, and the number of pairs per dialog.",
    "units.png": "How often units occur, how long they repeat, and the most frequent emotions of the turns.",
}
OVERWRITE = "pass --overwrite (Python: overwrite=True)"
PREPARE_AGAIN = f"run prepare again and {OVERWRITE}"

# Packages that can change a row: they decode, resample, make units, encode or shuffle. Of the other packages that counts.json names,
# datasets and pyarrow change the bytes of files at most, and matplotlib the pictures.
ROW_PACKAGES = ("dailytalk-usdm", "numpy", "soundfile", "soxr", "tokenizers", "torch", "transformers")
_MOST = 1 << 63  # a number of counts.json is less
_WIDTH = 40  # characters of a value that an error shows

_TYPES = {
    "key": str, "config": str, "num_units": int,
    "settings": dict, "digests": dict, "splits": dict, "statistics": dict, "files": dict,
}  # fmt: skip
# Values that may be missing.
_MORE_TYPES = {"unit_model": dict | None, "versions": dict | None}
_SETTINGS_TYPES = {
    "agent": str | int | float | None, "merge_speaker_turns": bool | None, "merge": str | None, "on_bad_rows": str | None,
    "max_gap": int | float | None, "min_seconds": int | float | None, "max_seconds": int | float | None, "keep_columns": list,
}  # fmt: skip
_SPLIT_TYPES = {
    "pairs_with_bad_rows": int, "turns_left_out": dict, "pairs_left_out": dict, "dialogs_left_out": dict, "turns_clipped": dict,
}  # fmt: skip


def read_counts(folder: str | Path) -> dict[str, Any]:
    """Read counts.json of a dataset folder.

    Raises:
        FileNotFoundError: The folder is not a finished dataset folder.
        ValueError: counts.json is not one that `prepare` wrote.
    """
    path = Path(folder).expanduser() / COUNTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {COUNTS}: name a folder that 'dailytalk-usdm prepare' finished, or run its command again"
        )
    try:
        counts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values = [*flatten(counts)]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{describe_bad_json(path, error)}: {PREPARE_AGAIN}") from error
    if not _is_counts(counts):
        raise ValueError(f"{path} is not the counts of a dataset folder: {PREPARE_AGAIN}")
    for name, value in values:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) < _MOST:  # NaN is not less
                raise ValueError(f"{path}: {name} is {shorten(number)}, too large or no number: {PREPARE_AGAIN}")
    # These names become paths, and the folder may come from an untrusted source.
    plain = (counts["config"], *counts["splits"])
    for name in (*plain, *counts["files"]):
        is_inside = name.isprintable() and "\\" not in name and {"", ".", ".."}.isdisjoint(name.split("/"))
        if not is_inside or (name in plain and "/" in name):
            raise ValueError(f"{path}: {name!r} is not a name in a dataset folder: {PREPARE_AGAIN}")
    return counts


def _is_counts(counts: Any) -> bool:
    """True if every value that other modules read from counts.json exists and has its type."""
    if not isinstance(counts, dict) or not all(isinstance(counts.get(name), kind) for name, kind in _TYPES.items()):
        return False
    splits, settings, utterances = counts["splits"], counts["settings"], counts.get(UTTERANCES, counts["splits"])
    if not (_fit(counts, _MORE_TYPES) and _fit(settings, _SETTINGS_TYPES)):
        return False
    try:
        streams = read_streams(counts)
        read_framing(counts)
    except ValueError:
        return False
    return (
        0 < counts["num_units"] <= MAX_UNITS
        and sum(streams.kept) == counts["num_units"]
        and bool(splits)
        and isinstance(utterances, dict)
        and utterances.keys() == splits.keys()
        and all(isinstance(split, dict) for split in (*splits.values(), *utterances.values()))
        and all(_fit(split, _SPLIT_TYPES) for split in splits.values())
        and isinstance(settings.get("template"), dict)
        and settings.get("corpus") in (None, *get_args(CorpusName))
        and all(isinstance(name, str) for name in read_columns(settings))
        and all(isinstance(settings.get(name), int) for name in ("history", "max_length"))
    )


def _fit(values: Mapping[str, Any], types: Mapping[str, Any]) -> bool:
    """True if each value that is there has its type."""
    return all(isinstance(values[name], kind) for name, kind in types.items() if name in values)


def read_columns(settings: Mapping[str, Any]) -> list[str]:
    """Return the further columns of a dataset folder (`--keep_columns`), from `settings` of counts.json."""
    columns: list[str] = settings.get("keep_columns", [])
    return columns


def read_framing(counts: Mapping[str, Any]) -> Framing | None:
    """Return how the unit model of a dataset folder cut recordings into frames; None if the corpus had its units.

    Raises:
        ValueError: counts.json does not say it.
    """
    unit_model = counts.get("unit_model")
    return None if unit_model is None else framing_of(unit_model)


def read_template(path: Path, counts: Mapping[str, Any]) -> Template:
    """Return the template of a dataset folder, from the content of counts.json; error messages name its path.

    Raises:
        ValueError: The settings are not those of a template.
    """
    try:
        return Template(**counts["settings"]["template"])
    except TypeError as error:  # an unknown field
        raise ValueError(f"{path}: settings.template is not a template ({error}): {PREPARE_AGAIN}") from error


def read_layout(path: Path, counts: Mapping[str, Any]) -> RowLayout:
    """Return what tells the parts of the rows of a dataset folder apart. Same arguments and errors as `read_template`."""
    template, tokenizer = read_template(path, counts), counts.get("tokenizer")
    if not isinstance(tokenizer, dict) or "ids" not in tokenizer:
        return RowLayout(ustm_tokens(MAX_UNITS), template)
    ids, chat = tokenizer["ids"], None
    if not _have_ids(ids, TemplateTokens._fields):
        raise ValueError(f"{path}: tokenizer.ids is {ids!r}, not the ids of a template: {PREPARE_AGAIN}")
    if template.tokenization == "chat":
        values: Any = tokenizer.get("chat")
        if not _have_ids(values, (*Frames._fields, "stop_id")):
            raise ValueError(f"{path}: tokenizer.chat is {values!r}, not the ids of a chat template: {PREPARE_AGAIN}")
        chat = ChatIds(Frames(*(values[name] for name in Frames._fields)), values["stop_id"])
    return RowLayout(TemplateTokens(**ids), template, chat)


def _have_ids(values: Any, names: Collection[str]) -> bool:
    """True for a dict with an id, or lists of ids at any depth, for each name and no other."""

    def are_ids(value: Any) -> bool:
        return all(map(are_ids, value)) if isinstance(value, list | tuple) else isinstance(value, int)

    return isinstance(values, dict) and values.keys() == {*names} and are_ids([*values.values()])


def data_files(folder: str | Path, counts: Mapping[str, Any], config: str | None = None) -> dict[str, list[Path]]:
    """Return the Parquet files of each split, in the order of the rows: of the config `UTTERANCES`, or by default of the rows.

    Raises:
        FileNotFoundError: A file is missing.
    """
    files = {}
    for split in counts["splits"]:
        prefix = f"{config or counts['config']}/{split}-"
        files[split] = [Path(folder).expanduser() / name for name in sorted(counts["files"]) if name.startswith(prefix)]
        for path in files[split]:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: run prepare again")
    return files


def lock_output(folder: Path) -> FileLock:
    """Return the lock of an output folder, which is created if it does not exist. It excludes runs with any cache.

    Raises:
        OSError: The folder is on a file system without working locks, or cannot be written.
    """
    return file_lock(folder / LOCK, option="output_path")


def open_unfinished(folder: Path, key: str, keep: Collection[str]) -> Path:
    """Return the absolute path of the folder for the unfinished files of a run, with none of another run beside it.

    Args:
        folder: The output folder.
        key: Key of the run, which owns the files.
        keep: Names of folders of files that stay if an interrupted run with this key left them.
    """
    owned = (folder / UNFINISHED / key[:16]).absolute()  # tasks run in other working directories
    for path, kept in ((owned.parent, {owned.name}), (owned, {*keep})):
        if path.is_symlink() or not path.is_dir():
            remove_path(path)
        path.mkdir(parents=True, exist_ok=True)
        for entry in path.iterdir():
            if entry.name not in kept or entry.is_symlink():
                remove_path(entry)
    for file in owned.glob("*/*"):
        if file.is_symlink():
            file.unlink()
    return owned


def check_output(
    folder: Path, *, overwrite: bool, finished_too: bool, describe: Callable[[], str] | None = None
) -> None:
    """Refuse to write into a folder with other content, before any work is done.

    Args:
        folder: The output folder.
        overwrite: Allow other content.
        finished_too: Refuse a finished dataset folder too. False while its key has not been compared yet.
        describe: Returns what the folder holds, for the message.

    Raises:
        FileExistsError: The folder has other content than an interrupted run, and `overwrite` is false.
        OSError: The folder cannot be written, or file locks do not work in it.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise FileExistsError(f"{existing} is not a folder: name another output_path")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror}): name another output_path") from error
    require_locks(existing, option="output_path")
    if overwrite or not folder.is_dir() or {*os.listdir(folder)} <= {LOCK}:
        return
    unfinished = folder / UNFINISHED
    finished = os.path.lexists(folder / COUNTS)
    if finished_too if finished else unfinished.is_symlink() or not unfinished.is_dir():
        holds = f"something else, such as {min({*os.listdir(folder)} - {LOCK})}" if describe is None else describe()
        raise FileExistsError(f"{folder} holds {holds}: name another output_path, or {OVERWRITE}")


def flatten(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts as they stand in JSON, by their names with dots."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flatten(value, f"{name}.{key}" if name else key)
    else:
        yield name, list(values) if isinstance(values, tuple) else values


def shorten(value: Any) -> str:
    """Return a setting as an error shows it."""
    text = "default" if value is None else str(value)
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}..."
