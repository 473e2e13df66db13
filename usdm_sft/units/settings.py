"""Settings of a unit tokenizer: their names, defaults and checks. Standard library only."""

from __future__ import annotations

from typing import Any, Literal, get_args

# Audio in one forward pass, by kind of device. A GPU needs large batches: the host must start the next batch before the GPU has
# finished this one. docs/performance.md has the memory that they take.
BATCH_SECONDS = {"cpu": 160.0, "cuda": 320.0}

# "fp32" is the reference's precision; `precision.PRECISIONS` says how each one computes.
PrecisionName = Literal["fp32", "tf32", "fp16", "bf16", "fp16x3", "bf16x3"]

# "soxr" is what librosa uses in the reference; "torchaudio" resamples on the device.
ResamplerName = Literal["soxr", "torchaudio"]

PUBLISHED = "xlsr2_1b_v2"  # the name of the published unit model
DESCRIPTION = "unit_model.json"  # in a folder of k-means, which `convert` makes; codecs have none

# The layer of XLS-R 1B that the reference's k-means was fit on; its 34 counts from 0.
XLSR_LAYER = 35


def make_settings(device: str, precision: str, resampler: str, batch_seconds: float | None) -> dict[str, Any]:
    """Check the settings and return those that units depend on, as JSON values.

    Args:
        device: Kind of device, "cpu" or "cuda".
        precision: One of `PrecisionName`.
        resampler: One of `ResamplerName`.
        batch_seconds: Seconds of audio, padding included, in one forward pass; by default that of `BATCH_SECONDS`.

    Raises:
        ValueError: A setting is unknown or does not fit the device.
    """
    if precision not in get_args(PrecisionName):
        raise ValueError(f"precision {precision!r} is unknown: choose one of {', '.join(get_args(PrecisionName))}")
    if resampler not in get_args(ResamplerName):
        raise ValueError(f"resampler {resampler!r} is unknown: choose one of {', '.join(get_args(ResamplerName))}")
    if batch_seconds is None:
        batch_seconds = BATCH_SECONDS.get(device, BATCH_SECONDS["cpu"])
    if not batch_seconds > 0:
        raise ValueError(f"batch_seconds is {batch_seconds}: give a positive number of seconds")
    if device == "cpu" and precision in ("tf32", "fp16x3"):
        raise ValueError(f"precision {precision} exists on CUDA only: use fp32 or bf16 on the CPU")
    return {
        "device": device,
        "precision": precision,
        "resampler": resampler,
        "batch_seconds": float(batch_seconds),
    }
