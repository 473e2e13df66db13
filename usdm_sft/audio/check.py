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

from usdm_sft.audio.addresses import AddressError, Stretch, file_problem, open_file, parse_address
from usdm_sft.audio.frames import MIN_SAMPLES, find_frames, resampled_length
from usdm_sft.audio.reading import AudioError
from usdm_sft.audio.sound import BLOCK_SAMPLES, read_frames, skip_tags, tags_end

if TYPE_CHECKING:
    import soundfile

MIN_RATE = 1000  # Hz; a damaged header with less would make hours of silence at 16 kHz
END_TOLERANCE = 0.05  # seconds that a stretch may end after its recording: time stamps are rounded

# Written by what cannot seek back to the header: 0xFFFFFFFF by ffmpeg, 0x7FFFF000 by sox, 0x80000000 and more by arecord.
_UNKNOWN_SIZE = 0x7FFFF000
_MP3_LENGTH_MARKS = (b"Xing", b"Info")  # without one the length of an MP3 file is an estimate


class AudioCheck(NamedTuple):
    """What an audio file holds, or why it is bad."""

    frames: int = 0
    rate: int = 0  # in Hz
    problem: str | None = None  # such as "does not exist"; names no path


def check_audio(address: str | Path) -> AudioCheck:
    """Address of audio -> its number of frames and sample rate, or what is wrong with it. Raises nothing."""
    import soundfile

    try:
        frames, rates = zip(*map(_check_stretch, parse_address(address)), strict=True)
        if len(set(rates)) > 1:
            raise AudioError(f"is of several sample rates ({', '.join(map(str, sorted(set(rates))))} Hz)")
        num_frames, rate = sum(frames), rates[0]
        if (num_samples := resampled_length(num_frames, rate)) < MIN_SAMPLES:
            raise AudioError(
                f"has {num_samples} samples at 16 kHz, fewer than the {MIN_SAMPLES} (25 ms) that make a unit"
            )
    except (AudioError, AddressError) as error:
        return AudioCheck(problem=str(error))
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        return AudioCheck(problem=f"is not audio that soundfile can read ({reason})")
    except OSError as error:
        return AudioCheck(problem=f"cannot be read ({error.strerror})")
    return AudioCheck(num_frames, rate)


def _check_stretch(stretch: Stretch) -> tuple[int, int]:
    """-> (number of frames, sample rate) of a file, or of what is meant of it."""
    import soundfile

    if problem := file_problem(stretch.file):
        raise AudioError(problem)
    with open_file(stretch.file) as file:
        if not file.seek(0, os.SEEK_END):
            raise AudioError("is empty (0 bytes)")
        content = skip_tags(file)
        _check_riff(content)
        content.seek(0)
        with soundfile.SoundFile(content) as sound:
            frames, rate = sound.frames, sound.samplerate
            if rate < MIN_RATE:
                raise AudioError(f"has a sample rate of {rate} Hz, less than {MIN_RATE}")
            if stretch.channel is not None and stretch.channel >= sound.channels:
                raise AudioError(f"has {sound.channels} channels, and no channel {stretch.channel}")
            needs_decoding = not (sound.format in ("WAV", "WAVEX") and sound.subtype.startswith("PCM_"))
            if stretch.end is None:
                frames = _decode(sound, file) if needs_decoding else frames
            else:
                frames = _check_bounds(stretch, sound, needs_decoding)
    if not frames:
        raise AudioError("holds no samples")
    return frames, rate


def _check_bounds(stretch: Stretch, sound: soundfile.SoundFile, needs_decoding: bool) -> int:
    """-> the number of frames of a stretch."""
    seconds = sound.frames / sound.samplerate
    if not stretch.start < stretch.end:
        raise AudioError(f"is to be cut from {stretch.start:g} to {stretch.end:g} s, which is nothing")
    if stretch.end > seconds + END_TOLERANCE:
        raise AudioError(f"is to be cut up to {stretch.end:g} s, but has {seconds:g} s")
    first, stop = find_frames(stretch, sound.samplerate, sound.frames)
    if needs_decoding and len(_finite(read_frames(sound, first, stop))) < stop - first:
        raise AudioError("is cut short")
    return stop - first


def _finite(samples: np.ndarray) -> np.ndarray:
    if not np.isfinite(samples).all():
        raise AudioError("holds NaN or infinite samples")
    return samples


def _check_riff(file: BinaryIO) -> None:
    """A WAV file that was cut short is read in silence by soundfile; its data chunk knows better."""
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


def _decode(sound: soundfile.SoundFile, file: BinaryIO) -> int:
    """-> the number of frames that are really there."""
    decoded = 0
    while len(samples := sound.read(max(1, BLOCK_SAMPLES // sound.channels), dtype="float32")):
        decoded += len(_finite(samples))
    file.seek(tags_end(file))
    exact = sound.format != "MP3" or any(mark in file.read(4096) for mark in _MP3_LENGTH_MARKS)
    if decoded < sound.frames and exact:
        raise AudioError(f"is cut short (its header promises {sound.frames:,} samples, {decoded:,} are there)")
    return decoded
