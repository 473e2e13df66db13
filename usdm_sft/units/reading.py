"""Audio that is read before it is needed: by threads, and so many seconds of it ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.audio.reading import describe, read_waveform
from usdm_sft.units.batches import Waveform, prepare_waveform

if TYPE_CHECKING:
    pass


class AudioReader:
    """Threads that read audio ahead. They belong to one process: a forked one needs a reader of its own.

    Args:
        read: Called in a thread with each source.
    """

    def __init__(self, read: Callable[[str | Path | bytes], Any]):
        self._read = read
        self._threads = ThreadPoolExecutor(thread_name_prefix="read-audio")
        self._waiting: dict[str | Path | bytes, Future] = {}

    def __len__(self) -> int:
        """Number of sources that were read ahead and not taken yet."""
        return len(self._waiting)

    def start(self, sources: Iterable[str | Path | bytes]) -> None:
        """Start to read what is not being read already."""
        for source in sources:
            if source not in self._waiting:
                self._waiting[source] = self._threads.submit(self._read, source)

    def take(self, sources: Sequence[str | Path | bytes]) -> Iterator[Any]:
        """Yield what was read, in order. After an error the sources that no thread has begun are not read."""
        self.start(sources)
        futures = {source: self._waiting.pop(source) for source in dict.fromkeys(sources)}
        try:
            for source in sources:
                yield futures[source].result()
        finally:
            for future in futures.values():
                future.cancel()

    def forget(self, sources: Iterable[str | Path | bytes]) -> None:
        """Give up sources that were read ahead."""
        for source in sources:
            if (future := self._waiting.pop(source, None)) is not None:
                future.cancel()


def read_and_prepare(source: str | Path | bytes, normalization: str) -> Waveform:
    """Address or bytes of audio -> what goes into a batch; resampled by soxr."""
    import torch

    return prepare_waveform(torch.from_numpy(read_waveform(source)), describe(source), normalization)
