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
from usdm_sft.audio.check import check_file, check_stretches, digest_recording
from usdm_sft.audio.containers import AudioError
from usdm_sft.audio.digest_table import AudioDigest
from usdm_sft.audio.frames import resampled_length
from usdm_sft.audio.memo import Memo, Row, Stamp
from usdm_sft.audio.sound import AUDIO_ERRORS, Extent, find_problem

_ABSENT: Stamp = (0, 0, 0)  # no file has this one


class _Recording(NamedTuple):
    """A file that is cut into stretches, as it was when it was read or remembered, or why it cannot be read."""

    stamp: Stamp
    sha256: str
    extent: Extent | None
    problem: str = ""

    def measure(self) -> Extent:
        """Return what the recording holds.

        Raises:
            AudioError: It cannot be read.
        """
        if self.extent is None:
            raise AudioError(self.problem)
        return self.extent


class Reader:
    """Digests and checks addresses in batches, and knows the recordings that several of them are cut from.

    A stretch is remembered nowhere: its digest and check follow from the digest and the extent of its recording.

    Args:
        memo: Where digests are remembered.
        threads: Read the files.
    """

    def __init__(self, memo: Memo, threads: ThreadPoolExecutor):
        self._memo, self._threads = memo, threads
        self._exists = NamesakeFinder().exists
        self._recordings: dict[str, _Recording] = {}

    def recall(self, addresses: Sequence[str]) -> list[AudioDigest | None]:
        """Return the digest of each good address that is remembered or follows from what is; no file is opened."""
        parsed = self._parse(addresses)
        whole = {address for address, stretches in parsed.items() if is_whole(stretches)}
        new = self._find_new(parsed)
        rows = self._memo.read(sorted(whole | new))
        for file in new & rows.keys():
            row = rows[file]
            if row.channels and find_stamp(file) == row.stamp:
                self._recordings[file] = _Recording(row.stamp, row.sha256, Extent(row.frames, row.rate, row.channels))
        return [self._recall(address, parsed[address], rows.get(address)) for address in addresses]

    def _recall(self, address: str, stretches: Sequence[Stretch], row: Row | None) -> AudioDigest | None:
        if not is_whole(stretches):
            is_known = all(stretch.file in self._recordings for stretch in stretches)
            row = self._derive(address, stretches) if is_known else None
        elif row is None or row.stamp != find_stamp(address):
            return None
        return to_digest(row) if row is not None and row.frames else None

    def read(self, addresses: Sequence[str]) -> list[Row]:
        """Return the row of each address, read anew; those of good files and of recordings are remembered."""
        started = time.time_ns()
        parsed = self._parse(addresses)
        rows = list(self._threads.map(self._read_recording, sorted(self._find_new(parsed))))
        whole = [file for file, stretches in parsed.items() if is_whole(stretches) and file not in self._recordings]
        read = list(self._threads.map(self._read, whole))
        self._memo.write([row for row in rows + read if row.problem is None and row.is_settled(started)])
        found = {row.path: row for row in read}
        return [found.get(address) or self._derive(address, parsed[address]) for address in addresses]

    def _parse(self, addresses: Sequence[str]) -> dict[str, list[Stretch]]:
        return {address: parse_address(address, self._exists) for address in addresses}

    def _find_new(self, parsed: Mapping[str, Sequence[Stretch]]) -> set[str]:
        """Return the recordings that are cut and not yet known."""
        files = {each.file for stretches in parsed.values() if not is_whole(stretches) for each in stretches}
        return files - self._recordings.keys()

    def _read_recording(self, file: str) -> Row:
        """Read a recording that is cut; return what is remembered of it."""
        stamp = find_stamp(file)
        try:
            extent, sha256 = digest_recording(file)
        except AUDIO_ERRORS as error:
            self._recordings[file] = _Recording(stamp, "", None, find_problem(error))
            return Row(file, *_ABSENT, "", 0, 0, 0, find_problem(error))
        self._recordings[file] = _Recording(stamp, sha256, extent)
        check = check_stretches([Stretch(file)], lambda _: extent)
        return Row(file, *stamp, sha256, check.frames, check.rate, extent.channels, check.problem)

    def _read(self, file: str) -> Row:
        stamp = find_stamp(file)
        check, channels, sha256 = check_file(file)
        return Row(file, *stamp, sha256, check.frames, check.rate, channels, check.problem)

    def _derive(self, address: str, stretches: Sequence[Stretch]) -> Row:
        """Check stretches, and find their digest from those of their recordings."""
        check = check_stretches(stretches, lambda file: self._recordings[file].measure())
        if check.problem is not None:
            return Row(address, *_ABSENT, "", 0, 0, 0, check.problem)
        sha256 = stretches_digest(stretches, lambda file: self._recordings[file].sha256)
        stamps = {each.file: self._recordings[each.file].stamp for each in stretches}
        return Row(address, *_join(list(stamps.values())), sha256, check.frames, check.rate, 0)


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
