"""The first pass over audio: digest, length and check of every recording, remembered in the cache.

A first run reads 6 GB of audio; later runs look only at size and times of change. The digest identifies the content; path, size and
times only tell whether a remembered digest is still valid. Only good files are remembered: a bad one is checked again at each run,
with other permissions or a newer soundfile. A segment is remembered nowhere: its digest and check follow from those of its recording.

`read_unchanged` reads the same bytes later, when units are made.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from usdm_sft.audio.addresses import (
    AddressError,
    NamesakeFinder,
    Segment,
    disk_file,
    file_problem,
    open_file,
    parse_address,
)
from usdm_sft.audio.check import check_segments, digest_recording
from usdm_sft.audio.containers import AudioError
from usdm_sft.audio.digest_database import TABLE, DigestDatabase, Row, Stamp
from usdm_sft.audio.frames import resampled_length
from usdm_sft.audio.reading import SharedBytes
from usdm_sft.audio.sound import AUDIO_ERRORS, Extent, find_problem
from usdm_sft.utils.cache_keys import cache_key, cache_root
from usdm_sft.utils.progress import progress_bar

if TYPE_CHECKING:
    from usdm_sft.utils.pool import Pool

NUM_THREADS = 2  # one waits for the disk while the other one computes; more of them wait for each other
FEW = 2_000  # addresses that this process reads alone: another process takes a second to start
BATCH = 512  # addresses that are looked up, or read by a process or task, in one call
_BAR = 512  # addresses that are worth a progress bar
_DATABASE = "digests.sqlite"  # in the cache
_ABSENT: Stamp = (0, 0, 0)  # no file has this one


class AudioDigest(NamedTuple):
    """Digest, length and check of the audio at an address.

    Attributes:
        sha256: Digest of the content, or of the content and the segment; "" for bad audio.
        num_samples: Number of samples at 16 kHz.
        seconds: Duration.
        problem: Why the audio is bad, without the path; None if it is good.
    """

    sha256: str
    num_samples: int
    seconds: float
    problem: str | None = None


def file_digest(path: str | Path, cache_dir: str | Path | None = None) -> str:
    """Return the sha256 of any file, in hex; it is remembered."""
    [digest] = file_digests([os.path.realpath(path)], cache_dir)
    return digest


def file_digests(paths: Sequence[str], cache_dir: str | Path | None = None) -> Iterator[str]:
    """Yield the sha256 of each file, in hex; it is remembered. Digests of recordings are those that `audio_digests` remembers."""
    with closing(DigestDatabase(cache_root(cache_dir) / _DATABASE)) as database:
        for batch in _batches(paths):
            known = database.read(batch)
            for path in batch:
                row = known.get(path)
                if row is None or not is_unchanged(row):
                    started = time.time_ns()
                    stamp = find_stamp(path)
                    with open_file(path) as content:
                        row = Row(path, *stamp, hashlib.file_digest(content, "sha256").hexdigest(), 0, 0, 0)
                    database.write([row] if row.is_settled(started) else [])
                yield row.sha256


def audio_digests(
    addresses: Iterable[str],
    cache_dir: str | Path | None = None,
    *,
    num_threads: int = NUM_THREADS,
    pool: Pool | None = None,
) -> dict[str, AudioDigest]:
    """Digest and check the audio at each address, in threads, with a progress bar for many.

    One core reads about 1,000 of DailyTalk's WAV files per second, and later finds 30,000 per second unchanged. It finds 30,000
    segments of uncompressed recordings per second. A bad file raises nothing: its `problem` says what is wrong.

    Args:
        addresses: Addresses of audio; duplicates are read once.
        cache_dir: Where digests are remembered; this package's cache by default.
        num_threads: Number of threads.
        pool: Shares out what is not remembered, if that is much. Bad audio, and files that have just changed, are read again here.

    Returns:
        Address -> digest, in the order of the addresses.

    Raises:
        Submitted: Slurm reads the recordings.
    """
    found: dict[str, AudioDigest | None] = dict.fromkeys(addresses)
    with ExitStack() as stack:
        database = stack.enter_context(closing(DigestDatabase(cache_root(cache_dir) / _DATABASE)))
        reader = _Reader(stack.enter_context(ThreadPoolExecutor(num_threads)))
        bar = stack.enter_context(progress_bar(len(found), "reading recordings", "files", disable=len(found) < _BAR))

        def put(batch: Sequence[str], digests: Sequence[AudioDigest | None]) -> None:
            found.update(zip(batch, digests, strict=True))
            bar.update(len(batch) - digests.count(None))

        def missing() -> list[str]:
            return [address for address, digest in found.items() if digest is None]

        for batch in _batches(missing()):
            put(batch, reader.recall(batch, database))
        if pool is not None and len(new := missing()) >= FEW:
            shares = _share_out(new)
            # The table is in the keys, so that the results of a version with other rows or checks are not found.
            keys = [cache_key(TABLE, share) for share in shares]
            calls = pool.map(read_recordings, shares, name="recordings", keys=keys, is_valid=_are_unchanged)
            for index, (digests, rows) in calls:
                database.write(rows)
                put(shares[index], digests)
        for batch in _batches(missing()):
            rows, remembered = reader.read(batch)
            database.write(remembered)
            put(batch, [to_digest(row) for row in rows])
    return cast(dict[str, AudioDigest], found)


def _batches(addresses: Sequence[str]) -> Iterator[Sequence[str]]:
    return (addresses[start : start + BATCH] for start in range(0, len(addresses), BATCH))


def _share_out(addresses: Sequence[str]) -> list[list[str]]:
    """Divide addresses into shares. The segments of one recording are in one share, so that it is read once."""
    groups: dict[str, list[str]] = {}
    for address in addresses:
        segment = parse_address(address, exists=lambda _: False)[0]
        groups.setdefault(address if segment.is_whole else segment.file, []).append(address)
    shares: list[list[str]] = []
    for group in groups.values():
        if not shares or len(shares[-1]) >= BATCH:
            shares.append([])
        shares[-1] += group
    return shares


def read_recordings(addresses: Sequence[str]) -> tuple[list[AudioDigest | None], list[Row]]:
    """Digest and check recordings, in a process or task, which does not write to the database.

    Returns:
        The digest of each address, None for bad audio and for files that have just changed; and the rows to remember.
    """
    started = time.time_ns()
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        rows, remembered = _Reader(threads).read(addresses)
    return [to_digest(row) if row.problem is None and row.is_settled(started) else None for row in rows], remembered


def _are_unchanged(result: tuple[list[AudioDigest | None], list[Row]]) -> bool:
    """Return True if the files that an earlier run read have not changed since."""
    return all(map(is_unchanged, result[1]))


class _KnownFile(NamedTuple):
    """A recording that is cut: its row, and what it holds; None if it cannot be read."""

    row: Row
    extent: Extent | None

    def measure(self) -> Extent:
        """Return what the recording holds.

        Raises:
            AudioError: It cannot be read.
        """
        if self.extent is None:
            raise AudioError(self.row.problem)
        return self.extent


class _Reader:
    """Digests and checks addresses in batches, and knows the recordings that several of them are cut from."""

    def __init__(self, threads: ThreadPoolExecutor):
        self._threads = threads
        self._exists = NamesakeFinder().exists
        self._recordings: dict[str, _KnownFile] = {}

    def recall(self, addresses: Sequence[str], database: DigestDatabase) -> list[AudioDigest | None]:
        """Return the digest of each good address that is remembered or follows from what is; no file is opened."""
        parsed = {address: parse_address(address, self._exists) for address in addresses}
        whole = {address for address, segments in parsed.items() if is_whole(segments)}
        new = self._find_new(parsed)
        rows = database.read(sorted(whole | new))
        for file in new & rows.keys():
            row = rows[file]
            if row.channels and find_stamp(file) == row.stamp:
                self._recordings[file] = _KnownFile(row, Extent(row.frames, row.rate, row.channels))

        def recall(address: str) -> AudioDigest | None:
            row = rows.get(address)
            if address not in whole:
                is_known = all(segment.file in self._recordings for segment in parsed[address])
                row = self._derive(address, parsed[address]) if is_known else None
            elif row is None or row.stamp != find_stamp(address):
                return None
            return to_digest(row) if row is not None and row.frames else None

        return [recall(address) for address in addresses]

    def read(self, addresses: Sequence[str]) -> tuple[list[Row], list[Row]]:
        """Read files anew; return the row of each address, and the rows of good files and recordings, to remember."""
        started = time.time_ns()
        parsed = {address: parse_address(address, self._exists) for address in addresses}
        cut = self._find_new(parsed)
        whole = {address for address, segments in parsed.items() if is_whole(segments)} - self._recordings.keys()
        files = sorted(whole | cut)
        read = dict(zip(files, self._threads.map(_read_recording, files), strict=True))
        self._recordings |= {file: read[file] for file in cut}
        remembered = [row for row, _ in read.values() if row.problem is None and row.is_settled(started)]
        rows = [
            read[address].row if address in whole else self._derive(address, parsed[address]) for address in addresses
        ]
        return rows, remembered

    def _find_new(self, parsed: Mapping[str, Sequence[Segment]]) -> set[str]:
        """Return the recordings that are cut and not yet known."""
        files = {each.file for segments in parsed.values() if not is_whole(segments) for each in segments}
        return files - self._recordings.keys()

    def _derive(self, address: str, segments: Sequence[Segment]) -> Row:
        """Check segments, and find their digest from those of their recordings."""
        check = check_segments(segments, lambda file: self._recordings[file].measure())
        if check.problem is not None:
            return Row(address, *_ABSENT, "", 0, 0, 0, check.problem)
        sha256 = segments_digest(segments, lambda file: self._recordings[file].row.sha256)
        stamps = {each.file: self._recordings[each.file].row.stamp for each in segments}
        return Row(address, *_join(list(stamps.values())), sha256, check.frames, check.rate, 0)


def _read_recording(file: str) -> _KnownFile:
    stamp = find_stamp(file)
    try:
        extent, sha256 = digest_recording(file)
    except AUDIO_ERRORS as error:
        return _KnownFile(Row(file, *_ABSENT, "", 0, 0, 0, find_problem(error)), None)
    check = check_segments([Segment(file)], lambda _: extent)
    return _KnownFile(Row(file, *stamp, sha256, check.frames, check.rate, extent.channels, check.problem), extent)


def is_whole(segments: Sequence[Segment]) -> bool:
    """Return True for an address that is one whole file."""
    return len(segments) == 1 and segments[0].is_whole


def is_unchanged(row: Row) -> bool:
    """Return True if the files of a row have the size and times that they had."""
    files = dict.fromkeys(segment.file for segment in parse_address(row.path))
    return row.stamp == _join([find_stamp(file) for file in files])


def to_digest(row: Row) -> AudioDigest:
    """Return the digest of a row that is good, or its problem."""
    if row.problem is not None:
        return AudioDigest("", 0, 0.0, row.problem)
    return AudioDigest(row.sha256, resampled_length(row.frames, row.rate), row.frames / row.rate)


def segments_digest(segments: Sequence[Segment], files: Callable[[str], str]) -> str:
    """Return the sha256 of a whole file, or for other addresses the sha256 over the digests of the files and the segments."""
    if is_whole(segments):
        return files(segments[0].file)
    identity = [[files(segment.file), *segment[1:]] for segment in segments]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def find_stamp(file: str) -> Stamp:
    """Return size and times of change of a file, or of the archive of which it is a member; zeros if there is none."""
    try:
        found = os.stat(disk_file(file))
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return _ABSENT  # reading the file reports it
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def find_stamps(addresses: Iterable[str]) -> dict[str, Stamp]:
    """Return the stamp of each file and archive that addresses name. No file is opened."""
    exists = NamesakeFinder().exists
    files = dict.fromkeys(segment.file for address in addresses for segment in parse_address(address, exists))
    return {file: find_stamp(file) for file in dict.fromkeys(map(disk_file, files))}


def _join(stamps: Sequence[Stamp]) -> Stamp:
    sizes, modified, changed = zip(*stamps, strict=True)
    return sum(sizes), max(modified), max(changed)


def read_unchanged(address: str, sha256: str, read_shared: Callable[[str], tuple[bytes, str]]) -> dict[str, bytes]:
    """Read the files of an address and check their bytes against the digest of the first pass.

    Units that are made from these bytes belong to the digest, whatever happens to the files meanwhile.

    Args:
        address: Address of audio.
        sha256: Its digest, as `audio_digests` found it.
        read_shared: `read_recording` with a cache, for recordings of which the address names a segment.

    Returns:
        The bytes of each file, by its name in the address.

    Raises:
        AudioError: A file was changed or removed meanwhile.
    """
    contents: dict[str, bytes] = {}
    reason = ""
    for segments in _find_readings(address):
        contents.clear()
        read = read_file if all(segment.is_whole for segment in segments) else read_shared

        def digest(file: str, read: Callable[[str], tuple[bytes, str]] = read) -> str:
            contents[file], found = read(file)
            return found

        try:
            if segments_digest(segments, digest) == sha256:
                return contents
            reason = ""
        except AddressError as error:
            reason = f" (it {error})"
    raise AudioError(f"audio file {address} was changed during the run{reason}: let nothing write to it, and run again")


def _find_readings(address: str) -> Iterator[list[Segment]]:
    """Yield what an address means if no file has its name, and then what it means if one has."""
    first = parse_address(address, exists=lambda _: False)
    yield first
    if (second := parse_address(address)) != first:
        yield second


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


def read_recording(file: str) -> tuple[SharedBytes, str]:
    """As `read_file`, for a recording that several segments are cut from."""
    content, sha256 = read_file(file)
    return SharedBytes(content), sha256
