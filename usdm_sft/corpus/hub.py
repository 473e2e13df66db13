"""A corpus on the Hub -> manifests and recordings in the cache: any dataset with the columns of a manifest, `audio` among them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.corpus.manifest import OPTIONAL, REQUIRED
from usdm_sft.utils.cache import cache_root, path_lock

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hub:"


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
    """
    import datasets

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        splits = datasets.load_dataset(repository, revision=revision or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"dataset {repository} cannot be loaded from the Hub ({reason}): see to its name and the network"
        ) from error
    cache = cache_root(cache_dir)
    return {split: _lay_down(rows, f"{repository}, split {split}", cache) for split, rows in splits.items()}


def _lay_down(rows: Dataset, name: str, cache: Path) -> Path:
    """One split -> its manifest; a finished one is used again."""
    import datasets

    if missing := [column for column in REQUIRED if column not in rows.column_names]:
        raise ValueError(f"{name} has no column {', '.join(missing)}: rename its columns to those of a manifest")
    folder = cache / "hub" / hashlib.sha256(rows._fingerprint.encode()).hexdigest()[:32]
    manifest = folder / "manifest.jsonl"
    with path_lock(folder, cache):
        if manifest.is_file():
            return manifest
        rows = rows.select_columns([column for column in (*REQUIRED, *OPTIONAL) if column in rows.column_names])
        if isinstance(rows.features["audio"], datasets.Audio):
            rows = rows.cast_column("audio", datasets.Audio(decode=False))
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / "manifest.unfinished"
        with open(unfinished, "w", encoding="utf-8") as file:
            for row in rows:
                row["audio"] = _write_audio(row["audio"], folder)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(unfinished, manifest)
    return manifest


def _write_audio(audio: Any, folder: Path) -> str | None:
    """-> path of the recording; bytes become a file that is named by their sha256."""
    if not isinstance(audio, dict):
        return audio
    if audio.get("bytes") is None:
        return audio.get("path")
    path = folder / hashlib.sha256(audio["bytes"]).hexdigest()
    if not path.is_file():
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(audio["bytes"])
        os.replace(unfinished, path)
    return path.name
