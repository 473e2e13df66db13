"""Resampling on the device with torchaudio, as an alternative to soxr."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from usdm_sft.audio.frames import SAMPLE_RATE, resampled_length

if TYPE_CHECKING:
    import torch


# soxr's "HQ" response in torchaudio's terms: passband to 0.913 of the band, so the middle of the transition is at 0.9565; width
# and beta are the best of a grid. torchaudio's default filter changes 14 to 30 % of a toy model's units, this one 0.1 to 0.8 %.
SOXR_HQ = {
    "lowpass_filter_width": 90,
    "rolloff": 0.9565,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 12.0,
}


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
