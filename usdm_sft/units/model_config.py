"""The config of a speech encoder, as transformers writes it -> the config of a unit model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from usdm_sft.audio.frames import FRAME_SAMPLES, MIN_SAMPLES

MODEL_TYPES = {"wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel"}

# The layer that the reference's k-means was fit on; its 34 counts from 0.
XLSR_LAYER = 35

# transformers' config of XLS-R 1B (facebook/wav2vec2-xls-r-1b).
XLSR_1B = {
    "hidden_size": 1280,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "hidden_act": "gelu",
    "feat_extract_norm": "layer",
    "feat_extract_activation": "gelu",
    "do_stable_layer_norm": True,
    "conv_bias": True,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "layer_norm_eps": 1e-5,
}


def cut_config(config: dict[str, Any], path: str | Path | None, layer: int, *, final_norm: bool) -> dict[str, Any]:
    """Return the config of the model cut to `layer` layers, for inference only.

    Args:
        config: Config of the whole model.
        path: File of the config, for error messages.
        layer: Number of layers to keep.
        final_norm: Whether the unit model applies the norm after the last layer.

    Raises:
        ValueError: The model lacks the layer or the norm, or its frames are not 25 ms long and 20 ms apart.
    """
    for name in ("hidden_size", "num_hidden_layers"):
        if not isinstance(config.get(name), int):
            raise ValueError(f"{path}: {name} is {config.get(name)!r}: complete the config of the model")
    num_layers = config["num_hidden_layers"]
    if not 1 <= layer <= num_layers:
        raise ValueError(
            f"layer {layer} does not exist: the model has {num_layers} layers, counted from 1; "
            "give the layer that the k-means was fit on with --layer"
        )
    if final_norm and (layer != num_layers or not config.get("do_stable_layer_norm")):
        raise ValueError(
            f"final_norm needs the last layer ({num_layers}) of a model with pre-norm layers (do_stable_layer_norm), "
            f"and layer {layer} of this model is not one: leave it out"
        )
    _check_frames(config, path)
    inference = {"apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0}
    return config | inference | {"num_hidden_layers": layer}


def _check_frames(config: dict[str, Any], path: str | Path | None) -> None:
    # Defaults of Wav2Vec2Config and HubertConfig in transformers.
    kernels = config.get("conv_kernel", (10, 3, 3, 3, 3, 2, 2))
    strides = config.get("conv_stride", (5, 2, 2, 2, 2, 2, 2))
    seen, step = 1, 1  # samples that a frame covers, and from frame to frame
    for kernel, stride in zip(kernels, strides, strict=False):
        seen, step = seen + (kernel - 1) * step, step * stride
    if (seen, step) != (MIN_SAMPLES, FRAME_SAMPLES):
        raise ValueError(
            f"{path}: conv_kernel and conv_stride make frames of {seen} samples every {step}; only models with "
            f"{MIN_SAMPLES} every {FRAME_SAMPLES} (25 ms every 20 ms) are supported"
        )
