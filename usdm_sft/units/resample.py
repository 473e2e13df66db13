"""Resampling on the device with torchaudio, an alternative to soxr."""

from __future__ import annotations

import numpy as np
import torch

from usdm_sft.audio.frames import SAMPLE_RATE, resampled_length

# The response of soxr's "HQ" filter in torchaudio's terms. Its passband ends at 0.913 of the band, which puts the middle of the
# transition at 0.9565; width and beta are the best of a grid search. On a toy model, this filter changes 0.1 to 0.8 % of the
# units, torchaudio's default filter 14 to 30 %.
SOXR_HQ = {
    "lowpass_filter_width": 90,
    "rolloff": 0.9565,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 12.0,
}


def resample_on(device: str, samples: np.ndarray, rate: int) -> torch.Tensor:
    """Resample (num_samples,) float32 mono from `rate` Hz to 16 kHz on `device`.

    The filter's response follows soxr's HQ filter (to 4e-4 on speech) without being equal, so a few units differ. `prepare`
    measures how many.

    Returns:
        (num_samples,) float32.

    Raises:
        ImportError: torchaudio is not installed, or does not match torch.
    """
    try:
        from torchaudio.functional import resample  # an optional extra
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
