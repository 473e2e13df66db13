"""Counts of equal numbers, in arrays: 16 bytes per different number, where a `Counter` takes 100 to 150."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_FEW = 4096  # numbers that may always wait, because sorting fewer is not worth the calls


class Weighted(NamedTuple):
    """Numbers of which many are equal.

    Attributes:
        values: (num_values,) different numbers, in ascending order.
        counts: (num_values,) int64, how often each occurs.
    """

    values: npt.NDArray[Any]
    counts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.counts.sum())


class Tally:
    """Counts how often each number occurs.

    New numbers wait until they are more than the different ones so far, and are then sorted together with these. So most numbers
    are sorted a few times only, and n additions take O(n log n).

    Args:
        dtype: Type of the numbers.
    """

    def __init__(self, dtype: npt.DTypeLike = np.int64):
        self._sorted = Weighted(np.zeros(0, dtype), np.zeros(0, np.int64))
        self._waiting: list[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]] = []
        self._num_waiting = 0

    def add(self, values: npt.NDArray[Any], counts: npt.NDArray[np.int64] | None = None) -> None:
        """Count numbers.

        Args:
            values: (num_values,) numbers in any order; several may be equal.
            counts: (num_values,) int64, how often each occurs; by default once.
        """
        values = values.astype(self._sorted.values.dtype, copy=False)
        if counts is None:
            values, counts = _count(values)
        self._waiting.append((values, counts))
        self._num_waiting += len(values)
        if self._num_waiting > max(len(self._sorted.values), _FEW):
            self.weighted()

    def merge(self, other: Tally) -> None:
        """Add the counts of another tally."""
        self.add(*other.weighted())

    def weighted(self) -> Weighted:
        """Return the different numbers and how often each occurs. The arrays must not be changed."""
        if self._waiting:
            values, counts = zip(self._sorted, *self._waiting, strict=True)
            self._sorted = weigh(np.concatenate(values), np.concatenate(counts))
            self._waiting, self._num_waiting = [], 0
        return self._sorted

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the sorted numbers, which take the least space."""
        self.weighted()
        return self.__dict__


def weigh(values: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> Weighted:
    """Sort numbers and add up the counts of equal ones."""
    order = np.argsort(values, kind="stable")  # fast where parts are sorted already
    values, counts = values[order], counts[order]
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(values) else np.zeros(0, np.int64)
    return Weighted(values[starts], np.add.reduceat(counts, starts))


def _count(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Count equal numbers. Small ones, such as lengths of runs, need not be sorted."""
    if values.dtype.kind == "i" and len(values) and values.min() >= 0 and values.max() < len(values):
        counts = np.bincount(values)
        values = np.flatnonzero(counts)
        return values, counts[values]
    return np.unique(values, return_counts=True)
