"""Precisions of the unit model, and the float32 settings of PyTorch that they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """How a precision computes: the layers' matrix products and attention, and everything else ("ieee" or "tf32")."""

    layers: torch.dtype
    front: str


PRECISIONS = {
    "fp32": Precision(torch.float32, "ieee"),
    "tf32": Precision(torch.float32, "tf32"),
    "fp16": Precision(torch.float16, "ieee"),
    "bf16": Precision(torch.bfloat16, "ieee"),
}


@contextmanager
def fp32_precision(value: str) -> Iterator[None]:
    """Run float32 matrix products and convolutions as "ieee" float32 or as "tf32"; the caller's settings come back.

    TF32 is CUDA's; on the CPU float32 is always "ieee", also where the caller lets oneDNN use bf16. Only PyTorch's `fp32_precision`
    settings are touched: once these have been used, the older `allow_tf32` flags raise. What comes back is the value that
    was in force, set on the operation itself, though the caller may have set it for all of them at once.
    """
    backends = torch.backends
    settings = {backends.cuda.matmul: value, backends.cudnn.conv: value}
    settings |= {backends.mkldnn.matmul: "ieee", backends.mkldnn.conv: "ieee"}
    before = {setting: setting.fp32_precision for setting in settings}
    try:
        for setting, wanted in settings.items():
            setting.fp32_precision = wanted
        yield
    finally:
        for setting, was in before.items():
            setting.fp32_precision = was
