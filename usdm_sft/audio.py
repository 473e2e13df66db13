"""Audio file or bytes -> 16 kHz mono float32, bit for bit what `librosa.load(path, sr=16000)` gives the reference.

soundfile decodes, channels are averaged, soxr resamples in one shot at quality "HQ", and the result is zero-padded or cut
to ceil(n * 16000 / rate): soxr alone is one sample short in half the cases at 22.05 and 44.1 kHz, which changes units.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SAMPLE_RATE = 16_000
MISSING = "does not exist"

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


def file_problem(path: str | Path) -> str | None:
    """Why there is nothing to read at `path`, or None.

    A symlink is followed wherever it leads, out of the corpus as well: people keep audio on another disk. What is no regular
    file is refused, since a FIFO would keep the run waiting for ever.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return f"{MISSING} (a symlink leads nowhere)" if os.path.islink(path) else MISSING
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if stat.S_ISREG(mode) else "cannot be read (it is no regular file)"


def read_audio(source: str | Path | bytes) -> tuple[np.ndarray, int]:
    """Path or bytes of an audio file -> ((num_samples,) float32 mono, sample rate in Hz).

    Raises:
        FileNotFoundError: No such file.
        AudioError: Not audio that soundfile can read, or a sample is NaN or infinite.
    """
    import soundfile

    with _open(source) as file:
        try:
            samples, rate = soundfile.read(file, dtype="float32")
        except soundfile.LibsndfileError as error:
            raise _not_audio(source, error) from error
    if samples.ndim > 1:
        samples = np.mean(samples.T, axis=0)
    if not np.isfinite(samples).all():
        raise AudioError(f"{describe(source)} holds NaN or infinite samples: repair or leave out the file")
    return samples, rate


def read_waveform(source: str | Path | bytes) -> np.ndarray:
    """Path or bytes of an audio file -> (num_samples,) float32 mono at 16 kHz.

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


def _open(source: str | Path | bytes) -> io.BufferedIOBase:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if problem := file_problem(source):
        if problem.startswith(MISSING):
            raise FileNotFoundError(f"audio file {source} {problem}: correct the path, or complete the corpus")
        raise AudioError(f"audio file {source} {problem}: see to its permissions and kind")
    try:
        return open(source, "rb")
    except OSError as error:
        raise AudioError(
            f"audio file {source} cannot be read ({error.strerror}): see to its permissions and kind"
        ) from error


def _not_audio(source: str | Path | bytes, error: Exception) -> AudioError:
    reason = str(error).rpartition(": ")[2].strip().rstrip(".")
    return AudioError(f"{describe(source)} is not audio that soundfile can read ({reason}): replace the file")
