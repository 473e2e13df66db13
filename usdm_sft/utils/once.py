"""A cache for functions that several threads call at the same time."""

from collections.abc import Callable, Hashable
from functools import lru_cache
from threading import Lock
from typing import TypeVar

T = TypeVar("T")


def once_per_key(function: Callable[..., T], maxsize: int | None = None) -> Callable[..., T]:
    """Return `function` with a cache. Threads that ask for the same key at the same time share one call.

    `functools.lru_cache` alone would call the function once per thread.

    Args:
        function: Takes hashable positional arguments.
        maxsize: Number of results to keep, as in `lru_cache`; by default all of them.
    """
    cached = lru_cache(maxsize)(function)
    locks: dict[tuple[Hashable, ...], Lock] = {}

    def call(*key: Hashable) -> T:
        with locks.setdefault(key, Lock()):
            return cached(*key)

    return call
