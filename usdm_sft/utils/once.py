"""A cache for functions that several threads call at the same time."""

from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import TypeVar

T = TypeVar("T")


def once_per_key(function: Callable[..., T], maxsize: int | None = None) -> Callable[..., T]:
    """Return `function` with a cache, such that threads that ask for one key at once wait for a single call.

    `functools.lru_cache` alone calls the function once a thread in that case.

    Args:
        function: Takes hashable positional arguments.
        maxsize: How many results are kept, as in `lru_cache`; all of them by default.
    """
    cached = lru_cache(maxsize)(function)
    locks: dict[tuple, Lock] = {}

    def call(*key):
        with locks.setdefault(key, Lock()):
            return cached(*key)

    return call
