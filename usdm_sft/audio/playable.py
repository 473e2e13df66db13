"""Recordings as files that browsers and the viewer of the Hub play, and that give the same units as the original.

A whole file in a format that browsers play is kept byte by byte. A segment of a longer recording, several in turn, or a file in
another format becomes the samples that the unit model gets, before resampling: one channel, in FLAC where 16 or 24 bits hold
every sample exactly, and otherwise in WAV as 32-bit floats.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile

from usdm_sft.audio.addresses import parse_address
from usdm_sft.audio.digests import read_file
from usdm_sft.audio.frames import resampled_length
from usdm_sft.audio.reading import AudioError, describe, read_audio
from usdm_sft.audio.sound import BLOCK_SAMPLES, open_sound

# What Chromium, Firefox and Safari play: libsndfile's names of formats and codecs, and the suffix of the file.
_PLAYED = {
    "WAV": (".wav", {"PCM_U8", "PCM_16", "PCM_24", "FLOAT"}),
    "WAVEX": (".wav", {"PCM_U8", "PCM_16", "PCM_24", "FLOAT"}),
    "FLAC": (".flac", {"PCM_S8", "PCM_16", "PCM_24"}),
    "MP3": (".mp3", {"MPEG_LAYER_III"}),
    "OGG": (".ogg", {"VORBIS", "OPUS"}),
}
# The first bytes, by which browsers know a format: no ID3v2 tag before them, and no big-endian WAV (RIFX).
_FIRST_BYTES = {".wav": b"RIFF", ".flac": b"fLaC", ".ogg": b"OggS"}
_MAX_FLAC_RATE = 655_350  # Hz, in the FLAC format
_FLOAT_CODE = 3  # WAVE_FORMAT_IEEE_FLOAT
MAX_BYTES = 2**31 - 1  # the largest value of a binary column in Arrow


class AudioFile(NamedTuple):
    """The content of an audio file, and the suffix that belongs to its format."""

    content: bytes
    suffix: str


def make_playable(address: str, contents: Mapping[str, bytes] | None = None) -> AudioFile:
    """Return the audio at an address as a file that browsers play.

    Args:
        address: A path or another address (`usdm_sft.audio.addresses`).
        contents: The bytes of each file of the address, if they were read already.

    Returns:
        The recording; `read_waveform` gives the same samples for its content as for the address.

    Raises:
        FileNotFoundError: The file does not exist.
        AudioError: The audio cannot be read, or is larger than 2 GiB.
        AddressError: A file or archive cannot be read.
    """
    if contents is None:
        contents = {segment.file: read_file(segment.file)[0] for segment in parse_address(address)}
    recording = _find_whole(address, contents) or _encode(*read_audio(address, contents))
    if len(recording.content) > MAX_BYTES:
        raise AudioError(
            f"{describe(address)} has {len(recording.content):,} bytes, and a Parquet file holds at most {MAX_BYTES:,} for one "
            "recording: cut it into turns with start and end, or prepare without --keep_audio"
        )
    return recording


def count_samples(content: bytes, sample_rate: int) -> int:
    """Return the number of samples at `sample_rate` of the content of an audio file.

    Raises:
        AudioError: soundfile cannot read it, or a sample is NaN or infinite.
    """
    samples, rate = read_audio(content)
    return resampled_length(len(samples), rate, sample_rate)


def _find_whole(address: str, contents: Mapping[str, bytes]) -> AudioFile | None:
    """Return the file at an address unchanged, or None if the address is not one whole file that browsers play."""
    segment, *more = parse_address(address, contents.__contains__)
    if more or not segment.is_whole:
        return None
    content = contents[segment.file]
    with open_sound(io.BytesIO(content)) as sound:
        suffix, codecs = _PLAYED.get(sound.format, ("", set()))
        is_played = (
            sound.subtype in codecs and content.startswith(_FIRST_BYTES.get(suffix, b"")) and not sound.is_patched
        )
    return AudioFile(content, suffix) if is_played else None


def _encode(samples: npt.NDArray[np.float32], rate: int) -> AudioFile:
    """Write (num_samples,) float32 samples without loss."""
    for subtype, bits in (("PCM_16", 16), ("PCM_24", 24)):
        if rate <= _MAX_FLAC_RATE and all(_fits(block, bits) for block in _blocks(samples)):
            file = io.BytesIO()
            with soundfile.SoundFile(file, "w", rate, 1, subtype, format="FLAC") as sound:
                for block in _blocks(samples):
                    sound.write((block * np.float32(2**31)).astype(np.int32))
            return AudioFile(file.getvalue(), ".flac")
    return AudioFile(_make_float_wav(samples, rate), ".wav")


def _blocks(samples: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    return (samples[start : start + BLOCK_SAMPLES] for start in range(0, len(samples), BLOCK_SAMPLES))


def _fits(samples: npt.NDArray[np.float32], bits: int) -> bool:
    """Return True if integers of so many bits, which stand for -1 to 1, hold every sample exactly."""
    scaled = samples * np.float32(2 ** (bits - 1))
    in_range = bool(((scaled >= -(2 ** (bits - 1))) & (scaled < 2 ** (bits - 1))).all())
    return in_range and np.array_equal(scaled, np.rint(scaled))


def _make_float_wav(samples: npt.NDArray[np.float32], rate: int) -> bytes:
    """Return a WAV file of 32-bit floats. libsndfile would put the time of writing into it (chunk PEAK)."""
    data = samples.astype("<f4").tobytes()
    chunks = [
        (b"fmt ", struct.pack("<HHIIHHH", _FLOAT_CODE, 1, rate, 4 * rate, 4, 32, 0)),
        (b"fact", struct.pack("<I", len(samples))),
        (b"data", data),
    ]
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(chunk)) + chunk for name, chunk in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body
