"""Sample rate, frame length, and the number of samples, frames and units of audio."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 16_000  # Hz
MIN_SAMPLES = 400  # 25 ms, the window of one frame
FRAME_SAMPLES = 320  # 20 ms, the distance between frames
UNITS_PER_SECOND = SAMPLE_RATE // FRAME_SAMPLES  # of a unit model; units that a corpus has may have another rate
MEL_SAMPLES = 160  # 10 ms, the distance between the log-mel frames of w2v-BERT 2.0
MIN_MEL_SAMPLES = MIN_SAMPLES + MEL_SAMPLES  # 35 ms, the two log-mel frames of one of its frames
MAX_SAMPLE = float(np.sqrt(np.finfo(np.float32).max))  # 1.8e19; the square of a louder one is not finite in float32
TOO_LOUD = f"holds samples beyond {MAX_SAMPLE:.2g}, whose variance is not finite in fp32"


def resampled_length(num_samples: int, rate: int) -> int:
    """Return the number of samples at 16 kHz of `num_samples` samples at `rate` Hz."""
    return math.ceil(num_samples * (SAMPLE_RATE / rate))


def is_too_loud(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return for each sample whether the unit model cannot normalize it; the reference gives NaN for such audio."""
    return np.abs(samples) > MAX_SAMPLE


def num_frames(num_samples: int) -> int:
    """Return the number of whole frames in `num_samples` samples at 16 kHz. `count_units` counts the units."""
    return (num_samples - MIN_SAMPLES) // FRAME_SAMPLES + 1


def min_samples(normalization: str) -> int:
    """Return the number of samples at 16 kHz that make one unit; a shorter recording is refused.

    Args:
        normalization: As in `count_units`.
    """
    return MIN_MEL_SAMPLES if normalization == "seamless_m4t" else MIN_SAMPLES


def count_units(num_samples: int, normalization: str) -> int:
    """Return the number of units of a recording, the only rule for it.

    There is one unit for each frame. "fairseq" appends one sample to an odd number of samples, as the reference does. For
    `num_samples % 320 == 79` it completes one more frame, whose unit the reference outputs too. The length in seconds is without it.
    "seamless_m4t" makes one frame of two log-mel frames of 25 ms, 10 ms apart; an odd last one is left out, which transformers pads
    and masks.

    Args:
        num_samples: Samples at 16 kHz, without the appended one. Fewer than `min_samples` have no unit.
        normalization: How the unit model's waveforms are normalized, a key of `usdm_sft.units.batches.NORMALIZATIONS`.
    """
    if num_samples < min_samples(normalization):
        return 0
    if normalization == "seamless_m4t":
        return ((num_samples - MIN_SAMPLES) // MEL_SAMPLES + 1) // 2
    return num_frames(num_samples + num_samples % 2 if normalization == "fairseq" else num_samples)
