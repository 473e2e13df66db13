"""The unit model on a device: padded waveforms in, one unit a frame out.

XLS-R's first layers as transformers runs them, without the final norm, then the nearest centroid. A batch gives each row the
units that it gets alone: padding is zeroed before the positional convolution and is no key in attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, Wav2Vec2Config

KMEANS_ROWS = 4096  # frames whose distances to all centroids are held at once: 160 MB with 10,000 centroids

# precision -> (dtype of the layers' matrix products, TF32 for what stays float32)
PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, False),
    "bf16": (torch.bfloat16, False),
}


class UnitModel(nn.Module):
    """Padded waveforms -> units.

    Args:
        folder: A unit model folder.
        precision: "fp32" computes as the reference does. "fp16" and "bf16" run the layers' matrix products and attention
            in that type; convolutions, projection, positional convolution, norms, the residual stream and k-means
            stay float32.
    """

    def __init__(self, folder: str | Path, precision: str = "fp32"):
        super().__init__()
        self.dtype, self.allow_tf32 = PRECISIONS[precision]
        config = json.loads((Path(folder) / "config.json").read_text())
        with torch.device("meta"):  # no memory, no initialization: the file's memory-mapped tensors take their place
            model = AutoModel.from_config(Wav2Vec2Config(**config), attn_implementation="sdpa")
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
        self.feature_extractor = model.feature_extractor
        self.feature_projection = model.feature_projection
        self.pos_conv_embed = model.encoder.pos_conv_embed
        # The weight that the weight norm computes at each call, computed once: the same values.
        nn.utils.parametrize.remove_parametrizations(self.pos_conv_embed.conv, "weight")
        self.layers = model.encoder.layers
        if self.dtype != torch.float32:
            for each in self.layers:
                each.attention.to(self.dtype)
                each.feed_forward.to(self.dtype)
                for norm in (each.layer_norm, each.final_layer_norm):
                    norm.register_forward_hook(lambda module, args, output: output.to(self.dtype))
        centroids = np.load(Path(folder) / "kmeans.npy", allow_pickle=False)
        self.register_buffer("centroids", torch.from_numpy(centroids))
        self.register_buffer("centroid_norms", torch.from_numpy(np.square(centroids).sum(axis=1)))
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(self, waveforms: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Units of a batch.

        Args:
            waveforms: (batch, num_samples) float32, each row normalized and then padded on the right with anything.
            frames: (batch,) int64, the frames that a row really has; further ones are masked, their units are output.

        Returns:
            (batch, num_frames) int32 units, and (batch,) bool: whether all features of the row's frames are finite.
        """
        with fp32_precision("tf32" if self.allow_tf32 else "ieee"):
            features = self.features(waveforms, frames)
            valid = torch.arange(features.shape[1], device=features.device) < frames[:, None]
            finite = (torch.isfinite(features).all(dim=-1) | ~valid).all(dim=-1)
            return self.nearest(features), finite

    def features(self, waveforms: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """-> (batch, num_frames, hidden_size) float32 output of the last layer, before any final norm."""
        hidden, _ = self.feature_projection(self.feature_extractor(waveforms).transpose(1, 2))
        valid = torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]
        hidden = hidden.masked_fill(~valid[:, :, None], 0.0)
        hidden = hidden + self.pos_conv_embed(hidden)
        mask = valid[:, None, None, :].expand(-1, 1, hidden.shape[1], -1)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask)
        return hidden

    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> (...) int32 index of the nearest centroid, the first one on ties."""
        rows = features.reshape(-1, features.shape[-1])
        units = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
        for start in range(0, len(rows), KMEANS_ROWS):
            some = rows[start : start + KMEANS_ROWS]
            distances = some.pow(2).sum(1, keepdim=True) - 2 * (some @ self.centroids.T) + self.centroid_norms
            units[start : start + KMEANS_ROWS] = distances.argmin(dim=1)
        return units.reshape(features.shape[:-1])


@contextmanager
def fp32_precision(value: str) -> Iterator[None]:
    """Run float32 matrix products and convolutions as "ieee" float32 or as "tf32"; the caller's settings come back.

    Only PyTorch's `fp32_precision` settings are touched: once these have been used, the older `allow_tf32` flags raise.
    """
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = value
        yield
    finally:
        for setting, was in zip(settings, before, strict=True):
            setting.fp32_precision = was
