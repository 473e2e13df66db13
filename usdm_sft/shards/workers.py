"""Unit shards made on one device in this process, or on several with one spawned process each.

Each process takes the next work shard when it has finished one.
"""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset

from usdm_sft.audio.digests import check_unchanged
from usdm_sft.shards.mapping import map_shard
from usdm_sft.utils.cache import ShardCache
from usdm_sft.utils.processes import start_process

if TYPE_CHECKING:
    from usdm_sft.units.tokenizer import UnitTokenizer

POLL_SECONDS = 1.0
FP32_FALLBACK = (
    "fp32_fallback"  # bool column of a unit shard: the utterance overflowed, and its units are those of fp32
)


class UnitShard(NamedTuple):
    """A unit shard to make."""

    key: str
    utterances: Dataset  # one row per utterance, with the column `audio`
    digests: dict[str, str]  # sha256 of each recording, by its address


def make_unit_shards(
    shards: Sequence[UnitShard], unit_tokenizer: UnitTokenizer, devices: Sequence[str], level: ShardCache
) -> Generator[tuple[UnitShard, Path], None, None]:
    """Make the file of each unit shard; yield each shard with its file as soon as it is finished.

    Args:
        shards: The unit shards to make.
        unit_tokenizer: Tokenizes the audio. It is pickled into the processes, each of which loads the model itself.
        devices: Such as ["cuda:0", "cuda:1"]; a single device is used by this process.
        level: The cache level of unit shards.

    Raises:
        RuntimeError: A process died. Finished shards are kept; each process loses the shard in progress.
        Exception: The error of a process.
    """
    if len(devices) == 1:
        unit_tokenizer.device = devices[0]
        yield from _make_in_turn(iter(shards), unit_tokenizer, level)
        return
    unit_tokenizer.release()  # free the memory that this process uses on the first GPU
    context = multiprocessing.get_context("spawn")
    waiting: Any = context.Queue()
    done: Any = context.Queue()
    for index in range(len(shards)):
        waiting.put(index)
    processes = {}
    try:
        for device in devices[: len(shards)]:
            waiting.put(None)
            args = (unit_tokenizer, device, level, list(shards), waiting, done)
            processes[device] = start_process(_run_process, args, name=f"units on {device}")
        for index, path in _receive(done, processes, len(shards)):
            yield shards[index], path
        for process in processes.values():
            process.join()
    finally:
        waiting.cancel_join_thread()
        for process in processes.values():
            process.terminate()
            process.join()


def _receive(done: Any, processes: Mapping[str, Any], number: int) -> Iterator[tuple[int, Path]]:
    """Yield `number` results. Raises the error that a process sent, or one that names a process that died."""
    while number:
        # Taken before the queue is read: a process that has ended by now has nothing more to send.
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


def _make_in_turn(
    shards: Iterator[UnitShard], unit_tokenizer: UnitTokenizer, level: ShardCache
) -> Iterator[tuple[UnitShard, Path]]:
    """Make one shard after the other; the audio of the next is read while the units of this one are computed."""
    shard = next(shards, None)
    if shard is not None:
        unit_tokenizer.read_ahead_rows(shard.utterances[:])
    while shard is not None:
        following = next(shards, None)
        if following is not None:
            unit_tokenizer.read_ahead_rows(following.utterances[:])
        path = level.make(shard.key, partial(_write_shard, shard, unit_tokenizer))
        unit_tokenizer.forget_rows(shard.utterances[:])  # still held if another run made the shard in the meantime
        yield shard, path
        shard = following


def _write_shard(shard: UnitShard, unit_tokenizer: UnitTokenizer, path: str) -> None:
    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        columns: dict[str, Any] = unit_tokenizer(batch)
        if fallback := unit_tokenizer.fp32_fallback:  # a shard without overflow has no such column
            columns[FP32_FALLBACK] = [audio in fallback for audio in batch["audio"]]
        return columns

    map_shard(shard.utterances, tokenize, path, shard.key)
    check_unchanged(shard.digests)  # before the file gets a name that states the digests of its audio


def _run_process(
    unit_tokenizer: UnitTokenizer, device: str, level: ShardCache, shards: list[UnitShard], waiting: Any, done: Any
) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a spawned process
    taken: list[int] = []

    def take_shards() -> Iterator[UnitShard]:
        while parent.is_alive():
            try:
                index = waiting.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if index is None:
                return
            taken.append(index)
            yield shards[index]

    try:
        unit_tokenizer.device = device
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        for _, path in _make_in_turn(take_shards(), unit_tokenizer, level):
            done.put((taken.pop(0), path))
    except Exception as error:  # raised again in the parent
        done.put(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """Return the error itself if it survives pickling, else a RuntimeError with its text.

    The traceback is added as a note, which Python prints only where it prints the traceback of the parent.
    """
    sent: Exception
    try:
        sent = pickle.loads(pickle.dumps(error))
    except Exception:  # the class of the error may raise anything here
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    sent.add_note("In the process:\n" + "".join(traceback.format_exception(error)))
    return sent
