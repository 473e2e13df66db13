"""Whether an audio file can become units, found out before any forward pass.

The header tells it for PCM in WAV, which is what DailyTalk has: 0.1 ms a file. Everything else is decoded in blocks, 1 to 3 ms a
file: floats may be NaN, and what is compressed may break off in the middle. Where no header promises a length (Ogg, some MP3),
a file that was cut between two of its pages is a whole one to us, as it is to the reference.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from usdm_sft.audio import AudioError, file_problem, resampled_length
from usdm_sft.batches import MIN_SAMPLES

if TYPE_CHECKING:
    import soundfile

MIN_RATE = 1000  # Hz; a damaged header with less would make hours of silence at 16 kHz
BLOCK_SAMPLES = 1 << 20

# Written by what cannot seek back to the header: 0xFFFFFFFF by ffmpeg, 0x7FFFF000 by sox, 0x80000000 and more by arecord.
_UNKNOWN_SIZE = 0x7FFFF000
_MP3_LENGTH_MARKS = (b"Xing", b"Info")  # without one the length of an MP3 file is an estimate


class AudioCheck(NamedTuple):
    """What an audio file holds, or why it is bad."""

    frames: int = 0
    rate: int = 0  # in Hz
    problem: str | None = None  # such as "does not exist"; names no path


def check_audio(path: str | Path) -> AudioCheck:
    """Path of an audio file -> its number of frames and sample rate, or what is wrong with it. Raises nothing."""
    import soundfile

    try:
        if problem := file_problem(path):
            raise AudioError(problem)
        with open(path, "rb") as file:
            return _check(file)
    except AudioError as error:
        return AudioCheck(problem=str(error))
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        return AudioCheck(problem=f"is not audio that soundfile can read ({reason})")
    except OSError as error:
        return AudioCheck(problem=f"cannot be read ({error.strerror})")


def _check(file: BinaryIO) -> AudioCheck:
    import soundfile

    if not os.fstat(file.fileno()).st_size:
        raise AudioError("is empty (0 bytes)")
    _check_riff(file)
    file.seek(0)
    with soundfile.SoundFile(file) as sound:
        frames, rate = sound.frames, sound.samplerate
        if rate < MIN_RATE:
            raise AudioError(f"has a sample rate of {rate} Hz, less than {MIN_RATE}")
        if not (sound.format in ("WAV", "WAVEX") and sound.subtype.startswith("PCM_")):
            frames = _decode(sound, file)
    if not frames:
        raise AudioError("holds no samples")
    if (num_samples := resampled_length(frames, rate)) < MIN_SAMPLES:
        raise AudioError(f"has {num_samples} samples at 16 kHz, fewer than the {MIN_SAMPLES} (25 ms) that make a unit")
    return AudioCheck(frames, rate)


def _check_riff(file: BinaryIO) -> None:
    """A WAV file that was cut short is read in silence by soundfile; its data chunk knows better."""
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return
    while len(header := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", header)
        if name == b"data":
            there = os.fstat(file.fileno()).st_size - file.tell()
            if there < size < _UNKNOWN_SIZE:
                raise AudioError(f"is cut short (its header promises {size:,} bytes of samples, {there:,} are there)")
            return
        file.seek(size + size % 2, os.SEEK_CUR)


def _decode(sound: soundfile.SoundFile, file: BinaryIO) -> int:
    """-> the number of frames that are really there."""
    decoded = 0
    while len(samples := sound.read(max(1, BLOCK_SAMPLES // sound.channels), dtype="float32")):
        if not np.isfinite(samples).all():
            raise AudioError("holds NaN or infinite samples")
        decoded += len(samples)
    file.seek(0)
    exact = sound.format != "MP3" or any(mark in file.read(4096) for mark in _MP3_LENGTH_MARKS)
    if decoded < sound.frames and exact:
        raise AudioError(f"is cut short (its header promises {sound.frames:,} samples, {decoded:,} are there)")
    return decoded
