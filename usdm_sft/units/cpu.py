"""The unit model at the CPU's own speed: packs of utterances side by side, one thread each, and the matrix product that suits the processor.

A pack holds the frames of many utterances one after the other, without padding. Linear layers, norms and GELU run over all of them at
once; convolutions and attention see one utterance at a time. One thread per pack needs no team of threads, whose members wait for each
other after each operation.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from usdm_sft.utils.forks import renew_after_fork

ATTENTION = "sdpa_in_packs"  # the name that `attend` has in transformers


# The pack that this thread computes. The layers of some releases of transformers pass no further arguments to their attention.
_PACK: ContextVar[Sequence[tuple[int, int]] | None] = ContextVar("pack", default=None)


@contextmanager
def within(pack: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Let `attend` see one utterance at a time.

    Args:
        pack: Frames of each utterance, and how many of them are keys.
    """
    before = _PACK.set(pack)
    try:
        yield
    finally:
        _PACK.reset(before)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each utterance of the pack that `within` names; without one, as transformers' "sdpa" does.

    Args:
        module: The layer's attention.
        query: (1, heads, num_frames, head_dim), the frames of all utterances; `key` and `value` as well.
        key: As `query`.
        value: As `query`.
        attention_mask: Without a pack, the mask of padding.
        scaling: Factor of the products of queries and keys.
        **options: Further arguments of transformers.

    Returns:
        (1, num_frames, heads, head_dim) outputs, and no weights.
    """
    pack = _PACK.get()
    if pack is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    outputs, end = [], 0
    for num_frames, num_keys in pack:
        start, end = end, end + num_frames
        keys = slice(start, start + num_keys)
        outputs.append(
            scaled_dot_product_attention(query[:, :, start:end], key[:, :, keys], value[:, :, keys], scale=scaling)
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)


class FrontEnd:
    """The convolutional feature extractor on (time, channels) arrays, so that norms over the channels need no transposed copy.

    A convolution is the sum of matrix products, one for each run of taps that is as long as the stride: their inputs are rows of
    the array itself.

    Args:
        extractor: The feature extractor of a wav2vec 2.0 or HuBERT model in transformers.
    """

    def __init__(self, extractor: Any):
        self.layers = extractor.conv_layers
        self.weights = []  # for each layer: first tap and (taps * channels, outputs) weight of each product
        for layer in self.layers:
            weight, stride = layer.conv.weight.permute(2, 1, 0), layer.conv.stride[0]  # (taps, channels, outputs)
            starts = range(0, len(weight), stride)
            self.weights.append([(tap, weight[tap : tap + stride].flatten(0, 1).contiguous()) for tap in starts])

    def __call__(self, samples: torch.Tensor) -> torch.Tensor:
        """Return (num_frames, channels) features of (num_samples,) float32 samples."""
        values = samples[:, None]
        for layer, products in zip(self.layers, self.weights, strict=True):
            norm = getattr(layer, "layer_norm", None)
            if isinstance(norm, nn.GroupNorm):  # over the time of each channel; only in a first layer
                values = layer(values.T[None])[0].T.contiguous()
                continue
            values = _convolve(values, products, layer.conv)
            if norm is not None:
                values = norm(values)
            values = layer.activation(values)
        return values


def _convolve(values: torch.Tensor, products: Sequence[tuple[int, torch.Tensor]], conv: Any) -> torch.Tensor:
    channels, stride = values.shape[1], conv.stride[0]
    outputs = values.new_zeros(((len(values) - conv.kernel_size[0]) // stride + 1, conv.out_channels))
    if conv.bias is not None:
        outputs += conv.bias
    for tap, weight in products:
        rows = values.as_strided((len(outputs), len(weight)), (stride * channels, 1), tap * channels)
        outputs.addmm_(rows, weight)
    return outputs


_TURN = threading.Lock()
renew_after_fork(sys.modules[__name__], "_TURN")


@cache
def numpy_is_faster() -> bool:
    """Return whether NumPy's matrix product is faster than torch's: on processors of AMD, if NumPy has OpenBLAS.

    torch multiplies with Intel's MKL, which reaches 0.14 TFLOP/s on two cores of an AMD EPYC where OpenBLAS reaches 0.19; on an Intel
    Xeon they are equal. The vendor decides, not a measurement, so that equal machines compute alike.
    """
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "AuthenticAMD" in cpuinfo and len(ThreadpoolController().select(internal_api="openblas")) > 0


def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the (num_rows, num_outputs) product of (num_rows, num_inputs) and (num_outputs, num_inputs) float32, by the faster library."""
    if not _multiplies_with_numpy(rows):
        return rows @ weight.T
    outputs = rows.new_empty((len(rows), len(weight)))
    with np.errstate(all="ignore"):  # features that are not finite are found, and computed again, by who calls
        np.matmul(rows.numpy(), weight.numpy().T, out=outputs.numpy())
    return outputs


def _multiplies_with_numpy(rows: torch.Tensor) -> bool:
    """Return whether NumpyLinear and k-means use NumPy: not beside threads of torch, which wait for work on the cores that NumPy's need."""
    return rows.device.type == "cpu" and torch.get_num_threads() == 1 and numpy_is_faster()


class NumpyLinear(nn.Module):
    """A float32 linear layer that uses NumPy's matrix product within a pack.

    Args:
        weight: (num_outputs, num_inputs) float32.
        bias: (num_outputs,) float32.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the (..., num_outputs) float32 outputs of (..., num_inputs) float32 inputs."""
        if not _multiplies_with_numpy(inputs):
            return linear(inputs, self.weight, self.bias)
        outputs = multiply(inputs.reshape(-1, inputs.shape[-1]), self.weight)
        if self.bias is not None:
            outputs += self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)


def side_by_side(function: Callable[[Any, threading.Event], Any], items: Sequence[Any], at_once: int) -> list[Any]:
    """Call `function(item, stopped)` for each item in several threads, each of which computes on its own.

    A single item, or one at once, is computed by this thread with all of torch's threads.

    Args:
        function: Raises an error soon after the event `stopped` is set, which happens when another call failed or Ctrl-C was pressed.
        items: Taken in order.
        at_once: Number of threads.

    Returns:
        The results in order.
    """
    stopped = threading.Event()
    num_threads = min(at_once, len(items))
    if num_threads <= 1:
        with _one_thread_per_numpy_product() if torch.get_num_threads() == 1 else nullcontext():
            return [function(item, stopped) for item in items]
    before = torch.get_num_threads()
    with (
        _one_thread_per_numpy_product(),
        ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        futures = [pool.submit(function, item, stopped) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            torch.set_num_threads(before)  # threads that start later would have one, as those of the pool


@contextmanager
def _one_thread_per_numpy_product() -> Iterator[None]:
    """Give each product of NumPy one thread; callers in several threads take turns, because the number is a setting of the process."""
    if not numpy_is_faster():
        yield
        return
    with _TURN, ThreadpoolController().limit(limits=1, user_api="blas"):
        yield
