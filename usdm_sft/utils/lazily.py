"""A sequence whose items are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class Lazily(Sequence[T]):
    """Items that a function makes anew at each access, so that none of them stays in memory.

    Args:
        function: Makes the item of an index.
        length: Number of items.
    """

    def __init__(self, function: Callable[[int], T], length: int):
        self._function, self._length = function, length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        chosen = range(self._length)[index]
        return self._function(chosen) if isinstance(chosen, int) else [self._function(each) for each in chosen]
