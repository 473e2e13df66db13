"""A corpus on the Hub -> manifests and recordings in the cache: any dataset with the columns of a manifest, `audio` among them.

The audio is in the rows, or in files of the dataset repository. A row that names any other file is refused: a dataset could
otherwise have files of the user read, and their sound passed on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.audio.addresses import absolute_file, disk_files
from usdm_sft.corpus.manifest import OPTIONAL, REQUIRED
from usdm_sft.corpus.problems import CorpusError, note
from usdm_sft.utils.atomic import write_then_replace
from usdm_sft.utils.cache import cache_root, path_lock
from usdm_sft.utils.texts import first_line, quote

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hub:"
_VERSION = 2  # of the manifests laid down; those of version 1 may name any file


def is_hub_corpus(data_dir: Any) -> bool:
    """Whether `data_dir` is spelled "hub:USER/NAME" or "hub:USER/NAME@REVISION"."""
    return str(data_dir).startswith(PREFIX)


def fetch_corpus(name: str, cache_dir: str | Path | None = None) -> dict[str, Path]:
    """Load a dataset of the Hub and lay its recordings down as files, once.

    Args:
        name: Such as "hub:user/calls", or "hub:user/calls@v1" at a revision.
        cache_dir: Where manifests and recordings are kept; this package's cache by default.

    Returns:
        The manifest of each split.

    Raises:
        OSError: The dataset cannot be loaded.
        ValueError: It has not the columns of a manifest.
        CorpusError: Its audio lies outside it; each row concerned is named.
    """
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        splits = datasets.load_dataset(repository, revision=revision or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise OSError(
            f"dataset {repository} cannot be loaded from the Hub ({first_line(error)}): see to its name and the network"
        ) from error
    cache = cache_root(cache_dir)
    files = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="dataset")).resolve()
    return {split: _lay_down(rows, f"{repository}, split {split}", files, cache) for split, rows in splits.items()}


def _lay_down(rows: Dataset, name: str, files: Path, cache: Path) -> Path:
    """One split -> its manifest; a finished one is used again. `files` is the folder of the downloaded repository."""
    import datasets

    if missing := [column for column in REQUIRED if column not in rows.column_names]:
        raise ValueError(f"{name} has no column {', '.join(missing)}: rename its columns to those of a manifest")
    folder = cache / "hub" / hashlib.sha256(f"{_VERSION} {rows._fingerprint}".encode()).hexdigest()[:32]
    manifest = folder / "manifest.jsonl"
    with path_lock(folder, cache):
        if manifest.is_file():
            return manifest
        rows = rows.select_columns([column for column in (*REQUIRED, *OPTIONAL) if column in rows.column_names])
        if isinstance(rows.features["audio"], datasets.Audio):
            rows = rows.cast_column("audio", datasets.Audio(decode=False))
        problems: list[str] = []
        with write_then_replace(manifest) as file:
            for number, row in enumerate(rows):
                row["audio"], problem = _write_audio(row["audio"], folder, files)
                if problem is not None:
                    note(problems, f"{name}, row {number}: {problem}")
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if problems:
                raise CorpusError(problems)
    return manifest


def _write_audio(audio: Any, folder: Path, files: Path) -> tuple[Any, str | None]:
    """-> (path of the recording, what is wrong with it); bytes become a file that is named by their sha256."""
    content, path = (audio.get("bytes"), audio.get("path")) if isinstance(audio, dict) else (None, audio)
    if content is not None:
        return _write_bytes(content, folder), None
    if isinstance(path, str) and path and not _is_inside(path, folder, files):
        return path, f"audio {quote(path)} is not a file of the dataset: put the audio itself into the row"
    return path, None


def _write_bytes(content: bytes, folder: Path) -> str:
    path = folder / hashlib.sha256(content).hexdigest()
    if not path.is_file():
        with write_then_replace(path, "wb") as file:
            file.write(content)
    return path.name


def _is_inside(path: str, folder: Path, files: Path) -> bool:
    """Whether `path`, named from `folder` as the manifest reader does it, leads to nothing outside `files`, symlinks followed."""
    try:
        return all(Path(file).is_relative_to(files) for file in disk_files(absolute_file(path, folder)))
    except ValueError:  # a NUL in it
        return False
