"""Precisions of the unit model, and the float32 settings of PyTorch that they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Precision(NamedTuple):
    """The types that a precision computes in."""

    layers: torch.dtype  # the layers' matrix products and attention
    front: str  # everything else: "ieee" float32, or "tf32"


PRECISIONS = {  # by `settings.PrecisionName`
    "fp32": Precision(torch.float32, "ieee"),
    "tf32": Precision(torch.float32, "tf32"),
    "fp16": Precision(torch.float16, "ieee"),
    "bf16": Precision(torch.bfloat16, "ieee"),
}


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
