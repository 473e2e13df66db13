"""Digests of texts in sorted files, which are read one stretch after the other, so that memory does not grow with their number.

128 bits of BLAKE2 tell any two texts apart. Each range of texts leaves its digests in a file of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
_WITH_CONTENT = np.dtype([*_DTYPE.descr, ("content", "<u8", (2,))])
_IN_MEMORY = 1_000_000  # digests of one stretch; 24 or 40 bytes each, and the same again for sorting


def digest_texts(texts: Iterable[bytes]) -> bytes:
    """Return the digests of texts, 16 bytes each."""
    return b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)


def write_digests(file: Path, digests: bytes, *, first: int = 0, contents: bytes | None = None) -> None:
    """Write the digests of a range in sorted order, each with its number.

    Args:
        file: The file to write; its name ends with ".npy".
        digests: As of `digest_texts`.
        first: Number of the first digest; the others follow.
        contents: Another digest for each of them, for `merge_digests`.
    """
    pairs = as_pairs(digests)
    table = np.empty(len(pairs), _DTYPE if contents is None else _WITH_CONTENT)
    table["high"], table["low"], table["row"] = pairs[:, 0], pairs[:, 1], np.arange(first, first + len(pairs))
    if contents is not None:
        table["content"] = as_pairs(contents)
    np.save(file, table[np.argsort(table["high"], kind="stable")])


def iter_stretches(files: Sequence[Path]) -> Iterator[list[npt.NDArray[np.void]]]:
    """Yield the digests of one stretch after the other, in ascending order of `high`.

    Args:
        files: Files of `write_digests`.

    Yields:
        The digests of each file, sorted by `high`; those of equal `high` are in the order of their numbers.
    """
    num_digests = sum(len(_open(file)) for file in files)
    num_stretches = -(-num_digests // _IN_MEMORY)
    for stretch in range(num_stretches):
        first, stop = ((number << 64) // num_stretches for number in (stretch, stretch + 1))
        yield [_between(_open(file), first, stop) for file in files]


class DigestTable(NamedTuple):
    """Sorted digests of keys with the digests of their contents, in memory-mapped files.

    Attributes:
        high: (num_keys,) uint64, upper half of the digest of each key.
        low: (num_keys,) uint64, the other half.
        contents: (num_keys, 2) uint64.
    """

    high: npt.NDArray[np.uint64]
    low: npt.NDArray[np.uint64]
    contents: npt.NDArray[np.uint64]

    @classmethod
    def open(cls, folder: str) -> DigestTable:
        """Open what `merge_digests` wrote."""
        return cls(*(np.load(Path(folder, f"{name}.npy"), mmap_mode="r") for name in cls._fields))

    def find(self, keys: bytes) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint64]]:
        """Find the contents of keys.

        Args:
            keys: The digests of (num_keys,) keys, as of `digest_texts`.

        Returns:
            (num_keys,) whether the table has each key, and (num_keys, 2) its content, the last one where a key occurs several times.
        """
        pairs = as_pairs(keys)
        if not len(self.high):
            return np.zeros(len(pairs), np.bool_), np.zeros_like(pairs)
        at = np.searchsorted(self.high, pairs[:, 0], side="right") - 1
        while True:  # again only where two keys share half of their digests
            same = (at >= 0) & (self.high[at] == pairs[:, 0])
            other = same & (self.low[at] != pairs[:, 1])
            if not other.any():
                return same, self.contents[at]
            at[other] -= 1


def merge_digests(files: Sequence[Path], folder: str) -> None:
    """Merge files of `write_digests` with contents, in order, into the files of a `DigestTable`."""
    num_keys = sum(len(_open(file)) for file in files)
    shapes = {"high": (num_keys,), "low": (num_keys,), "contents": (num_keys, 2)}
    high, low, contents = (
        create_array(Path(folder, f"{name}.npy"), np.uint64, shapes[name]) for name in DigestTable._fields
    )
    start = 0
    for parts in iter_stretches(files):
        digests = np.concatenate(parts)
        digests = digests[np.lexsort((digests["low"], digests["high"]))]  # stable: equal keys stay in order
        stop = start + len(digests)
        high[start:stop], low[start:stop] = digests["high"], digests["low"]
        contents[start:stop] = digests["content"]
        start = stop


def create_array(file: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Create a file of zeros that `np.load` reads, and return the memory-mapped array."""
    array: npt.NDArray[Any] = np.lib.format.open_memmap(file, "w+", dtype, shape)  # type: ignore[no-untyped-call]
    return array


def as_pairs(digests: bytes) -> npt.NDArray[np.uint64]:
    """Return (num_digests, 2) uint64, the halves of each digest."""
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def _open(file: Path) -> npt.NDArray[np.void]:
    table: npt.NDArray[np.void] = np.load(file, mmap_mode="r")
    return table


def _between(table: npt.NDArray[np.void], first: int, stop: int) -> npt.NDArray[np.void]:
    start = np.searchsorted(table["high"], np.uint64(first))
    end = len(table) if stop > np.iinfo(np.uint64).max else np.searchsorted(table["high"], np.uint64(stop))
    return np.array(table[start:end])
