"""Sample rates, frames, and the number of samples, frames and units of audio."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 16_000  # Hz; that of speech encoders, at which the pipeline counts audio
MIN_SAMPLES = 400  # 25 ms, the window of one frame
FRAME_SAMPLES = 320  # 20 ms, the distance between frames
MEL_SAMPLES = 160  # 10 ms, the distance between the log-mel frames of w2v-BERT 2.0, two of which make one of its frames
MAX_RATE = 1_000_000  # Hz, of the audio of a unit model
MAX_SAMPLE = float(np.sqrt(np.finfo(np.float32).max))  # 1.8e19; the square of a louder one is not finite in float32
TOO_LOUD = f"holds samples beyond {MAX_SAMPLE:.2g}, whose variance is not finite in fp32"


@dataclass(frozen=True)
class Framing:
    """How a unit model cuts a recording into frames, the only rule for their number. Each frame becomes a unit, or one unit of each stream.

    Attributes:
        sample_rate: Of the audio that the model takes, in Hz.
        step: Distance between frames, in samples.
        window: Samples that the first frame needs. With 1, a last frame that is not whole is padded; with 0, there is always one more.
        even: One sample is appended to an odd number of samples, as the reference does. For `num_samples % 320 == 79` it completes one
            more frame, whose unit the reference outputs too. The length in seconds is without it.
    """

    sample_rate: int = SAMPLE_RATE
    step: int = FRAME_SAMPLES
    window: int = MIN_SAMPLES
    even: bool = False

    @property
    def min_samples(self) -> int:
        """Number of samples of the shortest recording that is not refused: 25 ms, or what the first frame needs.

        Of 25 ms at another rate than 16 kHz, one sample may be missing, because lengths at both are rounded up.
        """
        return max(self.window, MIN_SAMPLES * self.sample_rate // SAMPLE_RATE - (self.sample_rate != SAMPLE_RATE))

    def count(self, num_samples: int) -> int:
        """Return the number of frames of a recording.

        Args:
            num_samples: Its samples at `sample_rate`, without an appended one. Fewer than `window` have no frame.
        """
        if num_samples < self.window:
            return 0
        return (num_samples + (num_samples % 2 if self.even else 0) - self.window) // self.step + 1

    def count_samples(self, num_samples: int, seconds: float) -> int:
        """Return the number of samples at `sample_rate` of a recording whose samples at 16 kHz, and seconds, are known."""
        return num_samples if self.sample_rate == SAMPLE_RATE else math.ceil(round(seconds * self.sample_rate, 6))


# The frames of speech encoders, by the way in which their waveforms are normalized. w2v-BERT 2.0 makes one frame of two log-mel frames;
# an odd last one is left out, which transformers pads and masks.
FRAMINGS = {
    "fairseq": Framing(even=True),
    "transformers": Framing(),
    "none": Framing(),
    "seamless_m4t": Framing(window=MIN_SAMPLES + MEL_SAMPLES),
}
# The frames that a speech encoder makes of samples at 16 kHz, without one that an appended sample completes.
num_frames = FRAMINGS["none"].count


def framing_of(unit_model: Mapping[str, Any]) -> Framing:
    """Return the frames of a unit model, from its description or from what counts.json says of it.

    Raises:
        ValueError: They are not those of a unit model.
    """
    if not isinstance(unit_model, Mapping):
        raise ValueError(f"{unit_model!r} does not describe a unit model")
    normalization, frames = unit_model.get("normalization", "fairseq"), unit_model.get("frames", {})
    if frames == {} and normalization in tuple(FRAMINGS):
        return FRAMINGS[normalization]
    is_codec = isinstance(frames, dict) and frames.keys() == {"sample_rate", "step", "window"}
    are_numbers = is_codec and all(type(value) is int and 0 <= value <= MAX_RATE for value in frames.values())
    if are_numbers and frames["step"] and frames["sample_rate"]:
        return Framing(**frames)
    raise ValueError(f"frames {frames!r} with normalization {normalization!r} are not those of a unit model")


def resampled_length(num_samples: int, rate: int, sample_rate: int = SAMPLE_RATE) -> int:
    """Return the number of samples at `sample_rate` of `num_samples` samples at `rate` Hz. At 16 kHz it is rounded as librosa does."""
    if sample_rate == SAMPLE_RATE:
        return math.ceil(num_samples * (SAMPLE_RATE / rate))
    return -(-num_samples * sample_rate // rate)


def is_too_loud(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return for each sample whether the unit model cannot normalize it; the reference gives NaN for such audio."""
    return np.abs(samples) > MAX_SAMPLE
