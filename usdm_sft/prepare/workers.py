"""Unit shards made on one device in this process, or on several with one spawned process each.

Each process takes the next work shard when it has finished one.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from datasets import Dataset

from usdm_sft.prepare.mapping import describe_versions, map_shard
from usdm_sft.units.columns import FP32_FALLBACK, distinct_audio, unit_columns
from usdm_sft.utils.processes import PipedProcess, num_cores, serve, share_out
from usdm_sft.utils.shard_cache import Claim, ShardCache

if TYPE_CHECKING:
    from usdm_sft.units.tokenizer import UnitTokenizer

# One process reads some 3,000 s of audio per second (WAV of one channel at 22.05 kHz; less of other formats). A GPU computes up to
# 8,000, by the computation in tests/benchmarks/README.md.
MAX_READERS = 8
FILES_PER_READER = 256  # the start of a process takes as long as reading 150 files
_AHEAD = 4  # shards that each process has and that wait for it: one is computed, one written and one read


class UnitShard(NamedTuple):
    """A unit shard to make."""

    key: str
    audio: list[str]  # address of the recording of each utterance, in order
    digests: dict[str, str]  # sha256 of each recording, by its address


def make_unit_shards(
    shards: Sequence[UnitShard], unit_tokenizer: UnitTokenizer, devices: Sequence[str], level: ShardCache
) -> Generator[tuple[str, Path], None, None]:
    """Make the file of each unit shard; yield the key and the file of each as soon as it is finished.

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
        for shard, path in _make_in_turn(iter(shards), unit_tokenizer, level, count_readers(shards, devices)):
            yield shard.key, path
        return
    unit_tokenizer.release()  # free the memory that this process uses on the first GPU
    num_readers, processes = count_readers(shards, devices), []
    try:
        for device in devices[: len(shards)]:
            args = (_serve_device, unit_tokenizer, device, level, num_readers)
            processes.append(PipedProcess(serve, args, name=f"units on {device}"))
        yield from share_out(shards, processes, ahead=_AHEAD)
    finally:
        for process in processes:
            process.close()


def count_readers(shards: Sequence[UnitShard], devices: Sequence[str]) -> int:
    """Return the number of processes that read audio for each device; 0 if threads read it.

    On the CPU, threads read much faster than the unit model computes.
    """
    if not devices[0].startswith("cuda") or multiprocessing.current_process().daemon:  # a daemon may not start any
        return 0
    num_files = sum(len(shard.digests) for shard in shards)
    wanted = min(MAX_READERS, num_files // len(devices) // FILES_PER_READER)
    return min(wanted, max(1, num_cores() // len(devices)))


def _make_in_turn(
    shards: Iterator[UnitShard], unit_tokenizer: UnitTokenizer, level: ShardCache, num_readers: int
) -> Iterator[tuple[UnitShard, Path]]:
    """Make one shard after the other, and yield each with its file, in order.

    Threads or processes read the audio of the next shard ahead, and another thread writes the files. On CUDA, the device gets the work of
    the next shard before it has finished this one. On the CPU, each shard is written before the next one is computed: a
    forward pass ends before this process goes on, and a finished shard shall not wait for it.
    """
    ahead = int(unit_tokenizer.settings["device"] == "cuda")
    with _Pipeline(unit_tokenizer, level, ahead=ahead, num_readers=num_readers) as pipeline:
        shard = next(shards, None)
        if shard is not None:
            pipeline.read_ahead(shard)
        while shard is not None:
            following = next(shards, None)
            if following is not None:
                pipeline.read_ahead(following)
            yield from pipeline.make(shard)
            shard = following
        yield from pipeline.finish()


class _Pipeline:
    """The shards in progress: first the device computes them, then a thread writes them.

    Args:
        unit_tokenizer: Tokenizes the audio.
        level: The cache level of unit shards.
        ahead: Number of shards that the device, and likewise the thread, may hold when `make` returns.
        num_readers: Number of processes that read audio; 0 if threads read it.
    """

    def __init__(self, unit_tokenizer: UnitTokenizer, level: ShardCache, *, ahead: int, num_readers: int):
        self._unit_tokenizer, self._level, self._ahead = unit_tokenizer, level, ahead
        self._computing: deque[tuple[UnitShard, Claim, Callable[[], Any]]] = deque()
        self._writing: deque[tuple[UnitShard, Future[Path]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-units")
        unit_tokenizer.start_reader(num_readers)

    def __enter__(self) -> _Pipeline:
        return self

    def __exit__(self, *error: object) -> None:
        """Finish the files that are being written, and give up the shards that are read or computed."""
        self._unit_tokenizer.end_reader()
        self._thread.shutdown()
        for _, claim, _ in self._computing:
            claim.release()

    def read_ahead(self, shard: UnitShard) -> None:
        self._unit_tokenizer.read_ahead(shard.audio, shard.digests)

    def make(self, shard: UnitShard) -> Iterator[tuple[UnitShard, Path]]:
        """Start a shard, and yield shards that are finished.

        Raises:
            AudioError: Audio cannot become units, or has another digest than in the first pass.
            OSError: A file cannot be written.
        """
        claim = self._level.claim(shard.key, wait=False)
        if claim is None:  # another run makes it, and may wait for a shard that is in progress here
            yield from self.finish()
            claim = self._level.claim(shard.key)
            assert claim is not None  # it waited
        if claim.finished is not None:
            claim.release()
            self._unit_tokenizer.forget(shard.audio)
            yield from self.finish()
            yield shard, claim.finished
            return
        try:
            units = self._unit_tokenizer.start_files(list(shard.digests), shard.digests)
        except BaseException:  # Ctrl-C as well, or another run would wait for this claim; raised again
            claim.release()
            raise
        self._computing.append((shard, claim, units))
        yield from self._advance(self._ahead)

    def finish(self) -> Iterator[tuple[UnitShard, Path]]:
        """Finish all shards."""
        yield from self._advance(0)

    def _advance(self, ahead: int) -> Iterator[tuple[UnitShard, Path]]:
        while len(self._computing) > ahead:
            shard, claim, units = self._computing[0]
            columns = self._columns(shard, *units())
            self._writing.append((shard, self._thread.submit(_write_shard, shard, claim, columns)))
            self._computing.popleft()  # from here on the thread releases the claim
        while len(self._writing) > ahead:
            shard, written = self._writing.popleft()
            yield shard, written.result()

    def _columns(self, shard: UnitShard, units: Sequence[Any], seconds: Any) -> dict[str, list[Any]]:
        rows = distinct_audio({"audio": shard.audio})[1]
        columns = unit_columns(rows, units, seconds)
        if fallback := self._unit_tokenizer.fp32_fallback:  # a shard without overflow has no such column
            columns[FP32_FALLBACK] = [audio in fallback for audio in shard.audio]
        return columns


def _write_shard(shard: UnitShard, claim: Claim, columns: dict[str, list[Any]]) -> Path:
    rows = Dataset.from_dict({"audio": shard.audio})
    with claim:
        return claim.write(lambda path: map_shard(rows, lambda batch: columns, path, metadata=describe_versions()))


def _serve_device(
    items: SimpleQueue[bytes], unit_tokenizer: UnitTokenizer, device: str, level: ShardCache, num_readers: int
) -> Iterator[tuple[str, Path]]:
    """Make the shards that arrive in the process of a device."""
    unit_tokenizer.device = device
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    shards = iter(lambda: pickle.loads(items.get()), None)
    for shard, path in _make_in_turn(shards, unit_tokenizer, level, num_readers):
        yield shard.key, path
