"""The files of work shards, and their cache: Arrow files that get their name only when they are complete.

A file is named `<key>.<digest>.arrow`. The key identifies the inputs; the digest is the sha256 of the file and shows damage. A
damaged file is made again. An unfinished shard is in the folder `<key>.unfinished`, which the next run removes.

The folder `locks` of a level has one lock file for all keys with the same first characters.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import BaseFileLock, Timeout

from usdm_sft.utils.files import remove_path, replace_path, sha256_file
from usdm_sft.utils.locks import file_lock

logger = logging.getLogger(__name__)

_PREFIX = 4  # characters of a key, which name its lock
_ROWS = 1_000  # of a record batch, as datasets writes it


class ShardCache:
    """One level of the cache.

    Args:
        folder: Folder of its files, created by the first write.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def find(self, key: str) -> Path | None:
        """Return the finished file of `key`, or None. A damaged file is removed with a warning."""
        return self.find_all([key]).get(key)

    def find_all(self, keys: Iterable[str]) -> dict[str, Path]:
        """Return the finished file of each key that has one. The folder is listed once."""
        wanted, found = set(keys), {}
        for name in sorted(os.listdir(self.folder)) if self.folder.is_dir() else []:
            key, _, rest = name.partition(".")
            if key in wanted and key not in found and rest.endswith(".arrow") and self._is_whole(self.folder / name):
                found[key] = self.folder / name
                # A run that was killed right after the rename leaves this folder.
                remove_path(self.folder / f"{key}.unfinished")
        return found

    def _is_whole(self, path: Path) -> bool:
        """Check the digest of a file, and remove the file if it is another one."""
        try:
            is_whole = sha256_file(path) == path.name.split(".")[1]
        except FileNotFoundError:  # removed meanwhile
            return False
        if not is_whole:
            logger.warning("%s was damaged after it was written: making it again", path)
            path.unlink(missing_ok=True)
        return is_whole

    def make(self, key: str, write: Callable[[str], Any]) -> Path:
        """Return the finished file of `key`, and make it first where there is none.

        Runs that share the cache take turns, so that only one of them makes the file.

        Args:
            key: Key of the work shard.
            write: Called with the path to write the file to.
        """
        claim = self.claim(key)
        assert claim is not None  # it waited
        with claim:
            return claim.finished or claim.write(write)

    def claim(self, key: str, *, wait: bool = True) -> Claim | None:
        """Claim the right to make the file of `key`.

        A caller that holds a claim must not wait for another one: two runs that each wait for the other would wait forever.

        Args:
            key: Key of the work shard.
            wait: Wait for another run that has the claim.

        Returns:
            The claim; None if another run has it and `wait` is false.

        Raises:
            OSError: The cache is on a file system without working locks.
        """
        # Lock files are never removed, so their number is bounded by the first characters of the key. With two characters,
        # 64 tasks at the same time would often share a lock. A claim may be released by another thread than its owner.
        lock = file_lock(self.folder / "locks" / key[:_PREFIX], thread_local=False)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return None
        with ExitStack() as held:
            held.callback(lock.release)
            finished = self.find(key)
            held.pop_all()  # without an error or a Ctrl-C the lock stays
        return Claim(self.folder, key, lock, finished)


@dataclass(frozen=True)
class Claim:
    """The exclusive right to make the file of one key, until the `with` block ends or `release` is called."""

    folder: Path
    key: str
    lock: BaseFileLock
    finished: Path | None  # the file, if it is finished

    def write(self, write: Callable[[str], Any]) -> Path:
        """Make the file with `write`, as in `ShardCache.make`, and return its path."""
        unfinished = self.folder / f"{self.key}.unfinished"
        remove_path(unfinished)
        unfinished.mkdir()
        path = unfinished / "shard.arrow"
        write(str(path))
        finished = self.folder / f"{self.key}.{sha256_file(path)}.arrow"
        replace_path(path, finished)
        remove_path(unfinished)
        return finished

    def release(self) -> None:
        """Let other runs make the file."""
        self.lock.release()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def write_shard(columns: Mapping[str, Any], path: str, *, metadata: Mapping[bytes, bytes] | None = None) -> None:
    """Write the Arrow file of a work shard.

    It has no description of the columns (`huggingface`), because datasets 3 cannot read the one of later versions. Each version of
    datasets finds the same columns from the Arrow types.

    Args:
        columns: Arrow columns, values, or one array per row.
        path: The file.
        metadata: Of the schema of the file.

    Raises:
        OSError: The file cannot be written, such as on a full disk.
    """
    rows = pa.table({name: _make_array(values) for name, values in columns.items()}, metadata=metadata)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=_ROWS)


def _make_array(values: Any) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if not isinstance(values[0], np.ndarray):
        return pa.array(values)
    offsets = pa.array(np.cumsum([0, *map(len, values)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, np.concatenate(values))  # six times as fast as `pa.array`


def read_shard(path: Path) -> pa.Table:
    """Return the rows of a work shard; they stay in the file, which is memory-mapped.

    `Dataset.from_file` takes ten times as long, which counts for shuffled rows.
    """
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()
