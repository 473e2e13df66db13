"""Precisions of the unit model, the settings of PyTorch that they need, and the CPUs that have instructions for them.

fp16x3 and bf16x3 get float32 accuracy, or nearly so, from products in half precision, which tensor cores compute many times faster. Each
value is written as the sum of two half-precision parts, x = hi + lo. Of the four products of the parts, lo * lo is below the rounding of
the others and is left out. The other three are one matrix product of three times the depth, summed in float32:

    [x_hi | x_hi | x_lo] @ [w_hi | w_lo | w_hi].T

Source: "3xTF32" of NVIDIA CUTLASS, and arXiv 2507.23387 for float16 and bfloat16. Parts of float16 keep 22 bits of a value, parts of
bfloat16 keep 16; float32 has 24.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)


class Precision(NamedTuple):
    """The types that a precision computes in."""

    layers: torch.dtype  # the layers' matrix products and attention
    front: str  # everything else: "ieee" float32, or "tf32"
    split: torch.dtype | None = None  # of the parts in linear layers and k-means (`SplitLinear`)


PRECISIONS = {  # by `settings.PrecisionName`
    "fp32": Precision(torch.float32, "ieee"),
    "tf32": Precision(torch.float32, "tf32"),
    "fp16": Precision(torch.float16, "ieee"),
    "bf16": Precision(torch.bfloat16, "ieee"),
    "fp16x3": Precision(torch.float32, "ieee", torch.float16),
    "bf16x3": Precision(torch.float32, "ieee", torch.bfloat16),
}

# Names in `torch.cpu.get_capabilities`, which newer releases of torch have, of instructions that multiply in a type.
_INSTRUCTIONS = {
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
}

# cuDNN's attention, the one that is missing here, builds a graph for each shape, and every batch has another shape.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def fp32_precision(value: str) -> Iterator[None]:
    """Run float32 matrix products and convolutions as "ieee" float32 or as "tf32", then restore the caller's settings.

    TF32 exists on CUDA only; the CPU always computes "ieee" float32, even if the caller lets oneDNN use bf16. Only PyTorch's
    `fp32_precision` settings are touched, because the older `allow_tf32` flags raise once these have been used. Each operation
    gets back the value that was in force for it, even if the caller had set it for all operations at once.
    """
    backends: Any = torch.backends  # torch's stubs lack the settings of cudnn and mkldnn
    settings = {backends.cuda.matmul: value, backends.cudnn.conv: value}
    settings |= {backends.mkldnn.matmul: "ieee", backends.mkldnn.conv: "ieee"}
    before = {setting: setting.fp32_precision for setting in settings}
    try:
        for setting, wanted in settings.items():
            setting.fp32_precision = wanted
        yield
    finally:
        for setting, earlier in before.items():
            setting.fp32_precision = earlier


@contextmanager
def own_settings(device: str, front: str) -> Iterator[None]:
    """Run a forward pass with settings that do not depend on the caller's, then restore those.

    Autocast is off, sums of half-precision products are float32, and cuDNN's attention is not used.

    Args:
        device: Kind of device, "cpu" or "cuda".
        front: As in `Precision`.
    """
    cublas: Any = torch.backends.cuda.matmul
    accumulation = cublas.allow_fp16_accumulation
    try:
        cublas.allow_fp16_accumulation = False
        with (
            torch.autocast(device, enabled=False),
            fp32_precision(front),
            sdpa_kernel(_ATTENTION, set_priority=True),
        ):
            yield
    finally:
        cublas.allow_fp16_accumulation = accumulation


@cache  # warn once
def check_cpu(precision: str) -> None:
    """Warn if a precision is slower than fp32 on the CPU of this machine.

    Raises:
        ValueError: The precision needs instructions that this CPU does not have, or that this torch does not report.
    """
    types = PRECISIONS[precision]
    instructions = _INSTRUCTIONS.get(types.split or types.layers)
    if instructions is None:
        return
    if not hasattr(torch.cpu, "get_capabilities"):
        if types.split is not None:
            raise ValueError(
                f"precision {precision} needs a CPU with bf16 instructions, which torch {torch.__version__} does not "
                "report: use fp32, or update torch"
            )
        return
    found = {name for name, value in torch.cpu.get_capabilities().items() if value}
    if not found.isdisjoint(instructions):
        if types.split is not None and "avx512_bf16" in found and "amx_bf16" not in found:
            logger.warning("precision %s is slower than fp32 on this CPU, which has no AMX: use fp32", precision)
    elif types.split is not None:
        raise ValueError(f"precision {precision} needs bf16 instructions, which this CPU does not have: use fp32")
    else:
        logger.warning("this CPU has no %s instructions, so %s is slower than fp32: use fp32", precision, precision)


LARGEST_PART = 2.0**14  # values are scaled to [2**14, 2**15): hi stays below 65,504, and lo above the subnormals
SMALLEST_POWER = 2.0**-100  # keeps LARGEST_PART / power finite


class SplitLinear(nn.Module):
    """A linear layer that multiplies hi and lo parts in half precision and sums in float32.

    The range of float16 is small. Therefore float16 parts are made of scaled values: the weight has one scale, and each row of
    the input has its own, so that a row does not depend on the rest of its batch. Scales are powers of two, which change no
    digit. bfloat16 has the range of float32 and needs none.

    Args:
        weight: (num_outputs, num_inputs) float32.
        bias: (num_outputs,) float32.
        dtype: torch.float16 or torch.bfloat16.
    """

    parts: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.weight_scale = 1.0  # of the product
        weight = weight.detach()
        if dtype == torch.float16:
            power = _power_of_two(weight.abs().max())
            weight = weight * (LARGEST_PART / power)
            self.weight_scale = float(power) / LARGEST_PART
        hi = weight.to(dtype)
        self.register_buffer("parts", torch.cat([hi, (weight - hi).to(dtype), hi], dim=1))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the (..., num_outputs) float32 outputs of (..., num_inputs) float32 inputs.

        An input that is not finite makes its outputs not finite.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.parts.dtype == torch.float16:
            power = _power_of_two(torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True))
            rows = rows * (LARGEST_PART / power)
            outputs = _multiply(self._split(rows), self.parts) * (power * (self.weight_scale / LARGEST_PART))
        else:
            outputs = _multiply(self._split(rows), self.parts)
        if self.bias is not None:
            outputs += self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (num_rows, 3 * num_inputs): hi, hi and lo of each row, written in place to save passes over memory."""
        width = rows.shape[1]
        parts = rows.new_empty((len(rows), 3 * width), dtype=self.parts.dtype)
        hi = parts[:, :width]
        hi.copy_(rows)
        parts[:, width : 2 * width].copy_(hi)
        torch.sub(rows, hi, out=parts[:, 2 * width :])
        return parts


def replace_linear_layers(modules: Iterable[nn.Module], make: Callable[..., nn.Module], *options: Any) -> None:
    """Replace every `nn.Linear` below some modules by `make(weight, bias, *options)`."""
    for module in modules:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, make(child.weight, child.bias, *options))
            else:
                replace_linear_layers([child], make, *options)


def _multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the float32 product of (num_rows, depth) and (num_outputs, depth), both in the same half precision."""
    if rows.device.type == "cuda":
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    # The CPU has no product of half precision with float32 sums. Products of float32 values that bfloat16 can hold are the same if
    # oneDNN multiplies in bfloat16, where the CPU has instructions for it.
    operation: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch's stubs lack it
    before = operation.fp32_precision
    try:
        operation.fp32_precision = "bf16" if weight.dtype == torch.bfloat16 else "ieee"
        return torch.mm(rows.float(), weight.float().T)
    finally:
        operation.fp32_precision = before


def _power_of_two(values: torch.Tensor) -> torch.Tensor:
    """Return the largest power of two that is not above each float32 value, from its exponent bits; infinity for NaN."""
    return (values.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(SMALLEST_POWER)
