"""What all unit models share: they are read from a unit model folder, and give each frame its nearest centroid."""

from __future__ import annotations

import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import nn
from transformers import AutoConfig, AutoModel

from usdm_sft.units.cpu import ATTENTION, multiply
from usdm_sft.units.families import WAV2VEC2, family_of, is_known
from usdm_sft.units.folder import ChangedError, copy_known, read_array, read_description, read_known_description
from usdm_sft.units.precision import PRECISIONS

KMEANS_DISTANCES = 4096 * 10_000  # in memory at once, 160 MB: 4,096 frames times 10,000 centroids, or 625 times 65,536
MAX_LAYERS = 128  # of a kind; the largest published models have 48
_MAX_JSON_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 24  # of .npy and safetensors


class KMeansModel(nn.Module, ABC):
    """A speech encoder with centroids. A subclass keeps what it needs of transformers' model (`_take`) and computes the features.

    Args:
        config: Config of the model, cut to the layers that are needed, or what `empty_model` makes of it.
        weights: float32 tensors under transformers' names.
        centroids: (num_units, hidden_size) float32.
        precision: "fp32" computes as the reference does. "fp16" and "bf16" run the layers' matrix products and attention
            in that type; convolutions, projection, positional convolution, norms, the residual stream and k-means
            stay float32. "tf32" lets CUDA round the inputs of all float32 matrix products and convolutions to TF32.
            "fp16x3" and "bf16x3" compute linear layers and k-means as `SplitLinear` does, and the rest in float32.
        final_norm: Apply the norm that follows the last layer; only pre-norm models have one.
    """

    centroids: torch.Tensor
    centroid_norms: torch.Tensor

    def __init__(
        self,
        config: dict[str, Any] | nn.Module,
        weights: dict[str, torch.Tensor],
        centroids: np.ndarray,
        precision: str = "fp32",
        *,
        final_norm: bool = False,
    ):
        super().__init__()
        self.precision = PRECISIONS[precision]
        self.register_buffer("centroids", torch.from_numpy(centroids))
        self.register_buffer("centroid_norms", torch.from_numpy(np.square(centroids).sum(axis=1)))
        self.products: nn.Module | None = None  # of features with centroids, where a precision has its own
        model = config if isinstance(config, nn.Module) else empty_model(config)
        model.load_state_dict(weights, assign=True)
        self._take(model, final_norm=final_norm)
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.centroids.device

    @abstractmethod
    def _take(self, model: Any, *, final_norm: bool) -> None:
        """Keep the parts of transformers' model that compute features."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, precision: str = "fp32", *, digest: str | None = None) -> Self:
        """Load a unit model folder into memory. What is loaded has the digests of unit_model.json.

        Args:
            folder: The unit model folder.
            precision: As in the class.
            digest: The digest that the unit model was opened with; by default that of the folder.

        Raises:
            ChangedError: The folder, or a file of it, was changed since then.
            ValueError: `convert` did not write the content, although the digests fit.
        """
        folder = Path(folder)
        description = read_description(folder) if digest is None else read_known_description(folder, digest)
        try:
            config = json.loads(_read(folder, "config.json", description, _MAX_JSON_BYTES).getvalue())
            _check_config(config, description)
            kmeans_bytes = 4 * description["num_units"] * config["hidden_size"]
            centroids = read_array(_read(folder, "kmeans.npy", description, kmeans_bytes + _MAX_HEADER_BYTES))
            _check_centroids(centroids, config, description)
            model = empty_model(config)
            weights = _read_weights(folder, model.state_dict(), description)
            return cls(model, weights, centroids, precision, final_norm=description.get("final_norm", False))
        except ChangedError:
            raise
        except (ValueError, RuntimeError, RecursionError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{folder} is not what convert wrote ({reason}): remove the folder and convert the unit model again"
            ) from error

    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """Return (...) uint16 indices of the centroids nearest to (..., hidden_size) features, the first one on ties."""
        rows = features.reshape(-1, features.shape[-1])
        units = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
        at_once = max(1, KMEANS_DISTANCES // len(self.centroids))
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            products = multiply(some, self.centroids) if self.products is None else self.products(some)
            distances = products.mul_(-2).add_(some.pow(2).sum(1, keepdim=True)).add_(self.centroid_norms)
            units[start : start + at_once] = distances.argmin(dim=1)
        return units.to(torch.uint16).reshape(features.shape[:-1])


def empty_model(config: dict[str, Any]) -> Any:
    """Make the model of a config on the device "meta", without memory and values.

    Returns:
        A model of transformers of the class that `families.FAMILIES` names, such as Wav2Vec2Model.

    Raises:
        ValueError: transformers cannot make a model from the config, or it would have too many layers.
    """
    config = {"model_type": WAV2VEC2} | config
    numbers = [value for name, value in config.items() if name.endswith("_layers") and isinstance(value, int)]
    numbers += [len(value) for value in config.values() if isinstance(value, list)]
    if config["model_type"] == "data2vec-audio":  # the number of its convolutions; elsewhere the width of one
        numbers += [config.get("num_conv_pos_embeddings", 0)]
    if max(numbers, default=0) > MAX_LAYERS:
        raise ValueError(f"the config has {max(numbers):,} layers of one kind, more than {MAX_LAYERS}: correct it")
    # "eager" is the one that all releases of transformers have for all families.
    attention = ATTENTION if family_of(config).in_batches else "eager"
    try:
        with torch.device("meta"):
            whole = AutoConfig.for_model(**config)
            return AutoModel.from_config(whole, attn_implementation=attention)  # type: ignore[no-untyped-call]  # transformers
    except Exception as error:  # transformers checks little and raises many kinds of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        kind = "a Wav2Vec2 or HuBERT" if family_of(config).in_batches else f"a {config['model_type']}"
        raise ValueError(f"the config is not that of {kind} model ({reason}): correct it") from error


def _read(folder: Path, name: str, description: Mapping[str, Any], max_bytes: int) -> io.BytesIO:
    memory = io.BytesIO()
    copy_known(folder / name, description["files"][name], memory, max_bytes)
    memory.seek(0)
    return memory


def _open_memory() -> IO[bytes]:
    """Open a new file in memory: one with a descriptor, or a `BytesIO` where the system has none (Windows, macOS)."""
    try:
        return open(os.memfd_create("weights"), "wb")
    except (AttributeError, OSError):  # the second where a sandbox forbids the call
        return io.BytesIO()


def _read_weights(
    folder: Path, expected: Mapping[str, torch.Tensor], description: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Read the tensors of model.safetensors, after their number and size were compared with those of the model."""
    max_bytes = sum(tensor.nbytes for tensor in expected.values()) + _MAX_HEADER_BYTES
    with _open_memory() as memory:
        copy_known(folder / "model.safetensors", description["files"]["model.safetensors"], memory, max_bytes)
        if isinstance(memory, io.BytesIO):
            weights = load(memory.getvalue())
        else:
            # The tensors are this memory itself, which stays after the descriptor is closed.
            with safe_open(f"/proc/self/fd/{memory.fileno()}", framework="pt") as file:
                if len(names := file.keys()) > len(expected):
                    raise ValueError(f"model.safetensors has {len(names):,} tensors, the model {len(expected):,}")
                weights = {name: file.get_tensor(name) for name in names}
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in weights.values()):
        raise ValueError("model.safetensors is not float32")
    return weights


def _check_config(config: Any, description: Mapping[str, Any]) -> None:
    """Check the config of an untrusted folder for content that would make the model huge, or another than the description says."""
    layer = description["layer"]
    if not isinstance(config, dict) or config.get("num_hidden_layers") != layer or not 0 < layer <= MAX_LAYERS:
        raise ValueError(f"config.json is not of a model of {layer} layers")
    if not isinstance(config.get("hidden_size"), int):
        raise ValueError(f"config.json has hidden_size {config.get('hidden_size')!r}")
    if not is_known(config) or family_of(config).in_batches != family_of(description).in_batches:
        raise ValueError(
            f"config.json has model_type {config.get('model_type')!r}, unit_model.json {description.get('model_type')!r}"
        )


def _check_centroids(centroids: np.ndarray, config: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    if centroids.dtype != np.float32 or centroids.shape != (description["num_units"], config["hidden_size"]):
        raise ValueError(
            f"kmeans.npy is {centroids.dtype} of shape {centroids.shape}, not {description['num_units']} float32 centroids"
        )
    if not len(centroids) or not np.isfinite(centroids).all():
        raise ValueError("kmeans.npy is empty, or holds NaN or infinite values")
