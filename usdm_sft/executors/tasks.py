"""The work of a stage, divided into tasks that Ray or Slurm runs, and the files that the caller and a task exchange.

A task is a contiguous range of all the work of a stage, not of the missing part, so that a completion mark means the same in
every run. Function, items and results go through files of the cache, so that a task of any machine can do its work, and a later run
finds the results of finished tasks. The folder of a stage has

function.pickle         the function, and the working directory of the caller
items/00000.pickle      the items of task 0, one after the other
results/00000.pickle    the results of task 0, one after the other
results/00000.sha256    the digest of this file
locks/00000             held while task 0 runs, so that the tasks of two runs take turns
completions/00000       datatrove's mark, written last
logs/, stats/           datatrove's
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from usdm_sft.executors import LocalPipelineExecutor
from usdm_sft.executors.ray_tasks import ray_session, run_on_ray
from usdm_sft.executors.slurm import submit
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.files import replace_text, sha256_file, write_then_replace
from usdm_sft.utils.locks import file_lock
from usdm_sft.utils.pool import Submitted

TaskFunction = Callable[[Iterator[Any], int], Iterator[Any]]  # of the items of a task and its number

_NUM_NAMED = 10  # failed tasks that an error lists
_FORMAT = 3  # of items and results, whose classes are pickled by name; those of other versions are not found


class TaskPool:
    """A `Pool` of tasks. A context manager, which ends the Ray cluster that it started.

    Args:
        executor: ray or slurm.
        tasks: Number of tasks of a stage, at most one for each item.
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
        self.cache = cache.resolve()
        self._executor, self._tasks = executor, tasks
        self._slurm, self._go_on = slurm or {}, go_on
        self._session = ExitStack()

    def __enter__(self) -> TaskPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()

    def start(self, num_proc: int) -> None:
        """Do nothing: tasks start with their work."""

    def map(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        name: str,
        keys: Sequence[str],
        is_valid: Callable[[Any], bool] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """As `Pool.map`. All tasks have ended before the first result; results come in the order of the items."""
        if not items:
            return

        def is_finished(folder: Path, rank: int, indices: range) -> bool:
            return _is_whole(folder, rank) and (is_valid is None or all(map(is_valid, read_results(folder, rank))))

        folder, ranges = self.run(partial(_call_each, function), items, name=name, keys=keys, is_finished=is_finished)
        for rank, indices in enumerate(ranges):
            yield from zip(indices, read_results(folder, rank), strict=True)

    def run(
        self,
        function: TaskFunction,
        items: Sequence[Any],
        *,
        name: str,
        keys: Sequence[str],
        is_finished: Callable[[Path, int, range], bool],
        device: str | None = None,
    ) -> tuple[Path, list[range]]:
        """Run the unfinished tasks of a stage.

        Args:
            function: Called with the items of a task and its number; yields the results. It is pickled.
            items: The items, which are pickled.
            name: Name of the work, in the plural.
            keys: A key for each item; the folder of the stage follows from them.
            is_finished: Called with the folder, the number of a task and the indices of its items, while nobody else makes the task.
            device: The kind of device of each task, "cuda" or "cpu"; by default one core.

        Returns:
            The folder of the stage, and the indices of the items of each task.

        Raises:
            Submitted: Slurm runs the tasks.
            RuntimeError: Tasks or sbatch failed.
        """
        tasks = min(self._tasks, len(items))
        ranges = [range(rank * len(items) // tasks, (rank + 1) * len(items) // tasks) for rank in range(tasks)]
        folder = self.cache / "executor" / cache_key(_FORMAT, name, tuple(keys), tasks)
        marks = LocalPipelineExecutor([], tasks=tasks, logging_dir=str(folder))
        with file_lock(folder / "locks" / "plan"):
            _write(folder / "function.pickle", [(function, os.getcwd())])
            for rank, indices in enumerate(ranges):
                with suppress(Timeout), _lock(folder, rank).acquire(timeout=0):  # else a task of another run makes it
                    if is_finished(folder, rank, indices):
                        marks.mark_rank_as_completed(rank)
                        continue
                    _results_file(folder, rank).unlink(missing_ok=True)
                (folder / "completions" / f"{rank:05d}").unlink(missing_ok=True)
                _write(_items_file(folder, rank), (items[index] for index in indices))
        if not (ranks := marks.get_incomplete_ranks()):
            return folder, ranges
        step = partial(run_task, folder=str(folder))
        if self._executor == "slurm":
            raise Submitted(submit(step, folder, name, tasks, ranks, device, self._slurm, self._go_on))
        self._session.enter_context(ray_session())  # stays open for the next stage
        failed = run_on_ray(step, folder, tasks, ranks, device or "cpu")
        # A missing mark alone is no failure: another run that plans the same stage may just have removed it.
        if failed := sorted({*failed} & {*marks.get_incomplete_ranks()}):
            names = ", ".join(map(str, failed[:_NUM_NAMED])) + (", ..." if len(failed) > _NUM_NAMED else "")
            raise RuntimeError(
                f"{len(failed)} of {tasks} tasks failed ({names}): see {folder / 'logs'}; start the run again, "
                "finished work shards are kept"
            )
        return folder, ranges


def _call_each(function: Callable[[Any], Any], items: Iterator[Any], rank: int) -> Iterator[Any]:
    return map(function, items)


def run_task(data: Any, rank: int, world_size: int, *, folder: str) -> None:
    """Do the work of one task; datatrove calls this as the only step of its pipeline.

    Args:
        data: Output of an earlier step; unused.
        rank: Number of the task.
        world_size: Number of all tasks; unused.
        folder: Folder of the files of the stage.
    """
    with _lock(Path(folder), rank):
        if _is_whole(Path(folder), rank):  # another run made them
            return
        ((function, directory),) = _read(Path(folder, "function.pickle"))
        with suppress(OSError):  # machines may share the data but not this directory
            os.chdir(directory)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have tasks of their own
        results = _results_file(Path(folder), rank)
        _write(results, function(_read(_items_file(Path(folder), rank)), rank))
        replace_text(results.with_suffix(".sha256"), sha256_file(results))


def read_results(folder: Path, rank: int) -> Iterator[Any]:
    """Yield the results of a finished task, in the order of its items."""
    return _read(_results_file(folder, rank))


def _items_file(folder: Path, rank: int) -> Path:
    return folder / "items" / f"{rank:05d}.pickle"


def _results_file(folder: Path, rank: int) -> Path:
    return folder / "results" / f"{rank:05d}.pickle"


def _lock(folder: Path, rank: int) -> FileLock:
    return file_lock(folder / "locks" / f"{rank:05d}")


def _is_whole(folder: Path, rank: int) -> bool:
    results = _results_file(folder, rank)
    digest = results.with_suffix(".sha256")
    return results.is_file() and digest.is_file() and sha256_file(results) == digest.read_text()


def _write(path: Path, values: Iterable[Any]) -> None:
    with write_then_replace(path, "wb") as file:
        for value in values:
            pickle.dump(value, file)


def _read(path: Path) -> Iterator[Any]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < size:
            yield pickle.load(file)
