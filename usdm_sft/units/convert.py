"""A speech encoder's checkpoint and k-means centroids -> a unit model folder.

The folder consists of `config.json` (a config of transformers with the layers that are needed), `model.safetensors`,
`kmeans.npy` (float32, one centroid per row) and `unit_model.json` (layer, sample rate, normalization of waveforms, family unless it is
wav2vec 2.0 or HuBERT, sha256 of every file and every source). XLS-R 1B needs 35 of its 48 layers: 2.8 GB instead of 3.9 GB. Every value stays the same.

The parameters of wav2vec 2.0 checkpoints have the names of fairseq or fairseq2, and get those of transformers' `Wav2Vec2Model`.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.template.config import MAX_UNITS
from usdm_sft.units.base import empty_model
from usdm_sft.units.families import family_of
from usdm_sft.units.folder import FILES, read_array, read_description
from usdm_sft.units.settings import DESCRIPTION, XLSR_LAYER
from usdm_sft.units.transformers_folder import (
    XLSR_1B,
    cut_config,
    read_folder_config,
    read_folder_weights,
    read_normalization,
    weight_files,
)
from usdm_sft.utils.files import SUFFIX, read_json, remove_path, replace_path, sha256_file
from usdm_sft.utils.locks import file_lock
from usdm_sft.utils.texts import first_line

_LAYER = r"encoder\.layers\.(\d+)\."
_CONV = "feature_extractor.conv_layers."
_POSITION = "encoder.pos_conv_embed.conv."
_FAIRSEQ = (
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.", _CONV + r"\1.conv."),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.", _CONV + r"\1.layer_norm."),
    (r"layer_norm\.", "feature_projection.layer_norm."),
    (r"post_extract_proj\.", "feature_projection.projection."),
    (r"encoder\.pos_conv\.0\.bias", _POSITION + "bias"),
    (r"encoder\.pos_conv\.0\.weight_g", _POSITION + "parametrizations.weight.original0"),
    (r"encoder\.pos_conv\.0\.weight_v", _POSITION + "parametrizations.weight.original1"),
    (_LAYER + r"self_attn\.", r"encoder.layers.\1.attention."),
    (_LAYER + r"self_attn_layer_norm\.", r"encoder.layers.\1.layer_norm."),
    (_LAYER + r"fc1\.", r"encoder.layers.\1.feed_forward.intermediate_dense."),
    (_LAYER + r"fc2\.", r"encoder.layers.\1.feed_forward.output_dense."),
    (_LAYER + r"final_layer_norm\.", r"encoder.layers.\1.final_layer_norm."),
    (r"encoder\.layer_norm\.", "encoder.layer_norm."),
)
_FAIRSEQ2 = (
    (r"encoder_frontend\.feature_extractor\.layers\.(\d+)\.(conv|layer_norm)\.", _CONV + r"\1.\2."),
    (r"encoder_frontend\.post_extract_layer_norm\.", "feature_projection.layer_norm."),
    (r"encoder_frontend\.model_dim_proj\.", "feature_projection.projection."),
    (r"encoder_frontend\.pos_encoder\.conv\.bias", _POSITION + "bias"),
    (r"encoder_frontend\.pos_encoder\.conv\.weight_g", _POSITION + "parametrizations.weight.original0"),
    (r"encoder_frontend\.pos_encoder\.conv\.weight_v", _POSITION + "parametrizations.weight.original1"),
    (_LAYER + r"self_attn\.output_proj\.", r"encoder.layers.\1.attention.out_proj."),
    (_LAYER + r"self_attn\.", r"encoder.layers.\1.attention."),
    (_LAYER + r"self_attn_layer_norm\.", r"encoder.layers.\1.layer_norm."),
    (_LAYER + r"ffn\.inner_proj\.", r"encoder.layers.\1.feed_forward.intermediate_dense."),
    (_LAYER + r"ffn\.output_proj\.", r"encoder.layers.\1.feed_forward.output_dense."),
    (_LAYER + r"ffn_layer_norm\.", r"encoder.layers.\1.final_layer_norm."),
    (r"encoder\.layer_norm\.", "encoder.layer_norm."),
)
# Parameters that only pre-training needs.
_UNUSED = re.compile(r"mask_emb|masker\.|quantizer\.|project_q\.|final_proj\.|final_target_proj\.")
# How files of other kinds of k-means begin: a pickle of protocol 2 and later; what joblib compresses with (zlib, gzip, bz2, xz, lzma,
# lz4); and a faiss index, whose four letters are followed by its dimension, an int32 of which the upper bytes are 0.
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_COMPRESSED = re.compile(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b|BZh|\xfd7zXZ|\x5d\x00\x00|\x04\x22\x4d\x18")
_FAISS = re.compile(rb"I[A-Za-z][A-Za-z0-9]{2}..\x00\x00", re.DOTALL)
_ONE_OFF = (
    "write its centroids into a .npy file, once and in an environment of your own, with the lines under 'Published k-means files' on the "
    'page "Unit models" of the documentation'
)


def to_transformers(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters under transformers' names, without those that only pre-training needs.

    Raises:
        KeyError: A name belongs to neither layout.
    """
    layout = _FAIRSEQ2 if any(key.startswith("encoder_frontend.") for key in parameters) else _FAIRSEQ
    return {_rename(key, layout): value for key, value in parameters.items() if not _UNUSED.match(key)}


def _rename(key: str, layout: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in layout:
        if match := re.match(pattern, key):
            return match.expand(replacement) + key[match.end() :]
    raise KeyError(key)


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
        checkpoint: A folder with a model of `families.FAMILIES` as transformers saves it, or a .pt file of a wav2vec 2.0 model
            `{"model": {...}}` with the keys of fairseq or fairseq2. Only tensors and plain values are unpickled, and no code
            in the folder runs. A folder's preprocessor_config.json says how waveforms are normalized.
        kmeans: A .npy file of float32 centroids, one per row, at most 65,536. float64 is rounded to float32, as the reference does.
        unit_model_dir: The folder to make. A folder that was made from the same files and settings is left unchanged.
        model_config: For a .pt file, a transformers Wav2Vec2Config in JSON that describes the whole checkpoint; by default
            that of XLS-R 1B. A folder has its own.
        layer: The layer, counted from 1, whose output becomes units: `hidden_states[layer]` of transformers.
        final_norm: Apply the norm that follows the last layer of a model with pre-norm layers, for a k-means that was fit on
            `last_hidden_state`, or on `hidden_states[-1]` of transformers before mid-2026 (the same then; since then
            `hidden_states[-1]` is without the norm, as in fairseq).

    Returns:
        The folder.

    Raises:
        FileNotFoundError: A source does not exist.
        FileExistsError: The folder exists and has other content.
        ValueError: A source is invalid; the message names the place and the remedy.
    """
    return write_unit_model(
        checkpoint, kmeans, unit_model_dir, model_config=model_config, layer=layer, final_norm=final_norm
    )


def write_unit_model(
    checkpoint: str | Path,
    kmeans: str | Path,
    unit_model_dir: str | Path,
    *,
    model_config: str | Path | None,
    layer: int,
    final_norm: bool,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Do what `convert` does, and add `record`, which is not part of the digest of the unit model, to unit_model.json."""
    checkpoint, kmeans = Path(checkpoint).expanduser(), Path(kmeans).expanduser()
    folder = Path(unit_model_dir).expanduser().resolve()
    if not kmeans.is_file():
        raise FileNotFoundError(f"{kmeans} is not a file: name the downloaded file")
    config, settings, sources = read_settings(checkpoint, model_config, layer, final_norm=final_norm)
    description: dict[str, Any] = {"format_version": 1, "layer": layer, "sample_rate": SAMPLE_RATE, **settings}
    description |= record or {}
    sources |= {"kmeans": kmeans}
    description["sources"] = {name: sha256_file(path) for name, path in sources.items()}
    if _is_finished(folder, description, config):
        return folder
    lock_file = folder.with_name(f".{folder.name}.lock")  # beside the folder: two runs may have different caches
    with file_lock(lock_file, option="unit_model_dir"):
        if not _is_finished(folder, description, config):  # otherwise another run was faster
            centroids = _read_kmeans(kmeans, config)
            read_weights = read_folder_weights if checkpoint.is_dir() else _read_weights
            _write(folder, description, config, centroids, read_weights(checkpoint, config), sources)
        lock_file.unlink(missing_ok=True)  # who gets a lock from now on finds the finished folder
    return folder


def read_settings(
    checkpoint: Path, model_config: str | Path | None, layer: int, *, final_norm: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Path]]:
    """Return the config of the unit model, the settings that unit_model.json records, and the files of the weights."""
    settings: dict[str, Any] = {}
    if checkpoint.is_dir():
        if model_config is not None:
            raise ValueError(
                f"model_config {model_config} is for a .pt file: leave it out, {checkpoint} has a config.json"
            )
        config = read_folder_config(checkpoint, layer, final_norm=final_norm)
        if not family_of(config).in_batches:
            settings["model_type"] = config["model_type"]
        sources = {path.name: path for path in weight_files(checkpoint)}
        settings["normalization"] = read_normalization(checkpoint, config)
    elif checkpoint.is_file():
        config = _read_config(model_config, layer, final_norm=final_norm)
        sources = {"checkpoint": checkpoint}
    else:
        raise FileNotFoundError(f"{checkpoint} is not a file or a folder: name the downloaded one")
    if final_norm:
        settings["final_norm"] = True
    return config, settings, sources


def _write(
    folder: Path,
    description: dict[str, Any],
    config: dict[str, Any],
    centroids: np.ndarray,
    weights: dict[str, Any],
    sources: dict[str, Path],
) -> None:
    unfinished = folder.with_name(folder.name + SUFFIX)
    remove_path(unfinished)
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes the file readable for its owner only.
    shutil.copymode(unfinished / "config.json", unfinished / "model.safetensors")
    np.save(unfinished / "kmeans.npy", centroids)
    description |= {
        "num_units": len(centroids),
        "files": {name: sha256_file(unfinished / name) for name in FILES},
    }
    (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    for name, path in sources.items():  # a checkpoint is memory-mapped, and read while it is written
        if sha256_file(path) != description["sources"][name]:
            raise ValueError(
                f"{path} was changed while it was converted: let nothing write to it, and convert it again"
            )
    replace_path(unfinished, folder)


def _is_finished(folder: Path, description: dict[str, Any], config: dict[str, Any]) -> bool:
    """Return True for the finished unit model folder, and False for one that can be written.

    Raises:
        FileExistsError: The folder has other content.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = read_description(folder)
        if (
            {name: value for name, value in found.items() if name not in ("num_units", "files")} == description
            and all(sha256_file(folder / name) == digest for name, digest in found["files"].items())
            and read_json(folder / "config.json") == config
        ):
            return True
    except (FileNotFoundError, ValueError):
        pass
    raise FileExistsError(
        f"{folder} exists and was not made from these files and settings, or was changed: remove it or name another folder"
    )


def _read_config(path: str | Path | None, layer: int, *, final_norm: bool = False) -> dict[str, Any]:
    """Return the config of a .pt file's model, cut to `layer` layers."""
    config = dict(XLSR_1B) if path is None else read_json(path)
    if config.setdefault("model_type", "wav2vec2") != "wav2vec2":
        raise ValueError(f"{path}: model_type is {config['model_type']!r}: name the config of a wav2vec2 model")
    if not config.get("do_stable_layer_norm"):
        raise ValueError(
            f"{path}: do_stable_layer_norm is not true: only models with pre-norm layers are supported as a .pt file; "
            "convert the model to a folder of transformers first"
        )
    return cut_config(config, path, layer, final_norm=final_norm) | {"architectures": ["Wav2Vec2Model"]}


def _name_format(path: Path) -> str | None:
    """Say what kind of k-means file this is that is not read; None for any other content."""
    with open(path, "rb") as file:
        start = file.read(8)
    if _PICKLE.match(start):
        return "is a pickle, as joblib writes it, and reading it would run code that it holds"
    if _COMPRESSED.match(start):
        return "is compressed, as joblib writes pickles, and reading it would run code that it holds"
    if _FAISS.match(start):
        return "is a faiss index, not a .npy array"
    return None


def _read_kmeans(path: Path, config: dict[str, Any]) -> np.ndarray:
    width = config["hidden_size"]
    if found := _name_format(path):
        raise ValueError(f"{path} {found}: {_ONE_OFF}")
    try:
        with open(path, "rb") as file:
            centroids = read_array(file)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a plain .npy array ({first_line(error)}): save the centroids as one; for a k-means of scikit-learn, "
            'np.save("kmeans.npy", kmeans.cluster_centers_)'
        ) from error
    if centroids.ndim != 2 or centroids.shape[1] != width or not len(centroids):
        raise ValueError(
            f"{path} has shape {centroids.shape}, not (number of units, {width}): "
            "name the centroids that belong to this model, one per row, or the config of another .pt file with --model_config"
        )
    if centroids.dtype not in (np.float32, np.float64):
        raise ValueError(f"{path} is {centroids.dtype}, not float32 or float64: save it as float32")
    if len(centroids) > MAX_UNITS:
        raise ValueError(f"{path} has {len(centroids):,} centroids; more than {MAX_UNITS:,} are not supported")
    # KmeansModel of seamless_communication (models/unit_extractor/kmeans.py) rounds the file to the dtype of the model, and computes the
    # norms from the rounded centroids. `UnitModel` has the norms of this array.
    with np.errstate(over="ignore"):  # an infinite value is an error below
        centroids = centroids.astype(np.float32, copy=False)
    if not np.isfinite(centroids).all():
        raise ValueError(f"{path} holds NaN or infinite values, or values too large for float32: name the right file")
    return centroids


def _read_weights(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of a .pt file that the config needs, float32, under transformers' names."""
    renamed = _load_checkpoint(path)
    weights = {}
    for key, parameter in empty_model(config).state_dict().items():
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


def _load_checkpoint(path: Path) -> dict[str, Any]:
    """Return all tensors of a .pt file that are of use, under transformers' names."""
    try:
        # A checkpoint in torch's format from before 1.6 is not a zip file and cannot be memory-mapped.
        if is_zip := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    # torch never compresses them, and a compressed part may unpack to any size.
                    raise ValueError("its parts are compressed")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # the unpickler raises many kinds of errors
        raise ValueError(
            f"{path} is not a checkpoint of plain tensors ({first_line(error)}): name the published file"
        ) from error
    source = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(source, dict):
        raise ValueError(f"{path} holds no 'model': name a fairseq or fairseq2 checkpoint")
    for key, tensor in source.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {key!r} is not the name of a tensor: name a fairseq or fairseq2 checkpoint")
    try:
        return to_transformers(source)
    except KeyError as error:
        raise ValueError(
            f"{path}: {error.args[0]} is not a parameter of a wav2vec 2.0 model in the naming of fairseq or fairseq2: "
            "name a checkpoint of such a model"
        ) from error
