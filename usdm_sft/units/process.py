"""Where the unit model folders are that this process has opened, and what another process has to know or to change."""

from __future__ import annotations

import os
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import multiprocess.reduction

if TYPE_CHECKING:
    from usdm_sft.units.tokenizer import UnitTokenizer

IMPORTED_IN = os.getpid()
_folders: dict[str, Path] = {}  # digest of a unit model -> its folder


def remember_folder(digest: str, folder: Path) -> None:
    """Remember where the unit model of `digest` is, for pickles that hold the digest alone."""
    _folders[digest] = folder


def recall_folder(digest: str) -> Path:
    """Return the folder of the unit model of `digest`.

    Raises:
        ValueError: This process has not opened the unit model.
    """
    if digest not in _folders:
        raise ValueError(
            f"this process has not opened the unit model of digest {digest}, and the pickle does not name its folder: "
            "call UnitTokenizer.from_pretrained(folder) first"
        )
    return _folders[digest]


def register_pickler(kind: type[UnitTokenizer]) -> None:
    """Let pickles for another process contain the path and the GPU, which no fingerprint may depend on."""
    # The picklers that start processes: torch's DataLoader and utils/processes.py use the first, `.map` the second.
    ForkingPickler.register(kind, _reduce)
    multiprocess.reduction.ForkingPickler.register(kind, _reduce)


def _reduce(tokenizer: UnitTokenizer) -> tuple[Any, ...]:
    more = {"folder": str(tokenizer.folder), "device": tokenizer.device}
    return _open, (type(tokenizer), tokenizer.__getstate__() | more)


def _open(kind: type[UnitTokenizer], state: dict[str, Any]) -> UnitTokenizer:
    tokenizer = kind.__new__(kind)
    tokenizer.__setstate__(state)
    return tokenizer


def is_forked(process: int, device: str) -> bool:
    """Return whether this process was forked from `process`, and prepare torch for it.

    Args:
        process: Id of the process that a tokenizer was last used in.
        device: Kind of device, "cpu" or "cuda".

    Raises:
        RuntimeError: The device is "cuda", whose state a fork breaks.
    """
    if os.getpid() == process:
        return False
    if device == "cuda":
        raise RuntimeError(
            "CUDA does not survive a fork: call multiprocess.set_start_method('spawn') before .map with num_proc"
        )
    import torch

    torch.set_num_threads(1)  # a forked process has no torch threads and would wait for them forever
    return True
