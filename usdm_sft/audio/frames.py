"""Sample rate, frame length, and the number of samples and frames of audio."""

from __future__ import annotations

import math

SAMPLE_RATE = 16_000  # Hz
MIN_SAMPLES = 400  # 25 ms, the window of one frame
FRAME_SAMPLES = 320  # 20 ms, the distance between frames


def resampled_length(num_samples: int, rate: int) -> int:
    """Return the number of samples at 16 kHz of `num_samples` samples at `rate` Hz."""
    return math.ceil(num_samples * (SAMPLE_RATE / rate))


def num_frames(num_samples: int) -> int:
    """Return the number of frames, which is the number of units, of `num_samples` samples at 16 kHz."""
    return (num_samples - MIN_SAMPLES) // FRAME_SAMPLES + 1
