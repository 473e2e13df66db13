"""The config of a speech encoder, as transformers writes it, and its checkpoint folder -> config and weights of a unit model.

transformers itself opens the folder, so that sharded files, older parameter names and models with a head all work. A missing
weight, which transformers would fill with random values, is an error here. Code in the folder never runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, FeatureExtractionMixin
from transformers.utils import logging

from usdm_sft.audio.frames import FRAME_SAMPLES, MIN_SAMPLES, SAMPLE_RATE
from usdm_sft.units.families import FAMILIES, family_of, is_codec, takes_log_mel
from usdm_sft.utils.files import read_json
from usdm_sft.utils.texts import first_line

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
    if takes_log_mel(config):
        width = _LOG_MEL["num_mel_bins"] * _LOG_MEL["stride"]
        if (found := config.get("feature_projection_input_dim", width)) != width:
            raise ValueError(
                f"{path}: feature_projection_input_dim is {found}; only {width} is supported: name another model"
            )
        return
    # Defaults of the configs in transformers.
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


# Values of SeamlessM4TFeatureExtractor, and its defaults: mel bins, and how many frames of 10 ms are one frame of the model.
_LOG_MEL = {"num_mel_bins": 80, "stride": 2}

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Keys of config.json that do not describe the model; `auto_map` names code.
_OF_THE_CHECKPOINT = ("_name_or_path", "auto_map", "torch_dtype", "transformers_version")


def read_folder_config(folder: Path, layer: int, *, final_norm: bool) -> dict[str, Any]:
    """Return the config of the folder's model, cut to `layer` layers.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: The model is of another kind, or lacks the layer.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: name a folder that transformers saved, or a .pt file")
    config = read_json(path)
    if is_codec(config):
        raise ValueError(
            f"{folder} is a codec, which needs no k-means and no conversion: give it to prepare as it is (--unit_model)"
        )
    if (model_type := config.get("model_type")) not in tuple(FAMILIES):
        raise ValueError(f"{path}: model_type is {model_type!r}: name a model of {', '.join(FAMILIES)}")
    if "quantization_config" in config:
        raise ValueError(f"{path}: the weights are quantized: name the checkpoint they were made from")
    config = {key: value for key, value in config.items() if key not in _OF_THE_CHECKPOINT}
    # The adapter that `add_adapter` adds follows the last layer, so units do not depend on it.
    config |= {"architectures": [family_of(config).model], "dtype": "float32", "add_adapter": False}
    if "use_intermediate_ffn_before_adapter" in config:  # of w2v-BERT 2.0; refused without an adapter
        config["use_intermediate_ffn_before_adapter"] = False
    return cut_config(config, path, layer, final_norm=final_norm)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights that transformers would open.

    Raises:
        FileNotFoundError: There are none, or one of several files is missing.
        ValueError: The index of several files is invalid.
    """
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} holds none of {', '.join(_WEIGHTS)}: name a folder that transformers saved, or a .pt file itself"
        )
    if path.suffix != ".json":
        return [path]
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in names.values()
    ):
        raise ValueError(f"{path}: weight_map does not name files of the folder: download the checkpoint again")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, though {path.name} names it: download the checkpoint again")
    return files


def read_normalization(folder: Path, config: dict[str, Any]) -> str:
    """Return how the folder's feature extractor makes the input of the model of a config.

    Returns:
        A key of `batches.NORMALIZATIONS`: "transformers" for waveforms with mean 0 and variance 1, "none" for waveforms as they are,
        "seamless_m4t" for log-mel features.

    Raises:
        FileNotFoundError: There is neither a preprocessor_config.json nor a processor_config.json, which newer processors save.
        ValueError: The feature extractor is of another kind, or not for 16 kHz.
    """
    expected = family_of(config).extractor
    try:
        values, _ = FeatureExtractionMixin.get_feature_extractor_dict(folder, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{folder} holds no preprocessor_config.json that can be read, which says how waveforms are normalized: copy it "
            f"from the model that the k-means was fit on, or save one with {expected}("
            + (")" if takes_log_mel(config) else "do_normalize=...)")
        ) from error
    kind = values.get("feature_extractor_type", "Wav2Vec2FeatureExtractor")
    if kind != expected:
        raise ValueError(f"{folder}: the feature extractor is a {kind}, not a {expected}: name another model")
    if (rate := values.get("sampling_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise ValueError(f"{folder}: sampling_rate is {rate}, not {SAMPLE_RATE}: name a model for 16 kHz")
    if not takes_log_mel(config):
        return "transformers" if values.get("do_normalize", True) else "none"
    for name, only in _LOG_MEL.items():
        if (value := values.get(name, only)) != only:
            raise ValueError(f"{folder}: {name} is {value}, only {only} is supported: name another model")
    return "seamless_m4t"


def read_folder_weights(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of the model that `config` describes, float32, under transformers' names.

    Raises:
        ValueError: A tensor cannot be read, is missing, has another shape than in the config, or is not finite.
    """
    weights = open_checkpoint(folder, config).state_dict()
    return {key: tensor.contiguous() for key, tensor in weights.items()}


def open_checkpoint(folder: Path, config: dict[str, Any]) -> Any:
    """Open the model of a folder that `config` describes, in float32.

    Raises:
        ValueError: As in `read_folder_weights`.
    """
    try:
        with _quiet():
            model, report = AutoModel.from_pretrained(
                folder,
                config=AutoConfig.for_model(**config),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                weights_only=True,
                ignore_mismatched_sizes=True,  # reported, and an error below
                output_loading_info=True,
            )
    except Exception as error:  # the readers of the formats raise many kinds of errors
        raise ValueError(
            f"{folder} cannot be opened as a model of plain tensors that transformers saved ({first_line(error)}): "
            "download it again, or save it as safetensors"
        ) from error
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{folder}: {key} has shape {tuple(found)}, config.json says {tuple(expected)}: "
            "name the config.json that belongs to the weights"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{folder} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "") + ": "
            "name a complete checkpoint of the model that config.json describes"
        )
    for key, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder}: {key} holds NaN or infinite values: download the checkpoint again")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch off transformers' progress bar and its report of unused weights."""
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers
