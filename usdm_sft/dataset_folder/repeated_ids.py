"""Rows that have the id of an earlier row, found in memory that does not depend on the number of rows.

Each range of rows leaves the digests of its ids in a sorted file. One stretch of digests after the other is then read from all
files and sorted. 128 bits of BLAKE2 tell any two ids apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
_IN_MEMORY = 1_000_000  # digests of one stretch; 24 bytes each, and the same again for sorting


class Place(NamedTuple):
    """A row: the number of its range, and its number in the range."""

    range: int
    row: int


def digest_ids(ids: Iterable[str]) -> bytes:
    """Return the digests of ids, 16 bytes each."""
    return b"".join(hashlib.blake2b(row_id.encode(), digest_size=16).digest() for row_id in ids)


def write_digests(file: Path, digests: bytes) -> None:
    """Write the digests of the ids of a range in sorted order, each with the number of its row."""
    table = np.empty(len(digests) // 16, _DTYPE)
    pairs = np.frombuffer(digests, "<u8").reshape(-1, 2)
    table["high"], table["low"], table["row"] = pairs[:, 0], pairs[:, 1], np.arange(len(table))
    np.save(file, table[np.argsort(table["high"], kind="stable")])


def find_repeated(files: Sequence[Path], limit: int) -> list[tuple[Place, Place]]:
    """Find the rows whose id an earlier row has.

    Args:
        files: The file of each range, in order.
        limit: Largest number of rows to find.

    Returns:
        The first rows, in order, each with the nearest earlier row of the same id.
    """
    num_ids = sum(len(_open(file)) for file in files)
    num_stretches = -(-num_ids // _IN_MEMORY)
    found: list[tuple[Place, Place]] = []
    for stretch in range(num_stretches):
        first, stop = ((number << 64) // num_stretches for number in (stretch, stretch + 1))
        parts = [_between(_open(file), first, stop) for file in files]
        ranges = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        digests = np.concatenate(parts)
        order = np.lexsort((digests["low"], digests["high"]))  # stable: equal digests stay in the order of the rows
        ordered = digests[order][["high", "low"]]
        equal = np.flatnonzero(ordered[1:] == ordered[:-1])
        rows, before = order[equal + 1], order[equal]
        chosen = np.lexsort((digests["row"][rows], ranges[rows]))[:limit]
        places = [
            [Place(*place) for place in zip(ranges[each].tolist(), digests["row"][each].tolist(), strict=True)]
            for each in (rows[chosen], before[chosen])
        ]
        found = sorted([*found, *zip(*places, strict=True)])[:limit]
    return found


def _open(file: Path) -> npt.NDArray[np.void]:
    table: npt.NDArray[np.void] = np.load(file, mmap_mode="r")
    return table


def _between(table: npt.NDArray[np.void], first: int, stop: int) -> npt.NDArray[np.void]:
    start = np.searchsorted(table["high"], np.uint64(first))
    end = len(table) if stop > np.iinfo(np.uint64).max else np.searchsorted(table["high"], np.uint64(stop))
    return np.array(table[start:end])
