"""Where the unit model folders are that this process has opened, and what a forked process has to change."""

from __future__ import annotations

import os
from pathlib import Path

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
