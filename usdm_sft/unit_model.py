"""The unit model on a device: padded waveforms in, one unit a frame out.

XLS-R's first layers as transformers runs them, without the final norm, then the nearest centroid. A batch gives each row the
units that it gets alone: padding is zeroed before the positional convolution and is no key in attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, PreTrainedModel, Wav2Vec2Config

from usdm_sft.checkpoint import read_description

KMEANS_ROWS = 4096  # frames whose distances to all centroids are held at once: 160 MB with 10,000 centroids


class Precision(NamedTuple):
    """How a precision computes: the layers' matrix products and attention, and everything else ("ieee" or "tf32")."""

    layers: torch.dtype
    front: str


PRECISIONS = {
    "fp32": Precision(torch.float32, "ieee"),
    "tf32": Precision(torch.float32, "tf32"),
    "fp16": Precision(torch.float16, "ieee"),
    "bf16": Precision(torch.bfloat16, "ieee"),
}


class UnitModel(nn.Module):
    """Padded waveforms -> units.

    Args:
        config: Of the model, cut to the layers that are needed.
        weights: By transformers' names, float32.
        centroids: (num_units, hidden_size) float32.
        precision: "fp32" computes as the reference does. "fp16" and "bf16" run the layers' matrix products and attention
            in that type; convolutions, projection, positional convolution, norms, the residual stream and k-means
            stay float32. "tf32" lets CUDA round the inputs of all float32 matrix products and convolutions to TF32.
    """

    def __init__(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], centroids: np.ndarray, precision: str = "fp32"
    ):
        super().__init__()
        self.precision = PRECISIONS[precision]
        model = empty_model(config)  # the given tensors take the parameters' place
        model.load_state_dict(weights, assign=True)
        self.feature_extractor = model.feature_extractor
        self.feature_projection = model.feature_projection
        self.pos_conv_embed = model.encoder.pos_conv_embed
        # The weight that the weight norm computes at each call, computed once: the same values.
        nn.utils.parametrize.remove_parametrizations(self.pos_conv_embed.conv, "weight")
        self.layers = model.encoder.layers
        if self.precision.layers != torch.float32:
            dtype = self.precision.layers
            for layer in self.layers:
                layer.attention.to(dtype)
                layer.feed_forward.to(dtype)
                for norm in (layer.layer_norm, layer.final_layer_norm):
                    norm.register_forward_hook(lambda module, args, output: output.to(dtype))
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
            return cls(config, weights, centroids, precision)
        except (ValueError, RuntimeError, RecursionError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{folder} is not what convert wrote ({reason}): remove the folder and convert the unit model again"
            ) from error

    @torch.inference_mode()
    def forward(self, waveforms: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Units of a batch.

        Args:
            waveforms: (batch, num_samples) float32 on the model's device, each row normalized and then padded on the right.
            frames: (batch,) int64 on the CPU, the frames that a row really has; further ones are masked, but their
                units are output too.

        Returns:
            (batch, num_frames) uint16 units, and (batch,) bool: whether all features of the row's frames are finite. Both
            on the model's device, which may still be computing them.
        """
        with fp32_precision(self.precision.front):
            features = self.features(waveforms, frames)
            padding = self._padding(frames, features)
            finite = (torch.isfinite(features).all(dim=-1) | padding).all(dim=-1)
            return self.nearest(features), finite

    def features(self, waveforms: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """-> (batch, num_frames, hidden_size) float32 output of the last layer, before any final norm."""
        hidden, _ = self.feature_projection(self.feature_extractor(waveforms).transpose(1, 2))
        mask = None
        if (frames < hidden.shape[1]).any():
            padding = self._padding(frames, hidden)
            hidden = hidden.masked_fill(padding[:, :, None], 0.0)
            mask = ~padding[:, None, None, :].expand(-1, 1, hidden.shape[1], -1)
        hidden = hidden + self.pos_conv_embed(hidden)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask)
        return hidden

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
        for start in range(0, len(rows), KMEANS_ROWS):
            some = rows[start : start + KMEANS_ROWS]
            distances = some.pow(2).sum(1, keepdim=True) - 2 * (some @ self.centroids.T) + self.centroid_norms
            units[start : start + KMEANS_ROWS] = distances.argmin(dim=1)
        return units.to(torch.uint16).reshape(features.shape[:-1])


def empty_model(config: dict[str, Any]) -> PreTrainedModel:
    """The Wav2Vec2Model of a config, on the device "meta": without memory and without values.

    Raises:
        ValueError: transformers makes no model of it.
    """
    try:
        with torch.device("meta"):
            return AutoModel.from_config(Wav2Vec2Config(**config), attn_implementation="sdpa")
    except Exception as error:  # whatever transformers trips over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the config is not that of a wav2vec2 model ({reason}): correct it") from error


def _check_parts(
    config: Any, weights: Mapping[str, torch.Tensor], centroids: np.ndarray, description: Mapping[str, Any]
) -> None:
    """What a stranger's folder may have otherwise, and the model would take an age to build for, or units be wrong by."""
    layer = description["layer"]
    if not isinstance(config, dict) or config.get("num_hidden_layers") != layer or not 0 < layer <= len(weights):
        raise ValueError(f"config.json is not of a model of {layer} layers")
    if any(tensor.dtype != torch.float32 for tensor in weights.values()):
        raise ValueError("model.safetensors is not float32")
    if centroids.dtype != np.float32 or centroids.shape != (description["num_units"], config.get("hidden_size")):
        raise ValueError(
            f"kmeans.npy is {centroids.dtype} of shape {centroids.shape}, not {description['num_units']} float32 centroids"
        )
    if not len(centroids) or not np.isfinite(centroids).all():
        raise ValueError("kmeans.npy is empty, or holds NaN or infinite values")


@contextmanager
def fp32_precision(value: str) -> Iterator[None]:
    """Run float32 matrix products and convolutions as "ieee" float32 or as "tf32"; the caller's settings come back.

    TF32 is CUDA's; on the CPU float32 is always "ieee", also where the caller lets oneDNN use bf16. Only PyTorch's `fp32_precision`
    settings are touched: once these have been used, the older `allow_tf32` flags raise. What comes back is the value that
    was in force, set on the operation itself, though the caller may have set it for all of them at once.
    """
    backends = torch.backends
    settings = {backends.cuda.matmul: value, backends.cudnn.conv: value}
    settings |= {backends.mkldnn.matmul: "ieee", backends.mkldnn.conv: "ieee"}
    before = {setting: setting.fp32_precision for setting in settings}
    try:
        for setting, wanted in settings.items():
            setting.fp32_precision = wanted
        yield
    finally:
        for setting, was in before.items():
            setting.fp32_precision = was
