"""sha256 of files, remembered in the cache: a first run reads 6 GB of audio, later runs look only at size and times of change.

The digest identifies the file; path, size and times only tell whether a remembered digest is still valid. Only good audio files are
remembered: a bad one is checked again at each run, with other permissions or a newer soundfile.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

from usdm_sft.audio.addresses import AddressError, Stretch, file_problem, open_file, parse_address
from usdm_sft.audio.digest_reader import Reader, find_stamp, is_unchanged, stretches_digest, to_digest
from usdm_sft.audio.digest_table import AudioDigest as AudioDigest
from usdm_sft.audio.digest_table import AudioDigests
from usdm_sft.audio.memo import Memo, Row
from usdm_sft.audio.reading import AudioError, SharedBytes
from usdm_sft.utils.cache_keys import cache_root
from usdm_sft.utils.progress import progress_bar

NUM_THREADS = 2  # one waits for the disk while the other one computes; more of them wait for each other
_MANY = 512  # addresses
_MEMO = "digests.sqlite"  # in the cache


def file_digest(path: str | Path, cache_dir: str | Path | None = None) -> str:
    """Return the sha256 of any file, in hex; it is remembered."""
    [digest] = file_digests([os.path.realpath(path)], cache_dir)
    return digest


def file_digests(paths: Sequence[str], cache_dir: str | Path | None = None) -> Iterator[str]:
    """Yield the sha256 of each file, in hex; it is remembered. Digests of recordings are those that `audio_digests` remembers."""
    with closing(Memo(cache_root(cache_dir) / _MEMO)) as memo:
        for start in range(0, len(paths), _MANY):
            batch = paths[start : start + _MANY]
            known = memo.read(batch)
            for path in batch:
                row = known.get(path)
                if row is None or not is_unchanged(row):
                    started = time.time_ns()
                    row = Row(path, *find_stamp(path), _digest_file(path), 0, 0, 0)
                    memo.write([row] if row.is_settled(started) else [])
                yield row.sha256


def audio_digests(
    paths: Iterable[str],
    cache_dir: str | Path | None = None,
    *,
    num_threads: int = NUM_THREADS,
    read_ahead: Callable[[AudioDigests, Memo], object] | None = None,
) -> AudioDigests:
    """Digest and check each audio file, in threads, with a progress bar for many files.

    One core reads about 1,000 of DailyTalk's WAV files per second, and later finds 30,000 per second unchanged. It finds 30,000
    stretches of uncompressed recordings per second. A bad file raises nothing: its `problem` says what is wrong.

    Args:
        paths: Addresses of audio; duplicates are read once. The result keeps a sequence and reads it again.
        cache_dir: Where digests are remembered; this package's cache by default.
        num_threads: Number of threads.
        read_ahead: Called once, with the digests that are remembered and the memo, if any are missing. What it does not put is
            read here.

    Returns:
        Address -> digest, in the order of `paths`.
    """
    found = AudioDigests(paths if isinstance(paths, Sequence) else list(paths))
    with ExitStack() as stack:
        memo = stack.enter_context(closing(Memo(cache_root(cache_dir) / _MEMO)))
        reader = Reader(memo, stack.enter_context(ThreadPoolExecutor(num_threads)))
        bar = stack.enter_context(progress_bar(len(found), "reading recordings", "files", disable=len(found) < _MANY))
        for places, addresses in found.batches():
            bar.update(found.put(places, reader.recall(addresses)))
        missing = found.find_unset()
        if len(missing) and read_ahead is not None:
            read_ahead(found, memo)
            bar.update(len(missing) - len(missing := found.find_unset()))
        for places, addresses in found.batches(missing):
            bar.update(found.put(places, list(map(to_digest, reader.read(addresses)))))
    return found


def read_unchanged(address: str, sha256: str, read_shared: Callable[[str], tuple[bytes, str]]) -> dict[str, bytes]:
    """Read the files of an address and check their bytes against the digest of the first pass.

    Units that are made from these bytes belong to the digest, whatever happens to the files meanwhile.

    Args:
        address: Address of audio.
        sha256: Its digest, as `audio_digests` found it.
        read_shared: `read_recording` with a cache, for recordings of which the address names a stretch.

    Returns:
        The bytes of each file, by its name in the address.

    Raises:
        AudioError: A file was changed or removed meanwhile.
    """
    contents: dict[str, bytes] = {}
    reason = ""
    for stretches in _find_readings(address):
        contents.clear()
        read = read_file if all(stretch.is_whole for stretch in stretches) else read_shared

        def digest(file: str, read: Callable[[str], tuple[bytes, str]] = read) -> str:
            contents[file], found = read(file)
            return found

        try:
            if stretches_digest(stretches, digest) == sha256:
                return contents
            reason = ""
        except AddressError as error:
            reason = f" (it {error})"
    raise AudioError(f"audio file {address} was changed during the run{reason}: let nothing write to it, and run again")


def _find_readings(address: str) -> Iterator[list[Stretch]]:
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
    """As `read_file`, for a recording that several stretches are cut from."""
    content, sha256 = read_file(file)
    return SharedBytes(content), sha256


def _digest_file(file: str) -> str:
    with open_file(file) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
