"""Find out before any forward pass whether an audio file can become units.

For PCM in WAV, as DailyTalk has it, the header is enough: 0.1 ms per file. Other formats are decoded in blocks, 1 to 3 ms per file:
floats may be NaN, and a compressed file may end in the middle. Without a length in the header (Ogg, some MP3), a file that was cut
between two pages passes as a whole one, as it does in the reference.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile

from usdm_sft.audio.addresses import AddressError, Stretch, file_problem, open_file, parse_address
from usdm_sft.audio.frames import MIN_SAMPLES, TOO_LOUD, find_frames, is_too_loud, resampled_length
from usdm_sft.audio.reading import AudioError
from usdm_sft.audio.sound import BLOCK_SAMPLES, read_frames, skip_tags, tags_end

MIN_RATE = 1000  # Hz; a lower rate in a damaged header would give hours of audio at 16 kHz
END_TOLERANCE = 0.05  # seconds; a stretch may end this much after its recording, because time stamps are rounded

# Programs that cannot seek back to the header write a size from here on: sox 0x7FFFF000, arecord 0x80000000, ffmpeg 0xFFFFFFFF.
_UNKNOWN_SIZE = 0x7FFFF000
_MP3_LENGTH_MARKS = (b"Xing", b"Info")  # without one the length of an MP3 file is an estimate


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


class Header(NamedTuple):
    """What the header of an audio file says.

    Attributes:
        frames: Number of frames at the file's own rate.
        rate: Sample rate in Hz.
        channels: Number of channels.
        needs_decoding: False where the header is enough to know that the samples are good.
    """

    frames: int
    rate: int
    channels: int
    needs_decoding: bool


HEADER_ERRORS = (AudioError, AddressError, soundfile.LibsndfileError, OSError)  # what `read_header` raises


def check_audio(address: str | Path) -> AudioCheck:
    """Return the number of frames and the sample rate at an address, or what is wrong with the audio. Raises nothing."""
    return check_stretches(parse_address(address), read_header)


def check_file(file: str) -> tuple[AudioCheck, Header | None, str]:
    """Check a whole file and find its sha256, both in one reading. Raises nothing.

    Returns:
        The result of `check_audio`; the header, or None if it cannot be read; and the sha256 in hex, "" for a bad file.
    """
    header = None
    try:
        with _open_sound(file) as (opened, sound):
            found = header = _describe(sound)
            check = check_stretches([Stretch(file)], lambda _: found, lambda _: _decode(sound, opened))
            return check, header, _digest(opened) if check.problem is None else ""
    except HEADER_ERRORS as error:
        return AudioCheck(problem=_find_problem(error)), header, ""


def check_stretches(
    stretches: Sequence[Stretch], read_header: Callable[[str], Header], decode: Callable[[str], int] | None = None
) -> AudioCheck:
    """Return the result of `check_audio` for a parsed address.

    Args:
        stretches: The parsed address.
        read_header: `read_header`, or the same with a cache for recordings with many stretches.
        decode: Decodes a whole file and returns its number of frames; by default it opens the file.
    """
    decode = decode or _decode_file
    try:
        frames, rates = zip(*(_check_stretch(stretch, read_header, decode) for stretch in stretches), strict=True)
        if len(set(rates)) > 1:
            raise AudioError(f"has several sample rates ({', '.join(map(str, sorted(set(rates))))} Hz)")
        num_frames, rate = sum(frames), rates[0]
        if (num_samples := resampled_length(num_frames, rate)) < MIN_SAMPLES:
            raise AudioError(
                f"has {num_samples} samples at 16 kHz, fewer than the {MIN_SAMPLES} (25 ms) that make a unit"
            )
    except HEADER_ERRORS as error:
        return AudioCheck(problem=_find_problem(error))
    return AudioCheck(num_frames, rate)


def _find_problem(error: Exception) -> str:
    if isinstance(error, soundfile.LibsndfileError):
        return f"is not audio that soundfile can read ({error.error_string.strip().rstrip('.')})"
    return f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


def read_header(file: str) -> Header:
    """Read the header of a file or a member of an archive.

    Raises:
        AudioError, AddressError, soundfile.LibsndfileError, OSError: The file cannot be read, or is not audio.
    """
    with _open_sound(file) as (_, sound):
        return _describe(sound)


def digest_recording(file: str) -> tuple[Header, str]:
    """Read the header of a file and its sha256 in one reading; raises what `read_header` raises."""
    with _open_sound(file) as (opened, sound):
        return _describe(sound), _digest(opened)


def _digest(file: io.BufferedIOBase) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _open_sound(file: str) -> Iterator[tuple[io.BufferedIOBase, soundfile.SoundFile]]:
    if problem := file_problem(file):
        raise AudioError(problem)
    with open_file(file) as opened:
        if not opened.seek(0, os.SEEK_END):
            raise AudioError("is empty (0 bytes)")
        content = skip_tags(opened)
        _check_riff(content)
        content.seek(0)
        with soundfile.SoundFile(content) as sound:
            yield opened, sound


def _describe(sound: soundfile.SoundFile) -> Header:
    needs_decoding = not (sound.format in ("WAV", "WAVEX") and sound.subtype.startswith("PCM_"))
    return Header(sound.frames, sound.samplerate, sound.channels, needs_decoding)


def _check_stretch(
    stretch: Stretch, read_header: Callable[[str], Header], decode: Callable[[str], int]
) -> tuple[int, int]:
    """Return the number of frames and the sample rate of a stretch."""
    header = read_header(stretch.file)
    _check_header(stretch, header)
    if stretch.start is None or stretch.end is None:
        frames = decode(stretch.file) if header.needs_decoding else header.frames
    else:
        _check_bounds(stretch.start, stretch.end, header.frames / header.rate)
        first, stop = find_frames(stretch, header.rate, header.frames)
        frames = stop - first
        if header.needs_decoding:
            with _open_sound(stretch.file) as (_, sound):
                if len(_finite(read_frames(sound, first, stop))) < frames:
                    raise AudioError("is cut short")
    if not frames:
        raise AudioError("holds no samples")
    return frames, header.rate


def _check_header(stretch: Stretch, header: Header) -> None:
    if header.rate < MIN_RATE:
        raise AudioError(f"has a sample rate of {header.rate} Hz, less than {MIN_RATE}")
    if stretch.channel is not None and stretch.channel >= header.channels:
        raise AudioError(f"has no channel {stretch.channel} (its channels are 0 to {header.channels - 1})")


def _check_bounds(start: float, end: float, seconds: float) -> None:
    if not start < end:
        raise AudioError(f"is to be cut from {start:g} to {end:g} s, which is nothing")
    if end > seconds + END_TOLERANCE:
        raise AudioError(f"is to be cut up to {end:g} s, but has {seconds:g} s")


def _finite(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    if not np.isfinite(samples).all():
        raise AudioError("holds NaN or infinite samples")
    if is_too_loud(samples):
        raise AudioError(TOO_LOUD)
    return samples


def _check_riff(file: io.RawIOBase) -> None:
    """Check a WAV file against the size in its data chunk, because soundfile reads a file that was cut without an error."""
    file_size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return
    while len(header := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", header)
        if name == b"data":
            there = file_size - file.tell()
            if there < size < _UNKNOWN_SIZE:
                raise AudioError(f"is cut short (its header promises {size:,} bytes of samples, {there:,} are there)")
            return
        file.seek(size + size % 2, os.SEEK_CUR)


def _decode_file(file: str) -> int:
    with _open_sound(file) as (opened, sound):
        return _decode(sound, opened)


def _decode(sound: soundfile.SoundFile, file: io.BufferedIOBase) -> int:
    """Decode the whole file and return its number of frames."""
    decoded = 0
    while len(samples := sound.read(max(1, BLOCK_SAMPLES // sound.channels), dtype="float32")):
        decoded += len(_finite(samples))
    file.seek(tags_end(file))
    exact = sound.format != "MP3" or any(mark in file.read(4096) for mark in _MP3_LENGTH_MARKS)
    if decoded < sound.frames and exact:
        raise AudioError(f"is cut short (its header promises {sound.frames:,} samples, {decoded:,} are there)")
    return decoded
