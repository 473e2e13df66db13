"""Unit shards on one device or several: one spawned process a GPU, work shards handed out as they finish."""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from usdm_sft.audio.digests import check_unchanged
from usdm_sft.shards.mapping import map_shard
from usdm_sft.utils.processes import start_process

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset

    from usdm_sft.units.tokenizer import UnitTokenizer
    from usdm_sft.utils.cache import ShardCache

POLL_SECONDS = 1.0
FP32_FALLBACK = "fp32_fallback"  # column of a unit shard: bool, whether the utterance overflowed and fell back to fp32


class Task(NamedTuple):
    """A work shard to make: its key, its rows, one an utterance, with the column `audio`, and the sha256 of each audio."""

    key: str
    rows: Dataset
    audio: dict[str, str]


def tokenize_shards(
    tasks: Sequence[Task], unit_tokenizer: UnitTokenizer, devices: Sequence[str], level: ShardCache
) -> Iterator[tuple[Task, Path]]:
    """Make each work shard's file of the cache level; yields the tasks as they are done, each with its file.

    Args:
        tasks: What to make.
        unit_tokenizer: Pickled into the processes, which load the model themselves.
        devices: Such as ["cuda:0", "cuda:1"]; one alone is used by this process.
        level: The cache level of unit shards.

    Raises:
        RuntimeError: A process died; what was finished stands (each process loses the shard it was at).
        Exception: Whatever went wrong in a process.
    """
    if len(devices) == 1:
        unit_tokenizer.device = devices[0]
        yield from _work(iter(tasks), unit_tokenizer, level)
        return
    unit_tokenizer.release()  # what this process holds of the first GPU
    context = multiprocessing.get_context("spawn")
    waiting, done = context.Queue(), context.Queue()
    for index in range(len(tasks)):
        waiting.put(index)
    processes = {}
    try:
        for device in devices[: len(tasks)]:
            waiting.put(None)
            args = (unit_tokenizer, device, level, list(tasks), waiting, done)
            processes[device] = start_process(_process, args, name=f"units on {device}")
        for index, path in _receive(done, processes, len(tasks)):
            yield tasks[index], path
        for process in processes.values():
            process.join()
    finally:
        waiting.cancel_join_thread()
        for process in processes.values():
            process.terminate()
            process.join()


def _receive(done: Any, processes: Mapping[str, Any], number: int) -> Iterator[tuple[int, Path]]:
    """Yield `number` results, or raise what a process sent or died of."""
    while number:
        # Before the queue is read: a process that ended by then has nothing more to send.
        exit_codes = {device: process.exitcode for device, process in processes.items()}
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
    for device, exit_code in exit_codes.items():
        if exit_code not in (None, 0):
            raise RuntimeError(
                f"the process on {device} died (exit code {exit_code}): start the run again; "
                "finished work shards are kept"
            )
    if all(exit_code == 0 for exit_code in exit_codes.values()):
        raise RuntimeError("the processes ended before their work was done: start the run again")


def _work(tasks: Iterator[Task], unit_tokenizer: UnitTokenizer, level: ShardCache) -> Iterator[tuple[Task, Path]]:
    """Make shard after shard; the next one's audio is read while this one is computed."""
    task = next(tasks, None)
    if task is not None:
        unit_tokenizer.read_ahead_rows(task.rows[:])
    while task is not None:
        following = next(tasks, None)
        if following is not None:
            unit_tokenizer.read_ahead_rows(following.rows[:])
        path = level.make(task.key, lambda path, task=task: _make(task, unit_tokenizer, path))
        unit_tokenizer.forget_rows(task.rows[:])  # another run may have made the shard meanwhile
        yield task, path
        task = following


def _make(task: Task, unit_tokenizer: UnitTokenizer, path: str) -> None:
    def tokenize(batch: dict[str, list]) -> dict[str, Any]:
        columns = unit_tokenizer(batch)
        if fallback := unit_tokenizer.fp32_fallback:  # other shards do without the column
            columns[FP32_FALLBACK] = [audio in fallback for audio in batch["audio"]]
        return columns

    map_shard(task.rows, tokenize, path, task.key)
    check_unchanged(task.audio)  # before the file gets the name that says what audio it is of


def _process(
    unit_tokenizer: UnitTokenizer, device: str, level: ShardCache, tasks: list[Task], waiting: Any, done: Any
) -> None:
    given: list[int] = []

    def handed_out() -> Iterator[Task]:
        while multiprocessing.parent_process().is_alive():
            try:
                index = waiting.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if index is None:
                return
            given.append(index)
            yield tasks[index]

    try:
        unit_tokenizer.device = device
        if device.startswith("cuda"):
            import torch

            torch.cuda.set_device(device)
        for _, path in _work(handed_out(), unit_tokenizer, level):
            done.put((given.pop(0), path))
    except Exception as error:  # raised again in the parent
        done.put(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """The error itself where it survives the way to the parent, else what it says.

    The traceback goes along as a note, which Python shows only where it shows the parent's traceback.
    """
    try:
        sent = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is pickled
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note("In the process:\n" + "".join(traceback.format_exception(error)))
    return sent
