"""Forward passes over prepared waveforms, in the batches of `plan_batches`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from usdm_sft.audio.frames import SAMPLE_RATE, count_units, num_frames
from usdm_sft.units.batches import Waveform, plan_batches
from usdm_sft.units.model import UnitModel

# In messages of a RuntimeError: the CPU's allocator, and cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def start_units(
    model: UnitModel,
    waveforms: Sequence[Waveform],
    names: Sequence[str],
    batch_seconds: float,
    in_fp32: Callable[[list[Waveform], list[str]], list[np.ndarray]],
    normalization: str = "fairseq",
) -> Callable[[], tuple[list[np.ndarray], list[int]]]:
    """Run waveforms through the unit model. On CUDA, this returns before the device has finished.

    Args:
        model: The unit model, on the device that computes.
        waveforms: Any number, in any order.
        names: Name of each waveform for error messages.
        batch_seconds: Seconds of audio, padding included, in one forward pass.
        in_fp32: Returns the units of waveforms, given with their names, whose features are not finite in this model.
        normalization: How the waveforms were normalized.

    Returns:
        A function that waits for the device and returns the units, one (num_units,) uint16 array per waveform, and the
        indices of the waveforms whose units are those of `in_fp32`.

    Raises:
        MemoryError: The device has too little memory; the message names the setting to change.
    """
    device = model.centroids.device.type
    batches = plan_batches([waveform.num_samples for waveform in waveforms], batch_seconds, device, normalization)
    # Submit all batches before reading any result, so that the device never waits.
    results = [
        _forward(model, [waveforms[row] for row in rows], [names[row] for row in rows], batch_seconds)
        for rows in batches
    ]

    def finish() -> tuple[list[np.ndarray], list[int]]:
        found: list[np.ndarray] = [np.zeros(0, np.uint16)] * len(waveforms)
        not_finite = []
        for rows, (units, finite) in zip(batches, results, strict=True):
            for row, row_units, row_finite in zip(rows, units.cpu().numpy(), finite.cpu().numpy(), strict=True):
                found[row] = row_units[: count_units(waveforms[row].num_samples, normalization)]
                if not row_finite:
                    not_finite.append(row)
        if not_finite:
            not_finite.sort()
            again = in_fp32([waveforms[row] for row in not_finite], [names[row] for row in not_finite])
            for row, row_units in zip(not_finite, again, strict=True):
                found[row] = row_units
        return found, not_finite

    return finish


def _forward(
    model: UnitModel, batch: Sequence[Waveform], names: Sequence[str], batch_seconds: float
) -> tuple[torch.Tensor, torch.Tensor]:
    device = model.centroids.device
    padded = _pad([waveform.samples for waveform in batch], device)
    # The frame that an appended sample completes is masked, although it has a unit.
    frames = torch.tensor([num_frames(waveform.num_samples) for waveform in batch], device="cpu")
    try:
        padded = padded.to(device, non_blocking=True)
        if not model.rows_alone:
            return model.forward(padded, frames)
        return model.forward([row[: len(each.samples)] for row, each in zip(padded, batch, strict=True)], frames)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        seconds = padded.numel() / SAMPLE_RATE
        if len(batch) > 1:
            remedy = f"set --batch_seconds (now {batch_seconds:g}) to {seconds / 2:.0f} or less"
        else:
            remedy = f"leave out {names[0]}, or use a device with more memory"
        raise MemoryError(
            f"out of memory on {device} with a batch of {len(batch)} utterances and {seconds:.0f} s of audio: {remedy}"
        ) from error


def _pad(samples: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return (batch, num_samples) rows padded with zeros, in pinned memory if they have to go to a GPU."""
    if samples[0].device.type != "cpu":
        return torch.nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
    shape, pinned = (len(samples), max(map(len, samples))), device.type == "cuda"
    padded = torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
    # NumPy copies with this thread alone. torch would use a team of threads, and take the cores of those who read.
    for row, each in zip(padded.numpy(), samples, strict=True):
        row[: len(each)] = each.numpy()
        row[len(each) :] = 0
    return padded
