"""A pool whose calls are made by tasks, which run in this process here."""

import hashlib
import operator
import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from filelock import Timeout

from tests.helpers import run_task_here, run_tasks_here
from usdm_sft.executors import tasks as executor_tasks
from usdm_sft.executors.tasks import TaskPool, read_results
from usdm_sft.utils.locks import file_lock

made = []  # the items that a task dealt with


def double(item):
    made.append(item)
    return 2 * item


def write(path):
    Path(path).write_text("content")
    return path


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Run the tasks in this process; return their numbers."""
    made.clear()
    return run_tasks_here(monkeypatch)


def pool(folder, tasks=3):
    return TaskPool("ray", tasks, folder)


def call(folder, items, *, function=double, is_valid=None, tasks=3):
    keys = [str(item) for item in items]
    return list(pool(folder, tasks).map(function, items, name="doubles", keys=keys, is_valid=is_valid))


def test_calls_are_divided_into_contiguous_ranges(tmp_path, here):
    assert call(tmp_path, range(8)) == [(index, 2 * index) for index in range(8)]
    assert here == [0, 1, 2]
    (folder,) = tmp_path.glob("executor/*")
    assert [list(read_results(folder, rank)) for rank in range(3)] == [[0, 2], [4, 6, 8], [10, 12, 14]]
    assert call(tmp_path, []) == []
    assert call(tmp_path, [5, 6]) == [(0, 10), (1, 12)]  # no task without work
    assert here[3:] == [0, 1]


def test_results_of_an_earlier_run_are_found_by_their_keys(tmp_path, here):
    call(tmp_path, range(8))
    assert call(tmp_path, range(8)) == [(index, 2 * index) for index in range(8)]
    assert made == list(range(8))
    call(tmp_path, range(9))
    assert made == [*range(8), *range(9)]


def test_failed_task_is_reported_and_finished_tasks_are_kept(tmp_path, monkeypatch):
    def fail(step, folder, tasks, rank):
        return rank != 1 and run_task_here(step, folder, tasks, rank)

    with monkeypatch.context() as patch:
        run_tasks_here(patch, fail)
        with pytest.raises(RuntimeError, match=r"1 of 3 tasks failed \(1\): see .*logs; start the run again"):
            call(tmp_path, range(6))
    assert call(tmp_path, range(6)) == [(index, 2 * index) for index in range(6)]
    assert made == [0, 1, 4, 5, 2, 3]


@pytest.mark.parametrize("damage", ["results", "digest", "vanished result", "result that does not hold"])
def test_results_that_are_damaged_or_do_not_hold_are_made_again(tmp_path, here, damage):
    files = [str(tmp_path / name) for name in "abc"]
    expected = list(enumerate(files))
    assert call(tmp_path / "cache", files, function=write, is_valid=os.path.exists) == expected
    (results,) = tmp_path.glob("cache/executor/*/results/00001.pickle")
    if damage == "results":
        content = results.read_bytes()
        results.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "digest":
        results.with_suffix(".sha256").unlink()
    elif damage == "vanished result":
        results.unlink()
    else:
        os.unlink(files[1])
    assert call(tmp_path / "cache", files, function=write, is_valid=os.path.exists) == expected
    assert here == [0, 1, 2, 1]
    assert all(map(os.path.exists, files))
    digest = results.with_suffix(".sha256").read_text()
    assert digest == hashlib.sha256(results.read_bytes()).hexdigest()


def test_task_that_another_run_makes_is_waited_for(tmp_path):
    """Its lock is held while this run plans, so that the results are not touched, and the task then finds them."""
    call(tmp_path, [1], tasks=1)
    (folder,) = tmp_path.glob("executor/*")
    results = folder / "results" / "00000.pickle"
    before = results.stat().st_mtime_ns
    lock = executor_tasks._lock(folder, 0)
    lock.acquire()
    run = threading.Thread(target=call, args=(tmp_path, [1]), kwargs={"tasks": 1})
    run.start()
    deadline = time.monotonic() + 60
    while (folder / "completions" / "00000").exists():  # until it has planned
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.join(0.3)
    assert run.is_alive()
    lock.release()
    run.join(60)
    assert not run.is_alive()
    assert made == [1]
    assert results.stat().st_mtime_ns == before


def test_task_whose_mark_another_run_removes_has_not_failed(tmp_path, monkeypatch):
    def run_and_remove_the_mark(step, folder, tasks, rank):
        run_task_here(step, folder, tasks, rank)
        (folder / "completions" / f"{rank:05d}").unlink()

    run_tasks_here(monkeypatch, run_and_remove_the_mark)
    assert call(tmp_path, [1, 2]) == [(0, 2), (1, 4)]


def test_only_one_run_at_a_time_plans(tmp_path):
    excluded = []

    def is_finished(folder, rank, indices):
        for lock in ("plan", f"{rank:05d}"):
            with pytest.raises(Timeout):
                file_lock(folder / "locks" / lock).acquire(timeout=0)
        excluded.append((rank, indices))
        return True

    pool(tmp_path, tasks=2).run(None, [1, 2, 3], name="units", keys=["a", "b", "c"], is_finished=is_finished)
    assert excluded == [(0, range(1)), (1, range(1, 3))]


def test_relative_paths_start_where_the_caller_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run_elsewhere(*task):
        monkeypatch.chdir("/")
        run_task_here(*task)

    run_tasks_here(monkeypatch, run_elsewhere)
    call(Path("cache"), ["file"], function=write)
    assert (tmp_path / "file").read_text() == "content"


def test_function_with_arguments(tmp_path):
    assert call(tmp_path, [4], function=partial(operator.mul, 3)) == [(0, 12)]
