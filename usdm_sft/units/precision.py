"""Precisions of the unit model, the settings of PyTorch that they need, and the CPUs that have instructions for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)


class Precision(NamedTuple):
    """The types that a precision computes in."""

    layers: torch.dtype  # the layers' matrix products and attention
    front: str  # everything else: "ieee" float32, or "tf32"
    split: torch.dtype | None = None  # of the parts in linear layers and k-means (`split_linear.SplitLinear`)


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
