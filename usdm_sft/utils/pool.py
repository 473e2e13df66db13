"""The interface of what shares out the calls of a function: the processes of this machine, or the tasks of an executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Submission:
    """A stage whose unfinished tasks Slurm runs. As a string, a sentence on it.

    Attributes:
        stage: Name of the work, such as "units".
        num_submitted: Number of its tasks that were submitted.
        num_tasks: Number of its tasks.
        job_id: The job that runs them; the last one if they are more than an array may have.
        logs: Folder of their logs.
        next_job_id: The job that goes on with the run after them, if any.
    """

    stage: str
    num_submitted: int
    num_tasks: int
    job_id: str
    logs: str
    next_job_id: str | None = None

    def __str__(self) -> str:
        sentence = (
            f"{self.num_submitted} of {self.num_tasks} tasks ({self.stage}) were submitted to Slurm (job {self.job_id}; "
            f"logs in {self.logs})"
        )
        if self.next_job_id is None:
            return sentence
        return f"{sentence}; job {self.next_job_id} goes on with the run after them"


class Submitted(Exception):
    """Leaves the stages of a run because Slurm makes one of them; `prepare` returns its only argument, a `Submission`."""


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
        is_valid: Callable[[Any], bool] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Call a function with each item.

        Args:
            function: A function of an importable module, a `partial` of one, or an object with `__call__`. It is pickled.
            items: The items, which are pickled one by one.
            name: Name of the work, in the plural.
            keys: A key for each item, such as the sha256 of all that decides the result. Tasks that an earlier run finished are
                found by these keys.
            is_valid: Returns True if the result that an earlier run left still holds, such as whether its file is still there. By
                default each result does.

        Yields:
            The index and the result of each item, in any order.

        Raises:
            Submitted: Slurm makes the calls. The same call gives the results when its job has ended.
            RuntimeError: A process died, or tasks failed.
            Exception: The error of a call. The pool must not be used again then.
        """
        ...
