"""A corpus on the Hub as manifests and recordings in the cache.

The dataset has the columns of a manifest; of a dataset folder that was prepared with `--keep_audio`, the config `utterances` is
read. Its audio is in the rows, or in files of the dataset repository. Other files are refused: an untrusted dataset could
otherwise read files of the user and put their sound into the output.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.audio.addresses import absolute_file, disk_files
from usdm_sft.corpus import manifest
from usdm_sft.corpus.dialogs import FilePath, Split
from usdm_sft.corpus.further import list_further
from usdm_sft.corpus.manifest import OPTIONAL, REQUIRED, UTTERANCES, list_missing, list_required
from usdm_sft.corpus.problems import CorpusError, add_problem
from usdm_sft.utils.cache_keys import cache_root
from usdm_sft.utils.files import replace_text, sha256_file, write_then_replace
from usdm_sft.utils.locks import path_lock
from usdm_sft.utils.texts import MAX_LINE, count_noun, first_line, quote

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

PREFIX = "hub:"
_DIGEST = re.compile(r"[0-9a-f]{64}")  # name of a recording
_REMOTE = ("hf://", "https://", "http://")
_MANIFEST, _RECORD = "manifest.jsonl", "manifest.sha256"  # of a split in the cache
_VERSION = 2  # version of the manifests in the cache; those of version 1 may name any file


def is_hub_corpus(data_dir: Any) -> bool:
    """Return True if `data_dir` is "hub:USER/NAME" or "hub:USER/NAME@REVISION"."""
    return str(data_dir).startswith(PREFIX)


def split_name(name: str) -> tuple[str, str | None]:
    """Split "hub:USER/NAME@REVISION" into the repository and the revision, or None where no revision is named."""
    repository, at, revision = name.removeprefix(PREFIX).partition("@")
    return repository, revision if at else None


def fetch_corpus(name: str, cache_dir: str | Path | None = None, *, with_units: bool = False) -> dict[str, Path]:
    """Load a dataset from the Hub and write its recordings to files in the cache, once.

    Args:
        name: Such as "hub:user/calls", or "hub:user/calls@v1" for a revision.
        cache_dir: Where manifests and recordings are kept; this package's cache by default.
        with_units: Write the column `units` into the manifests. Recordings are then optional.

    Returns:
        The manifest of each split.

    Raises:
        OSError: The dataset cannot be loaded.
        ValueError: A column of a manifest is missing, a folder here has the name of the dataset, or the revision does not exist.
        CorpusError: A row names audio outside the dataset; the message names each such row.
    """
    import datasets  # slow to import, and needed for a corpus on the Hub only
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    from usdm_sft.utils.hub import check_revision, hub_errors, size_on_hub

    repository, revision = split_name(name)
    if Path(repository).exists():  # datasets would read it in place of the dataset on the Hub
        raise ValueError(
            f"{PREFIX}{repository} names a dataset of the Hub, but {Path(repository).resolve()} exists here and would be "
            "read in its place: run the command in another folder"
        )
    check_revision(revision)
    try:
        builder = datasets.load_dataset_builder(repository, revision=revision)
        if UTTERANCES in builder.builder_configs:
            builder = datasets.load_dataset_builder(repository, UTTERANCES, revision=revision)
        check_data_files(repository, builder.config.data_files)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as error:
        if isinstance(error, CorpusError):
            raise
        intro = f"dataset {repository} cannot be loaded: "
        with hub_errors(repository, revision, repo_type="dataset", intro=intro):
            if not isinstance(error, OSError | ValueError | datasets.exceptions.DatasetsError):
                raise
            # datasets replaces most errors of the Hub by one without the reason: ask the Hub again.
            size_on_hub(repository, "README.md", "dataset", revision=revision, timeout=10)
            reason = first_line(error.__cause__ or error)  # datasets itself says no more than that an error occurred
            raise OSError(f"{intro}{reason}: correct the dataset, or name another one") from error
    cache = cache_root(cache_dir)
    files = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="dataset")).resolve()
    return {
        split: write_manifest(rows, rows._fingerprint, f"{repository}, split {split}", files, cache, with_units)
        for split, rows in splits.items()
    }


def place_rows(splits: Mapping[str, Split], lists: Mapping[str, Path], data_dir: FilePath | None) -> dict[str, Split]:
    """Return the splits with the rows of a dataset placed in the dataset that the user gave, and not in a manifest in the cache."""
    return {
        name: replace(split, place=partial(_place_row, f"{data_dir}, split {name}"), is_dataset=True)
        if RECIPE.reads(lists[name])
        else split
        for name, split in splits.items()
    }


def _place_row(name: str, line: int) -> str:
    return f"{name}, row {line - 1}"


@contextmanager
def naming_dataset(lists: Mapping[str, Path], data_dir: FilePath | None) -> Iterator[None]:
    """Name the dataset that the user gave, with split and row, in errors of its manifests and recordings in the cache."""

    def rename(text: str) -> str:
        for split, path in lists.items():
            if RECIPE.reads(path):
                name, folder = f"{data_dir}, split {split}", re.escape(str(path.parent.absolute()))
                lines = re.split(rf"{re.escape(str(path))}:(\d+)", text)  # every second one is the number of a line
                lines[1::2] = [_place_row(name, int(number)) for number in lines[1::2]]
                text = "".join(lines).replace(str(path), name)
                text = re.sub(rf"file {folder}/{_DIGEST.pattern}", f"of {data_dir}", text)
        return text

    try:
        yield
    except (ValueError, OSError) as error:
        error.args = tuple(rename(each) if isinstance(each, str) else each for each in error.args)
        if isinstance(error, CorpusError):
            error.problems = [*map(rename, error.problems)]
        raise


def check_data_files(repository: str, data_files: Mapping[Any, Iterable[Any]] | None) -> None:
    """Check that all data files of a dataset lie on the Hub. datasets 3 takes any path from a dataset card.

    Raises:
        CorpusError: The card names a local file.
    """
    for file in chain.from_iterable((data_files or {}).values()):
        if not str(file).rpartition("::")[2].startswith(_REMOTE):
            raise CorpusError([f"dataset {repository} names the local file {file} as its data: use another dataset"])


def write_manifest(
    rows: Dataset | IterableDataset, identity: str, name: str, files: Path, cache: Path, with_units: bool
) -> Path:
    """Write the manifest and recordings of one split, unless the cache has them. Damage in the cache is found and made good.

    Args:
        rows: The rows, with the columns of a manifest. Further columns are written too, those with bytes left out.
        identity: Another text for other rows.
        name: The beginning of error messages.
        files: The folder of the dataset, in which recordings may lie.
        cache: The cache.
        with_units: As in `fetch_corpus`.
    """
    import datasets

    required = list_required(with_units)
    if missing := list_missing(rows.column_names, with_units, needs_text=False):  # read_manifest checks the texts
        raise ValueError(f"{name} has no column {', '.join(missing)}: rename its columns to those of a manifest")
    schema = rows.features.arrow_schema
    further = [column for column in list_further(rows.column_names) if _fits_json(schema.field(column).type)]
    identity = f"{_VERSION} {identity}{' with units' if with_units else ''}"
    identity += " with further columns" if further else ""  # earlier versions of this package left them out
    folder = cache / "hub" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    manifest, record = folder / _MANIFEST, folder / _RECORD  # the record is written last
    with path_lock(folder, cache):
        num_recordings = _remove_damaged(folder, cache)
        if manifest.is_file() and record.is_file():
            if record.read_bytes() == f"{sha256_file(manifest)} {num_recordings}".encode():
                return manifest
            logger.warning("%s was damaged after it was written: making it again", folder)
        wanted = dict.fromkeys((*REQUIRED, *OPTIONAL, *required, *further))
        rows = rows.select_columns([column for column in wanted if column in rows.column_names])
        if isinstance(rows.features.get("audio"), datasets.Audio):
            rows = rows.cast_column("audio", datasets.Audio(decode=False))
        problems: list[str] = []
        num_too_long = 0
        with write_then_replace(manifest) as file:
            for number, row in enumerate(rows):
                problem = None
                if row.get("audio") is not None or not with_units:
                    row["audio"], problem = _write_audio(row["audio"], number, folder, files)
                if problem is not None:
                    add_problem(problems, f"{name}, row {number}: {problem}")
                line = json.dumps(row, ensure_ascii=False, default=str)
                if further and len(line) > MAX_LINE:
                    num_too_long += 1
                    line = json.dumps({**row, **dict.fromkeys(further)}, ensure_ascii=False, default=str)
                file.write(line + "\n")
            if problems:
                raise CorpusError(problems)
        if num_too_long:
            logger.warning(
                "%s: the further columns of %s are left out, because they have more than %s characters: shorten them to keep them",
                name, count_noun(num_too_long, "row"), f"{MAX_LINE:,}",
            )  # fmt: skip
        replace_text(record, f"{sha256_file(manifest)} {len(_find_recordings(folder))}")
    return manifest


def _fits_json(kind: pa.DataType) -> bool:
    """Return False if values of a type hold bytes, as recordings and pictures do."""
    inner = (kind.field(index).type for index in range(kind.num_fields))
    return "binary" not in str(kind).partition("<")[0] and all(map(_fits_json, inner))


def _remove_damaged(folder: Path, cache: Path) -> int:
    """Remove recordings whose bytes do not have the digest in their name, and return the number of the others."""
    # The command line reads this module, and soundfile is slow to import.
    from usdm_sft.audio.digests import file_digests

    recordings = _find_recordings(folder)
    for path, sha256 in zip(recordings, file_digests(recordings, cache), strict=True):
        if sha256 != os.path.basename(path):
            os.unlink(path)
    return len(_find_recordings(folder))


def _find_recordings(folder: Path) -> list[str]:
    """Return the absolute paths of the recordings, as a manifest in the folder means them."""
    names = filter(_DIGEST.fullmatch, os.listdir(folder) if folder.is_dir() else [])
    return [os.path.abspath(folder / name) for name in names]


def _write_audio(audio: Any, number: int, folder: Path, files: Path) -> tuple[Any, str | None]:
    """Return the path of the recording of a row and what is wrong with it.

    Bytes become a file with their sha256 as its name. A row without a recording gets the name of a file that does not exist, which
    `on_bad_audio` then decides about as it does about any missing file.
    """
    if audio is None:
        return f"no recording in row {number}", None
    content, path = (audio.get("bytes"), audio.get("path")) if isinstance(audio, dict) else (None, audio)
    if isinstance(path, bytes):  # a column of type binary
        content = path
    if content is not None:
        if not isinstance(content, bytes):
            kind = type(content).__name__
            return None, f"audio is a {kind}, not the bytes of a recording: put the recording into the row"
        recording = folder / hashlib.sha256(content).hexdigest()
        if not recording.is_file():
            with write_then_replace(recording, "wb", sync=False) as file:  # every run checks the digest
                file.write(content)
        return recording.name, None
    if isinstance(path, str) and path and not _is_inside(path, folder, files):
        return path, f"audio {quote(path)} is not a file of the dataset: put the audio itself into the row"
    return path, None


def _is_inside(path: str, folder: Path, files: Path) -> bool:
    """Return True if every file of the address is in `files`, with symlinks followed; relative paths start at `folder`."""
    try:
        return all(Path(file).is_relative_to(files) for file in disk_files(absolute_file(path, folder)))
    except ValueError:  # a NUL in the path
        return False


def _find(
    data_dir: FilePath, cache_dir: str | Path | None, may_download: bool, with_units: bool
) -> dict[str, Path] | None:
    is_wanted = may_download and is_hub_corpus(data_dir)
    return fetch_corpus(str(data_dir), cache_dir, with_units=with_units) if is_wanted else None


RECIPE = manifest.RECIPE._replace(
    name="dataset",
    looks_for=f"{PREFIX}USER/NAME, a dataset of the Hub with the columns of a manifest",
    reads=lambda path: path.name == _MANIFEST and path.with_name(_RECORD).is_file(),
    find=_find,
    # Recordings lie beside the manifest.
    read=lambda path, problems, data_dir, **options: manifest.read_manifest(path, problems, None, **options),
    read_units=lambda path, problems, data_dir, units, **options: manifest.read_manifest(
        path, problems, None, units, **options
    ),
)
