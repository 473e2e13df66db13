"""Calls of a function, divided into tasks: the files that the caller and a task exchange.

function.pickle         the function, and the working directory of the caller
items/00000.pickle      the items of task 0, one after the other
results/00000.pickle    the results of task 0, one after the other
results/00000.sha256    the digest of this file
completions/00000       datatrove's mark, written last
logs/, stats/           datatrove's
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from usdm_sft.utils.atomic import replace_text, write_then_replace
from usdm_sft.utils.hashes import sha256_file
from usdm_sft.utils.locks import file_lock


def write_function(folder: Path, function: Callable[[Any], Any]) -> None:
    """Write the function that all tasks of a stage call."""
    _write(folder / "function.pickle", [(function, os.getcwd())])


def enter(directory: str) -> None:
    """Enter the working directory of the caller, where relative paths start."""
    with suppress(OSError):  # machines may share the data but not this directory
        os.chdir(directory)


def write_items(folder: Path, rank: int, items: Iterable[Any]) -> None:
    """Write the items of a task."""
    _write(_items_file(folder, rank), items)


def run_calls(data: Any, rank: int, world_size: int, *, folder: str) -> None:
    """Call the function with each item of a task; datatrove calls this as the only step of its pipeline.

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
        enter(directory)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have tasks of their own
        results = _results_file(Path(folder), rank)
        _write(results, map(function, _read(_items_file(Path(folder), rank))))
        replace_text(results.with_suffix(".sha256"), sha256_file(results))


def find_results(folder: Path, rank: int, holds: Callable[[Any], bool] | None) -> bool:
    """Return True if a task has results that still hold; others are removed.

    Args:
        folder: Folder of the files of the stage.
        rank: Number of the task.
        holds: As in `Pool.map`.
    """
    try:
        with _lock(folder, rank).acquire(timeout=0):
            if _is_whole(folder, rank) and (holds is None or all(map(holds, read_results(folder, rank)))):
                return True
            _results_file(folder, rank).unlink(missing_ok=True)
    except Timeout:  # a task of another run makes them
        pass
    return False


def read_results(folder: Path, rank: int) -> Iterator[Any]:
    """Yield the results of a finished task, in the order of its items."""
    return _read(_results_file(folder, rank))


def _items_file(folder: Path, rank: int) -> Path:
    return folder / "items" / f"{rank:05d}.pickle"


def _results_file(folder: Path, rank: int) -> Path:
    return folder / "results" / f"{rank:05d}.pickle"


def _lock(folder: Path, rank: int) -> FileLock:
    """Return the lock of a task; the tasks of two runs take turns."""
    return file_lock(folder / "locks" / f"{rank:05d}")


def _is_whole(folder: Path, rank: int) -> bool:
    results = _results_file(folder, rank)
    digest = results.with_suffix(".sha256")
    return results.is_file() and digest.is_file() and sha256_file(results) == digest.read_text()


def _write(path: Path, values: Iterable[Any]) -> None:
    with write_then_replace(path, "wb") as file:
        for value in values:
            pickle.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> Iterator[Any]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < size:
            yield pickle.load(file)
