"""A `Pool` whose calls are made by the tasks of an executor.

The calls are divided into contiguous ranges, one task each. Function, items and results go through files of the cache, so that
a task of any machine can make its calls, and a later run finds the results of finished tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from usdm_sft.executors.calls import find_results, read_results, run_calls, write_function, write_items
from usdm_sft.executors.engine import Engine
from usdm_sft.utils.locks import file_lock


class TaskPool:
    """A `Pool` of tasks.

    Args:
        engine: Runs the tasks.
    """

    def __init__(self, engine: Engine):
        self._engine = engine

    def start(self, num_proc: int) -> None:
        """Do nothing: tasks start with their calls, and their number is that of the engine."""

    def map(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        name: str,
        keys: Sequence[str],
        holds: Callable[[Any], bool] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """As `Pool.map`. All tasks have ended before the first result; results come in the order of the items."""
        if not items:
            return
        stage = self._engine.open_stage(len(items), name, *keys)
        with file_lock(stage.folder / "locks" / "plan"):
            write_function(stage.folder, function)
            for rank, indices in enumerate(stage.ranges):
                if find_results(stage.folder, rank, holds):
                    stage.mark(rank)
                else:
                    stage.unmark(rank)
                    write_items(stage.folder, rank, (items[index] for index in indices))
        self._engine.run(stage, run_calls)
        for rank, indices in enumerate(stage.ranges):
            yield from zip(indices, read_results(stage.folder, rank), strict=True)
