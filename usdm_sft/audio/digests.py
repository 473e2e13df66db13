"""sha256 of files, remembered in the cache: a first run reads 6 GB of audio, later runs look only at size and times of change.

The digest identifies the file; path, size and times only tell whether a remembered digest is still valid. Only good audio files are
remembered: a bad one is checked again at each run, with other permissions or a newer soundfile.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path

from usdm_sft.audio.addresses import AddressError, Stretch, disk_files, file_problem, open_file, parse_address
from usdm_sft.audio.check import HEADER_ERRORS, check_audio, check_stretches, read_header
from usdm_sft.audio.digest_table import AudioDigest as AudioDigest
from usdm_sft.audio.digest_table import AudioDigests
from usdm_sft.audio.frames import resampled_length
from usdm_sft.audio.memo import Memo, Row
from usdm_sft.audio.reading import AudioError
from usdm_sft.cache.keys import cache_root
from usdm_sft.utils.once import once_per_key
from usdm_sft.utils.progress import progress_bar

_BATCH = 512
_MEMO = "digests.sqlite"  # in the cache
_SETTLED_NS = 2_000_000_000  # a file that changed more recently could change again with the same time stamp


def file_digest(path: str | Path, cache_dir: str | Path | None = None) -> str:
    """Return the sha256 of any file, in hex; it is remembered."""
    path = os.path.realpath(path)
    with closing(Memo(cache_root(cache_dir) / _MEMO)) as memo:
        row = memo.read([path]).get(path)
        if row is not None and _is_valid(row, audio=False):
            return row.sha256
        settled = time.time_ns() - _SETTLED_NS
        row = Row(path, *_stamp(path), _digest_file(path), 0, 0)
        memo.write([row] if _newest(row) < settled else [])
        return row.sha256


def audio_digests(
    paths: Iterable[str],
    cache_dir: str | Path | None = None,
    *,
    num_threads: int | None = None,
    read_ahead: Callable[[Iterable[str], Memo], None] | None = None,
) -> AudioDigests:
    """Digest and check each audio file, in threads, with a progress bar for many files.

    One core reads about 1,000 of DailyTalk's WAV files per second, and later finds 30,000 per second unchanged. It finds 30,000
    stretches of uncompressed recordings per second. A bad file raises nothing: its `problem` says what is wrong.

    Args:
        paths: Addresses of audio; duplicates are read once. The result keeps this object and iterates over it again, unless it
            is an iterator.
        cache_dir: Where digests are remembered; this package's cache by default.
        num_threads: Number of threads; as in `ThreadPoolExecutor` by default.
        read_ahead: Called once, with all addresses and the memo, if an address is not remembered. What it does not add to the memo
            is read here.

    Returns:
        Address -> digest, in the order of `paths`.
    """
    found = AudioDigests(list(paths) if isinstance(paths, Iterator) else paths)
    with ExitStack() as stack:
        memo = stack.enter_context(closing(Memo(cache_root(cache_dir) / _MEMO)))
        ahead = None if read_ahead is None else partial(read_ahead, found, memo)
        reader = Reader(memo, stack.enter_context(ThreadPoolExecutor(num_threads)), ahead)
        bar = stack.enter_context(progress_bar(len(found), "reading recordings", "files", disable=len(found) < _BATCH))
        addresses = iter(found)
        while batch := list(islice(addresses, _BATCH)):
            for row in reader.read(batch):
                found.append(row.path, _to_digest(row))
            bar.update(len(batch))
    return found


def _to_digest(row: Row) -> AudioDigest:
    if row.problem is not None:
        return AudioDigest("", 0, 0.0, row.problem)
    return AudioDigest(row.sha256, resampled_length(row.frames, row.rate), row.frames / row.rate)


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
    stretches = parse_address(address)
    read = read_file if all(stretch.is_whole for stretch in stretches) else read_shared

    def digest(file: str) -> str:
        contents[file], found = read(file)
        return found

    reason = ""
    try:
        unchanged = _stretches_digest(stretches, digest) == sha256
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


class Reader:
    """Digests and checks addresses in batches, and knows the recordings that several of them are cut from.

    A stretch of uncompressed audio is remembered nowhere: its digest and check follow from the digest and the header of its
    recording, which are found once.

    Args:
        memo: Where digests are remembered.
        threads: Read the files.
        read_ahead: Called once, if an address is not remembered; it may add to the memo.
    """

    def __init__(self, memo: Memo, threads: ThreadPoolExecutor, read_ahead: Callable[[], None] | None = None):
        self._memo, self._threads, self._read_ahead = memo, threads, read_ahead
        self._header = once_per_key(read_header)
        self._sha256 = once_per_key(lambda file: _digest_file(file))
        self._recordings: dict[str, str | None] = {}  # recording that is cut -> its remembered sha256

    def read(self, addresses: Sequence[str]) -> list[Row]:
        """Return the row of each address."""
        parsed = {address: parse_address(address) for address in addresses}
        settled = time.time_ns() - _SETTLED_NS
        cut = {address: stretches for address, stretches in parsed.items() if not _is_whole(stretches)}
        self._open_recordings({stretch.file for stretches in cut.values() for stretch in stretches}, settled)
        derived = {address for address, stretches in cut.items() if self._is_plain(stretches)}
        others = [address for address in addresses if address not in derived]
        rows = self._remember(others, audio=True)
        missing = [address for address in others if address not in rows]
        read = list(self._threads.map(lambda address: self._read(address, parsed[address]), missing))
        self._memo.write([row for row in read if row.problem is None and _newest(row) < settled])
        rows |= {row.path: row for row in read}
        rows |= {address: self._derive(address, parsed[address]) for address in derived}
        return [rows[address] for address in addresses]

    def _open_recordings(self, files: set[str], settled: int) -> None:
        """Read the headers of recordings, and find the digests of those whose stretches follow from them."""
        new = sorted(files - self._recordings.keys())
        plain = [
            file for file, is_plain in zip(new, self._threads.map(self._is_uncompressed, new), strict=True) if is_plain
        ]
        known = self._remember(plain, audio=False)
        self._recordings |= {file: known[file].sha256 if file in known else None for file in new}
        missing = [file for file in plain if file not in known]
        rows = [row for row in self._threads.map(self._read_recording, missing) if row is not None]
        self._memo.write([row for row in rows if _newest(row) < settled])

    def _remember(self, paths: Sequence[str], *, audio: bool) -> dict[str, Row]:
        """Return the remembered rows that are valid; if one is missing for the first time, others may read ahead."""
        rows = {path: row for path, row in self._memo.read(paths).items() if _is_valid(row, audio=audio)}
        if len(rows) == len(paths) or self._read_ahead is None:
            return rows
        read_ahead, self._read_ahead = self._read_ahead, None
        read_ahead()
        return self._remember(paths, audio=audio)

    def _read_recording(self, file: str) -> Row | None:
        try:
            return Row(file, *_stamp(file), self._sha256(file), 0, 0)
        except (AddressError, OSError):
            return None  # `_derive` reports it

    def _is_uncompressed(self, file: str) -> bool:
        try:
            return not self._header(file).needs_decoding
        except HEADER_ERRORS:
            return False  # `_read` reports it

    def _is_plain(self, stretches: Sequence[Stretch]) -> bool:
        return all(self._is_uncompressed(stretch.file) for stretch in stretches)

    def _derive(self, address: str, stretches: Sequence[Stretch]) -> Row:
        check = check_stretches(stretches, self._header)
        if check.problem is not None:
            return Row(address, 0, 0, 0, "", *check)
        return Row(address, 0, 0, 0, _stretches_digest(stretches, self._find_sha256), *check)

    def _read(self, address: str, stretches: Sequence[Stretch]) -> Row:
        check = check_audio(address)
        if check.problem is not None:
            return Row(address, 0, 0, 0, "", *check)
        return Row(address, *_stamp(address), _stretches_digest(stretches, self._find_sha256), *check)

    def _find_sha256(self, file: str) -> str:
        if file not in self._recordings:
            return _digest_file(file)  # without stretches, it is hashed once anyway
        return self._recordings[file] or self._sha256(file)


def _newest(row: Row) -> int:
    return max(row.mtime_ns, row.ctime_ns)


def _is_whole(stretches: Sequence[Stretch]) -> bool:
    return len(stretches) == 1 and stretches[0].is_whole


def _stamp(address: str) -> tuple[int, int, int]:
    """Return size and times of change of the files that an address names; any later change increases the last one."""
    stats = [os.stat(file) for file in disk_files(address)]
    return sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats), max(s.st_ctime_ns for s in stats)


def _is_valid(row: Row, *, audio: bool) -> bool:
    try:
        unchanged = (row.size, row.mtime_ns, row.ctime_ns) == _stamp(row.path)
    except OSError:
        return False  # reading the file reports it
    return unchanged and bool(row.frames or not audio)


def _stretches_digest(stretches: Sequence[Stretch], files: Callable[[str], str]) -> str:
    """Return the sha256 of a whole file, or for other addresses the sha256 over the digests of the files and the stretches."""
    if _is_whole(stretches):
        return files(stretches[0].file)
    identity = [[files(stretch.file), *stretch[1:]] for stretch in stretches]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _digest_file(file: str) -> str:
    with open_file(file) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
