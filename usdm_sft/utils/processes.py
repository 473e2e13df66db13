"""Spawned processes that neither import the caller's script nor answer to its Ctrl-C."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from types import ModuleType

from tqdm import tqdm

_lock = threading.Lock()  # __main__ and its stand-in must not be swapped by two threads at once


def start_process(target: Callable, args: tuple, *, name: str | None = None) -> SpawnProcess:
    """Start a spawned process that ends with this one.

    Args:
        target: A function of an importable module.
        args: Its arguments; nothing of the caller's script can be pickled among them.
        name: Name of the process.

    Returns:
        The started process. It is a daemon, and SIGINT is blocked in it: the process that started it ends it.
    """
    process = multiprocessing.get_context("spawn").Process(target=_call, args=(target, args), name=name, daemon=True)
    with _lock, _main_hidden(), _interrupts_blocked():
        process.start()
    return process


def _call(target: Callable, args: tuple) -> None:
    # The default lock of tqdm holds a semaphore of multiprocessing. A process that is terminated leaves it behind, and
    # Python warns of that on stderr.
    tqdm.set_lock(threading.RLock())
    target(*args)


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Put an empty module in the place of `__main__`.

    A spawned process imports the file of `__main__`, and a script without `if __name__ == "__main__":` would start its work
    again there. An empty module has no file, so that nothing is imported.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in this thread; a process started meanwhile keeps it blocked from its first instruction on.

    Ctrl-C goes to the whole process group. A handler set by the process itself would come too late for a Ctrl-C during its imports.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # where it starts later, it unblocks SIGINT in this thread
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
