"""sha256 of files, remembered in the cache: a first run reads 6 GB of audio, later runs look only at size and times of change.

The digest identifies the file; path, size and times only tell whether a remembered digest is still valid. Only good audio files are
remembered: a bad one is checked again at each run, with other permissions or a newer soundfile.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from usdm_sft.audio.addresses import AddressError, disk_files, file_problem, open_file, parse_address
from usdm_sft.audio.check import AudioCheck, check_audio
from usdm_sft.audio.frames import resampled_length
from usdm_sft.audio.reading import AudioError
from usdm_sft.utils.cache import cache_root
from usdm_sft.utils.once import once_per_key
from usdm_sft.utils.progress import progress_bar

logger = logging.getLogger(__name__)

_BATCH = 512
_TABLE = "files_4"  # gets another name when its columns or the checks of audio change
_SETTLED_NS = 2_000_000_000  # a file that changed more recently could change again with the same time stamp


class AudioDigest(NamedTuple):
    """Digest, length and check of an audio file.

    Attributes:
        sha256: Digest of the content, or of the content and the stretch; "" for a bad file.
        num_samples: Number of samples at 16 kHz.
        seconds: Duration.
        problem: Why the file is bad, without the path; None if it is good.
    """

    sha256: str
    num_samples: int
    seconds: float
    problem: str | None = None


class _Row(NamedTuple):
    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str
    frames: int  # 0 if the file was not checked as audio
    rate: int
    problem: str | None = None  # not remembered


def file_digest(path: str | Path, cache_dir: str | Path | None = None) -> str:
    """Return the sha256 of any file, in hex; it is remembered."""
    return _digest([os.path.realpath(path)], cache_dir, audio=False)[0].sha256


def audio_digests(
    paths: Iterable[str], cache_dir: str | Path | None = None, *, num_threads: int | None = None
) -> dict[str, AudioDigest]:
    """Digest and check each audio file, in threads, with a progress bar for many files.

    One core reads about 1,000 of DailyTalk's WAV files per second, and later finds 30,000 per second unchanged. A bad file raises
    nothing: its `problem` says what is wrong.

    Args:
        paths: Addresses of audio; duplicates are read once.
        cache_dir: Where digests are remembered; this package's cache by default.
        num_threads: Number of threads; as in `ThreadPoolExecutor` by default.

    Returns:
        Address -> digest, in the order of `paths`.
    """
    paths = list(dict.fromkeys(paths))
    rows = _digest(paths, cache_dir, audio=True, num_threads=num_threads)

    def found(path: str, row: _Row) -> AudioDigest:
        if row.problem is not None:
            return AudioDigest("", 0, 0.0, row.problem)
        return AudioDigest(row.sha256, resampled_length(row.frames, row.rate), row.frames / row.rate)

    return {path: found(path, row) for path, row in zip(paths, rows, strict=True)}


def read_unchanged(address: str, sha256: str, read_shared: Callable[[str], tuple[bytes, str]]) -> dict[str, bytes]:
    """Read the files of an address and check their bytes against the digest of the first pass.

    Units that are made from these bytes belong to the digest, whatever happens to the files meanwhile.

    Args:
        address: Address of audio.
        sha256: Its digest, as `audio_digests` found it.
        read_shared: `read_file` with a cache, for recordings of which the address names a stretch.

    Returns:
        The bytes of each file, by its name in the address.

    Raises:
        AudioError: A file was changed or removed meanwhile.
    """
    contents: dict[str, bytes] = {}
    read = read_file if all(stretch.is_whole for stretch in parse_address(address)) else read_shared

    def digest(file: str) -> str:
        contents[file], found = read(file)
        return found

    reason = ""
    try:
        unchanged = _address_digest(address, digest) == sha256
    except AddressError as error:
        unchanged, reason = False, f" (it {error})"
    if not unchanged:
        raise AudioError(
            f"audio file {address} was changed during the run{reason}: let nothing write to it, and run again"
        )
    return contents


def read_file(file: str) -> tuple[bytes, str]:
    """Return the bytes of a file or a member of an archive, and their sha256.

    Raises:
        AddressError: The file does not exist, is not a regular file, or cannot be read.
    """
    if problem := file_problem(file):
        raise AddressError(problem)
    try:
        with open_file(file) as opened:
            content = opened.read()
    except OSError as error:
        raise AddressError(f"cannot be read ({error.strerror})") from error
    return content, hashlib.sha256(content).hexdigest()


def _digest(
    paths: list[str], cache_dir: str | Path | None, *, audio: bool, num_threads: int | None = None
) -> list[_Row]:
    with closing(_Memo(cache_root(cache_dir) / "digests.sqlite")) as memo:
        remembered = memo.read(paths)
        found = {path: row for path in paths if (row := remembered.get(path)) and _is_valid(row, audio)}
        missing = [path for path in paths if path not in found]
        bar = progress_bar(len(missing), "reading recordings", "files", disable=len(missing) < _BATCH)
        files = once_per_key(_digest_file)  # a telephone call with a hundred turns is hashed once
        with bar, ThreadPoolExecutor(num_threads) as threads:
            for start in range(0, len(missing), _BATCH):
                settled = time.time_ns() - _SETTLED_NS
                rows = list(threads.map(lambda path: _read(path, audio, files), missing[start : start + _BATCH]))
                lasting = [row for row in rows if row.problem is None and max(row.mtime_ns, row.ctime_ns) < settled]
                memo.write(lasting)
                found |= {row.path: row for row in rows}
                bar.update(len(rows))
    return [found[path] for path in paths]


class _Memo:
    """The remembered rows. They only save time: after an error, which is logged, the run goes on without them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=60)
            self._database.execute(
                f"CREATE TABLE IF NOT EXISTS {_TABLE} (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER,"
                " ctime_ns INTEGER, sha256 TEXT, frames INTEGER, rate INTEGER)"
            )
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def read(self, paths: list[str]) -> dict[str, _Row]:
        if self._database is None:
            return {}
        rows: dict[str, _Row] = {}
        try:
            for start in range(0, len(paths), _BATCH):
                batch = paths[start : start + _BATCH]
                query = f"SELECT * FROM {_TABLE} WHERE path IN ({','.join('?' * len(batch))})"
                rows |= {row[0]: _Row(*row) for row in self._database.execute(query, batch)}
        except sqlite3.Error as error:
            self._give_up(error)
        return rows

    def write(self, rows: list[_Row]) -> None:
        if self._database is None:
            return
        try:
            with self._database:
                self._database.executemany(
                    f"INSERT OR REPLACE INTO {_TABLE} VALUES (?, ?, ?, ?, ?, ?, ?)", [row[:7] for row in rows]
                )
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("digests are not remembered this time: %s (%s)", self._path, error)
        self.close()
        self._database = None
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            self._path.unlink(missing_ok=True)  # damaged: the next run makes it again

    def close(self) -> None:
        if self._database:
            self._database.close()


def _stamp(address: str) -> tuple[int, int, int]:
    """Return size and times of change of the files that an address names; any later change increases the last one."""
    stats = [os.stat(file) for file in disk_files(address)]
    return sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats), max(s.st_ctime_ns for s in stats)


def _is_valid(row: _Row, audio: bool) -> bool:
    try:
        unchanged = (row.size, row.mtime_ns, row.ctime_ns) == _stamp(row.path)
    except OSError:
        return False  # `_read` reports it
    return unchanged and bool(row.frames or not audio)


def _read(address: str, audio: bool, files: Callable[[str], str]) -> _Row:
    check = check_audio(address) if audio else AudioCheck()
    if check.problem is not None:
        return _Row(address, 0, 0, 0, "", *check)
    return _Row(address, *_stamp(address), _address_digest(address, files), *check)


def _address_digest(address: str, files: Callable[[str], str]) -> str:
    """Return the sha256 of a whole file, or for other addresses the sha256 over the digests of the files and the stretches."""
    stretches = parse_address(address)
    if len(stretches) == 1 and stretches[0].is_whole:
        return files(stretches[0].file)
    identity = [[files(stretch.file), *stretch[1:]] for stretch in stretches]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _digest_file(file: str) -> str:
    with open_file(file) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
