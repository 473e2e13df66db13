"""Freed memory that goes back to the operating system, so that a long run does not keep the most that each stage took."""

from __future__ import annotations

import ctypes
import os
import sys


def use_system_allocator() -> None:
    """Let Arrow use the allocator of the system, before it is imported; mimalloc, its own default, keeps what was freed."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


def give_back_memory() -> None:
    """Give freed memory back to the operating system. Only glibc keeps it; elsewhere this does nothing."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
