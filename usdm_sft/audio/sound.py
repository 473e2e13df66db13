"""Open audio with soundfile, so that a file, a member of an archive and bytes with the same content give the same samples.

libsndfile 1.2.2 mishandles an ID3v2 tag before WAV, AIFF and AU in a file object: it counts the tag twice, so that WAV and AIFF
lose samples at the end, and AU begins with the tag. By path it handles the tag, but then reads any file named .au, .snd, .gsm or
.vox as samples without a header. soundfile therefore always gets a file object that begins after the tag.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import soundfile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_SAMPLES = 1 << 20  # decoded at a time, so that an hour of audio needs little memory

_TAGS = (b"ID3\2", b"ID3\3", b"ID3\4")  # the versions that libsndfile skips
_MISHANDLED = (
    b"RIFF",
    b"RIFX",
    b"FORM",
    b".snd",
    b"dns.",
)  # WAV, AIFF and AU; FLAC and MP3 are read right with their tags


class _Content(io.RawIOBase):
    """A view of a file from `start` on. It has no name, from which soundfile would guess the format (.raw)."""

    def __init__(self, file: io.BufferedIOBase, start: int) -> None:
        self._file, self._start = file, start
        self.seek(0)

    def readinto(self, buffer: WriteableBuffer) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset + self._start if whence == os.SEEK_SET else offset, whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start


def skip_tags(file: io.BufferedIOBase) -> io.RawIOBase:
    """Return a view of `file` without the ID3v2 tags before a WAV, AIFF or AU header, at its beginning."""
    start = tags_end(file)
    file.seek(start)
    return _Content(file, start if file.read(4) in _MISHANDLED else 0)


def tags_end(file: io.BufferedIOBase) -> int:
    """Return the number of bytes of the ID3v2 tags at the beginning of a file; 0 without a tag."""
    end = 0
    while True:
        file.seek(end)
        header = file.read(10)
        if len(header) < 10 or header[:4] not in _TAGS:
            return end
        size = 0
        for byte in header[6:]:  # seven bits per byte
            size = size << 7 | byte & 0x7F
        end += 10 + size


def read_frames(sound: soundfile.SoundFile, first: int, stop: int) -> npt.NDArray[np.float32]:
    """Read the frames `first` to `stop` (exclusive) of a file that was just opened.

    A codec that cannot seek (GSM 6.10, G.721, NMS ADPCM) is decoded from its beginning, for which libsndfile does not need to seek.

    Returns:
        (num_frames,) or (num_frames, num_channels) float32; fewer frames if the file ends before `stop`.
    """
    if sound.seekable():
        if first:
            sound.seek(first)
    else:
        for start in range(0, first, BLOCK_SAMPLES):
            sound.read(min(BLOCK_SAMPLES, first - start), dtype="float32")
    if sound.format in ("WAV", "WAVEX") and sound.subtype == "PCM_16":
        # As float32, libsndfile reads 8 KB at a time, each time through a Python function that holds up other threads. As
        # int16 it reads everything at once. Its float32 values are the same quotients by a power of two.
        steps: npt.NDArray[np.int16] = sound.read(stop - first, dtype="int16")
        return steps * np.float32(1 / 32_768)
    frames: npt.NDArray[np.float32] = sound.read(stop - first, dtype="float32")
    return frames
