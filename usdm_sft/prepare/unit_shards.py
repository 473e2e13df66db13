"""Unit shards: the first level of the cache, one row per utterance with its units and seconds.

The key of a unit shard covers the ids of its utterances, the sha256 of their audio, the unit model, its settings and the
version of the code that makes units. Rows, texts and the template do not enter it: another config, tokenizer or length
limit uses the same unit shards.

One device makes them in this process; several devices make them in one spawned process each, which takes the next shard when it has
finished one.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import pickle
import random
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import torch

from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.prepare.plan import Plan
from usdm_sft.units.columns import FP32_FALLBACK, columns_by_audio, distinct_audio
from usdm_sft.utils.processes import PipedProcess, num_cores, serve, share_out
from usdm_sft.utils.progress import AUDIO, progress_bar
from usdm_sft.utils.shard_cache import Claim, ShardCache, write_shard

if TYPE_CHECKING:
    from usdm_sft.units.tokenizer import UnitTokenizer

# One process reads some 3,000 s of audio per second (WAV of one channel at 22.05 kHz; less of other formats). A GPU computes up to
# 8,000, by the computation in tests/benchmarks/README.md.
MAX_READERS = 8
FILES_PER_READER = 256  # the start of a process takes as long as reading 150 files
_AHEAD = 4  # shards that each process has and that wait for it: one is computed, one written and one read
_DEVICE_AHEAD = {
    "cpu": 0,
    "cuda": 1,
}  # shards that a device, and likewise the thread that writes, has when the next one starts
_WINDOW = 64  # shards that each run takes in an order of its own

_MAKE_UNITS = ("numpy", "soundfile", "soxr", "torch", "transformers")  # packages that read, resample and compute
_ONLY_UNITS = ("soxr", "torch")  # those that do nothing else in a run
_VERSIONS = b"versions"  # key in the metadata of a unit shard's schema
_UNKNOWN = "unknown"  # the version in a unit shard of an earlier version of this package, which recorded none


class UnitShard(NamedTuple):
    """A unit shard to make."""

    key: str
    audio: list[str]  # address of the recording of each utterance, in order
    digests: dict[str, str]  # sha256 of each recording, by its address
    num_samples: int = 0  # at 16 kHz, of all its utterances
    longest: int = 0  # samples of its longest utterance


def describe_shards(plan: Plan) -> list[UnitShard]:
    """Return the unit shard of each work shard, in order."""
    return [
        UnitShard(
            shard.units_key,
            plan.content(shard).audio,
            dict(zip(plan.content(shard).audio, plan.content(shard).digests, strict=True)),
            shard.num_samples,
            shard.longest,
        )
        for shard in plan
    ]


def make_units(
    shards: Sequence[UnitShard], unit_tokenizer: UnitTokenizer, devices: Sequence[str], cache: Path
) -> dict[str, Path]:
    """Make the unit shards that the cache lacks.

    Args:
        shards: The unit shards.
        unit_tokenizer: Tokenizes the audio.
        devices: Such as ["cuda:0", "cuda:1"]; with more than one, each gets a process of its own.
        cache: Folder of the cache.

    Returns:
        The file of each unit shard, by its key: one row per utterance, with the columns `units` and `seconds`.
    """
    level = ShardCache(cache / "units")
    files = level.find_all(shard.key for shard in shards)
    missing = order_shards([shard for shard in shards if shard.key not in files])
    made = make_unit_shards(missing, unit_tokenizer, devices, level)
    seconds = {shard.key: shard.num_samples / SAMPLE_RATE for shard in missing}
    bar = progress_bar(sum(seconds.values()), "units", AUDIO, disable=not missing)
    with bar, closing(made):  # `closing` ends the processes at once if this loop is interrupted
        for key, path in made:
            files[key] = path
            bar.update(seconds[key])
    return files


def order_shards(shards: Sequence[UnitShard]) -> list[UnitShard]:
    """Return shards in the order in which this run makes them: those with the longest utterances first, which need the most memory.

    Among 64 neighbours, each run has another order. Runs that share a cache and had the same order would wait for each other at each shard.
    """
    longest_first = sorted(shards, key=lambda shard: -shard.longest)
    own = random.Random()  # a script may have seeded the other one, and uses its numbers
    order: list[UnitShard] = []
    for start in range(0, len(longest_first), _WINDOW):
        window = longest_first[start : start + _WINDOW]
        order += own.sample(window, len(window))
    return order


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
        yield from _make_in_turn(iter(shards), unit_tokenizer, level, count_readers(shards, devices))
        return
    unit_tokenizer.release()  # free the memory that this process uses on the first GPU
    num_readers = count_readers(shards, devices)
    with ExitStack() as held:
        processes = []
        for device in devices[: len(shards)]:
            args = (_serve_device, unit_tokenizer, device, level, num_readers)
            processes.append(held.enter_context(closing(PipedProcess(serve, args, name=f"units on {device}"))))
        yield from share_out(shards, processes, ahead=_AHEAD)


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
) -> Iterator[tuple[str, Path]]:
    """Make one shard after the other, and yield the key and the file of each, in order.

    Threads or processes read the audio of the next shard ahead, and another thread writes the files. On CUDA, the device gets the work of
    the next shard before it has finished this one. On the CPU, each shard is written before the next one is computed: a
    forward pass ends before this process goes on, and a finished shard shall not wait for it.

    Raises:
        AudioError: Audio cannot become units, or has another digest than in the first pass.
        OSError: A file cannot be written.
    """
    computing: deque[tuple[UnitShard, Callable[[], Any]]] = deque()
    claims: deque[Claim] = deque()  # of the shards that are computed
    writing: deque[tuple[UnitShard, Future[Path]]] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="write-units")
    ahead = _DEVICE_AHEAD[unit_tokenizer.settings["device"]]

    def read_ahead() -> Iterator[UnitShard | None]:
        for shard in shards:
            unit_tokenizer.read_ahead(shard.audio, shard.digests)
            yield shard
        yield None

    def finish(num_left: int) -> Iterator[tuple[str, Path]]:
        while len(computing) > num_left:
            shard, compute = computing.popleft()
            units, seconds = compute()  # sets `fp32_fallback`
            columns = _make_columns(shard, units, seconds, unit_tokenizer.fp32_fallback)
            writing.append((shard, thread.submit(_write_shard, claims[0], columns)))
            claims.popleft()  # from here on the thread releases it
        while len(writing) > num_left:
            shard, written = writing.popleft()
            yield shard.key, written.result()

    unit_tokenizer.start_reader(num_readers)
    try:
        for shard, _ in pairwise(read_ahead()):
            assert shard is not None  # it has a successor
            claim = level.claim(shard.key, wait=False)
            if claim is None:  # another run makes it, and may wait for a shard that is in progress here
                yield from finish(0)
                claim = level.claim(shard.key)
                assert claim is not None  # it waited
            claims.append(claim)
            if claim.finished is None:
                computing.append((shard, unit_tokenizer.start_files(list(shard.digests), shard.digests)))
                yield from finish(ahead)
            else:
                claims.pop().release()
                unit_tokenizer.forget(shard.audio)
                yield from finish(0)
                yield shard.key, claim.finished
        yield from finish(0)
    finally:
        unit_tokenizer.end_reader()
        thread.shutdown()
        for claim in claims:
            claim.release()


def _make_columns(
    shard: UnitShard, units: Sequence[Any], seconds: Any, fp32_fallback: Collection[Any]
) -> dict[str, list[Any]]:
    columns = columns_by_audio(distinct_audio({"audio": shard.audio})[1], units, seconds)
    if fp32_fallback:  # a shard without overflow has no such column
        columns[FP32_FALLBACK] = [audio in fp32_fallback for audio in shard.audio]
    return columns


def _write_shard(claim: Claim, columns: dict[str, list[Any]]) -> Path:
    with claim:
        return claim.write(lambda path: write_shard(columns, path, metadata=describe_versions()))


def _serve_device(
    items: SimpleQueue[bytes], unit_tokenizer: UnitTokenizer, device: str, level: ShardCache, num_readers: int
) -> Iterator[tuple[str, Path]]:
    """Make the shards that arrive in the process of a device."""
    unit_tokenizer.device = device
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    yield from _make_in_turn(iter(lambda: pickle.loads(items.get()), None), unit_tokenizer, level, num_readers)


def describe_versions() -> dict[bytes, bytes]:
    """Return the metadata of a unit shard: the versions of the packages that make its units, which are no part of its key."""
    return {_VERSIONS: json.dumps({name: importlib.metadata.version(name) for name in _MAKE_UNITS}).encode()}


def name_versions(versions: Mapping[str, str], units: Iterable[Path]) -> dict[str, str]:
    """Return the versions that counts.json names: those that made the units, also if an earlier run did.

    Args:
        versions: The version of each package in this run.
        units: The files of the unit shards.

    Returns:
        The versions; several of a package are separated by commas.
    """
    made: dict[str, set[str]] = defaultdict(set)
    for path in units:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            recorded = json.loads((reader.schema.metadata or {}).get(_VERSIONS, b"{}"))
        for name in _MAKE_UNITS:
            made[name].add(recorded.get(name, _UNKNOWN))
    for name in made.keys() - {*_ONLY_UNITS}:
        made[name].add(versions[name])
    return {**versions, **{name: ", ".join(sorted(found)) for name, found in made.items()}}
