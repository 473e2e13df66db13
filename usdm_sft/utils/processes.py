"""Spawned processes that do not import the calling script and ignore its Ctrl-C, alone or in a pool."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any

from tqdm import tqdm

POLL_SECONDS = 1.0
_AHEAD = 2  # items that wait for each process, so that it need not wait for this one

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
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # A daemon may not start processes, because they would outlive it when it is terminated. Those of this module do not.
    multiprocessing.current_process().daemon = False
    # tqdm's default lock contains a multiprocessing semaphore. A terminated process leaks it, and Python warns on stderr.
    tqdm.set_lock(threading.RLock())
    target(*args)


def _exit_with_parent() -> None:
    """End this process when its parent is killed, even while it waits for the other half of a message."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a spawned process
    parent.join()
    os._exit(1)


def process_died(name: str, exit_code: int | None) -> RuntimeError:
    """Return the error for a process that died."""
    return RuntimeError(
        f"a process died ({name}, exit code {exit_code}): start the run again; finished work shards are kept"
    )


class ProcessPool:
    """A `Pool` of this process and others on this machine.

    The others start when `map` first needs them and end with the `with` block. Until they have imported what they need, this
    process makes the calls.

    Args:
        num_proc: Number of processes, this one included; with one or none, it makes all calls.
        modules: Modules that a process imports as soon as it has nothing else to do.
    """

    def __init__(self, num_proc: int, modules: Sequence[str] = ()):
        self._num_proc = num_proc
        self._modules = tuple(modules)
        context = multiprocessing.get_context("spawn")
        self._waiting: Any = context.Queue()
        self._done: Any = context.Queue()
        self._processes: dict[str, SpawnProcess] = {}

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting.cancel_join_thread()
        for process in self._processes.values():
            process.terminate()
            process.join()

    def start(self, num_proc: int) -> None:
        """Start processes ahead of the calls, and no more than this number from now on, because more would not pay."""
        self._num_proc = min(self._num_proc, num_proc)
        self._start(self._num_proc)

    def _start(self, num_proc: int) -> None:
        for number in range(len(self._processes), num_proc - 1):
            name = f"process {number + 1}"
            args = (self._waiting, self._done, self._modules)
            self._processes[name] = start_process(_serve, args, name=name)

    def map(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        name: str,
        keys: Sequence[str] = (),
        holds: Callable[[Any], bool] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """As `Pool.map`. The results of earlier runs are not looked for, so that `keys` and `holds` are unused.

        The function is pickled once, and unpickled once in each process; items are sent a few at a time. Results come in the
        order in which they are finished.
        """
        num_proc = min(self._num_proc, len(items))
        self._start(num_proc)
        processes = {f"{name}, {key}": each for key, each in self._processes.items()} if num_proc > 1 else {}
        pickled = pickle.dumps(function) if processes else b""
        following = num_sent = 0  # the next item, and items without a result in the processes
        while following < len(items):
            while following < len(items) and num_sent < _AHEAD * len(processes):
                self._waiting.put((following, pickled, pickle.dumps(items[following])))
                following, num_sent = following + 1, num_sent + 1
            if following < len(items):
                yield following, function(items[following])
                following += 1
            _check_alive({key: process.exitcode for key, process in processes.items()})
            while num_sent and not self._done.empty():
                yield from receive(self._done, processes, 1)
                num_sent -= 1
        yield from receive(self._done, processes, num_sent)


def in_order(results: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield the results of `ProcessPool.map` in the order of the items; only results that wait for an earlier one are kept."""
    waiting: dict[int, Any] = {}
    following = 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


def _serve(waiting: Any, done: Any, modules: Sequence[str]) -> None:
    """Make the calls of a `ProcessPool` until the parent ends this process, or itself ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    ahead = list(modules)
    while True:
        if ahead and waiting.empty():
            importlib.import_module(ahead.pop(0))
            continue
        index, function, item = waiting.get()
        try:
            done.put((index, _unpickle(function)(pickle.loads(item))))
        except Exception as error:  # raised again in the parent
            done.put(sendable(error))


@lru_cache(maxsize=1)
def _unpickle(function: bytes) -> Callable[[Any], Any]:
    unpickled: Callable[[Any], Any] = pickle.loads(function)
    return unpickled


def receive(done: Any, processes: Mapping[str, Any], number: int) -> Iterator[Any]:
    """Yield `number` results from a queue. Raises the error that a process sent, or one that names a process that died."""
    while number:
        # Taken before the queue is read: a process that has ended by now has nothing more to send.
        exit_codes = {name: process.exitcode for name, process in processes.items()}
        try:
            outcome = done.get(timeout=POLL_SECONDS)
        except queue.Empty:
            _check_alive(exit_codes)
            continue
        if isinstance(outcome, BaseException):
            raise outcome
        number -= 1
        yield outcome


def _check_alive(exit_codes: Mapping[str, int | None]) -> None:
    for name, exit_code in exit_codes.items():
        if exit_code not in (None, 0):
            raise process_died(name, exit_code)
    if exit_codes and all(exit_code == 0 for exit_code in exit_codes.values()):
        raise RuntimeError("the processes ended before their work was done: start the run again")


def sendable(error: Exception) -> Exception:
    """Return the error itself if it survives pickling, else a RuntimeError with its text.

    The traceback is added as a note, which Python prints only where it prints the traceback of the parent.
    """
    sent: Exception
    try:
        sent = pickle.loads(pickle.dumps(error))
    except Exception:  # code of any library runs here: pickling calls the class of the error, which may raise anything
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note("In the process:\n" + "".join(traceback.format_exception(error)))
    return sent


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
