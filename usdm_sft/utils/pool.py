"""The interface of what shares out the calls of a function: the processes of this machine, or the tasks of an executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol


class Submitted(Exception):
    """Slurm makes a stage; its jobs go on with the run. This is not an error."""


class Pool(Protocol):
    """Shares out the calls of a function. Results do not depend on where the calls are made."""

    def start(self, num_proc: int) -> None:
        """Start processes ahead of the calls, and no more than this number from now on, because more would not pay.

        Tasks are not affected.
        """

    def map(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        name: str,
        keys: Sequence[str],
        holds: Callable[[Any], bool] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Call a function with each item.

        Args:
            function: A function of an importable module, a `partial` of one, or an object with `__call__`. It is pickled.
            items: Made, if they are a `Lazily`, and pickled one by one.
            name: Name of the work, in the plural.
            keys: A key for each item, such as the sha256 of all that decides the result. Tasks that an earlier run finished are
                found by these keys.
            holds: Returns True if the result that an earlier run left still holds, such as whether its file is still there. By
                default each result does.

        Yields:
            The index and the result of each item, in any order.

        Raises:
            Submitted: Slurm makes the calls. The same call gives the results when its job has ended.
            RuntimeError: A process died, or tasks failed.
            Exception: The error of a call. The pool must not be used again then.
        """
        ...
