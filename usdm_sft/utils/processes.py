"""Spawned processes that do not import the calling script and ignore its Ctrl-C, each with a pipe of its own, and a pool of them."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from types import ModuleType
from typing import Any, TypeVar, cast

from tqdm import tqdm

from usdm_sft.utils.forks import renew_after_fork

T = TypeVar("T")

_AHEAD = 2  # items that each process has, so that it need not wait for this one

_lock = threading.Lock()  # only one thread at a time may replace __main__
renew_after_fork(sys.modules[__name__], "_lock")


def start_process(target: Callable[..., object], args: tuple[Any, ...], *, name: str | None = None) -> SpawnProcess:
    """Start a spawned process that ends with this one.

    A spawned process imports the file of `__main__`, so that a script without `if __name__ == "__main__":` would run again there.
    An empty module takes its place here: it has no file to import. Ctrl-C goes to the whole process group. If the new process
    set a handler itself, a Ctrl-C during its imports would still end it with a traceback; it inherits a block of the signal.

    Args:
        target: A function of an importable module.
        args: Its arguments, which are pickled. They must not contain objects that the calling script defines.
        name: Name of the process.

    Returns:
        The started process. It is a daemon with SIGINT blocked, so this process must end it.
    """
    process = multiprocessing.get_context("spawn").Process(target=_call, args=(target, args), name=name, daemon=True)
    with _lock, ExitStack() as undo:
        undo.callback(sys.modules.__setitem__, "__main__", sys.modules["__main__"])
        sys.modules["__main__"] = ModuleType("__main__")
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            resource_tracker.ensure_running()  # started later, it would unblock SIGINT in this thread
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            undo.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        process.start()
    return process


def _call(target: Callable[..., object], args: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a spawned process

    def exit_with_parent() -> None:
        """End this process when its parent is killed, even while it waits for the other half of a message."""
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    # A daemon may not start processes, because they would outlive it when it is terminated. Those of this module do not.
    multiprocessing.current_process().daemon = False
    # tqdm's default lock contains a multiprocessing semaphore. A terminated process leaks it, and Python warns on stderr.
    tqdm.set_lock(threading.RLock())
    target(*args)


class PipedProcess:
    """A process at the other end of a pipe of its own, which serves one thread at a time.

    Processes share neither a queue nor a lock: when one is killed, its own pipe ends, and no other process is held up.

    Args:
        target: As in `start_process`; it is called with the other end of the pipe and with `args`.
        args: Further arguments.
        name: Name of the process in errors; it may be changed.
    """

    def __init__(self, target: Callable[..., object], args: tuple[Any, ...], *, name: str):
        self.name = name
        self.connection, theirs = multiprocessing.get_context("spawn").Pipe()
        with theirs:
            self._process = start_process(_use_pipe, (target, theirs, *args), name=name)

    def call(self, function: Callable[[Connection], T]) -> T:
        """Return what `function` makes of this end of the pipe.

        Args:
            function: Called with the connection; its OSError is one of the pipe.

        Raises:
            RuntimeError: The process died.
        """
        try:
            return function(self.connection)
        except (EOFError, OSError) as error:  # OSError: it died within a message
            self._process.join()
            raise RuntimeError(
                f"a process died ({self.name}, exit code {self._process.exitcode}): start the run again; finished work "
                "shards are kept"
            ) from error
        except Exception:  # raised again; the next call must not find the rest of an answer
            self._process.terminate()
            raise

    def send(self, value: Any) -> None:
        """Pickle a value and send it. Raises the RuntimeError of `call`."""
        pickled = pickle.dumps(value)  # an error of this is not one of the pipe
        self.call(lambda connection: connection.send_bytes(pickled))

    def terminate(self) -> None:
        """End the process. A thread that waits for it gets the RuntimeError."""
        self._process.terminate()

    def close(self) -> None:
        """End the process and close the pipe, which no thread may use then."""
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _use_pipe(target: Callable[..., object], connection: Connection, *args: Any) -> None:
    with suppress(EOFError, ConnectionError):  # the parent has closed its end
        target(connection, *args)


def serve(connection: Connection, stream: Callable[..., Iterator[Any]], *args: Any) -> None:
    """Answer items with the results of a stream; the target of the processes of `share_out`.

    A thread empties the pipe: if both ends waited until the other one reads, they would wait forever.

    Args:
        connection: This end of the pipe.
        stream: Called with a queue of pickled items and with `args`; yields a result for each item, in any order.
        args: Further arguments.
    """
    items: SimpleQueue[bytes] = SimpleQueue()

    def receive() -> None:
        with suppress(EOFError, OSError):  # the parent has closed its end, and ends this process
            while True:
                items.put(connection.recv_bytes())

    threading.Thread(target=receive, daemon=True).start()
    try:
        for result in stream(items, *args):
            connection.send((result, None))
    except Exception as error:  # raised again in the parent
        connection.send((None, sendable(error)))


def share_out(
    items: Iterable[Any],
    processes: Sequence[PipedProcess],
    *,
    ahead: int,
    here: Callable[[Any], Any] | None = None,
) -> Iterator[Any]:
    """Send items to processes that run `serve`, and yield their results as they come.

    Args:
        items: The items. None follows the last one in each process, so that a stream can finish what it has begun.
        processes: The processes.
        ahead: Largest number of items that a process has at a time.
        here: Makes the result of an item in this process, while the others have enough to do.

    Raises:
        RuntimeError: A process died.
        Exception: The error of a process.
    """
    unanswered = dict.fromkeys(processes, 0)
    left, are_told = deque(items), False
    while left or any(unanswered.values()):
        while left and min(unanswered.values(), default=ahead) < ahead:
            process = min(unanswered, key=unanswered.__getitem__)
            process.send(left.popleft())
            unanswered[process] += 1
        timeout = None
        if left and here is not None:
            yield here(left.popleft())
            timeout = 0
        if not left and not are_told:
            for process in processes:
                process.send(None)
            are_told = True
        connections = {process.connection: process for process, number in unanswered.items() if number}
        for connection in wait(list(connections), timeout):
            process = connections[cast(Connection, connection)]
            result, error = pickle.loads(process.call(Connection.recv_bytes))
            if error is not None:
                raise error
            unanswered[process] -= 1
            yield result


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
        self._processes: list[PipedProcess] = []

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.close()

    def start(self, num_proc: int) -> None:
        """Start processes ahead of the calls, and no more than this number from now on, because more would not pay."""
        self._num_proc = min(self._num_proc, num_proc)
        self._start(self._num_proc)

    def _start(self, num_proc: int) -> None:
        for number in range(len(self._processes) + 1, num_proc):
            self._processes.append(PipedProcess(serve, (_make_calls, self._modules), name=f"process {number}"))

    def map(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        name: str,
        keys: Sequence[str] = (),
        is_valid: Callable[[Any], bool] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """As `Pool.map`. The results of earlier runs are not looked for, so that `keys` and `is_valid` are unused.

        The function is pickled once for each process. Results come in the order in which they are finished.
        """
        num_proc = min(self._num_proc, len(items))
        self._start(num_proc)
        processes = self._processes if num_proc > 1 else []
        for number, process in enumerate(processes, start=1):
            process.name = f"{name}, process {number}"
            process.send(function)
        yield from share_out(enumerate(items), processes, ahead=_AHEAD, here=partial(_call_with, function))


def _call_with(function: Callable[[Any], Any], indexed: tuple[int, Any]) -> tuple[int, Any]:
    index, item = indexed
    return index, function(item)


def _make_calls(items: SimpleQueue[bytes], modules: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Make the calls of a `ProcessPool`: a function comes, the items that it is called with, and None."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own
    left = list(modules)

    def receive() -> Any:
        while left and items.empty():
            importlib.import_module(left.pop(0))
        return pickle.loads(items.get())

    while True:
        function = receive()
        for indexed in iter(receive, None):
            yield _call_with(function, indexed)


def in_order(results: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield the results of `ProcessPool.map` in the order of the items; only results that wait for an earlier one are kept."""
    waiting: dict[int, Any] = {}
    following = 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


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
