"""The first pass over audio: digest, length and check of every recording, remembered in the cache.

A first run reads 6 GB of audio; later runs look only at size and times of change. The digest identifies the content; path, size and
times only tell whether a remembered digest is still valid. For PCM in WAV, as DailyTalk has it, the header tells the length; other
formats are decoded, 1 to 3 ms per file: floats may be NaN, and a compressed file may end in the middle. Only good files are
remembered: a bad one is checked again at each run, with other permissions or a newer soundfile. A segment is remembered nowhere: its
digest and check follow from those of its recording.

`read_unchanged` reads the same bytes later, when units are made.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from usdm_sft.audio.addresses import (
    AddressError,
    Segment,
    disk_file,
    file_problem,
    group_by_recording,
    open_file,
    parse_address,
)
from usdm_sft.audio.containers import AudioError
from usdm_sft.audio.digest_database import TABLE, DigestDatabase, Row, Stamp
from usdm_sft.audio.frames import MIN_SAMPLES, resampled_length
from usdm_sft.audio.reading import SharedBytes
from usdm_sft.audio.sound import AUDIO_ERRORS, Extent, Sound, find_frames, find_problem, open_sound
from usdm_sft.utils.cache_keys import cache_key, cache_root
from usdm_sft.utils.progress import progress_bar

if TYPE_CHECKING:
    from usdm_sft.utils.pool import Pool

TOO_SHORT = f"fewer than the {MIN_SAMPLES} (25 ms) that make a unit"  # ends the problem of such a recording
NUM_THREADS = 2  # one waits for the disk while the other one computes; more of them wait for each other
FEW = 2_000  # addresses that this process reads alone: another process takes a second to start
BATCH = 512  # addresses that are looked up, or read by a process or task, in one call
_BAR = 512  # addresses that are worth a progress bar
_DATABASE = "digests.sqlite"  # in the cache


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


class AudioCheck(NamedTuple):
    """The length of an audio file, or why it is bad.

    Attributes:
        frames: Number of frames at the file's own rate.
        rate: Sample rate in Hz.
        problem: Such as "does not exist", without the path; None if the file is good.
    """

    frames: int = 0
    rate: int = 0
    problem: str | None = None


class _KnownFile(NamedTuple):
    """A file of the pass: its row, and what it holds or why it cannot be read."""

    row: Row
    content: Extent | str

    def measure(self) -> Extent:
        if isinstance(self.content, str):
            raise AudioError(self.content)
        return self.content


Files = dict[str, _KnownFile]


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
                if row is None or not _is_unchanged(row):
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
    pool: Pool | None = None,
) -> dict[str, AudioDigest]:
    """Digest and check the audio at each address, in threads, with a progress bar for many.

    One core reads about 1,000 of DailyTalk's WAV files per second, and later finds 30,000 per second unchanged. It finds 30,000
    segments of uncompressed recordings per second. A bad file raises nothing: its `problem` says what is wrong.

    Args:
        addresses: Addresses of audio; duplicates are read once.
        cache_dir: Where digests are remembered; this package's cache by default.
        pool: Shares out what is not remembered, if that is much. Bad audio, and files that have just changed, are read again here.

    Returns:
        Address -> digest, in the order of the addresses.

    Raises:
        Submitted: Slurm reads the recordings.
    """
    found: dict[str, AudioDigest | None] = dict.fromkeys(addresses)
    cut: Files = {}  # the recordings that segments are cut from
    with ExitStack() as stack:
        database = stack.enter_context(closing(DigestDatabase(cache_root(cache_dir) / _DATABASE)))
        threads = stack.enter_context(ThreadPoolExecutor(NUM_THREADS))
        bar = stack.enter_context(progress_bar(len(found), "reading recordings", "files", disable=len(found) < _BAR))

        def missing() -> list[str]:
            return [address for address, digest in found.items() if digest is None]

        def find(batch: Sequence[str], load: Callable[[list[str]], Files]) -> None:
            """Find the digests of addresses whose files are known or loaded now."""
            parsed = [parse_address(address) for address in batch]
            files = {segment.file for segments in parsed for segment in segments}
            known = load(sorted(files - cut.keys())) | {file: cut[file] for file in files & cut.keys()}
            for address, segments in zip(batch, parsed, strict=True):
                if all(segment.file in known for segment in segments):
                    found[address] = _make_digest(segments, known)
                    bar.update()
                    if not is_whole(segments):
                        cut.update({segment.file: known[segment.file] for segment in segments})

        def recall(files: list[str]) -> Files:
            rows = database.read(files).values()
            return _from_rows([row for row in rows if row.channels and _is_unchanged(row)], files)

        def read(files: list[str]) -> Files:
            known, rows = _read_files(files, threads)
            database.write(rows)
            return known

        for batch in _batches(missing()):
            find(batch, recall)
        if pool is not None and len(new := missing()) >= FEW:
            shares = group_by_recording(new, BATCH)
            # The table is in the keys, so that the results of a version with other rows or checks are not found.
            keys = [cache_key(TABLE, "rows", share) for share in shares]
            calls = pool.map(read_recordings, shares, name="recordings", keys=keys, is_valid=_are_unchanged)
            for index, rows in calls:
                database.write(rows)
                find(shares[index], partial(_from_rows, rows))
        for batch in _batches(missing()):
            find(batch, read)
    return cast(dict[str, AudioDigest], found)


def _batches(addresses: Sequence[str]) -> Iterator[Sequence[str]]:
    return (addresses[start : start + BATCH] for start in range(0, len(addresses), BATCH))


def read_recordings(addresses: Sequence[str]) -> list[Row]:
    """Digest and check the files of addresses, in a process or task, which does not write to the database.

    Returns:
        The rows to remember; none of a bad file, and of one that has just changed.
    """
    files = {segment.file for address in addresses for segment in parse_address(address)}
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return _read_files(sorted(files), threads)[1]


def _read_files(files: list[str], threads: ThreadPoolExecutor) -> tuple[Files, list[Row]]:
    """Read files anew; return what they hold, and the rows to remember."""
    started = time.time_ns()
    known = dict(zip(files, threads.map(_read_file, files), strict=True))
    good = [each.row for file, each in known.items() if _make_digest([Segment(file)], known).problem is None]
    return known, [row for row in good if row.is_settled(started)]


def _read_file(file: str) -> _KnownFile:
    stamp = find_stamp(file)
    try:
        extent, sha256 = digest_recording(file)
    except AUDIO_ERRORS as error:
        return _KnownFile(Row(file, *stamp, "", 0, 0, 0), find_problem(error))
    return _KnownFile(Row(file, *stamp, sha256, extent.frames, extent.rate, extent.channels), extent)


def _from_rows(rows: Iterable[Row], files: list[str]) -> Files:
    """Return those of the files that have a row, which is of good audio."""
    known = {row.path: _KnownFile(row, Extent(row.frames, row.rate, row.channels)) for row in rows}
    return {file: known[file] for file in files if file in known}


def _is_unchanged(row: Row) -> bool:
    """Return True if the file of a row has the size and times that it had."""
    return row.stamp == find_stamp(row.path)


def _are_unchanged(rows: list[Row]) -> bool:
    """Return True if the files that an earlier run read have not changed since."""
    return all(map(_is_unchanged, rows))


def _make_digest(segments: Sequence[Segment], known: Files) -> AudioDigest:
    """Check segments, and find their digest from those of their recordings."""
    check = check_segments(segments, lambda file: known[file].measure())
    if check.problem is not None:
        return AudioDigest("", 0, 0.0, check.problem)
    sha256 = segments_digest(segments, lambda file: known[file].row.sha256)
    return AudioDigest(sha256, resampled_length(check.frames, check.rate), check.frames / check.rate)


def check_audio(address: str | Path) -> AudioCheck:
    """Return the number of frames and the sample rate at an address, or what is wrong with the audio. Raises nothing."""
    return check_segments(parse_address(address), lru_cache(_measure))


def check_segments(segments: Sequence[Segment], measure: Callable[[str], Extent]) -> AudioCheck:
    """Return the result of `check_audio` for a parsed address; `measure` returns what a file holds, or raises one of `AUDIO_ERRORS`."""
    num_frames, rates = 0, set()
    try:
        for segment in segments:
            extent = measure(segment.file)
            first, stop = find_frames(segment, extent)
            num_frames += stop - first
            rates.add(extent.rate)
        if len(rates) > 1:
            raise AudioError(f"has several sample rates ({', '.join(map(str, sorted(rates)))} Hz)")
        [rate] = rates
        if (num_samples := resampled_length(num_frames, rate)) < MIN_SAMPLES:
            raise AudioError(f"has {num_samples} samples at 16 kHz, {TOO_SHORT}")
    except AUDIO_ERRORS as error:
        return AudioCheck(problem=find_problem(error))
    return AudioCheck(num_frames, rate)


def _measure(file: str) -> Extent:
    with _open_sound(file) as (_, sound):
        return sound.measure()


def digest_recording(file: str) -> tuple[Extent, str]:
    """Find out what a file or a member of an archive holds, and its sha256, in one reading; raises one of `AUDIO_ERRORS`."""
    with _open_sound(file) as (opened, sound):
        return sound.measure(), _digest(opened)


def _digest(file: io.BufferedIOBase) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _open_sound(file: str) -> Iterator[tuple[io.BufferedIOBase, Sound]]:
    if problem := file_problem(file):
        raise AudioError(problem)
    with open_file(file) as opened, open_sound(opened) as sound:
        yield opened, sound


def is_whole(segments: Sequence[Segment]) -> bool:
    """Return True for an address that is one whole file."""
    return len(segments) == 1 and segments[0].is_whole


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
        return 0, 0, 0  # reading the file reports it
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def find_stamps(addresses: Iterable[str]) -> dict[str, Stamp]:
    """Return the stamp of each file and archive that addresses name. No file is opened."""
    files = dict.fromkeys(segment.file for address in addresses for segment in parse_address(address))
    return {file: find_stamp(file) for file in dict.fromkeys(map(disk_file, files))}


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
