"""Linear layers of float32 accuracy from products in half precision, which tensor cores compute many times faster.

Each value is written as the sum of two half-precision parts, x = hi + lo. Of the four products of the parts, lo * lo is below the
rounding of the others and is left out. The other three are one matrix product of three times the depth, summed in float32:

    [x_hi | x_hi | x_lo] @ [w_hi | w_lo | w_hi].T

Source: "3xTF32" of NVIDIA CUTLASS, and arXiv 2507.23387 for float16 and bfloat16. Parts of float16 keep 22 bits of a value, parts of
bfloat16 keep 16; float32 has 24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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


def split_linear_layers(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every `nn.Linear` below a module by a `SplitLinear`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, SplitLinear(child.weight, child.bias, dtype))
        else:
            split_linear_layers(child, dtype)


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
