"""Audio of any address -> 16 kHz mono float32, bit for bit what `librosa.load(path, sr=16000)` gives the reference.

soundfile decodes, channels are averaged, soxr resamples in one shot at quality "HQ", and the result is zero-padded or cut
to ceil(n * 16000 / rate): soxr alone is one sample short in half the cases at 22.05 and 44.1 kHz, which changes units.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from usdm_sft.audio.addresses import MISSING, AddressError, Stretch, file_problem, open_file, parse_address
from usdm_sft.audio.sound import read_frames, skip_tags

if TYPE_CHECKING:
    import torch

SAMPLE_RATE = 16_000

# soxr's "HQ" response in torchaudio's terms: passband to 0.913 of the band, so the middle of the transition is at 0.9565; width
# and beta are the best of a grid. torchaudio's default filter changes 14 to 30 % of a toy model's units, this one 0.1 to 0.8 %.
SOXR_HQ = {
    "lowpass_filter_width": 90,
    "rolloff": 0.9565,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 12.0,
}


class AudioError(ValueError):
    """Audio that cannot become units: names file, reason and remedy."""


def audio_source(value: Any) -> str | bytes:
    """What an audio column holds -> path or file content.

    Args:
        value: A path, the bytes of a file, or a `{"bytes", "path"}` dict as `Audio(decode=False)` gives.

    Raises:
        TypeError: Anything else, such as decoded audio.
    """
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise TypeError(
        f"audio is a {type(value).__name__}, not a path or bytes: load or cast the column with Audio(decode=False)"
    )


def distinct_audio(batch: Mapping[str, Sequence]) -> tuple[list[str | bytes], dict[str, list]]:
    """-> the distinct audio of a batch, and for each audio column which of them every row has (or list of exchanges)."""
    names = [name for name in batch if name == "audio" or name.endswith("_audio")]
    if not names:
        raise ValueError(
            f"there is no audio column among {', '.join(batch) or 'no columns'}: name it audio, or let it end in _audio"
        )
    order: dict[str | bytes, int] = {}

    def number(value: Any) -> int | list[int]:
        if isinstance(value, list | tuple):
            return [number(each) for each in value]
        return order.setdefault(audio_source(value), len(order))

    columns = {name: [number(value) for value in batch[name]] for name in names}
    return list(order), columns


def read_audio(source: str | Path | bytes) -> tuple[np.ndarray, int]:
    """Address or bytes of audio -> ((num_samples,) float32 mono, sample rate in Hz).

    Args:
        source: A path or another address (`usdm_sft.audio.addresses`), or the bytes of an audio file.

    Raises:
        FileNotFoundError: No such file.
        AudioError: Not audio that soundfile can read, or a sample is NaN or infinite.
    """
    stretches = [Stretch("")] if isinstance(source, bytes) else parse_address(source)
    read = [_read_stretch(source, stretch) for stretch in stretches]
    if len({rate for _, rate in read}) > 1:
        raise AudioError(f"{describe(source)} is of several sample rates: bring the recordings to one")
    samples = np.concatenate([samples for samples, _ in read]) if len(read) > 1 else read[0][0]
    if not np.isfinite(samples).all():
        raise AudioError(f"{describe(source)} holds NaN or infinite samples: repair or leave out the file")
    return samples, read[0][1]


def _read_stretch(source: str | Path | bytes, stretch: Stretch) -> tuple[np.ndarray, int]:
    import soundfile

    with _open(source, stretch.file) as file:
        try:
            with soundfile.SoundFile(skip_tags(file)) as sound:
                samples = read_frames(sound, *find_frames(stretch, sound.samplerate, sound.frames))
                rate = sound.samplerate
        except soundfile.LibsndfileError as error:
            raise _not_audio(source, error) from error
    if stretch.channel is not None:
        samples = samples.reshape(len(samples), -1)[:, stretch.channel]
    elif samples.ndim > 1:
        samples = np.mean(samples.T, axis=0)
    return samples, rate


def find_frames(stretch: Stretch, rate: int, num_frames: int) -> tuple[int, int]:
    """First frame of a stretch in a recording of `num_frames` at `rate` Hz, and the frame after its last."""
    if stretch.start is None or stretch.end is None:
        return 0, num_frames
    return round(stretch.start * rate), min(round(stretch.end * rate), num_frames)


def read_waveform(source: str | Path | bytes) -> np.ndarray:
    """Address or bytes of audio -> (num_samples,) float32 mono at 16 kHz.

    Raises:
        FileNotFoundError: No such file.
        AudioError: Not audio that soundfile can read, or a sample is NaN or infinite.
    """
    samples, rate = read_audio(source)
    if rate == SAMPLE_RATE:
        return samples
    import soxr

    resampled = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    length = resampled_length(len(samples), rate)
    return np.pad(resampled[:length], (0, max(0, length - len(resampled))))


def resample_on(device: str, samples: np.ndarray, rate: int) -> torch.Tensor:
    """(num_samples,) float32 mono at `rate` Hz -> (num_samples,) float32 tensor at 16 kHz, resampled on `device`.

    The filter is set to soxr's HQ response (4e-4 from it on speech), but is not soxr's, so a few units differ; `prepare`
    measures how many.

    Raises:
        ImportError: torchaudio is not installed, or does not match torch.
    """
    import torch

    try:
        from torchaudio.functional import resample
    except (ImportError, OSError) as error:
        raise ImportError(
            f"resampler torchaudio needs torchaudio built for the same device as torch ({error}): "
            "pip install 'dailytalk-usdm[torchaudio]', or use resampler soxr"
        ) from error
    waveform = torch.from_numpy(np.ascontiguousarray(samples)).to(device, non_blocking=True)
    length = resampled_length(len(samples), rate)
    if rate != SAMPLE_RATE:
        waveform = resample(waveform, rate, SAMPLE_RATE, **SOXR_HQ)
    return torch.nn.functional.pad(waveform[:length], (0, max(0, length - len(waveform))))


def resampled_length(num_samples: int, rate: int) -> int:
    """Samples at 16 kHz of `num_samples` samples at `rate` Hz."""
    return math.ceil(num_samples * (SAMPLE_RATE / rate))


def describe(source: str | Path | bytes) -> str:
    """A name for error messages."""
    return f"audio bytes ({len(source):,} bytes)" if isinstance(source, bytes) else f"audio file {os.fspath(source)}"


def _open(source: str | Path | bytes, file: str) -> BinaryIO:
    """`source` for error messages, `file` of it to open."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if problem := file_problem(file):
        if problem.startswith(MISSING):
            raise FileNotFoundError(f"audio file {source} {problem}: correct the path, or complete the corpus")
        raise AudioError(f"audio file {source} {problem}: see to its permissions and kind")
    try:
        return open_file(file)
    except (OSError, AddressError) as error:
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise AudioError(f"audio file {source} {reason}: see to its permissions and kind") from error


def _not_audio(source: str | Path | bytes, error: Exception) -> AudioError:
    reason = str(error).rpartition(": ")[2].strip().rstrip(".")
    return AudioError(f"{describe(source)} is not audio that soundfile can read ({reason}): replace the file")
