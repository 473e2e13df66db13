"""The first pass over many recordings, shared out to processes or tasks.

They read what is not remembered, and the caller, which alone writes the memo, looks at none of these files. Bad files are left to
the caller, which checks them again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from usdm_sft.audio.addresses import parse_address
from usdm_sft.audio.digest_reader import Reader, is_unchanged, to_digest
from usdm_sft.audio.digest_table import AudioDigest, AudioDigests, Places
from usdm_sft.audio.digests import NUM_THREADS
from usdm_sft.audio.memo import TABLE, Memo, Row
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.lazily import Lazily
from usdm_sft.utils.progress import progress_bar

if TYPE_CHECKING:
    from usdm_sft.utils.pool import Pool

FEW = 2_000  # addresses that this process reads alone: another one takes a second to start
BATCH = 512  # addresses that a process or task reads in one call

Found = tuple[list[AudioDigest | None], list[Row]]  # a digest for each address, and rows to remember


def read_ahead(digests: AudioDigests, memo: Memo, pool: Pool) -> None:
    """Read the recordings that have no digest yet, if they are many.

    Args:
        digests: The digests that were remembered; others are put there.
        memo: Where digests are remembered.
        pool: Shares out the recordings.

    Raises:
        Submitted: Slurm reads the recordings.
    """
    missing = digests.find_unset()
    if len(missing) < FEW:
        return
    parts = _divide(digests, missing)
    batches = Lazily(lambda index: digests.addresses_at(parts[index]), len(parts))
    # Results of a version with other rows or checks are not found.
    keys = [cache_key(TABLE, batch) for batch in batches]
    with progress_bar(len(missing), "reading recordings", "files") as bar:
        for index, (found, rows) in pool.map(read_recordings, batches, name="recordings", keys=keys, holds=_hold):
            memo.write(rows)
            digests.put(parts[index], found)
            bar.update(len(found))


def _divide(digests: AudioDigests, places: Places) -> list[Places]:
    """Divide addresses into batches. Stretches of one recording share a batch, so that it is read once."""
    recordings: dict[str, int] = {}
    firsts = np.arange(len(places))  # for each address the first one of the same recording
    position = 0
    for _, addresses in digests.batches(places):
        for address in addresses:
            stretch = parse_address(address, exists=lambda _: False)[0]
            if not stretch.is_whole:
                firsts[position] = recordings.setdefault(stretch.file, position)
            position += 1
    order = np.argsort(firsts, kind="stable")
    stops = np.append(np.flatnonzero(np.diff(firsts[order])) + 1, len(places))  # of each recording
    parts, start = [], 0
    for stop in map(int, stops):
        if stop - start >= BATCH or stop == len(places):
            parts.append(places[order[start:stop]])
            start = stop
    return parts


def _hold(result: Found) -> bool:
    """Return True if what an earlier run read has not changed since."""
    return all(map(is_unchanged, result[1]))


def read_recordings(addresses: Sequence[str]) -> Found:
    """Digest and check recordings, in a process or task. The digests of bad files, and of those just changed, are None."""
    memo, started = _Collected(), time.time_ns()
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        rows = Reader(memo, threads).read(addresses)
    return [to_digest(row) if row.problem is None and row.is_settled(started) else None for row in rows], memo.rows


class _Collected(Memo):
    """Stands in for the memo where it cannot be opened: on another machine, or beside the caller."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def read(self, paths: Sequence[str]) -> dict[str, Row]:
        return {}

    def write(self, rows: Sequence[Row]) -> None:
        self.rows += rows
