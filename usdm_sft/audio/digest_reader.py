"""Find digests of audio: from what is remembered, from the recording that a stretch is cut from, or by reading the file."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from usdm_sft.audio.addresses import NamesakeFinder, Stretch, disk_file, parse_address
from usdm_sft.audio.check import HEADER_ERRORS, Header, check_file, check_stretches, digest_recording
from usdm_sft.audio.digest_table import AudioDigest
from usdm_sft.audio.frames import resampled_length
from usdm_sft.audio.memo import Memo, Row, Stamp
from usdm_sft.utils.once import once_per_key

_ABSENT: Stamp = (0, 0, 0)  # no file has this one


class _Recording(NamedTuple):
    """A file that is cut into stretches, as it was when it was read or remembered."""

    stamp: Stamp
    sha256: str
    header: Header | None  # None for a remembered file whose stretches must be decoded


class Reader:
    """Digests and checks addresses in batches, and knows the recordings that several of them are cut from.

    A stretch of uncompressed audio is remembered nowhere: its digest and check follow from the digest and the header of its
    recording.

    Args:
        memo: Where digests are remembered.
        threads: Read the files.
    """

    def __init__(self, memo: Memo, threads: ThreadPoolExecutor):
        self._memo, self._threads = memo, threads
        self._exists = NamesakeFinder().exists
        self._recordings: dict[str, _Recording] = {}
        self._open = once_per_key(self._open_recording)

    def recall(self, addresses: Sequence[str]) -> list[AudioDigest | None]:
        """Return the digest of each good address that is remembered or follows from what is; no file is opened."""
        parsed = self._parse(addresses)
        whole = {address for address, stretches in parsed.items() if is_whole(stretches)}
        new = self._find_new(parsed)
        rows = self._memo.read(sorted(whole | new))
        for file in new & rows.keys():
            if find_stamp(file) == rows[file].stamp:
                self._recordings[file] = _recall_recording(rows[file])
        decoded = [
            each for each, cut in parsed.items() if each not in whole and self._knows(cut) and not self._is_plain(cut)
        ]
        rows |= self._memo.read(decoded)
        return [self._recall(address, parsed[address], rows.get(address)) for address in addresses]

    def _recall(self, address: str, stretches: Sequence[Stretch], row: Row | None) -> AudioDigest | None:
        if self._is_plain(stretches):
            row = self._derive(address, stretches, _ABSENT)
        elif row is None or row.stamp != self._stamp(stretches):
            return None
        return to_digest(row) if row.frames else None

    def read(self, addresses: Sequence[str]) -> list[Row]:
        """Return the row of each address, read anew; those of good files and of recordings are remembered."""
        started = time.time_ns()
        parsed = self._parse(addresses)
        rows = list(self._threads.map(self._read_recording, sorted(self._find_new(parsed))))
        found = {
            address: self._derive(address, stretches, self._stamp(stretches))
            for address, stretches in parsed.items()
            if self._is_plain(stretches)
        }
        others = [address for address in parsed if address not in found]
        read = list(self._threads.map(lambda address: self._read(address, parsed[address]), others))
        self._memo.write([row for row in rows + read if row.problem is None and row.is_settled(started)])
        found |= {row.path: row for row in read}
        return [found[address] for address in addresses]

    def _parse(self, addresses: Sequence[str]) -> dict[str, list[Stretch]]:
        return {address: parse_address(address, self._exists) for address in addresses}

    def _find_new(self, parsed: Mapping[str, Sequence[Stretch]]) -> set[str]:
        """Return the recordings that are cut and not yet known."""
        files = {each.file for stretches in parsed.values() if not is_whole(stretches) for each in stretches}
        return files - self._recordings.keys()

    def _knows(self, stretches: Sequence[Stretch]) -> bool:
        return all(stretch.file in self._recordings for stretch in stretches)

    def _is_plain(self, stretches: Sequence[Stretch]) -> bool:
        """Return True if headers that are known are enough to check an address."""
        known = [self._recordings.get(stretch.file) for stretch in stretches]
        return all(each is not None and each.header is not None and not each.header.needs_decoding for each in known)

    def _read_recording(self, file: str) -> Row:
        """Read a recording that is cut; return what is remembered of it."""
        try:
            stamp, sha256, header = self._open(file)
        except HEADER_ERRORS as error:
            return Row(file, *_ABSENT, "", 0, 0, 0, str(error))  # `_derive` reports it
        if header is None or header.needs_decoding:
            return Row(file, *stamp, sha256, 0, 0, 0)
        check = check_stretches([Stretch(file)], self._find_header)
        return Row(file, *stamp, sha256, check.frames, check.rate, header.channels, check.problem)

    def _open_recording(self, file: str) -> _Recording:
        stamp = find_stamp(file)
        header, sha256 = digest_recording(file)
        self._recordings[file] = _Recording(stamp, sha256, header)
        return self._recordings[file]

    def _find_header(self, file: str) -> Header:
        known = self._recordings.get(file)
        if known is None or known.header is None:
            known = self._open(file)
        assert known.header is not None  # it was read
        return known.header

    def _read(self, address: str, stretches: Sequence[Stretch]) -> Row:
        if not is_whole(stretches):
            return self._derive(address, stretches, self._stamp(stretches))
        stamp = find_stamp(address)
        check, header, sha256 = check_file(address)
        channels = 0 if header is None or header.needs_decoding else header.channels
        return Row(address, *stamp, sha256, check.frames, check.rate, channels, check.problem)

    def _derive(self, address: str, stretches: Sequence[Stretch], stamp: Stamp) -> Row:
        """Check stretches, and find their digest from those of their recordings."""
        check = check_stretches(stretches, self._find_header)
        if check.problem is not None:
            return Row(address, *stamp, "", 0, 0, 0, check.problem)
        sha256 = stretches_digest(stretches, lambda file: self._recordings[file].sha256)
        return Row(address, *stamp, sha256, check.frames, check.rate, 0)

    def _stamp(self, stretches: Sequence[Stretch]) -> Stamp:
        known = {each.file: self._recordings.get(each.file) for each in stretches}
        return _join([find_stamp(file) if each is None else each.stamp for file, each in known.items()])


def is_whole(stretches: Sequence[Stretch]) -> bool:
    """Return True for an address that is one whole file."""
    return len(stretches) == 1 and stretches[0].is_whole


def is_unchanged(row: Row) -> bool:
    """Return True if the files of a row have the size and times that they had."""
    files = dict.fromkeys(stretch.file for stretch in parse_address(row.path))
    return row.stamp == _join([find_stamp(file) for file in files])


def to_digest(row: Row) -> AudioDigest:
    """Return the digest of a row that is good, or its problem."""
    if row.problem is not None:
        return AudioDigest("", 0, 0.0, row.problem)
    return AudioDigest(row.sha256, resampled_length(row.frames, row.rate), row.frames / row.rate)


def stretches_digest(stretches: Sequence[Stretch], files: Callable[[str], str]) -> str:
    """Return the sha256 of a whole file, or for other addresses the sha256 over the digests of the files and the stretches."""
    if is_whole(stretches):
        return files(stretches[0].file)
    identity = [[files(stretch.file), *stretch[1:]] for stretch in stretches]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _recall_recording(row: Row) -> _Recording:
    header = Header(row.frames, row.rate, row.channels, needs_decoding=False) if row.channels else None
    return _Recording(row.stamp, row.sha256, header)


def find_stamp(file: str) -> Stamp:
    """Return size and times of change of a file, or of the archive of which it is a member."""
    try:
        found = os.stat(disk_file(file))
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return _ABSENT  # reading the file reports it
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _join(stamps: Sequence[Stamp]) -> Stamp:
    sizes, modified, changed = zip(*stamps, strict=True)
    return sum(sizes), max(modified), max(changed)
