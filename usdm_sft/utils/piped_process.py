"""A spawned process with a pipe of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from usdm_sft.utils.processes import process_died, start_process

T = TypeVar("T")


class PipedProcess:
    """A process at the other end of a pipe of its own, which serves one thread at a time.

    Processes share neither a queue nor a lock: when one is killed, its own pipe ends, and no other process is held up.

    Args:
        target: Called in the process with the other end of the pipe and `args`, as in `start_process`.
        args: Further arguments.
        name: Name of the process in errors.
    """

    def __init__(self, target: Callable[..., object], args: tuple[Any, ...], *, name: str):
        self._name = name
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        with theirs:
            self._process = start_process(_use_pipe, (target, theirs, *args), name=name)

    def call(self, function: Callable[[Connection], T]) -> T:
        """Return what `function` makes of this end of the pipe.

        Raises:
            RuntimeError: The process died.
        """
        try:
            return function(self._connection)
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise process_died(self._name, self._process.exitcode) from error
        except Exception:  # raised again; the next call must not find the rest of an answer
            self._process.terminate()
            raise

    def terminate(self) -> None:
        """End the process. A thread that waits for it gets the RuntimeError."""
        self._process.terminate()

    def close(self) -> None:
        """End the process and close the pipe, which no thread may use then."""
        self._process.terminate()
        self._process.join()
        self._connection.close()


def _use_pipe(target: Callable[..., object], connection: Connection, *args: Any) -> None:
    with suppress(EOFError, ConnectionError):  # the parent has closed its end
        target(connection, *args)
