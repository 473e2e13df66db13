"""Open audio with soundfile, or with FFmpeg where that cannot, find out how long it really is, and read all of it or a segment.

A file, a member of an archive and bytes with the same content give the same samples. The check of the first pass and the reading
use the same functions, so that they agree.

libsndfile 1.2.2 mishandles an ID3v2 tag before WAV, AIFF and AU in a file object: it counts the tag twice, so that WAV and AIFF
lose samples at the end, and AU begins with the tag. By path it handles the tag, but then reads any file named .au, .snd, .gsm or
.vox as samples without a header. soundfile therefore always gets a file object that begins after the tag.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile

from usdm_sft.audio.addresses import END_TOLERANCE, AddressError, Segment
from usdm_sft.audio.containers import (
    REWRITE,
    AudioError,
    Layout,
    MpegFrames,
    find_flac_total,
    find_layout,
    find_mpeg_frames,
    find_ogg_streams,
    id3_size,
)
from usdm_sft.audio.ffmpeg import FFMPEG, MP3, FFmpegFile, find_format
from usdm_sft.audio.frames import TOO_LOUD, is_too_loud
from usdm_sft.utils.forks import renew_after_fork

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_SAMPLES = 1 << 20  # decoded at a time, so that an hour of audio needs little memory
MIN_RATE = 1000  # Hz; a lower rate in a damaged header would give hours of audio at 16 kHz
PAST_END = "is to be cut up to"  # begins the problem of a segment that ends after its recording

_TAGS = (b"ID3\2", b"ID3\3", b"ID3\4")  # the versions that libsndfile skips
_MISHANDLED = (
    b"RIFF",
    b"RIFX",
    b"FORM",
    b".snd",
    b"dns.",
)  # WAV, AIFF and AU; FLAC and MP3 are read right with their tags
_SAMPLE_BYTES = {
    "PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8,
}  # fmt: skip
_MAX_FLAWS = 1000
_PADDING_BYTES = 8  # what follows samples in W64 begins at a multiple of it
_NOT_FINITE = "holds NaN or infinite samples"

renew_after_fork(soundfile.SoundFile, "_sf_error_lock")  # held while a file is opened, since soundfile 0.14

AUDIO_ERRORS = (AudioError, AddressError, soundfile.LibsndfileError, OSError)  # what a file that cannot be read raises

Samples = npt.NDArray[np.float32]  # (num_frames,) or (num_frames, num_channels)


class Flaw(NamedTuple):
    """Frames of a recording that cannot be used: the first one, the one after the last, and why."""

    first: int
    stop: int
    problem: str


class Extent(NamedTuple):
    """What a recording holds.

    Attributes:
        frames: Number of frames at the file's own rate, those of `flaws` included.
        rate: Sample rate in Hz.
        channels: Number of channels.
        flaws: Frames that are missing or not finite. A segment without them is good.
    """

    frames: int
    rate: int
    channels: int
    flaws: tuple[Flaw, ...] = ()


def find_frames(segment: Segment, extent: Extent) -> tuple[int, int]:
    """Return the first frame of a segment in its recording, and the frame after its last.

    Raises:
        AudioError: The segment is not in the recording, or is flawed.
    """
    if extent.rate < MIN_RATE:
        raise AudioError(f"has a sample rate of {extent.rate} Hz, less than {MIN_RATE}")
    if segment.channel is not None and segment.channel >= extent.channels:
        raise AudioError(f"has no channel {segment.channel} (its channels are 0 to {extent.channels - 1})")
    first, stop = 0, extent.frames
    if segment.start is not None and segment.end is not None:
        seconds = extent.frames / extent.rate
        if not segment.start < segment.end:
            raise AudioError(f"is to be cut from {segment.start:g} to {segment.end:g} s, which is nothing")
        if segment.end > seconds + END_TOLERANCE:
            raise AudioError(f"{PAST_END} {segment.end:g} s, but has {seconds:g} s")
        first, stop = _frames_of(segment, extent.rate)
        stop = min(stop, extent.frames)
    for flaw in extent.flaws:
        if first < flaw.stop and flaw.first < stop:
            raise AudioError(flaw.problem)
    if first >= stop:
        raise AudioError("holds no samples")
    return first, stop


def _frames_of(segment: Segment, rate: int) -> tuple[int, int]:
    assert segment.start is not None and segment.end is not None
    return round(segment.start * rate), round(segment.end * rate)


class _Content(io.RawIOBase):
    """A view of a file from `start` on, with other bytes at some positions.

    It has no name, from which soundfile would guess the format (.raw).
    """

    def __init__(self, file: io.BufferedIOBase, start: int) -> None:
        self._file, self._start = file, start
        self.patches: list[tuple[int, bytes]] = []
        self.seek(0)

    def readinto(self, buffer: WriteableBuffer) -> int:
        view: Any = buffer
        position = self.tell() if self.patches else 0
        size = self._file.readinto(buffer)
        for first, patch in self.patches:
            start, stop = max(first, position), min(first + len(patch), position + size)
            if start < stop:
                view[start - position : stop - position] = patch[start - first : stop - first]
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek as a file does; a position that no file has, which a damaged header leads to, changes nothing."""
        if whence == os.SEEK_SET:
            offset += self._start
        else:
            offset += self._file.tell() if whence == os.SEEK_CUR else self._file.seek(0, os.SEEK_END)
        if self._start <= offset < 1 << 63:
            self._file.seek(offset)
        return self.tell()

    def tell(self) -> int:
        return self._file.tell() - self._start

    def readable(self) -> bool:
        return True

    seekable = readable  # PyAV asks for both


class _ForwardFile(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """A sound file that is read from its beginning to its end.

    Of a file that can seek, soundfile reads as many frames as the header promises, and it seeks after each reading, also to where it
    is. libsndfile then decodes other samples of MP3 and Opus, and fails for FLAC without a length.
    """

    def seekable(self) -> bool:
        return False


def _open_first(content: _Content, start: int) -> Any:
    """Open a file, of several Ogg streams the first one, with libsndfile or else with FFmpeg; `start` is the end of the tags."""
    content.seek(0)
    try:
        return _ForwardFile(content)
    except soundfile.LibsndfileError:
        content.seek(start)
        found = find_format(content.read(36))
        if found is None:
            raise
        return FFmpegFile(content, start, *found)


class Sound:
    """An audio file whose header was read and checked.

    Attributes:
        rate: Sample rate in Hz.
        channels: Number of channels.
        format: libsndfile's name of the container, such as "WAV"; "FFmpeg" if FFmpeg decodes it.
        subtype: libsndfile's name of the codec, such as "PCM_16"; "FFmpeg" likewise.
        frames: Number of frames that the header promises; None if it does not say. An estimate for some MP3.
        can_seek: True if frames can be read without those before them: each has the same number of bytes.
        is_patched: True if programs that believe the header read fewer frames, or none.

    Raises:
        AudioError: The file is empty, cut or damaged, or holds more than libsndfile reads.
        soundfile.LibsndfileError: The file is not audio.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        if not file.seek(0, os.SEEK_END):
            raise AudioError("is empty (0 bytes)")
        start = find_tags_end(file)
        file.seek(start)
        content = _Content(file, start if file.read(4) in _MISHANDLED else 0)
        layout, flac = find_layout(content), find_flac_total(content, start)
        content.patches += layout.patches if layout else [] if flac is None else [flac[1]]
        content.seek(0)
        self._source, self._starts = file, [0]  # of Ogg streams that follow each other
        self._file: Any = _open_first(content, start)
        self._mpeg = self._check_frames_of(content, start, layout)
        if self._mpeg is not None and layout is None and self._is_estimate_short(self._mpeg):
            self._file.close()
            self._file = FFmpegFile(content, start, *MP3)
        self.rate, self.channels = self._file.samplerate, self._file.channels
        self.format, self.subtype = self._file.format, self._file.subtype
        self.frames: int | None = self._file.frames if flac is None else flac[0] or None
        if len(self._starts) > 1:
            self.frames = self._add_streams(content)
        self.is_patched = bool(layout and layout.patches) or (flac is not None and not flac[0]) or len(self._starts) > 1
        frame_bytes = _SAMPLE_BYTES.get(self.subtype, 0) * self.channels
        self.can_seek = layout is not None and frame_bytes > 0
        self._flaws: tuple[Flaw, ...] = ()
        if layout is not None and layout.problem is not None:
            if not self.can_seek:
                raise AudioError(layout.problem)
            self.frames = max(self._file.frames + 1, (layout.promised or 0) // frame_bytes)
            self._flaws = (Flaw(self._file.frames, self.frames, layout.problem),)
        elif self.can_seek and layout is not None and layout.promised is not None:
            surplus = self._file.frames * frame_bytes - layout.promised
            if surplus >= _PADDING_BYTES:  # libsndfile reads SPHERE and W64 to the end of the file
                raise AudioError(f"holds {surplus:,} bytes more than the samples that its header promises {REWRITE}")

    def _check_frames_of(self, content: _Content, start: int, layout: Layout | None) -> MpegFrames | None:
        """Check the frames or pages of a codec that has them; `start` is the end of the tags before them."""
        position = content.tell()  # where libsndfile goes on
        found = None
        if self._file.format == "OGG":
            self._starts = find_ogg_streams(content)
        elif self._file.subtype.startswith("MPEG_LAYER"):
            first, size = (
                (start, content.seek(0, os.SEEK_END) - start) if layout is None else (layout.start, layout.there)
            )
            found = find_mpeg_frames(content, first, first + size)
        content.seek(position)
        return found

    def _is_estimate_short(self, mpeg: MpegFrames) -> bool:
        """Return True for MP3 without a Xing tag of which libsndfile would read a part: up to the length that it estimates."""
        is_whole = mpeg.promised is None and not mpeg.is_cut
        return is_whole and self._file.frames < mpeg.num_frames * mpeg.frame_samples

    def _add_streams(self, content: _Content) -> int:
        """Return the number of frames of all Ogg streams that follow each other."""
        position, frames = content.tell(), 0
        for start in self._starts:
            with _ForwardFile(_Content(self._source, start)) as stream:
                if (stream.samplerate, stream.channels) != (self.rate, self.channels):
                    raise AudioError(f"holds Ogg streams with several sample rates or numbers of channels {REWRITE}")
                frames += stream.frames
        content.seek(position)
        return frames

    def close(self) -> None:
        """Close what libsndfile opened; the file stays open."""
        self._file.close()

    def measure(self) -> Extent:
        """Find out what the recording holds. It is decoded to its end, unless the header of uncompressed integers is enough.

        Raises:
            AudioError: The number of decoded frames is not what the file promises.
            soundfile.LibsndfileError: The file cannot be decoded.
        """
        if self.can_seek and self.subtype not in ("FLOAT", "DOUBLE"):
            return self._extent(self.frames or 0)
        decoded = 0
        flaws: list[Flaw] = []
        for block in self._blocks():
            flaws += _find_flaws(block, decoded)
            decoded += len(block)
            if len(flaws) > _MAX_FLAWS:
                raise AudioError(_NOT_FINITE)
        return self._extent(self.frames or 0 if self.can_seek else decoded, flaws)

    def read(self, segment: Segment) -> Samples:
        """Read a segment, or the whole file.

        Returns:
            (num_frames,) or (num_frames, num_channels) float32.

        Raises:
            AudioError: As `measure`, or the segment is not in the recording or is cut short.
            soundfile.LibsndfileError: The file cannot be decoded.
        """
        if self.can_seek:
            first, stop = find_frames(segment, self._extent(self.frames or 0))
            samples = self._read_frames(first, stop)
            if len(samples) < stop - first:
                raise AudioError("is cut short")
            return samples
        return self._decode(segment)

    def _extent(self, frames: int, flaws: Sequence[Flaw] = ()) -> Extent:
        return Extent(frames, self.rate, self.channels, (*self._flaws, *flaws))

    def _decode(self, segment: Segment) -> Samples:
        """Decode from the beginning to the end, and keep a segment."""
        first, stop = (0, None) if segment.start is None else _frames_of(segment, self.rate)
        kept, decoded = [], 0
        for block in self._blocks():
            part = block[max(0, first - decoded) : None if stop is None else max(0, stop - decoded)]
            if len(part):
                kept.append(part)
            decoded += len(block)
        find_frames(segment, self._extent(decoded))
        return kept[0] if len(kept) == 1 else np.concatenate(kept)

    def _blocks(self) -> Iterator[Samples]:
        decoded = 0
        for start in self._starts:
            file = _ForwardFile(_Content(self._source, start)) if start else self._file
            while len(block := file.read(max(1, BLOCK_SAMPLES // self.channels), dtype="float32")):
                decoded += len(block)
                yield block
        self._check_decoded(decoded)

    def _check_decoded(self, decoded: int) -> None:
        promised = self._file.frames if self.can_seek else self.frames
        least = most = promised
        if self._mpeg is not None:
            num_frames, frame_samples, tagged, is_cut = self._mpeg
            there = num_frames * frame_samples
            if tagged is None and is_cut:
                raise AudioError("is cut short (it ends inside an MPEG frame)")
            if tagged is None and decoded != there:
                raise AudioError(
                    f"has no Xing tag with its length, and {decoded:,} of {there:,} samples are read {REWRITE}"
                )
            # Some encoders count the frame of the tag too.
            least = (
                0 if tagged is None else self._file.frames - (tagged == num_frames + 1 and not is_cut) * frame_samples
            )
            most = None
        elif self.format == FFMPEG:
            most = None
        if least is not None and decoded < least:
            raise AudioError(f"is cut short (its header promises {promised:,} samples, {decoded:,} are there)")
        if most is not None and decoded > most:
            raise AudioError(f"holds {decoded:,} samples, of which its header counts only {most:,} {REWRITE}")

    def _read_frames(self, first: int, stop: int) -> Samples:
        if first:
            self._file.seek(first)
        if self.format in ("WAV", "WAVEX") and self.subtype == "PCM_16":
            # As float32, libsndfile reads 8 KB at a time, each time through a Python function that holds up other threads. As
            # int16 it reads everything at once. Its float32 values are the same quotients by a power of two.
            steps: npt.NDArray[np.int16] = self._file.read(stop - first, dtype="int16")
            return steps * np.float32(1 / 32_768)
        frames: Samples = self._file.read(stop - first, dtype="float32")
        return frames


def find_problem(error: Exception) -> str:
    """Return what an error says of a file, without the file's name."""
    if isinstance(error, soundfile.LibsndfileError):
        return f"is not audio that soundfile can read ({error.error_string.strip().rstrip('.')})"
    return f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


@contextmanager
def open_sound(file: io.BufferedIOBase) -> Iterator[Sound]:
    """Open the audio in a file; raises what `Sound` raises."""
    sound = Sound(file)
    try:
        yield sound
    finally:
        sound.close()


def _find_flaws(block: Samples, start: int) -> Iterator[Flaw]:
    """Yield the runs of frames that cannot be used in a block that begins at frame `start`."""
    frames = block.reshape(len(block), -1)
    is_finite = np.isfinite(frames).all(1)
    is_loud = is_finite & is_too_loud(frames).any(1)
    for is_bad, problem in ((~is_finite, _NOT_FINITE), (is_loud, TOO_LOUD)):
        if is_bad.any():
            edges = np.flatnonzero(np.diff(np.concatenate([[False], is_bad, [False]]).astype(np.int8))) + start
            for first, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                yield Flaw(first, stop, problem)


def find_tags_end(file: io.BufferedIOBase) -> int:
    """Return the number of bytes of the ID3v2 tags at the beginning of a file; 0 without a tag."""
    end = 0
    while True:
        file.seek(end)
        header = file.read(10)
        if len(header) < 10 or header[:4] not in _TAGS:
            return end
        end += id3_size(header)
