"""The unit model on a device: padded waveforms in, one unit per frame out.

The first layers of a wav2vec 2.0 or HuBERT model run as in transformers; then each frame gets its nearest centroid. Each row of a
batch gets the units that it gets alone: padding is set to zero before the positional convolution and masked in attention,
and if a norm of the feature extractor covers the whole waveform, rows pass the feature extractor one by one.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel

from usdm_sft.audio.frames import SAMPLE_RATE, count_units, num_frames
from usdm_sft.units.batches import PACK_SECONDS, Waveform, plan_batches
from usdm_sft.units.cpu import ATTENTION, FrontEnd, NumpyLinear, multiply, numpy_is_faster, side_by_side, within
from usdm_sft.units.folder import ChangedError, copy_known, read_array, read_description, read_known_description
from usdm_sft.units.precision import PRECISIONS, SplitLinear, own_settings, replace_linear_layers

KMEANS_DISTANCES = 4096 * 10_000  # in memory at once, 160 MB: 4,096 frames times 10,000 centroids, or 625 times 65,536
MAX_LAYERS = 128  # of a kind; the largest published models have 48
_MAX_JSON_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 24  # of .npy and safetensors


class UnitModel(nn.Module):
    """Padded waveforms -> units.

    Args:
        config: Config of the model, cut to the layers that are needed.
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
        config: dict[str, Any],
        weights: dict[str, torch.Tensor],
        centroids: np.ndarray,
        precision: str = "fp32",
        *,
        final_norm: bool = False,
    ):
        super().__init__()
        self.precision = PRECISIONS[precision]
        model = empty_model(config)
        model.load_state_dict(weights, assign=True)
        self.feature_extractor: nn.Module = model.feature_extractor
        self.feature_projection: nn.Module = model.feature_projection
        self.pos_conv_embed: nn.Module = model.encoder.pos_conv_embed
        # HuBERT's batch norm runs in `_positions`, because padding is set to zero between it and the convolution.
        self.pos_batch_norm: nn.Module | None = getattr(self.pos_conv_embed, "batch_norm", None)
        self.pos_conv_embed.batch_norm = None
        convolution = model.encoder.pos_conv_embed.conv
        if nn.utils.parametrize.is_parametrized(convolution):
            # The weight norm computes this weight at each call; computing it once gives the same values.
            nn.utils.parametrize.remove_parametrizations(convolution, "weight")
        self.layers: nn.ModuleList = model.encoder.layers
        pre_norm = model.config.do_stable_layer_norm
        self.norm_before_layers: nn.Module | None = None if pre_norm else model.encoder.layer_norm
        self.norm_after_layers: nn.Module | None = model.encoder.layer_norm if pre_norm and final_norm else None
        self.rows_alone: bool = model.config.feat_extract_norm == "group"
        if self.precision.layers != torch.float32:
            for layer in model.encoder.layers:
                for part in (layer.attention, layer.feed_forward):
                    _compute_in(part, self.precision.layers)
        self.products: nn.Module | None = None  # of features with centroids
        if self.precision.split is not None:
            replace_linear_layers([self.feature_projection, self.layers], SplitLinear, self.precision.split)
            self.products = SplitLinear(torch.from_numpy(centroids), None, self.precision.split)
        elif self.precision.layers == torch.float32 and numpy_is_faster():
            replace_linear_layers([self.feature_projection, self.layers], NumpyLinear)
        self.register_buffer("centroids", torch.from_numpy(centroids))
        self.register_buffer("centroid_norms", torch.from_numpy(np.square(centroids).sum(axis=1)))
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, precision: str = "fp32", *, digest: str | None = None) -> UnitModel:
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
            _check_config(config, description["layer"])
            kmeans_bytes = 4 * description["num_units"] * config["hidden_size"]
            centroids = read_array(_read(folder, "kmeans.npy", description, kmeans_bytes + _MAX_HEADER_BYTES))
            _check_centroids(centroids, config, description)
            weights = _read_weights(folder, config, description)
            return cls(config, weights, centroids, precision, final_norm=description.get("final_norm", False))
        except ChangedError:
            raise
        except (ValueError, RuntimeError, RecursionError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{folder} is not what convert wrote ({reason}): remove the folder and convert the unit model again"
            ) from error

    @cached_property
    def front_end(self) -> FrontEnd:
        """The feature extractor for packs."""
        return FrontEnd(self.feature_extractor)

    @torch.inference_mode()
    def forward_pack(
        self, rows: Sequence[torch.Tensor], frames: Sequence[int], stopped: threading.Event
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Compute the units of a pack of utterances on the CPU, with the caller's settings of PyTorch.

        Args:
            rows: (num_samples,) float32 each, normalized.
            frames: Number of frames of each row, as in `forward`.
            stopped: If this is set, an error is raised after the layer that is being computed.

        Returns:
            What `forward` returns, with the units of each row, (num_frames,) uint16, in a list.
        """
        features = self.packed_features([self.front_end(row) for row in rows], frames, stopped)
        finite = [torch.isfinite(row[:num_keys]).all() for row, num_keys in zip(features, frames, strict=True)]
        units = self.nearest(torch.cat(features))
        return list(torch.split(units, [len(row) for row in features])), torch.stack(finite)

    @torch.inference_mode()
    def forward(
        self, waveforms: torch.Tensor | Sequence[torch.Tensor], frames: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the units of a batch.

        Args:
            waveforms: (batch, num_samples) float32 on the model's device, each row normalized and then padded on the right.
                With `rows_alone`, a list of rows without padding, (num_samples,) each.
            frames: (batch,) int64 on the CPU, the number of frames of each row. Further frames are masked, but their units
                are output too.

        Returns:
            (batch, num_frames) uint16 units, and (batch,) bool: whether all features of the row's frames are finite. Both
            are on the model's device, which may still be computing them.
        """
        # The caller's settings would change units, which their cache key does not show.
        with own_settings(self.centroids.device.type, self.precision.front):
            features = self.features(waveforms, frames)
            padding = self._padding(frames, features)
            finite = (torch.isfinite(features).all(dim=-1) | padding).all(dim=-1)
            return self.nearest(features), finite

    def features(self, waveforms: torch.Tensor | Sequence[torch.Tensor], frames: torch.Tensor) -> torch.Tensor:
        """Return the (batch, num_frames, hidden_size) float32 output of the last layer, with the final norm if it is set.

        The arguments are those of `forward`.
        """
        if self.rows_alone:
            extracted = pad_sequence([self.feature_extractor(row[None])[0].T for row in waveforms], batch_first=True)
        else:
            extracted = self.feature_extractor(waveforms).transpose(1, 2)
        hidden, padding = self._add_positions(_first(self.feature_projection(extracted)), frames)
        return self._encode(hidden, attention_mask=None if padding is None else ~padding[:, None, None, :])

    def packed_features(
        self, extracted: Sequence[torch.Tensor], frames: Sequence[int], stopped: threading.Event | None = None
    ) -> list[torch.Tensor]:
        """Return the (num_frames, hidden_size) float32 features of each utterance of a pack.

        Args:
            extracted: (num_frames, channels) output of the front end for each utterance.
            frames: As in `forward_pack`.
            stopped: If this is set, an error is raised after the layer that is being computed.
        """
        lengths = [len(each) for each in extracted]
        hidden = _first(self.feature_projection(torch.cat(list(extracted))[None]))
        placed = [
            self._add_positions(each, torch.tensor([num_keys], device="cpu"))[0]
            for each, num_keys in zip(torch.split(hidden, lengths, dim=1), frames, strict=True)
        ]
        with within(list(zip(lengths, frames, strict=True))):
            encoded = self._encode(torch.cat(placed, dim=1), stopped=stopped)[0]
        return list(torch.split(encoded, lengths))

    def _add_positions(self, hidden: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the positional convolution to (batch, num_frames, hidden_size); also return the mask of padding, if there is any."""
        padding = None
        if min(frames.tolist()) < hidden.shape[1]:
            padding = self._padding(frames, hidden)
            hidden = hidden.masked_fill(padding[:, :, None], 0.0)
        return hidden + self._positions(hidden, padding), padding

    def _encode(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        stopped: threading.Event | None = None,
    ) -> torch.Tensor:
        """Run the layers and their norms."""
        if self.norm_before_layers is not None:
            hidden = self.norm_before_layers(hidden)
        for layer in self.layers:
            if stopped is not None and stopped.is_set():
                raise CancelledError  # another pack failed, or Ctrl-C was pressed
            hidden = _first(layer(hidden, attention_mask=attention_mask))
        return hidden if self.norm_after_layers is None else self.norm_after_layers(hidden)

    def _positions(self, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        if self.pos_batch_norm is not None:
            hidden = self.pos_batch_norm(hidden.transpose(1, 2)).transpose(1, 2)
            if padding is not None:
                hidden = hidden.masked_fill(padding[:, :, None], 0.0)
        positions: torch.Tensor = self.pos_conv_embed(hidden)
        return positions

    @staticmethod
    def _padding(frames: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return (batch, num_frames) bool: True for frames that the row does not have."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return positions >= frames.to(hidden.device, non_blocking=True)[:, None]

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


def _compute_in(part: nn.Module, dtype: torch.dtype) -> None:
    part.to(dtype)
    part.register_forward_pre_hook(lambda module, args: (args[0].to(dtype), *args[1:]))


def _first(output: Any) -> torch.Tensor:
    """Return the hidden states; which modules output a tuple differs between models and releases of transformers."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def empty_model(config: dict[str, Any]) -> Any:
    """Make the model of a config on the device "meta", without memory and values.

    Returns:
        A transformers.Wav2Vec2Model or HubertModel.

    Raises:
        ValueError: transformers cannot make a model from the config, or it would have too many layers.
    """
    numbers = [value for name, value in config.items() if name.endswith("_layers") and isinstance(value, int)]
    numbers += [len(value) for value in config.values() if isinstance(value, list)]
    if max(numbers, default=0) > MAX_LAYERS:
        raise ValueError(f"the config has {max(numbers):,} layers of one kind, more than {MAX_LAYERS}: correct it")
    try:
        with torch.device("meta"):
            whole = AutoConfig.for_model(**({"model_type": "wav2vec2"} | config))
            return AutoModel.from_config(whole, attn_implementation=ATTENTION)  # type: ignore[no-untyped-call]  # transformers
    except Exception as error:  # transformers checks little and raises many kinds of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the config is not that of a Wav2Vec2 or HuBERT model ({reason}): correct it") from error


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


def _read_weights(folder: Path, config: dict[str, Any], description: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Read the tensors of model.safetensors, after their number and size were compared with those of the model."""
    expected = empty_model(config).state_dict()
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


def _check_config(config: Any, layer: int) -> None:
    """Check the config of an untrusted folder for content that would make the model huge."""
    if not isinstance(config, dict) or config.get("num_hidden_layers") != layer or not 0 < layer <= MAX_LAYERS:
        raise ValueError(f"config.json is not of a model of {layer} layers")
    if not isinstance(config.get("hidden_size"), int):
        raise ValueError(f"config.json has hidden_size {config.get('hidden_size')!r}")


def _check_centroids(centroids: np.ndarray, config: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    if centroids.dtype != np.float32 or centroids.shape != (description["num_units"], config["hidden_size"]):
        raise ValueError(
            f"kmeans.npy is {centroids.dtype} of shape {centroids.shape}, not {description['num_units']} float32 centroids"
        )
    if not len(centroids) or not np.isfinite(centroids).all():
        raise ValueError("kmeans.npy is empty, or holds NaN or infinite values")


# In messages of a RuntimeError: the CPU's allocator, and cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def start_units(
    model: UnitModel,
    waveforms: Sequence[Waveform],
    names: Sequence[str],
    batch_seconds: float,
    in_fp32: Callable[[list[Waveform], list[str]], list[np.ndarray]],
    normalization: str = "fairseq",
) -> Callable[[], tuple[list[np.ndarray], list[int]]]:
    """Run waveforms through the unit model. On CUDA, this returns before the device has finished.

    Args:
        model: The unit model, on the device that computes.
        waveforms: Any number, in any order.
        names: Name of each waveform for error messages.
        batch_seconds: Seconds of audio, padding included, in one forward pass.
        in_fp32: Returns the units of waveforms, given with their names, whose features are not finite in this model.
        normalization: How the waveforms were normalized.

    Returns:
        A function that waits for the device and returns the units, one (num_units,) uint16 array per waveform, and the
        indices of the waveforms whose units are those of `in_fp32`.

    Raises:
        MemoryError: The device has too little memory; the message names the setting to change.
    """
    device = model.centroids.device.type
    batches = plan_batches([waveform.num_samples for waveform in waveforms], batch_seconds, device)

    def forward(rows: Sequence[int], stopped: threading.Event | None = None) -> tuple[Any, torch.Tensor]:
        batch = [waveforms[row] for row in rows]
        with _out_of_memory_explained(batch, [names[row] for row in rows], device, batch_seconds):
            if stopped is None:
                return _forward(model, batch)
            return model.forward_pack([waveform.samples for waveform in batch], _frames(batch), stopped)

    if device == "cpu":
        # `SplitLinear` changes a setting of the process during each product, which no other thread may see.
        at_once = torch.get_num_threads() if model.precision.split is None else 1
        # Utterances longer than a pack come first. They are computed one at a time, because each thread holds the activations of its pack.
        num_long = sum(waveforms[rows[0]].num_samples > PACK_SECONDS * SAMPLE_RATE for rows in batches)
        with own_settings(device, model.precision.front):
            results = side_by_side(forward, batches[:num_long], 1) + side_by_side(forward, batches[num_long:], at_once)
    else:  # submit all batches before reading any result, so that the device never waits
        results = [forward(rows) for rows in batches]

    def finish() -> tuple[list[np.ndarray], list[int]]:
        found: list[np.ndarray] = [np.zeros(0, np.uint16)] * len(waveforms)
        not_finite = []
        for rows, (units, finite) in zip(batches, results, strict=True):
            units = [each.numpy() for each in (units if device == "cpu" else units.cpu())]
            for row, row_units, row_finite in zip(rows, units, finite.cpu().numpy(), strict=True):
                found[row] = row_units[: count_units(waveforms[row].num_samples, normalization)]
                if not row_finite:
                    not_finite.append(row)
        if not_finite:
            not_finite.sort()
            again = in_fp32([waveforms[row] for row in not_finite], [names[row] for row in not_finite])
            for row, row_units in zip(not_finite, again, strict=True):
                found[row] = row_units
        return found, not_finite

    return finish


def _frames(batch: Sequence[Waveform]) -> list[int]:
    """Return the frames of each waveform without the one that an appended sample completes: masked, although it has a unit."""
    return [num_frames(waveform.num_samples) for waveform in batch]


def _forward(model: UnitModel, batch: Sequence[Waveform]) -> tuple[torch.Tensor, torch.Tensor]:
    device = model.centroids.device
    padded = _pad([waveform.samples for waveform in batch], device).to(device, non_blocking=True)
    frames = torch.tensor(_frames(batch), device="cpu")
    if not model.rows_alone:
        return model.forward(padded, frames)
    return model.forward([row[: len(each.samples)] for row, each in zip(padded, batch, strict=True)], frames)


@contextmanager
def _out_of_memory_explained(
    batch: Sequence[Waveform], names: Sequence[str], device: str, batch_seconds: float
) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        lengths = [len(waveform.samples) / SAMPLE_RATE for waveform in batch]
        seconds = sum(lengths) if device == "cpu" else max(lengths) * len(lengths)
        if len(batch) > 1:
            remedy = f"set --batch_seconds (now {batch_seconds:g}) to {seconds / 2:.0f} or less"
        else:
            remedy = f"leave out {names[0]}, or use a device with more memory"
        raise MemoryError(
            f"out of memory on {device} with a batch of {len(batch)} utterances and {seconds:.0f} s of audio: {remedy}"
        ) from error


def _pad(samples: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return (batch, num_samples) rows padded with zeros, in pinned memory if they have to go to a GPU."""
    if samples[0].device.type != "cpu":
        return torch.nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
    shape, pinned = (len(samples), max(map(len, samples))), device.type == "cuda"
    padded = torch.empty(shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
    # NumPy copies with this thread alone. torch would use a team of threads, and take the cores of those who read.
    for row, each in zip(padded.numpy(), samples, strict=True):
        row[: len(each)] = each.numpy()
        row[len(each) :] = 0
    return padded
