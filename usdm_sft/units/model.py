"""The unit model on a device: padded waveforms in, one unit a frame out.

A wav2vec 2.0 or HuBERT model's first layers as transformers runs them, then the nearest centroid. A batch gives each row the
units that it gets alone: padding is zeroed before the positional convolution and is no key in attention, and where a norm
of the feature extractor sees the whole waveform, rows go through that one by one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, PreTrainedModel

from usdm_sft.units.folder import read_description
from usdm_sft.units.precision import PRECISIONS, fp32_precision

KMEANS_DISTANCES = 4096 * 10_000  # held at once, 160 MB: of 4,096 frames to 10,000 centroids, of 625 to 65,536


class UnitModel(nn.Module):
    """Padded waveforms -> units.

    Args:
        config: Of the model, cut to the layers that are needed.
        weights: By transformers' names, float32.
        centroids: (num_units, hidden_size) float32.
        precision: "fp32" computes as the reference does. "fp16" and "bf16" run the layers' matrix products and attention
            in that type; convolutions, projection, positional convolution, norms, the residual stream and k-means
            stay float32. "tf32" lets CUDA round the inputs of all float32 matrix products and convolutions to TF32.
        final_norm: Whether the norm after the last layer is applied; only pre-norm models have one.
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: dict[str, torch.Tensor],
        centroids: np.ndarray,
        precision: str = "fp32",
        *,
        final_norm: bool = False,
    ):
        super().__init__()
        self.precision = PRECISIONS[precision]
        model = empty_model(config)  # the given tensors take the parameters' place
        model.load_state_dict(weights, assign=True)
        self.feature_extractor = model.feature_extractor
        self.feature_projection = model.feature_projection
        self.pos_conv_embed = model.encoder.pos_conv_embed
        # Taken out of the positional convolution: the padding is zeroed after it.
        self.pos_batch_norm = getattr(self.pos_conv_embed, "batch_norm", None)
        self.pos_conv_embed.batch_norm = None
        if nn.utils.parametrize.is_parametrized(self.pos_conv_embed.conv):
            # The weight that the weight norm computes at each call, computed once: the same values.
            nn.utils.parametrize.remove_parametrizations(self.pos_conv_embed.conv, "weight")
        self.layers = model.encoder.layers
        pre_norm = model.config.do_stable_layer_norm
        self.norm_before_layers = None if pre_norm else model.encoder.layer_norm
        self.norm_after_layers = model.encoder.layer_norm if pre_norm and final_norm else None
        self.rows_alone = model.config.feat_extract_norm == "group"
        if self.precision.layers != torch.float32:
            dtype = self.precision.layers
            for part in (part for layer in self.layers for part in (layer.attention, layer.feed_forward)):
                part.to(dtype)
                part.register_forward_pre_hook(lambda module, args: (args[0].to(dtype), *args[1:]))
        self.register_buffer("centroids", torch.from_numpy(centroids))
        self.register_buffer("centroid_norms", torch.from_numpy(np.square(centroids).sum(axis=1)))
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, precision: str = "fp32") -> UnitModel:
        """Open a unit model folder; the weights are memory-mapped until they go to a device.

        Raises:
            ValueError: The folder holds something else than `convert` writes, though its digests fit.
        """
        folder = Path(folder)
        description = read_description(folder)
        try:
            config = json.loads((folder / "config.json").read_text())
            centroids = np.load(folder / "kmeans.npy", allow_pickle=False)
            weights = load_file(folder / "model.safetensors")
            _check_parts(config, weights, centroids, description)
            return cls(config, weights, centroids, precision, final_norm=description.get("final_norm", False))
        except (ValueError, RuntimeError, RecursionError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{folder} is not what convert wrote ({reason}): remove the folder and convert the unit model again"
            ) from error

    @torch.inference_mode()
    def forward(
        self, waveforms: torch.Tensor | Sequence[torch.Tensor], frames: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Units of a batch.

        Args:
            waveforms: (batch, num_samples) float32 on the model's device, each row normalized and then padded on the right;
                for a model with `rows_alone` a list of rows, (num_samples,) each, without padding.
            frames: (batch,) int64 on the CPU, the frames that a row really has; further ones are masked, but their
                units are output too.

        Returns:
            (batch, num_frames) uint16 units, and (batch,) bool: whether all features of the row's frames are finite. Both
            on the model's device, which may still be computing them.
        """
        # A caller's autocast would change the units, and not their key.
        with torch.autocast(self.centroids.device.type, enabled=False), fp32_precision(self.precision.front):
            features = self.features(waveforms, frames)
            padding = self._padding(frames, features)
            finite = (torch.isfinite(features).all(dim=-1) | padding).all(dim=-1)
            return self.nearest(features), finite

    def features(self, waveforms: torch.Tensor | Sequence[torch.Tensor], frames: torch.Tensor) -> torch.Tensor:
        """-> (batch, num_frames, hidden_size) float32 output of the last layer, before any final norm that is not asked for."""
        if self.rows_alone:
            extracted = pad_sequence([self.feature_extractor(row[None])[0].T for row in waveforms], batch_first=True)
        else:
            extracted = self.feature_extractor(waveforms).transpose(1, 2)
        hidden = _first(self.feature_projection(extracted))
        mask = padding = None
        if (frames < hidden.shape[1]).any():
            padding = self._padding(frames, hidden)
            hidden = hidden.masked_fill(padding[:, :, None], 0.0)
            mask = ~padding[:, None, None, :]
        hidden = hidden + self._positions(hidden, padding)
        if self.norm_before_layers is not None:
            hidden = self.norm_before_layers(hidden)
        for layer in self.layers:
            hidden = _first(layer(hidden, attention_mask=mask))
        return hidden if self.norm_after_layers is None else self.norm_after_layers(hidden)

    def _positions(self, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        if self.pos_batch_norm is not None:
            hidden = self.pos_batch_norm(hidden.transpose(1, 2)).transpose(1, 2)
            if padding is not None:
                hidden = hidden.masked_fill(padding[:, :, None], 0.0)
        return self.pos_conv_embed(hidden)

    @staticmethod
    def _padding(frames: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, num_frames) bool: the frames that a row does not have."""
        return (
            torch.arange(hidden.shape[1], device=hidden.device) >= frames.to(hidden.device, non_blocking=True)[:, None]
        )

    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (...) uint16 index of the nearest centroid, the first one on ties."""
        rows = features.reshape(-1, features.shape[-1])
        units = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
        at_once = max(1, KMEANS_DISTANCES // len(self.centroids))
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            distances = some.pow(2).sum(1, keepdim=True) - 2 * (some @ self.centroids.T) + self.centroid_norms
            units[start : start + at_once] = distances.argmin(dim=1)
        return units.to(torch.uint16).reshape(features.shape[:-1])


def _first(output: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden states; which modules give more than these changes between models and releases of transformers."""
    return output[0] if isinstance(output, tuple) else output


def empty_model(config: dict[str, Any]) -> PreTrainedModel:
    """The model of a config, on the device "meta": without memory and without values.

    Raises:
        ValueError: transformers makes no model of it.
    """
    try:
        with torch.device("meta"):
            whole = AutoConfig.for_model(**({"model_type": "wav2vec2"} | config))
            return AutoModel.from_config(whole, attn_implementation="sdpa")
    except Exception as error:  # whatever transformers trips over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the config is not that of a Wav2Vec2 or HuBERT model ({reason}): correct it") from error


def _check_parts(
    config: Any, weights: Mapping[str, torch.Tensor], centroids: np.ndarray, description: Mapping[str, Any]
) -> None:
    """What a stranger's folder may have otherwise, and the model would take an age to build for, or units be wrong by."""
    layer = description["layer"]
    if not isinstance(config, dict) or config.get("num_hidden_layers") != layer or not 0 < layer <= len(weights):
        raise ValueError(f"config.json is not of a model of {layer} layers")
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in weights.values()):
        raise ValueError("model.safetensors is not float32")
    if centroids.dtype != np.float32 or centroids.shape != (description["num_units"], config.get("hidden_size")):
        raise ValueError(
            f"kmeans.npy is {centroids.dtype} of shape {centroids.shape}, not {description['num_units']} float32 centroids"
        )
    if not len(centroids) or not np.isfinite(centroids).all():
        raise ValueError("kmeans.npy is empty, or holds NaN or infinite values")
