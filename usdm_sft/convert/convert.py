"""A speech encoder's checkpoint and k-means centroids -> a unit model folder, once.

The folder holds `config.json` (a Wav2Vec2Config or HubertConfig with the layers that are needed), `model.safetensors`,
`kmeans.npy` (float32, one centroid a row) and `unit_model.json` (layer, sample rate, how waveforms are normalized, sha256 of
every file and of its sources). Of XLS-R 1B's 48 layers 35 are needed: 2.8 GB instead of 3.9. No value is changed.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.convert.keys import to_transformers
from usdm_sft.convert.model_config import cut_config
from usdm_sft.convert.transformers_folder import (
    read_folder_config,
    read_folder_weights,
    read_normalization,
    weight_files,
)
from usdm_sft.template.tokenizer import MAX_UNITS
from usdm_sft.units.folder import FILES, read_description
from usdm_sft.utils.cache import cache_root, path_lock, sha256_file
from usdm_sft.utils.json_files import read_json

XLSR_LAYER = 35

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


def convert(
    checkpoint: str | Path,
    kmeans: str | Path,
    unit_model_dir: str | Path,
    *,
    model_config: str | Path | None = None,
    layer: int = XLSR_LAYER,
    final_norm: bool = False,
) -> Path:
    """Make a unit model folder.

    Args:
        checkpoint: A folder with a wav2vec 2.0 or HuBERT model as transformers saves it, or a .pt file of a wav2vec 2.0 model
            `{"model": {...}}` with the keys of the original fairseq or of fairseq2. Only tensors and plain values are
            unpickled, and no code of the folder is run. A folder's preprocessor_config.json says how waveforms are
            normalized.
        kmeans: A .npy file of float32 centroids, one a row, at most 65,536.
        unit_model_dir: The folder to make. One that was made from the same files is left as it is.
        model_config: For a .pt file, a transformers Wav2Vec2Config in JSON that describes the whole checkpoint; XLS-R 1B by
            default. A folder has its own.
        layer: The layer, counted from 1, whose output becomes units: `hidden_states[layer]` of transformers. XLS-R's 35 by
            default.
        final_norm: Apply the norm that follows the last layer of a model with pre-norm layers. For a k-means that was fit on
            `last_hidden_state`, or on `hidden_states[-1]` of transformers before mid-2026, which was the same; since then
            `hidden_states[-1]` is without it, as in fairseq.

    Raises:
        FileNotFoundError: A source does not exist.
        FileExistsError: The folder holds something else.
        ValueError: The sources are not what they should be; the message says what, where and what to do.
    """
    checkpoint, kmeans = Path(checkpoint).expanduser(), Path(kmeans).expanduser()
    folder = Path(unit_model_dir).expanduser().resolve()
    description: dict[str, Any] = {"format_version": 1, "layer": layer, "sample_rate": SAMPLE_RATE}
    if not kmeans.is_file():
        raise FileNotFoundError(f"{kmeans} is not a file: name the downloaded file")
    if checkpoint.is_dir():
        if model_config is not None:
            raise ValueError(
                f"model_config {model_config} is for a .pt file: leave it out, {checkpoint} has a config.json"
            )
        config = read_folder_config(checkpoint, layer, final_norm=final_norm)
        description["normalization"] = read_normalization(checkpoint)
        sources = {path.name: path for path in weight_files(checkpoint)}
        read_weights = read_folder_weights
    elif checkpoint.is_file():
        config = _read_config(model_config, layer, final_norm=final_norm)
        sources = {"checkpoint": checkpoint}
        read_weights = _read_weights
    else:
        raise FileNotFoundError(f"{checkpoint} is not a file or a folder: name the downloaded one")
    if final_norm:
        description["final_norm"] = True
    description["sources"] = {name: sha256_file(path) for name, path in (sources | {"kmeans": kmeans}).items()}
    with path_lock(folder, cache_root()):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if _made_from(folder, description, config):
                return folder
            raise FileExistsError(
                f"{folder} exists and was not made from these files and settings, or was changed: "
                "remove it or name another folder"
            )
        return _write(folder, description, config, _read_kmeans(kmeans, config), read_weights(checkpoint, config))


def _write(
    folder: Path, description: dict[str, Any], config: dict[str, Any], centroids: np.ndarray, weights: dict[str, Any]
) -> Path:

    from safetensors.torch import save_file

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(
        unfinished / "config.json", unfinished / "model.safetensors"
    )  # safetensors writes for the owner only
    np.save(unfinished / "kmeans.npy", centroids)
    description |= {
        "num_units": len(centroids),
        "files": {name: sha256_file(unfinished / name) for name in FILES},
    }
    (unfinished / "unit_model.json").write_text(json.dumps(description, indent=2) + "\n")
    os.replace(unfinished, folder)
    return folder


def _made_from(folder: Path, description: dict[str, Any], config: dict[str, Any]) -> bool:
    try:
        found = read_description(folder)
        return (
            {name: value for name, value in found.items() if name not in ("num_units", "files")} == description
            and all(sha256_file(folder / name) == digest for name, digest in found["files"].items())
            and read_json(folder / "config.json") == config
        )
    except (FileNotFoundError, ValueError):
        return False


def _read_config(path: str | Path | None, layer: int, *, final_norm: bool = False) -> dict[str, Any]:
    """The config of a .pt file's model, cut to `layer` layers."""
    config = dict(XLSR_1B) if path is None else read_json(path)
    if config.setdefault("model_type", "wav2vec2") != "wav2vec2":
        raise ValueError(f"{path}: model_type is {config['model_type']!r}: name the config of a wav2vec2 model")
    if not config.get("do_stable_layer_norm"):
        raise ValueError(
            f"{path}: do_stable_layer_norm is not true: only models with pre-norm layers are supported as a .pt file; "
            "convert the model to a folder of transformers first"
        )
    return cut_config(config, path, layer, final_norm=final_norm) | {"architectures": ["Wav2Vec2Model"]}


def _read_kmeans(path: Path, config: dict[str, Any]) -> np.ndarray:
    width = config["hidden_size"]
    try:
        with open(path, "rb") as file:
            centroids = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a plain .npy array ({error}): save the centroids as one; of scikit-learn's k-means, "
            'np.save("kmeans.npy", kmeans.cluster_centers_.astype("float32"))'
        ) from error
    if centroids.ndim != 2 or centroids.shape[1] != width or not len(centroids):
        raise ValueError(
            f"{path} has shape {centroids.shape}, not (number of units, {width}): "
            "name the centroids that belong to this model, one a row"
        )
    if centroids.dtype != np.float32:
        raise ValueError(f"{path} is {centroids.dtype}, not float32: save it as float32")
    if len(centroids) > MAX_UNITS:
        raise ValueError(f"{path} has {len(centroids):,} centroids; more than {MAX_UNITS:,} are not supported")
    if not np.isfinite(centroids).all():
        raise ValueError(f"{path} holds NaN or infinite values: name the right file")
    return centroids


def _read_weights(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The tensors of the layers that are needed of a .pt file, under transformers' names."""
    import torch

    from usdm_sft.units.model import empty_model

    try:
        # Old checkpoints are no zip files and cannot be memory-mapped.
        if is_zip := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("its parts are compressed, as torch never writes them")  # to any size
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever the unpickler trips over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of plain tensors ({reason}): name the published file") from error
    source = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(source, dict):
        raise ValueError(f"{path} holds no 'model': name a fairseq or fairseq2 checkpoint")
    for key, tensor in source.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {key!r} is no name of a tensor: name a fairseq or fairseq2 checkpoint")
    try:
        renamed = to_transformers(source)
    except KeyError as error:
        raise ValueError(
            f"{path}: {error.args[0]} is no parameter of a wav2vec 2.0 model in fairseq's or fairseq2's naming"
        ) from error

    expected = empty_model(config).state_dict()
    weights = {}
    for key, parameter in expected.items():
        if key not in renamed:
            raise ValueError(f"{path} lacks {key}: name the checkpoint and the --model_config that belong together")
        tensor = renamed[key]
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, the config says {tuple(parameter.shape)}: "
                "name the --model_config that belongs to the checkpoint"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinite values: download the checkpoint again")
        weights[key] = tensor.float().contiguous()
    return weights
