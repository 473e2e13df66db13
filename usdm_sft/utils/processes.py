"""Spawned processes that do not import the calling script and ignore its Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any

from tqdm import tqdm

_lock = threading.Lock()  # only one thread at a time may replace __main__


def start_process(target: Callable[..., object], args: tuple[Any, ...], *, name: str | None = None) -> SpawnProcess:
    """Start a spawned process that ends with this one.

    Args:
        target: A function of an importable module.
        args: Its arguments, which are pickled. They must not contain objects that the calling script defines.
        name: Name of the process.

    Returns:
        The started process. It is a daemon with SIGINT blocked, so this process must end it.
    """
    process = multiprocessing.get_context("spawn").Process(target=_call, args=(target, args), name=name, daemon=True)
    with _lock, _main_hidden(), _interrupts_blocked():
        process.start()
    return process


def _call(target: Callable[..., object], args: tuple[Any, ...]) -> None:
    # tqdm's default lock contains a multiprocessing semaphore. A terminated process leaks it, and Python warns on stderr.
    tqdm.set_lock(threading.RLock())
    target(*args)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Replace `__main__` with an empty module.

    A spawned process imports the file of `__main__`. A script without `if __name__ == "__main__":` would run again there.
    An empty module has no file to import.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in this thread; a process that starts meanwhile inherits the block.

    Ctrl-C goes to the whole process group. If the new process set a handler itself, a Ctrl-C during its imports would still
    end it with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # started later, it would unblock SIGINT in this thread
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
