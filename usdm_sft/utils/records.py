"""Byte strings that are kept on the disk, so that a corpus of any size takes little memory."""

from __future__ import annotations

import mmap
import tempfile
from array import array
from itertools import pairwise
from typing import IO

_IN_MEMORY = 8 << 20  # bytes that wait to be written; what is smaller, such as DailyTalk, never reaches the disk


class Records:
    """Byte strings, appended one by one, of which all but the last ones lie in an unnamed temporary file.

    The file lies in Python's folder for temporary files (`TMPDIR`), and vanishes with the process. Threads and forked processes may
    read at the same time.
    """

    def __init__(self) -> None:
        self._ends = array("Q", [0])
        self._waiting = bytearray()
        self._num_written = 0  # bytes in the file
        self._file: IO[bytes] | None = None
        self._map: mmap.mmap | None = None  # the file, as far as it was written when it was last read

    def append(self, record: bytes) -> None:
        """Add a record at the end.

        Raises:
            OSError: The temporary file cannot be written.
        """
        self._waiting += record
        self._ends.append(self._ends[-1] + len(record))
        if len(self._waiting) > _IN_MEMORY:
            self._write()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it is open as long as this object lives
            self._file.write(self._waiting)
            self._file.flush()
        except OSError as error:
            reason = f"{error.strerror} (temporary file; name another folder with TMPDIR)"
            raise OSError(error.errno, reason, tempfile.gettempdir()) from error
        self._num_written += len(self._waiting)
        self._waiting = bytearray()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        start, end = self._ends[index], self._ends[index + 1]
        if start >= self._num_written:
            return bytes(self._waiting[start - self._num_written : end - self._num_written])
        # A record never lies in both places, because all that waits is written at once.
        if self._map is None or len(self._map) < end:
            assert self._file is not None
            self._map = mmap.mmap(self._file.fileno(), self._num_written, access=mmap.ACCESS_READ)
        return self._map[start:end]

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (self._ends, b"".join(map(self.__getitem__, range(len(self)))))


def _restore(ends: array[int], content: bytes) -> Records:
    records = Records()
    for start, end in pairwise(ends):
        records.append(content[start:end])
    return records
