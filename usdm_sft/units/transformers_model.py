"""A unit model that transformers computes: one utterance at a time, as it computes a single one, for the families without a path of their own.

Padding would have to be kept out of each family's convolutions and attention. Without it, the units of an utterance depend on nothing else.
"""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from usdm_sft.units.base import KMeansModel
from usdm_sft.units.precision import own_settings

# Positions that w2v-BERT's sinusoids are made for at first, as in its default config. They grow with longer utterances.
MAX_POSITIONS = 5_000


class TransformersModel(KMeansModel):
    """One utterance -> units, for WavLM, data2vec-audio and w2v-BERT 2.0.

    Same arguments as `KMeansModel`. The precision is fp32 or tf32.
    """

    def _take(self, model: Any, *, final_norm: bool) -> None:
        for module in model.modules():
            if nn.utils.parametrize.is_parametrized(module):
                # The weight norm computes this weight at each call; computing it once gives the same values.
                nn.utils.parametrize.remove_parametrizations(module, "weight")
        if getattr(model.config, "do_stable_layer_norm", False) and not final_norm:
            model.encoder.layer_norm = nn.Identity()  # it follows the last layer
        if getattr(model.encoder, "embed_positions", None) is not None:
            # Its buffers are in no checkpoint, so they are still without values.
            model.config.max_source_positions = min(model.config.max_source_positions, MAX_POSITIONS)
            model.encoder.embed_positions = _OneAtATime(type(model.encoder.embed_positions)(model.config))
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            raise ValueError(f"{type(model).__name__} has values that are not in its weights")
        self.encoder = model

    @torch.inference_mode()
    def forward(self, row: torch.Tensor, stopped: threading.Event | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the units of an utterance.

        Args:
            row: Its `Waveform.samples`.
            stopped: Only on the CPU, where the caller has set `own_settings` for all threads: if this is set, an error is raised.

        Returns:
            (1, num_frames) uint16 units, and (1,) bool: whether all features are finite. Both are on the model's device, which
            may still be computing them.
        """
        if stopped is not None and stopped.is_set():
            raise CancelledError  # another utterance failed, or Ctrl-C was pressed
        device = self.centroids.device.type
        with own_settings(device, self.precision.front) if stopped is None else nullcontext():
            features = self.features(row.to(self.centroids.device, non_blocking=True))
            return self.nearest(features)[None], torch.isfinite(features).all()[None]

    def features(self, row: torch.Tensor) -> torch.Tensor:
        """Return the (num_frames, hidden_size) float32 output of the last layer, with the final norm if it is set."""
        outputs = self.encoder(row[None], output_hidden_states=False, output_attentions=False, return_dict=True)
        features: torch.Tensor = outputs.last_hidden_state[0]
        return features


class _OneAtATime(nn.Module):
    """Calls a module that keeps values between calls, for one thread at a time."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.lock = threading.Lock()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.lock:
            positions: torch.Tensor = self.module(hidden)
            return positions
