"""Sample rate, frame length, and how many samples and frames audio has."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from usdm_sft.audio.addresses import Stretch

if TYPE_CHECKING:
    pass


from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

MIN_SAMPLES = 400  # 25 ms, what a frame sees
FRAME_SAMPLES = 320  # 20 ms, from frame to frame


SAMPLE_RATE = 16_000


def find_frames(stretch: Stretch, rate: int, num_frames: int) -> tuple[int, int]:
    """First frame of a stretch in a recording of `num_frames` at `rate` Hz, and the frame after its last."""
    if stretch.start is None or stretch.end is None:
        return 0, num_frames
    return round(stretch.start * rate), min(round(stretch.end * rate), num_frames)


def resampled_length(num_samples: int, rate: int) -> int:
    """Samples at 16 kHz of `num_samples` samples at `rate` Hz."""
    return math.ceil(num_samples * (SAMPLE_RATE / rate))


def num_frames(num_samples: int) -> int:
    """Frames, and so units, of `num_samples` samples at 16 kHz."""
    return (num_samples - MIN_SAMPLES) // FRAME_SAMPLES + 1
