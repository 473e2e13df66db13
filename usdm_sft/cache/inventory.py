"""What a cache holds, and the removal of what a user names. Nothing else in this package removes finished work."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from filelock import Timeout

from usdm_sft.cache.runs import KEY_LENGTH, RunRecord, find_running, read_records, registry_lock
from usdm_sft.cache.shard_cache import ShardCache
from usdm_sft.utils.atomic import remove_path
from usdm_sft.utils.hashes import sha256_file

Level = Literal[
    "units", "tokens", "builder", "hub", "split_lists", "digests", "agreement", "executor", "unit_models",
    "unfinished", "damaged", "other",
]  # fmt: skip
LEVELS: tuple[Level, ...] = get_args(Level)
OF_RUNS = ("units", "tokens", "builder", "hub", "executor", "unfinished")  # removed without naming the level
UNKNOWN = "unknown"
DAY = 86_400.0

_SHARD = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{64})\.arrow")
_UNFINISHED = re.compile(r"([0-9a-f]{64})\.unfinished")
_SHARD_LEVELS: tuple[Level, ...] = ("units", "tokens")
_FOLDER_LEVELS: tuple[tuple[Level, str], ...] = (  # level, and the pattern of its entries
    ("builder", "builder/*/*"), ("hub", "hub/*"), ("split_lists", "split_lists"), ("agreement", "agreement"),
    ("executor", "executor/*"), ("unit_models", "unit_models/*"), ("digests", "digests.sqlite*"),
)  # fmt: skip
_OWN_NAMES = {"locks", "runs", *_SHARD_LEVELS, *(pattern.partition("/")[0] for _, pattern in _FOLDER_LEVELS)}


class Entry(NamedTuple):
    """A file or folder of the cache.

    Attributes:
        level: Its kind.
        path: Where it is.
        size: Bytes of the file, or of all files in the folder.
        used: When it was made or, if later, when the last run that uses it started; in seconds since the epoch.
        runs: The recorded runs that use it; empty if it is not known.
    """

    level: Level
    path: Path
    size: int
    used: float
    runs: tuple[RunRecord, ...]

    @property
    def corpora(self) -> tuple[str, ...]:
        return tuple(sorted({run.corpus for run in self.runs}))

    @property
    def unit_models(self) -> tuple[str, ...]:
        """Name and digest of each unit model."""
        if self.level in ("builder", "hub"):  # they do not depend on it
            return ()
        return tuple(sorted({f"{run.unit_model} ({run.unit_model_digest[:8]})" for run in self.runs}))


class Kept(NamedTuple):
    """An entry that was not removed."""

    entry: Entry
    reason: str


def list_cache(cache: Path, *, check: bool = False) -> list[Entry]:
    """List the entries of a cache, in the order of `LEVELS`. Its lock files and its records of runs are no entries.

    Args:
        cache: Folder of the cache.
        check: Read every work shard; one that differs from the digest in its name is of the level "damaged".
    """
    records = read_records(cache)
    times = {record.digest: path.stat().st_mtime for path, record in records.items()}
    by_key: dict[str, list[RunRecord]] = {}
    for record in records.values():
        for key in record.keys:
            by_key.setdefault(key, []).append(record)

    def entry(level: Level, path: Path, runs: Sequence[RunRecord]) -> Entry:
        size, made = _measure(path)
        return Entry(level, path, size, max([made, *(times[run.digest] for run in runs)]), tuple(runs))

    entries = []
    for shard_level in _SHARD_LEVELS:
        for path in _children(cache / shard_level, skip={"locks"}):
            level, key = _classify(shard_level, path, check=check)
            entries.append(entry(level, path, by_key.get(key[:KEY_LENGTH], [])))
    for level, pattern in _FOLDER_LEVELS:
        for path in sorted(cache.glob(pattern)):
            if not path.name.endswith(".lock"):
                name = path.relative_to(cache).as_posix()
                users = [r for r in records.values() if any(f"{each}/".startswith(f"{name}/") for each in r.folders)]
                entries.append(entry(level, path, users))
    entries += [
        entry("other", path, [])
        for path in _children(cache, skip=_OWN_NAMES)
        if not path.name.startswith("digests.sqlite")
    ]
    return sorted(entries, key=lambda each: LEVELS.index(each.level))


def _children(folder: Path, *, skip: set[str]) -> Iterator[Path]:
    if folder.is_dir():
        yield from (folder / name for name in sorted(os.listdir(folder)) if name not in skip)


def _classify(level: Level, path: Path, *, check: bool) -> tuple[Level, str]:
    """Return the level of a path among work shards, and its key, "" if it has none."""
    if shard := _SHARD.fullmatch(path.name):
        return ("damaged" if check and sha256_file(path) != shard[2] else level), shard[1]
    if unfinished := _UNFINISHED.fullmatch(path.name):
        return "unfinished", unfinished[1]
    return "other", ""


def _measure(path: Path) -> tuple[int, float]:
    """Return the size of a file, or of all files in a folder, and when the last of them was changed. Links are not followed."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return found.st_size, found.st_mtime
    files = [os.lstat(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names]
    return sum(each.st_size for each in files), max((each.st_mtime for each in files), default=found.st_mtime)


def select(
    entries: Iterable[Entry],
    *,
    level: str | None = None,
    corpus: str | None = None,
    unit_model: str | None = None,
    older_than: float | None = None,
) -> list[Entry]:
    """Select the entries to which all conditions apply.

    What several runs use is selected only if the conditions apply to each of them.

    Args:
        entries: The entries of a cache.
        level: One of `LEVELS`.
        corpus: Folder of the corpus or its last part, "hub:USER/NAME", or "unknown".
        unit_model: Name, folder, or its last part, or the start of the digest of the unit model, or "unknown".
        older_than: Number of days for which the entry was not used.
    """
    latest = time.time() - (older_than or 0.0) * DAY

    def applies(entry: Entry, value: str | None, of_run: Callable[[RunRecord, str], bool]) -> bool:
        if value is None:
            return True
        return all(of_run(run, value) for run in entry.runs) if entry.runs else value == UNKNOWN

    return [
        entry
        for entry in entries
        if level in (None, entry.level)
        and applies(entry, corpus, lambda run, value: _names(value, run.corpus))
        and applies(entry, unit_model, _is_unit_model)
        and (older_than is None or entry.used <= latest)
    ]


def _names(value: str, name: str) -> bool:
    return value in (name, Path(name).name) or str(Path(value).expanduser().resolve()) == name


def _is_unit_model(run: RunRecord, value: str) -> bool:
    return _names(value, run.unit_model) or (len(value) >= 6 and run.unit_model_digest.startswith(value))


def remove(cache: Path, entries: Iterable[Entry], *, dry_run: bool = False) -> tuple[list[Entry], list[Kept]]:
    """Remove entries of a cache, but for those that a running process uses.

    Args:
        cache: Folder of the cache.
        entries: Entries of `list_cache`.
        dry_run: Remove nothing, and return what would be removed and kept now.

    Returns:
        The entries that were removed, and those that were kept.

    Raises:
        OSError: An entry cannot be removed, or the cache is on a file system without working locks.
    """
    removed: list[Entry] = []
    kept: list[Kept] = []
    with registry_lock(cache):
        in_use = find_running(cache)
        for entry in entries:
            with ExitStack() as held:
                if _is_in_use(entry, in_use):
                    kept.append(Kept(entry, "a run of prepare uses it"))
                elif not _lock_shard(entry, held):
                    kept.append(Kept(entry, "a process makes it, or another work shard with the same lock"))
                else:
                    removed.append(entry)
                    if not dry_run:
                        remove_path(entry.path)
        if not dry_run:
            _remove_records(cache, in_use)
    return removed, kept


def _is_in_use(entry: Entry, in_use: set[str]) -> bool:
    """True if a running run uses the entry, or if it is not known who uses it and any run may, such as a unit model."""
    if entry.runs:
        return any(run.digest in in_use for run in entry.runs)
    return bool(in_use) and entry.level in {level for level, _ in _FOLDER_LEVELS}


def _lock_shard(entry: Entry, held: ExitStack) -> bool:
    """Take the lock under which a process makes a work shard; returns False if a process holds it."""
    match = _SHARD.fullmatch(entry.path.name) or _UNFINISHED.fullmatch(entry.path.name)
    if match is None:
        return True
    lock = ShardCache(entry.path.parent).lock(match[1])
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    held.callback(lock.release)
    return True


def _remove_records(cache: Path, in_use: set[str]) -> None:
    """Remove the records of runs of which nothing is left."""
    left = {
        name[:KEY_LENGTH]
        for level in _SHARD_LEVELS
        for name in map(os.path.basename, _children(cache / level, skip=set()))
    }
    for path, record in read_records(cache).items():
        if record.digest in in_use or not left.isdisjoint(record.keys):
            continue
        if not any((cache / folder).exists() for folder in record.folders):
            path.unlink()
