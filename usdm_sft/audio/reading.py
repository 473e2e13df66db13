"""Read audio as 16 kHz mono float32, bit for bit the samples that `librosa.load(path, sr=16000)` gives the reference.

soundfile decodes, channels are averaged, soxr resamples in one shot at quality "HQ", and the result is zero-padded or cut
to ceil(n * 16000 / rate). soxr alone is one sample short in half the cases at 22.05 and 44.1 kHz, which changes units.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from usdm_sft.audio.addresses import MISSING, AddressError, Segment, file_problem, open_file, parse_address
from usdm_sft.audio.containers import AudioError as AudioError
from usdm_sft.audio.frames import SAMPLE_RATE, TOO_LOUD, is_too_loud, resampled_length
from usdm_sft.audio.sound import Extent, Samples, find_frames, find_problem, open_sound

# 50 minutes of stereo at 44.1 kHz; of a longer recording, each segment is decoded by itself.
MAX_DECODED_BYTES = 1 << 30


class SharedBytes(bytes):
    """The bytes of a recording that segments are cut from, with its samples once they were decoded, at most `MAX_DECODED_BYTES`.

    A segment of compressed audio is a part of the decoded recording. libsndfile decodes other samples after it has jumped into the
    middle of MP3, and takes longer for each jump than for all that stands before it.
    """

    decoded: tuple[Samples, Extent] | None

    def __init__(self, *_: object) -> None:
        self.lock = Lock()
        self.decoded = None


def read_audio(
    source: str | Path | bytes, contents: Mapping[str, bytes] | None = None
) -> tuple[npt.NDArray[np.float32], int]:
    """Read audio at its own sample rate.

    Args:
        source: A path or another address (`usdm_sft.audio.addresses`), or the bytes of an audio file.
        contents: The bytes of each file of the address, if they were read already; no file is opened then.

    Returns:
        (num_samples,) float32 mono, and the sample rate in Hz.

    Raises:
        FileNotFoundError: The file does not exist.
        AudioError: soundfile cannot read the file, or a sample is NaN, infinite or too loud.
    """
    exists = os.path.lexists if contents is None else contents.__contains__
    segments = [Segment("")] if isinstance(source, bytes) else parse_address(source, exists)
    read = [_read_segment(source, segment, contents) for segment in segments]
    if len({rate for _, rate in read}) > 1:
        raise AudioError(f"{describe(source)} has several sample rates: bring the recordings to one")
    samples = np.concatenate([samples for samples, _ in read]) if len(read) > 1 else read[0][0]
    if not np.isfinite(samples).all():
        raise AudioError(f"{describe(source)} holds NaN or infinite samples: repair or leave out the file")
    if is_too_loud(samples).any():
        raise AudioError(
            f"{describe(source)} {TOO_LOUD}: leave out the utterance, or write it with samples from -1 to 1"
        )
    return samples, read[0][1]


def _read_segment(
    source: str | Path | bytes, segment: Segment, contents: Mapping[str, bytes] | None
) -> tuple[npt.NDArray[np.float32], int]:
    content = None if contents is None else contents[segment.file]
    with _open(source, segment.file) if content is None else _open_bytes(content) as file:
        try:
            samples, rate = _cut(file, segment, content if isinstance(content, SharedBytes) else None)
        except (AudioError, soundfile.LibsndfileError) as error:
            raise AudioError(f"{describe(source)} {find_problem(error)}: replace the file") from error
    if segment.channel is not None:
        samples = samples.reshape(len(samples), -1)[:, segment.channel]
    elif samples.ndim > 1:
        samples = np.mean(samples.T, axis=0)
    return samples, rate


def _open_bytes(content: bytes) -> io.BufferedIOBase:
    """Open bytes for reading. BytesIO would copy those of a subclass, and with them a whole call for each of its turns."""
    import pyarrow as pa  # needed for segments only

    shared: io.BufferedIOBase = pa.BufferReader(content) if isinstance(content, SharedBytes) else io.BytesIO(content)
    return shared


def _cut(file: io.BufferedIOBase, segment: Segment, shared: SharedBytes | None) -> tuple[Samples, int]:
    """Read a segment of a file; of compressed audio that others need too, from the samples that were decoded."""
    if shared is None:
        with open_sound(file) as sound:
            return sound.read(segment), sound.rate
    with shared.lock:
        if shared.decoded is None:
            with open_sound(file) as sound:
                num_bytes = (sound.frames or len(shared)) * sound.channels * 4
                if sound.can_seek or num_bytes > MAX_DECODED_BYTES:
                    return sound.read(segment), sound.rate
                samples = sound.read(Segment(segment.file))
                shared.decoded = samples, Extent(len(samples), sound.rate, sound.channels)
    samples, extent = shared.decoded
    first, stop = find_frames(segment, extent)
    return samples[first:stop].copy(), extent.rate  # so that it does not keep the whole recording in memory


def read_waveform(source: str | Path | bytes, contents: Mapping[str, bytes] | None = None) -> npt.NDArray[np.float32]:
    """Read audio at 16 kHz.

    Args:
        source: A path or another address (`usdm_sft.audio.addresses`), or the bytes of an audio file.
        contents: As in `read_audio`.

    Returns:
        (num_samples,) float32 mono.

    Raises:
        FileNotFoundError: The file does not exist.
        AudioError: soundfile cannot read the file, or a sample is NaN or infinite.
    """
    samples, rate = read_audio(source, contents)
    if rate == SAMPLE_RATE:
        return samples
    resampled: npt.NDArray[np.float32] = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    missing = resampled_length(len(samples), rate) - len(resampled)
    if missing > 0:
        return np.concatenate([resampled, np.zeros(missing, np.float32)])
    return resampled[: len(resampled) + missing]


def describe(source: str | Path | bytes) -> str:
    """Return a name for error messages."""
    return f"audio bytes ({len(source):,} bytes)" if isinstance(source, bytes) else f"audio file {os.fspath(source)}"


def _open(source: str | Path | bytes, file: str) -> io.BufferedIOBase:
    """Open `file` of `source`; error messages name `source`."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if problem := file_problem(file):
        if problem.startswith(MISSING):
            raise FileNotFoundError(f"audio file {source} {problem}: correct the path, or complete the corpus")
        raise AudioError(f"audio file {source} {problem}: check its permissions and kind")
    try:
        return open_file(file)
    except (OSError, AddressError) as error:
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise AudioError(f"audio file {source} {reason}: check its permissions and kind") from error
