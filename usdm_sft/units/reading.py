"""Threads or processes that read audio before it is needed. The processes import no torch, so that they start in a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from usdm_sft.audio.addresses import AddressError, group_by_recording, parse_address
from usdm_sft.audio.digests import find_stamp, is_whole, read_recording, read_unchanged
from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.audio.reading import SharedBytes, read_audio, read_waveform
from usdm_sft.utils.once import once_per_key
from usdm_sft.utils.processes import PipedProcess, num_cores, sendable

Source = str | Path | bytes  # an address of audio, or the content of an audio file
Audio = tuple[npt.NDArray[np.float32], int]  # (num_samples,) mono, and the sample rate in Hz
Read = Callable[[Source, Mapping[str, bytes] | None], Audio]
Chunk = list[tuple[Source, str | None]]  # sources with the sha256 that they must have

CHUNK_FILES = 32  # for one message to a process: some 30 ms of work

_NUM_RECORDINGS = 2  # long recordings in memory; the segments of one follow each other


def read_resampled(source: Source, contents: Mapping[str, bytes] | None, sample_rate: int = SAMPLE_RATE) -> Audio:
    """Read audio and resample it with soxr."""
    return read_waveform(source, contents, sample_rate), sample_rate


def choose_read(resampler: str, sample_rate: int) -> Read:
    """Return how to read for a resampler; torchaudio resamples later, on the device."""
    return partial(read_resampled, sample_rate=sample_rate) if resampler == "soxr" else read_audio


class AudioReader:
    """Reads audio ahead, in threads or in processes of its own. A forked process needs another reader.

    A file is read once, and the bytes whose digest is checked are the bytes that are decoded. Without a digest only a recording of
    which segments are read is read into memory.

    Args:
        read: Called with each source, and with the bytes of its files or None. It must be picklable if processes call it.
        num_processes: Number of processes to start. 0 means threads, which one interpreter lets read some 2,000 s of audio
            per second, whatever the number of cores.
    """

    def __init__(self, read: Read, num_processes: int = 0):
        self._waiting: dict[Source, tuple[Future[list[Audio | Exception]], int]] = {}
        names = [f"reads audio, process {number + 1}" for number in range(num_processes)]
        self._processes = [PipedProcess(_serve, (read,), name=name) for name in names]
        self._idle: SimpleQueue[PipedProcess] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        # Four threads more than cores, as by default in Python 3.13, because some wait for the disk. With processes, each thread
        # waits for one of them.
        self._threads = ThreadPoolExecutor(num_processes or min(32, num_cores() + 4), thread_name_prefix="read-audio")
        self._read = self._read_there if num_processes else partial(_read_here, read, _Recordings())

    def __len__(self) -> int:
        """Number of sources that were started and not yet taken."""
        return len(self._waiting)

    def start(self, sources: Iterable[Source], digests: Mapping[str, str] | None = None) -> None:
        """Start to read the sources that are not being read already.

        Args:
            sources: What to read.
            digests: The sha256 that the audio must have, by its address. Other audio is an error of `take`.
        """
        new = [source for source in dict.fromkeys(sources) if source not in self._waiting]
        for chunk in cut_into_chunks(new, len(self._processes)):
            with_digests = [(source, None if digests is None else digests[str(source)]) for source in chunk]
            future = self._threads.submit(self._read, with_digests)
            self._waiting |= {source: (future, position) for position, source in enumerate(chunk)}

    def take(self, sources: Sequence[Source], digests: Mapping[str, str] | None = None) -> Iterator[Audio]:
        """Yield the waveforms and sample rates in order. After an error, sources that nobody has begun are not read.

        Raises:
            RuntimeError: A process died.
            Exception: What `read` raised for a source, when its turn comes.
        """
        self.start(sources, digests)
        taken = {source: self._waiting.pop(source) for source in dict.fromkeys(sources)}
        last = {source: index for index, source in enumerate(sources)}
        try:
            for index, source in enumerate(sources):
                future, position = taken[source]
                outcome = future.result()[position]
                if last[source] == index:
                    del taken[source]  # so that the caller decides how long a waveform stays in memory
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
        finally:
            self._cancel(future for future, _ in taken.values())

    def forget(self, sources: Iterable[Source]) -> None:
        """Drop sources that were started and are not needed."""
        self._cancel(self._waiting.pop(source)[0] for source in sources if source in self._waiting)

    def _cancel(self, futures: Iterable[Future[Any]]) -> None:
        dropped = set(futures)
        for future in dropped - {future for future, _ in self._waiting.values()}:
            future.cancel()

    def close(self) -> None:
        """Drop everything, and end the processes."""
        self._waiting.clear()
        for process in self._processes:
            process.terminate()  # its thread does not wait any longer then
        self._threads.shutdown(wait=bool(self._processes), cancel_futures=True)
        for process in self._processes:
            process.close()

    def _read_there(self, chunk: Chunk) -> list[Audio | Exception]:
        process = self._idle.get()
        try:
            return process.call(partial(_request, chunk))
        finally:
            self._idle.put(process)


def cut_into_chunks(sources: Sequence[Source], num_processes: int) -> list[list[Source]]:
    """Cut sources into chunks that are read one by one. Threads share memory, and each takes single sources."""
    if not num_processes:
        return [[source] for source in sources]
    size = min(CHUNK_FILES, -(-len(sources) // (2 * num_processes)))  # few files give work to all processes
    return group_by_recording(sources, size)


class _Recordings:
    """The last recordings that segments were read of."""

    def __init__(self) -> None:
        self._read = once_per_key(lambda file, stamp: read_recording(file), maxsize=_NUM_RECORDINGS)

    def read(self, file: str) -> tuple[SharedBytes, str]:
        """Return the bytes of a file and their sha256; raises what `read_file` raises."""
        return self._read(file, find_stamp(file))

    def find(self, source: Source) -> dict[str, bytes] | None:
        """Return the bytes of the files of an address; None for a whole file, and where reading it tells what is wrong."""
        if isinstance(source, bytes) or is_whole(segments := parse_address(source)):
            return None
        try:
            return {segment.file: self.read(segment.file)[0] for segment in segments}
        except AddressError:
            return None


def _read_here(read: Read, recordings: _Recordings, chunk: Chunk) -> list[Audio | Exception]:
    return [_read_one(read, recordings, *each) for each in chunk]


def _read_one(read: Read, recordings: _Recordings, source: Source, sha256: str | None) -> Audio | Exception:
    try:
        if sha256 is None:
            return read(source, recordings.find(source))
        return read(source, read_unchanged(str(source), sha256, recordings.read))
    except Exception as error:  # `take` raises it if this source is taken
        return error


def _serve(connection: Connection, read: Read) -> None:
    """Read chunks until the parent closes the connection."""
    recordings = _Recordings()
    while True:
        outcomes = [_read_one(read, recordings, *each) for each in connection.recv()]
        connection.send(
            [sendable(each) if isinstance(each, Exception) else (len(each[0]), each[1]) for each in outcomes]
        )
        for outcome in outcomes:
            if not isinstance(outcome, Exception):
                connection.send_bytes(np.ascontiguousarray(outcome[0]).view(np.uint8).data)


def _request(chunk: Chunk, connection: Connection) -> list[Audio | Exception]:
    """Let a process that runs `_serve` read a chunk."""
    connection.send(chunk)
    outcomes: list[Audio | Exception] = []
    for each in connection.recv():
        if isinstance(each, Exception):
            outcomes.append(each)
            continue
        num_samples, rate = each
        samples = np.empty(num_samples, np.float32)
        connection.recv_bytes_into(samples.view(np.uint8).data)
        outcomes.append((samples, rate))
    return outcomes
