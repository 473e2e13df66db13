"""The first pass over many recordings, shared out to processes or tasks.

They read what the memo lacks, and the caller, which alone writes the memo, then finds it there. Bad files are not remembered, so
that the caller checks them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

from usdm_sft.audio.digests import Reader
from usdm_sft.audio.memo import Memo, Row
from usdm_sft.cache.keys import cache_key
from usdm_sft.utils.progress import progress_bar

if TYPE_CHECKING:
    from usdm_sft.utils.pool import Pool

FEW = 2_000  # recordings that this process reads alone: another one takes a second to start
BATCH = 512  # recordings that a process or task reads in one call
_THREADS = 2  # one waits for the disk while the other one computes; more of them wait for each other


def read_ahead(addresses: Iterable[str], memo: Memo, pool: Pool) -> None:
    """Read the recordings that are not remembered, if they are many.

    Args:
        addresses: Addresses of audio.
        memo: Where digests are remembered.
        pool: Shares out the recordings.

    Raises:
        Submitted: Slurm reads the recordings.
    """
    missing = _find_missing(addresses, memo)
    num_missing = sum(map(len, missing.values()))
    if num_missing < FEW:
        return
    batches = list(_divide(missing.values()))
    made = pool.map(read_recordings, batches, name="recordings", keys=[cache_key(batch) for batch in batches])
    with progress_bar(num_missing, "reading recordings", "files") as bar:
        for index, rows in made:
            memo.write(rows)
            bar.update(len(batches[index]))


def _find_missing(addresses: Iterable[str], memo: Memo) -> dict[str, list[str]]:
    """Return the addresses that are not remembered, by their recording."""
    missing: dict[str, list[str]] = {}
    remaining = iter(addresses)
    while batch := list(islice(remaining, BATCH)):
        files = [_file(address) for address in batch]
        known = memo.read(list({*batch, *files}))
        for address, file in zip(batch, files, strict=True):
            if address not in known and file not in known:
                missing.setdefault(file, []).append(address)
    return missing


def _file(address: str) -> str:
    """Return the recording of an address by its spelling alone, which suffices to keep the addresses in one together."""
    return address.partition("#")[0]


def _divide(recordings: Iterable[list[str]]) -> Iterator[list[str]]:
    """Divide addresses into batches. Those in one recording share a batch, so that it is hashed once."""
    batch: list[str] = []
    for addresses in recordings:
        batch += addresses
        if len(batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def read_recordings(addresses: Sequence[str]) -> list[Row]:
    """Digest and check recordings, in a process or task; return the rows to remember."""
    memo = _Collected()
    with ThreadPoolExecutor(_THREADS) as threads:
        Reader(memo, threads).read(addresses)
    return memo.rows


class _Collected(Memo):
    """Stands in for the memo where it cannot be opened: on another machine, or beside the caller."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def read(self, paths: Sequence[str]) -> dict[str, Row]:
        return {}

    def write(self, rows: Sequence[Row]) -> None:
        self.rows += rows
