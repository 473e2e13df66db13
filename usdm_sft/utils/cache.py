"""The cache of finished work shards: Arrow files that appear under their name only when complete.

A file is named `<key>.<digest>.arrow`: the key says what went in, the digest (sha256 of the file) that it is whole. A file that
was cut short or changed is made anew. What is unfinished lies in one folder `<key>.unfinished`, so that a rerun removes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

logger = logging.getLogger(__name__)


def cache_key(*parts: Any) -> str:
    """sha256 over JSON values, in hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def path_lock(path: str | Path, cache: Path) -> FileLock:
    """A lock on what is written to `path`, for the runs that share the cache."""
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    return FileLock(cache / "locks" / cache_key(str(Path(path).resolve()))[:2])


class ShardCache:
    """One level of the cache.

    Args:
        folder: Where its files lie; made at the first write.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def find(self, key: str) -> Path | None:
        """The finished file of `key`, checked, or None. One that is damaged is removed, and said so."""
        for path in sorted(self.folder.glob(f"{key}.*.arrow")):
            if sha256_file(path) == path.name.split(".")[1]:
                # Left where a run was killed right after it had given the file its name.
                shutil.rmtree(self.folder / f"{key}.unfinished", ignore_errors=True)
                return path
            logger.warning("%s was damaged after it was written: it is made anew", path)
            path.unlink(missing_ok=True)
        return None

    def make(self, key: str, write: Callable[[str], Any]) -> Path:
        """The finished file of `key`; where there is none, `write` is called with the path to write it to.

        Runs that share the cache take turns: the second finds what the first has made.
        """
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        # A fixed set of names: lock files stay, and must not pile up. Of two letters 64 tasks at once would often share one.
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
    """`cache_dir`, or the folder `dailytalk_usdm` in huggingface_hub's HF_HOME."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "dailytalk_usdm"


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
