"""Find out before any forward pass whether an audio file can become units.

For PCM in WAV, as DailyTalk has it, the header is enough: 0.1 ms per file. Other formats are decoded in blocks, 1 to 3 ms per file:
floats may be NaN, and a compressed file may end in the middle.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from usdm_sft.audio.addresses import Segment, file_problem, open_file, parse_address
from usdm_sft.audio.containers import AudioError
from usdm_sft.audio.frames import MIN_SAMPLES, resampled_length
from usdm_sft.audio.sound import AUDIO_ERRORS, Extent, Sound, find_frames, find_problem, open_sound


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


def check_audio(address: str | Path) -> AudioCheck:
    """Return the number of frames and the sample rate at an address, or what is wrong with the audio. Raises nothing."""
    return check_segments(parse_address(address), lru_cache(_measure))


def check_segments(segments: Sequence[Segment], measure: Callable[[str], Extent]) -> AudioCheck:
    """Return the result of `check_audio` for a parsed address.

    Args:
        segments: The parsed address.
        measure: Returns what a file holds, or raises what `digest_recording` raises.
    """
    num_frames, rates = 0, set()
    try:
        for segment in segments:
            extent = measure(segment.file)
            first, stop = find_frames(segment, extent)
            num_frames += stop - first
            rates.add(extent.rate)
        if len(rates) > 1:
            raise AudioError(f"has several sample rates ({', '.join(map(str, sorted(rates)))} Hz)")
        [rate] = rates
        if (num_samples := resampled_length(num_frames, rate)) < MIN_SAMPLES:
            raise AudioError(
                f"has {num_samples} samples at 16 kHz, fewer than the {MIN_SAMPLES} (25 ms) that make a unit"
            )
    except AUDIO_ERRORS as error:
        return AudioCheck(problem=find_problem(error))
    return AudioCheck(num_frames, rate)


def _measure(file: str) -> Extent:
    with _open_sound(file) as (_, sound):
        return sound.measure()


def digest_recording(file: str) -> tuple[Extent, str]:
    """Find out what a file or a member of an archive holds, and its sha256, in one reading.

    Raises:
        AudioError, AddressError, soundfile.LibsndfileError, OSError: The file cannot be read, or is not audio.
    """
    with _open_sound(file) as (opened, sound):
        return sound.measure(), _digest(opened)


def _digest(file: io.BufferedIOBase) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _open_sound(file: str) -> Iterator[tuple[io.BufferedIOBase, Sound]]:
    if problem := file_problem(file):
        raise AudioError(problem)
    with open_file(file) as opened, open_sound(opened) as sound:
        yield opened, sound
