"""Audio that libsndfile does not read, decoded by FFmpeg through PyAV (the extra `av`).

PyAV is imported when the first such file is opened. The first bytes decide the format, and never FFmpeg: some of its formats, such as
playlists, open other files. FFmpeg decodes a cut file without an error, so its outermost parts are checked before, and afterwards
its length against the header and the time stamps.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from usdm_sft.audio.containers import REWRITE, AudioError, find_ogg_streams

FFMPEG = "FFmpeg"  # in place of libsndfile's name of a format
MP3 = ("mp3", "MP3 of variable bit rate without a Xing tag")

# Position and value of the first bytes of a file, FFmpeg's demuxer, and the name in messages.
_FORMATS = (
    (4, b"ftyp", "mov", "MP4 or M4A"),
    (0, b"\x1a\x45\xdf\xa3", "matroska", "WebM or Matroska"),
    (0, bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "asf", "WMA"),
    (28, b"Speex   ", "ogg", "Ogg Speex"),
    (28, b"\x7fFLAC", "ogg", "Ogg FLAC"),
)
_HAVE_DURATION = ("mov", "matroska", "asf")  # in their header; of other formats, FFmpeg's duration is an estimate
_HEAD_BYTES = 24  # the longest header of a part, of ASF
_TOLERANCE = 0.2  # seconds; encoders count the silence that they add before and after the samples in different ways


def find_format(head: bytes) -> tuple[str, str] | None:
    """Return the demuxer and the name of a format that FFmpeg reads and libsndfile does not, by the first 36 bytes of a file."""
    for position, value, demuxer, name in _FORMATS:
        if head.startswith(value, position):
            return demuxer, name
    return ("aac", "AAC") if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0 else None


def _box_size(head: bytes, left: int) -> int | None:
    """MP4: https://www.iso.org/standard/83102.html. A size of 0 reaches to the end of the file, one of 1 is in the next 8 bytes."""
    size, large = struct.unpack(">I4xQ", head[:16])
    size = {0: left, 1: large}.get(size, size)
    return size if size >= 8 else None


def _object_size(head: bytes, left: int) -> int | None:
    """ASF: an identifier of 16 bytes, and the size with this header. The samples have that of their header if a program wrote to a pipe."""
    [size] = struct.unpack("<16xQ", head)
    if head[:4] == b"\x36\x26\xb2\x75" and size <= 50:
        raise AudioError(f"has no length in its header {REWRITE}")
    return size if size >= 24 else None


def _element_size(head: bytes, left: int) -> int | None:
    """Matroska: https://www.rfc-editor.org/rfc/rfc8794#name-element-id. What is in an element of unknown size follows as if beside it."""
    id_bytes = 9 - head[0].bit_length()
    size_bytes = 9 - head[id_bytes].bit_length()
    if id_bytes > 4 or size_bytes > 8:
        return None
    bits = 7 * size_bytes
    size = int.from_bytes(head[id_bytes : id_bytes + size_bytes], "big") & ((1 << bits) - 1)
    return id_bytes + size_bytes + (0 if size == (1 << bits) - 1 else size)


def _adts_size(head: bytes, left: int) -> int | None:
    """AAC without a container: a header of 7 bytes in front of each frame."""
    if head[0] != 0xFF or head[1] & 0xF6 != 0xF0:
        return left if head.startswith((b"TAG", b"APETAGEX", b"ID3")) else None
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    return size if size >= 7 else None


_ELEMENTS = {"mov": _box_size, "asf": _object_size, "matroska": _element_size, "aac": _adts_size}


def check_elements(file: io.RawIOBase, demuxer: str, start: int) -> None:
    """Check that the outermost parts of a file for FFmpeg are whole, from byte `start` on; `demuxer` is FFmpeg's name of the format.

    Raises:
        AudioError: The file ends inside a part, or has something else between parts.
    """
    end = file.seek(0, os.SEEK_END)
    if demuxer == "ogg":
        find_ogg_streams(file)
    while demuxer in _ELEMENTS and start < end:
        file.seek(start)
        size = _ELEMENTS[demuxer]((file.read(_HEAD_BYTES) or b"").ljust(_HEAD_BYTES, b"\0"), end - start)
        if size is None:
            raise AudioError(f"is damaged (the part at byte {start:,} is none of its format)")
        start += size
        if start > end:
            raise AudioError(f"is cut short (it should have {start:,} bytes or more, {end:,} are there)")


class FFmpegFile:
    """An audio file that is read from its beginning to its end, with the methods and attributes of `soundfile.SoundFile`.

    Args:
        content: The file, from its first byte.
        start: Number of bytes of tags before the audio.
        demuxer: FFmpeg's name of the format.
        name: Its name in messages.

    Raises:
        AudioError: PyAV is missing, or the file is cut, damaged or has no single track of audio.
    """

    format = subtype = FFMPEG

    def __init__(self, content: io.RawIOBase, start: int, demuxer: str, name: str) -> None:
        check_elements(content, demuxer, start)
        content.seek(0)
        try:
            import av
        except ImportError as error:
            raise AudioError(
                f"is {name}, for which PyAV is needed (pip install 'dailytalk-usdm[av]', or write it again as FLAC or WAV)"
            ) from error
        self._errors = av.FFmpegError
        self._decoded = 0
        try:
            self._container: Any = av.open(content, format=demuxer, metadata_errors="ignore")  # type: ignore[call-overload]
        except self._errors as error:
            raise AudioError(f"is not {name} that FFmpeg can read ({error.strerror})") from error
        if (num_tracks := len(self._container.streams.audio)) != 1:
            self.close()
            remedy = " (write the one to use as FLAC or WAV)" if num_tracks else ""
            raise AudioError(f"has {num_tracks} tracks of audio{remedy}")
        frames = self._decode()
        first = next(frames, None)
        if first is None:
            self.close()
            raise AudioError("holds no samples")
        self.samplerate: int = first.sample_rate
        self.channels: int = first.layout.nb_channels
        self.frames = self._find_promised() if demuxer in _HAVE_DURATION else None
        self._blocks = map(self._convert, chain([first], frames))

    def _find_promised(self) -> int | None:
        """Return the number of samples that the header promises, less the tolerance; None if it does not say."""
        [track] = self._container.streams.audio
        if track.duration is not None:
            seconds = float(track.duration * track.time_base)
        elif self._container.duration is not None:
            seconds = self._container.duration / 1_000_000
        else:
            return None
        return max(0, round((seconds - _TOLERANCE) * self.samplerate))

    def _decode(self) -> Iterator[Any]:
        """Yield the decoded frames, and check their time stamps."""
        begin = end = None
        try:
            for packet in self._container.demux(audio=0):
                for frame in packet.decode():
                    self._decoded += frame.samples
                    if frame.time is not None:
                        begin = frame.time if begin is None else begin
                        end = frame.time + frame.samples / frame.sample_rate
                    yield frame
        except self._errors as error:
            raise AudioError(f"is damaged (FFmpeg: {error.strerror})") from error
        if begin is not None and end is not None and end - begin > self._decoded / self.samplerate + _TOLERANCE:
            raise AudioError(
                f"has gaps (its time stamps cover {end - begin:.2f} s, {self._decoded / self.samplerate:.2f} s are there) {REWRITE}"
            )

    def _convert(self, frame: Any) -> npt.NDArray[np.float32]:
        """Return the samples of a frame, (num_samples,) or (num_samples, num_channels); integers as libsndfile scales them."""
        if (frame.sample_rate, frame.layout.nb_channels) != (self.samplerate, self.channels):
            raise AudioError(f"changes its sample rate or its number of channels {REWRITE}")
        values: npt.NDArray[Any] = frame.to_ndarray()
        samples = values.T if frame.format.is_planar else values.reshape(-1, self.channels)
        floats: npt.NDArray[np.float32] = samples.astype(np.float32)
        if samples.dtype.kind in "iu":
            floats = floats / np.float32(2 ** (8 * samples.itemsize - 1)) - np.float32(samples.dtype.kind == "u")
        return floats[:, 0] if self.channels == 1 else floats

    def read(self, frames: int, dtype: str) -> npt.NDArray[np.float32]:
        """Return at least `frames` samples of each channel as float32; fewer at the end, and none after it."""
        parts, size = [], 0
        for block in self._blocks:
            parts.append(block)
            size += len(block)
            if size >= frames:
                break
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    def close(self) -> None:
        """Close the container; the file stays open."""
        self._container.close()
