"""Threads that read audio before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from usdm_sft.audio.reading import describe, read_waveform
from usdm_sft.units.batches import Waveform, prepare_waveform

Source = str | Path | bytes  # an address of audio, or the content of an audio file


class AudioReader:
    """Reads audio ahead in threads. The threads belong to one process, and a forked process needs a reader of its own.

    Args:
        read: Called in a thread with each source.
    """

    def __init__(self, read: Callable[[Source], Any]):
        self._read = read
        self._threads = ThreadPoolExecutor(thread_name_prefix="read-audio")
        self._waiting: dict[Source, Future[Any]] = {}

    def __len__(self) -> int:
        """Number of sources that were started and not yet taken."""
        return len(self._waiting)

    def start(self, sources: Iterable[Source]) -> None:
        """Start to read the sources that are not being read already."""
        for source in sources:
            if source not in self._waiting:
                self._waiting[source] = self._threads.submit(self._read, source)

    def take(self, sources: Sequence[Source]) -> Iterator[Any]:
        """Yield the results in order. After an error, sources that no thread has begun are not read."""
        self.start(sources)
        futures = {source: self._waiting.pop(source) for source in dict.fromkeys(sources)}
        try:
            for source in sources:
                yield futures[source].result()
        finally:
            for future in futures.values():
                future.cancel()

    def forget(self, sources: Iterable[Source]) -> None:
        """Drop sources that were started and are not needed."""
        for source in sources:
            if (future := self._waiting.pop(source, None)) is not None:
                future.cancel()


def read_and_prepare(source: Source, normalization: str) -> Waveform:
    """Read audio, resample it with soxr and prepare it for a batch."""
    return prepare_waveform(torch.from_numpy(read_waveform(source)), describe(source), normalization)
