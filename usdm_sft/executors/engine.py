"""The engine of a run: it divides the work of each stage into tasks, and has Ray or Slurm run them.

A task is a contiguous range of all the work of a stage, not of the missing part, so that a completion mark means the same in
every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from usdm_sft.executors.extras import LocalPipelineExecutor
from usdm_sft.executors.launchers import Step, ray_session, run_on_ray
from usdm_sft.executors.slurm import submit
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.pool import Submitted

_NUM_NAMED = 10  # failed tasks that an error lists


class Stage:
    """The tasks of a stage, and datatrove's marks of those that are finished.

    Args:
        folder: Folder of the task files, marks and logs.
        name: Name of the work, in the plural.
        ranges: The range of the work of each task.
    """

    def __init__(self, folder: Path, name: str, ranges: Sequence[range]):
        self.folder, self.name, self.ranges = folder, name, ranges
        self._marks = LocalPipelineExecutor([], tasks=len(ranges), logging_dir=str(folder))

    def mark(self, rank: int) -> None:
        """Mark a task as finished."""
        self._marks.mark_rank_as_completed(rank)

    def unmark(self, rank: int) -> None:
        """Remove the mark of a task."""
        (self.folder / "completions" / f"{rank:05d}").unlink(missing_ok=True)

    def unfinished(self) -> list[int]:
        """Return the numbers of the tasks without a mark."""
        ranks: list[int] = self._marks.get_incomplete_ranks()
        return ranks


class Engine:
    """Runs the tasks of the stages. A context manager, which ends the Ray cluster that it started.

    Args:
        executor: ray or slurm.
        tasks: Number of tasks of a stage, at most one for each piece of its work.
        cache: Folder of the cache, which all machines see under this path.
        slurm: Options of datatrove's SlurmPipelineExecutor.
        go_on: What a job of Slurm does when the tasks of a stage have ended: a step of datatrove's pipeline.
    """

    def __init__(
        self,
        executor: str,
        tasks: int,
        cache: Path,
        *,
        slurm: Mapping[str, Any] | None = None,
        go_on: Callable[..., None] | None = None,
    ):
        self.executor, self.tasks, self.cache = executor, tasks, cache.resolve()
        self._slurm, self._go_on = slurm or {}, go_on
        self._session = ExitStack()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()

    def open_stage(self, num_pieces: int, name: str, *keys: Any) -> Stage:
        """Divide the work of a stage.

        Args:
            num_pieces: Number of pieces of work.
            name: Name of the work.
            keys: JSON values that identify the work; the files of the stage lie in a folder of the cache that follows from them.
        """
        tasks = min(self.tasks, num_pieces)
        ranges = [range(rank * num_pieces // tasks, (rank + 1) * num_pieces // tasks) for rank in range(tasks)]
        return Stage(self.cache / "executor" / cache_key(name, keys, tasks), name, ranges)

    def run(self, stage: Stage, step: Step, *, device: str | None = None) -> None:
        """Run the unfinished tasks of a stage.

        Args:
            stage: The stage; the files of its tasks are written.
            step: What a task does.
            device: The kind of device of each task, "cuda" or "cpu"; by default one core.

        Raises:
            Submitted: Slurm runs the tasks.
            RuntimeError: Tasks or sbatch failed.
        """
        if not (ranks := stage.unfinished()):
            return
        tasks = len(stage.ranges)
        if self.executor == "slurm":
            raise Submitted(submit(step, stage.folder, stage.name, tasks, ranks, device, self._slurm, self._go_on))
        self._session.enter_context(ray_session())  # stays open for the next stage
        failed = run_on_ray(step, stage.folder, tasks, ranks, device or "cpu")
        # A missing mark alone is no failure: another run that plans the same stage may just have removed it.
        if failed := sorted({*failed} & {*stage.unfinished()}):
            names = ", ".join(map(str, failed[:_NUM_NAMED])) + (", ..." if len(failed) > _NUM_NAMED else "")
            raise RuntimeError(
                f"{len(failed)} of {tasks} tasks failed ({names}): see {stage.folder / 'logs'}; start the run again, "
                "finished work shards are kept"
            )
