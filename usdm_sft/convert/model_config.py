"""The config of a speech encoder, as transformers writes it -> the config of what a unit model keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from usdm_sft.audio.frames import FRAME_SAMPLES, MIN_SAMPLES

MODEL_TYPES = {"wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel"}


def cut_config(config: dict[str, Any], path: str | Path | None, layer: int, *, final_norm: bool) -> dict[str, Any]:
    """The config of the model that is cut to `layer` layers and used for inference only.

    Args:
        config: Of the whole model.
        path: Where it comes from, for error messages.
        layer: Layers that are needed.
        final_norm: Whether the norm after all layers is needed.

    Raises:
        ValueError: There is no such layer or norm, or frames are not 25 ms long and 20 ms apart.
    """
    for name in ("hidden_size", "num_hidden_layers"):
        if not isinstance(config.get(name), int):
            raise ValueError(f"{path}: {name} is {config.get(name)!r}: complete the config of the model")
    num_layers = config["num_hidden_layers"]
    if not 1 <= layer <= num_layers:
        raise ValueError(
            f"layer {layer} does not exist: the model has {num_layers} layers, counted from 1; "
            "give --layer, the one that the k-means was fit on"
        )
    if final_norm and (layer != num_layers or not config.get("do_stable_layer_norm")):
        raise ValueError(
            f"final_norm is of the last layer ({num_layers}) of a model with pre-norm layers (do_stable_layer_norm), "
            f"not of layer {layer} of this one: leave it out"
        )
    _check_frames(config, path)
    inference = {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}
    return config | inference | {"num_hidden_layers": layer}


def _check_frames(config: dict[str, Any], path: str | Path | None) -> None:
    kernels = config.get("conv_kernel", (10, 3, 3, 3, 3, 2, 2))  # the defaults of transformers
    strides = config.get("conv_stride", (5, 2, 2, 2, 2, 2, 2))
    seen, step = 1, 1  # samples that a frame sees; from frame to frame
    for kernel, stride in zip(kernels, strides, strict=False):
        seen, step = seen + (kernel - 1) * step, step * stride
    if (seen, step) != (MIN_SAMPLES, FRAME_SAMPLES):
        raise ValueError(
            f"{path}: conv_kernel and conv_stride make frames of {seen} samples every {step}; only models with "
            f"{MIN_SAMPLES} every {FRAME_SAMPLES} (25 ms every 20 ms) are supported"
        )
