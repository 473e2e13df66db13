"""Threads that read audio before it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from usdm_sft.audio.digests import read_file, read_unchanged
from usdm_sft.audio.reading import describe, read_waveform
from usdm_sft.units.batches import Waveform, prepare_waveform
from usdm_sft.utils.once import once_per_key
from usdm_sft.utils.processes import num_cores

Source = str | Path | bytes  # an address of audio, or the content of an audio file

_NUM_RECORDINGS = 2  # long recordings in memory; the stretches of one follow each other


class AudioReader:
    """Reads audio ahead in threads. The threads belong to one process, and a forked process needs a reader of its own.

    A file is read once, and the bytes whose digest is checked are the bytes that are decoded. Without a digest the file is not
    read into memory.

    Args:
        decode: Called in a thread with each source, and with the bytes of its files or None.
    """

    def __init__(self, decode: Callable[[Source, Mapping[str, bytes] | None], Any]):
        self._decode = decode
        # Four threads more than cores, as by default in Python 3.13, because some wait for the disk.
        self._threads = ThreadPoolExecutor(min(32, num_cores() + 4), thread_name_prefix="read-audio")
        self._waiting: dict[Source, Future[Any]] = {}
        self._recordings = once_per_key(read_file, maxsize=_NUM_RECORDINGS)

    def __len__(self) -> int:
        """Number of sources that were started and not yet taken."""
        return len(self._waiting)

    def start(self, sources: Iterable[Source], digests: Mapping[str, str] | None = None) -> None:
        """Start to read the sources that are not being read already.

        Args:
            sources: What to read.
            digests: The sha256 that the audio must have, by its address. Other audio is an error of `take`.
        """
        for source in sources:
            if source not in self._waiting:
                sha256 = None if digests is None else digests[str(source)]
                self._waiting[source] = self._threads.submit(self._read, source, sha256)

    def _read(self, source: Source, sha256: str | None) -> Any:
        if sha256 is None:
            return self._decode(source, None)
        return self._decode(source, read_unchanged(str(source), sha256, self._recordings))

    def take(self, sources: Sequence[Source], digests: Mapping[str, str] | None = None) -> Iterator[Any]:
        """Yield the results in order. After an error, sources that no thread has begun are not read."""
        self.start(sources, digests)
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


def read_and_prepare(source: Source, contents: Mapping[str, bytes] | None, *, normalization: str) -> Waveform:
    """Read audio, resample it with soxr and prepare it for a batch."""
    return prepare_waveform(torch.from_numpy(read_waveform(source, contents)), describe(source), normalization)
