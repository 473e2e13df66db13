"""The cache of finished work shards: Arrow files that get their name only when they are complete.

A file is named `<key>.<digest>.arrow`. The key identifies the inputs; the digest is the sha256 of the file and shows damage. A
damaged file is made again. An unfinished shard is in the folder `<key>.unfinished`, which the next run removes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants

logger = logging.getLogger(__name__)


def cache_key(*parts: Any) -> str:
    """Return the sha256, in hex, of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def path_lock(path: str | Path, cache: Path) -> FileLock:
    """Return a lock on writes to `path` among the runs that share the cache."""
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    return FileLock(cache / "locks" / cache_key(str(Path(path).resolve()))[:2])


class ShardCache:
    """One level of the cache.

    Args:
        folder: Folder of its files, created by the first write.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def find(self, key: str) -> Path | None:
        """Return the finished file of `key`, or None. A damaged file is removed with a warning."""
        for path in sorted(self.folder.glob(f"{key}.*.arrow")):
            if sha256_file(path) == path.name.split(".")[1]:
                # A run that was killed right after the rename leaves this folder.
                shutil.rmtree(self.folder / f"{key}.unfinished", ignore_errors=True)
                return path
            logger.warning("%s was damaged after it was written: making it again", path)
            path.unlink(missing_ok=True)
        return None

    def find_all(self, keys: Iterable[str]) -> dict[str, Path]:
        """Return the finished file of each key that has one."""
        found = {key: self.find(key) for key in keys}
        return {key: path for key, path in found.items() if path is not None}

    def make(self, key: str, write: Callable[[str], Any]) -> Path:
        """Return the finished file of `key`, and make it first where there is none.

        Runs that share the cache take turns, so that only one of them makes the file.

        Args:
            key: Key of the work shard.
            write: Called with the path to write the file to.
        """
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        # Lock files are never removed, so their number is bounded by the first characters of the key. With two characters,
        # 64 tasks at the same time would often share a lock.
        with FileLock(self.folder / "locks" / key[:4]):
            if (found := self.find(key)) is not None:
                return found
            unfinished = self.folder / f"{key}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            path = unfinished / "shard.arrow"
            write(str(path))
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            finished = self.folder / f"{key}.{sha256_file(path)}.arrow"
            os.replace(path, finished)
            shutil.rmtree(unfinished)
            return finished


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return `cache_dir`, or by default the folder `dailytalk_usdm` in huggingface_hub's HF_HOME."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(constants.HF_HOME) / "dailytalk_usdm"


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
