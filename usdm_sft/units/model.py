"""The unit model on a device: padded waveforms in, one unit per frame out.

The first layers of a wav2vec 2.0 or HuBERT model run as in transformers; then each frame gets its nearest centroid. Each row of a
batch gets the units that it gets alone: padding is set to zero before the positional convolution and masked in attention,
and if a norm of the feature extractor covers the whole waveform, rows pass the feature extractor one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from usdm_sft.audio.frames import FRAMINGS, SAMPLE_RATE, num_frames
from usdm_sft.units.base import KMeansModel
from usdm_sft.units.batches import PACK_SECONDS, Waveform, plan_batches
from usdm_sft.units.cpu import FrontEnd, NumpyLinear, numpy_is_faster, side_by_side, within
from usdm_sft.units.precision import SplitLinear, own_settings, replace_linear_layers
from usdm_sft.units.transformers_model import TransformersModel

if TYPE_CHECKING:
    from usdm_sft.units.codecs import CodecModel


class UnitModel(KMeansModel):
    """Padded waveforms -> units, for wav2vec 2.0 and HuBERT. Same arguments as `KMeansModel`."""

    def _take(self, model: Any, *, final_norm: bool) -> None:
        self.feature_extractor: nn.Module = model.feature_extractor
        self.feature_projection: nn.Module = model.feature_projection
        self.pos_conv_embed: nn.Module = model.encoder.pos_conv_embed
        # HuBERT's batch norm runs in `_positions`, because padding is set to zero between it and the convolution.
        self.pos_batch_norm: nn.Module | None = getattr(self.pos_conv_embed, "batch_norm", None)
        self.pos_conv_embed.batch_norm = None
        convolution = model.encoder.pos_conv_embed.conv
        if nn.utils.parametrize.is_parametrized(convolution):
            # The weight norm computes this weight at each call; computing it once gives the same values.
            nn.utils.parametrize.remove_parametrizations(convolution, "weight")
        self.layers: nn.ModuleList = model.encoder.layers
        pre_norm = model.config.do_stable_layer_norm
        self.norm_before_layers: nn.Module | None = None if pre_norm else model.encoder.layer_norm
        self.norm_after_layers: nn.Module | None = model.encoder.layer_norm if pre_norm and final_norm else None
        self.rows_alone: bool = model.config.feat_extract_norm == "group"
        if self.precision.layers != torch.float32:
            for layer in model.encoder.layers:
                for part in (layer.attention, layer.feed_forward):
                    _compute_in(part, self.precision.layers)
        if self.precision.split is not None:
            replace_linear_layers([self.feature_projection, self.layers], SplitLinear, self.precision.split)
            self.products = SplitLinear(self.centroids, None, self.precision.split)
        elif self.precision.layers == torch.float32 and numpy_is_faster():
            replace_linear_layers([self.feature_projection, self.layers], NumpyLinear)

    @cached_property
    def front_end(self) -> FrontEnd:
        """The feature extractor for packs."""
        return FrontEnd(self.feature_extractor)

    @torch.inference_mode()
    def forward_pack(
        self, rows: Sequence[torch.Tensor], frames: Sequence[int], stopped: threading.Event
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Compute the units of a pack of utterances on the CPU, with the caller's settings of PyTorch.

        Args:
            rows: (num_samples,) float32 each, normalized.
            frames: Number of frames of each row, as in `forward`.
            stopped: If this is set, an error is raised after the layer that is being computed.

        Returns:
            What `forward` returns, with the units of each row, (num_frames,) uint16, in a list.
        """
        features = self.packed_features([self.front_end(row) for row in rows], frames, stopped)
        finite = [torch.isfinite(row[:num_keys]).all() for row, num_keys in zip(features, frames, strict=True)]
        units = self.nearest(torch.cat(features))
        return list(torch.split(units, [len(row) for row in features])), torch.stack(finite)

    @torch.inference_mode()
    def forward(
        self, waveforms: torch.Tensor | Sequence[torch.Tensor], frames: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the units of a batch.

        Args:
            waveforms: (batch, num_samples) float32 on the model's device, each row normalized and then padded on the right.
                With `rows_alone`, a list of rows without padding, (num_samples,) each.
            frames: (batch,) int64 on the CPU, the number of frames of each row. Further frames are masked, but their units
                are output too.

        Returns:
            (batch, num_frames) uint16 units, and (batch,) bool: whether all features of the row's frames are finite. Both
            are on the model's device, which may still be computing them.
        """
        # The caller's settings would change units, which their cache key does not show.
        with own_settings(self.centroids.device.type, self.precision.front):
            features = self.features(waveforms, frames)
            padding = self._padding(frames, features)
            finite = (torch.isfinite(features).all(dim=-1) | padding).all(dim=-1)
            return self.nearest(features), finite

    def features(self, waveforms: torch.Tensor | Sequence[torch.Tensor], frames: torch.Tensor) -> torch.Tensor:
        """Return the (batch, num_frames, hidden_size) float32 output of the last layer, with the final norm if it is set.

        The arguments are those of `forward`.
        """
        if self.rows_alone:
            extracted = pad_sequence([self.feature_extractor(row[None])[0].T for row in waveforms], batch_first=True)
        else:
            extracted = self.feature_extractor(waveforms).transpose(1, 2)
        hidden, padding = self._add_positions(_first(self.feature_projection(extracted)), frames)
        return self._encode(hidden, attention_mask=None if padding is None else ~padding[:, None, None, :])

    def packed_features(
        self, extracted: Sequence[torch.Tensor], frames: Sequence[int], stopped: threading.Event | None = None
    ) -> list[torch.Tensor]:
        """Return the (num_frames, hidden_size) float32 features of each utterance of a pack.

        Args:
            extracted: (num_frames, channels) output of the front end for each utterance.
            frames: As in `forward_pack`.
            stopped: If this is set, an error is raised after the layer that is being computed.
        """
        lengths = [len(each) for each in extracted]
        hidden = _first(self.feature_projection(torch.cat(list(extracted))[None]))
        placed = [
            self._add_positions(each, torch.tensor([num_keys], device="cpu"))[0]
            for each, num_keys in zip(torch.split(hidden, lengths, dim=1), frames, strict=True)
        ]
        with within(list(zip(lengths, frames, strict=True))):
            encoded = self._encode(torch.cat(placed, dim=1), stopped=stopped)[0]
        return list(torch.split(encoded, lengths))

    def _add_positions(self, hidden: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the positional convolution to (batch, num_frames, hidden_size); also return the mask of padding, if there is any."""
        padding = None
        if min(frames.tolist()) < hidden.shape[1]:
            padding = self._padding(frames, hidden)
            hidden = hidden.masked_fill(padding[:, :, None], 0.0)
        return hidden + self._positions(hidden, padding), padding

    def _encode(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stopped: threading.Event | None = None,
    ) -> torch.Tensor:
        """Run the layers and their norms."""
        if self.norm_before_layers is not None:
            hidden = self.norm_before_layers(hidden)
        for layer in self.layers:
            if stopped is not None and stopped.is_set():
                raise CancelledError  # another pack failed, or Ctrl-C was pressed
            hidden = _first(layer(hidden, attention_mask=attention_mask))
        return hidden if self.norm_after_layers is None else self.norm_after_layers(hidden)

    def _positions(self, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        if self.pos_batch_norm is not None:
            hidden = self.pos_batch_norm(hidden.transpose(1, 2)).transpose(1, 2)
            if padding is not None:
                hidden = hidden.masked_fill(padding[:, :, None], 0.0)
        positions: torch.Tensor = self.pos_conv_embed(hidden)
        return positions

    @staticmethod
    def _padding(frames: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return (batch, num_frames) bool: True for frames that the row does not have."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return positions >= frames.to(hidden.device, non_blocking=True)[:, None]


def _compute_in(part: nn.Module, dtype: torch.dtype) -> None:
    part.to(dtype)
    part.register_forward_pre_hook(lambda module, args: (args[0].to(dtype), *args[1:]))


def _first(output: Any) -> torch.Tensor:
    """Return the hidden states; which modules output a tuple differs between models and releases of transformers."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


# In messages of a RuntimeError: the CPU's allocator, and cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def start_units(
    model: UnitModel | TransformersModel | CodecModel,
    waveforms: Sequence[Waveform],
    names: Sequence[str],
    batch_seconds: float,
    in_fp32: Callable[[list[Waveform], list[str]], list[np.ndarray]],
    count_units: Callable[[int], int] = FRAMINGS["fairseq"].count,
) -> Callable[[], tuple[list[np.ndarray], list[int]]]:
    """Run waveforms through the unit model. On CUDA, this returns before the device has finished.

    Args:
        model: The unit model, on the device that computes.
        waveforms: Any number, in any order.
        names: Name of each waveform for error messages.
        batch_seconds: Seconds of audio, padding included, in one forward pass.
        in_fp32: Returns the units of waveforms, given with their names, whose features are not finite in this model.
        count_units: Returns the number of units of so many samples.

    Returns:
        A function that waits for the device and returns the units, one (num_units,) uint16 array per waveform, and the
        indices of the waveforms whose units are those of `in_fp32`.

    Raises:
        MemoryError: The device has too little memory; the message names the setting to change.
    """
    device = model.device.type
    room = batch_seconds if isinstance(model, UnitModel) else 0  # the others compute each utterance alone
    batches = plan_batches([waveform.num_samples for waveform in waveforms], room, device)

    def forward(rows: Sequence[int], stopped: threading.Event | None = None) -> tuple[Any, torch.Tensor]:
        batch = [waveforms[row] for row in rows]
        with _out_of_memory_explained(batch, [names[row] for row in rows], device, batch_seconds):
            if not isinstance(model, UnitModel):
                return model.forward(batch[0].samples, stopped)
            if stopped is None:
                return _forward(model, batch)
            return model.forward_pack([waveform.samples for waveform in batch], _frames(batch), stopped)

    if device == "cpu":
        # `SplitLinear` changes a setting of the process during each product, which no other thread may see.
        at_once = torch.get_num_threads() if model.precision.split is None else 1
        # Utterances longer than a pack come first. They are computed one at a time, because each thread holds the activations of its pack.
        num_long = sum(waveforms[rows[0]].num_samples > PACK_SECONDS * SAMPLE_RATE for rows in batches)
        with own_settings(device, model.precision.front):
            results = side_by_side(forward, batches[:num_long], 1) + side_by_side(forward, batches[num_long:], at_once)
    else:  # submit all batches before reading any result, so that the device never waits
        results = [forward(rows) for rows in batches]

    def finish() -> tuple[list[np.ndarray], list[int]]:
        found: list[np.ndarray] = [np.zeros(0, np.uint16)] * len(waveforms)
        not_finite = []
        for rows, (units, finite) in zip(batches, results, strict=True):
            units = [each.numpy() for each in (units if device == "cpu" else units.cpu())]
            for row, row_units, row_finite in zip(rows, units, finite.cpu().numpy(), strict=True):
                found[row] = row_units[: count_units(waveforms[row].num_samples)]
                if not row_finite:
                    not_finite.append(row)
        if not_finite:
            not_finite.sort()
            again = in_fp32([waveforms[row] for row in not_finite], [names[row] for row in not_finite])
            for row, row_units in zip(not_finite, again, strict=True):
                found[row] = row_units
        return found, not_finite

    return finish


def _frames(batch: Sequence[Waveform]) -> list[int]:
    """Return the frames of each waveform without the one that an appended sample completes: masked, although it has a unit."""
    return [num_frames(waveform.num_samples) for waveform in batch]


def _forward(model: UnitModel, batch: Sequence[Waveform]) -> tuple[torch.Tensor, torch.Tensor]:
    device = model.device
    padded = _pad([waveform.samples for waveform in batch], device).to(device, non_blocking=True)
    frames = torch.tensor(_frames(batch), device="cpu")
    if not model.rows_alone:
        return model.forward(padded, frames)
    return model.forward([row[: len(each.samples)] for row, each in zip(padded, batch, strict=True)], frames)


@contextmanager
def _out_of_memory_explained(
    batch: Sequence[Waveform], names: Sequence[str], device: str, batch_seconds: float
) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        lengths = [waveform.num_samples / SAMPLE_RATE for waveform in batch]
        seconds = sum(lengths) if device == "cpu" else max(lengths) * len(lengths)
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
