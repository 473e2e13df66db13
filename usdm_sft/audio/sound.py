"""Open audio with soundfile so that every way to it (a file, a member of an archive, bytes) gives the same samples.

libsndfile 1.2.2 mishandles an ID3v2 tag before WAV, AIFF and AU when it reads a file object: it counts the tag twice, so that WAV and
AIFF lose samples at the end, and AU begins with the tag. By path it is right, but then takes whatever is named .au, .snd, .gsm
or .vox for samples without a header. So it always gets a file object, which begins behind the tag.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import soundfile

BLOCK_SAMPLES = 1 << 20

_TAGS = (b"ID3\2", b"ID3\3", b"ID3\4")  # the versions that libsndfile skips
_MISHANDLED = (
    b"RIFF",
    b"RIFX",
    b"FORM",
    b".snd",
    b"dns.",
)  # WAV, AIFF and AU; FLAC and MP3 are read right with their tags


class _Content(io.RawIOBase):
    """A file from `start` on. It has no name, from which soundfile would guess the format (.raw)."""

    def __init__(self, file: BinaryIO, start: int):
        self._file, self._start = file, start
        self.seek(0)

    def readinto(self, buffer: bytearray | memoryview) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset + self._start if whence == os.SEEK_SET else offset, whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start


def skip_tags(file: BinaryIO) -> BinaryIO:
    """Return a view of `file` without the ID3v2 tags before a WAV, AIFF or AU header, at its beginning."""
    start = tags_end(file)
    file.seek(start)
    return _Content(file, start if file.read(4) in _MISHANDLED else 0)


def tags_end(file: BinaryIO) -> int:
    """Return how many bytes the ID3v2 tags at the beginning of a file take; 0 without one."""
    end = 0
    while True:
        file.seek(end)
        header = file.read(10)
        if len(header) < 10 or header[:4] not in _TAGS:
            return end
        size = 0
        for byte in header[6:]:  # seven bits a byte
            size = size << 7 | byte & 0x7F
        end += 10 + size


def read_frames(sound: soundfile.SoundFile, first: int, stop: int) -> np.ndarray:
    """Read the frames from `first` to before `stop` of a file that was just opened.

    A codec that cannot seek (GSM 6.10, G.721, NMS ADPCM) is decoded from its beginning, since libsndfile needs no seeking for that.

    Returns:
        (num_frames,) or (num_frames, num_channels) float32; fewer frames where the file ends before.
    """
    if sound.seekable():
        if first:
            sound.seek(first)
    else:
        for start in range(0, first, BLOCK_SAMPLES):
            sound.read(min(BLOCK_SAMPLES, first - start), dtype="float32")
    return sound.read(stop - first, dtype="float32")
