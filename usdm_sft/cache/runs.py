"""The runs that use a cache: what each is for, which work shards it uses, and whether it is running.

    runs/<digest>.json             written when a run starts; equal runs share one file
    runs/<digest>.<random>.lock    held while a run is running; the operating system frees it if the run is killed

The work shards themselves do not tell their corpus, because their bytes depend on their content alone.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from usdm_sft.cache.keys import cache_key
from usdm_sft.cache.locks import file_lock, path_lock
from usdm_sft.utils.atomic import replace_text
from usdm_sft.utils.json_files import read_json

logger = logging.getLogger(__name__)

KEY_LENGTH = 16  # characters of each key of a work shard that a record holds; 64 bits tell the shards of a cache apart


@dataclass(frozen=True)
class RunRecord:
    """What a run is for, and what it uses of the cache.

    Attributes:
        corpus: Folder of the corpus, or "hub:USER/NAME".
        unit_model: Name or folder of the unit model.
        unit_model_digest: Its sha256, in hex.
        keys: The first `KEY_LENGTH` characters of the key of each work shard.
        folders: Folders that it uses, relative to the cache.
    """

    corpus: str
    unit_model: str
    unit_model_digest: str
    keys: tuple[str, ...]
    folders: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Name of its file."""
        return cache_key(asdict(self))[:32]


@contextmanager
def running(cache: Path, record: RunRecord) -> Iterator[None]:
    """Record a run, and mark all that it uses as in use until the block ends or the process dies."""
    path = cache / "runs" / f"{record.digest}.json"
    lock = file_lock(path.with_suffix(f".{uuid.uuid4().hex}.lock"))
    with registry_lock(cache):  # waits for a removal, so that the run sees the cache after it
        find_running(cache)
        replace_text(path, json.dumps(asdict(record)))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def registry_lock(cache: Path) -> FileLock:
    """Return the lock that a run takes to register, and a removal until it is done."""
    return path_lock(cache / "runs", cache)


def find_running(cache: Path) -> set[str]:
    """Return the digests of the records whose runs are running. Locks that killed runs left are removed.

    The caller holds `registry_lock`.
    """
    found = set()
    for path in (cache / "runs").glob("*.lock"):
        lock = file_lock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            found.add(path.name.partition(".")[0])
            continue
        lock.release()
        path.unlink(missing_ok=True)
    return found


def read_records(cache: Path) -> dict[Path, RunRecord]:
    """Read the records of all runs, by their files. A damaged one is reported and left out."""
    records = {}
    for path in sorted((cache / "runs").glob("*.json")):
        try:
            values = read_json(path)
            record = RunRecord(**values | {name: tuple(values[name]) for name in ("keys", "folders")})
            if record.digest != path.stem:
                raise ValueError("its content does not have the digest in its name")
        except (ValueError, TypeError, KeyError, OSError) as error:
            logger.warning("%s is damaged (%s): the next run of prepare writes it again", path, error)
            continue
        records[path] = record
    return records
