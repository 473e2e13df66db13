"""Units that a corpus has already: their checks. No heavy imports, because the command line reads this module."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from usdm_sft.template.streams import UnitStreams, check_unit_options, flatten_units, sum_problem
from usdm_sft.utils.texts import count_noun, quote

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_EMPTY = "units is empty: give one unit or more, or leave out the turn"


class UnitReader:
    """Checks the units of the rows of a corpus, and makes one sequence of each.

    All rows have the same number of streams. It is known from the first one.

    Args:
        unit_rate: Units, or frames of several, per second.
        num_units: Number of units: of every stream, or one number for each stream.
        streams: What is made of several streams, "first" or "flatten".

    Raises:
        ValueError: An option is wrong.
    """

    def __init__(self, unit_rate: float, num_units: int | Sequence[int], streams: str | None):
        check_unit_options(unit_rate, num_units, streams)
        self._rate, self._num_units, self._name = float(unit_rate), num_units, streams
        self._streams: UnitStreams | None = None
        self._first_place = ""
        self._is_refused = False

    @property
    def streams(self) -> UnitStreams:
        """The units of the corpus, after its rows were read without a problem."""
        assert self._streams is not None  # a corpus has a row
        return self._streams

    def read(self, value: Any, place: str) -> npt.NDArray[np.uint16] | str:
        """Read the units of a row.

        Args:
            value: A list of units, or a list of frames, which are lists of one unit of each stream; or an array of integers, (num_units,)
                or (num_frames, num_streams).
            place: The place of the row in errors.

        Returns:
            (num_units,) units, or what is wrong with them. A problem of all rows is told of the first one.
        """
        import numpy as np

        if isinstance(value, np.ndarray):
            flat, width = value.reshape(-1), 1 if value.ndim == 1 else value.shape[1]
            problem = None if len(flat) else _EMPTY
        else:
            flat, width, problem = _read_list(value)
        if problem is not None:
            return problem
        if self._streams is None:
            self._first_place = place
            self._streams, problem = self._find_streams(width)
            if problem is not None:
                self._is_refused = True
                return problem
        assert self._streams is not None
        if width != len(self._streams.num_units):
            found, before = (count_noun(each, "unit") for each in (width, len(self._streams.num_units)))
            return f"units has {found} in a frame, but {before} at {self._first_place}: give every row the same streams"
        if self._is_refused:  # as was told of the first row
            return np.zeros(0, np.uint16)
        if problem := _find_outside(flat, self._streams.num_units):
            return problem
        if len(self._streams.kept) == 1:
            return np.array(flat[::width], np.uint16)
        return flatten_units(np.asarray(flat, np.int64).reshape(-1, width), self._streams.num_units)

    def _find_streams(self, width: int) -> tuple[UnitStreams, str | None]:
        """Return the streams of a corpus whose frames have so many units, and what is wrong with them."""
        num_units = self._num_units
        sizes = (num_units,) * width if isinstance(num_units, int) else tuple(num_units)
        name: Any = None if width == 1 else self._name or "first"
        found = UnitStreams(self._rate, (sizes + sizes[:1] * width)[:width], name)
        if len(sizes) != width:
            return found, (
                f"units has {count_noun(width, 'unit')} in a frame, but num_units names {count_noun(len(sizes), 'stream')}: give one number "
                "for all streams, or one for each"
            )
        if width > 1 and self._name is None:
            return found, (
                f"units has frames of {width} units: choose with --streams first (stream 0 alone) or flatten (all streams, frame by frame)"
            )
        return found, sum_problem(found)


def make_reader(
    unit_rate: float | None, num_units: int | Sequence[int] | None, streams: str | None
) -> UnitReader | None:
    """Return what reads the units of a corpus, or None if none are wanted. Same errors as `check_unit_options`."""
    check_unit_options(unit_rate, num_units, streams)
    return None if unit_rate is None or num_units is None else UnitReader(unit_rate, num_units, streams)


def _read_list(value: Any) -> tuple[Any, int, str | None]:
    """Return the units of a value of JSON in one list, how many of them are in a frame, and what is wrong with its form."""
    if not isinstance(value, list):
        return [], 1, f"units {quote(str(value))} is not a list: give a list of whole numbers, or of frames of them"
    if not value:
        return [], 1, _EMPTY
    flat, width = value, 1
    if isinstance(value[0], list):
        width = len(value[0])
        for number, frame in enumerate(value):
            if not isinstance(frame, list) or len(frame) != width or not frame:
                has = f"has {count_noun(len(frame), 'unit')}" if isinstance(frame, list) else f"is {quote(str(frame))}"
                remedy = "give one unit of each stream in each frame"
                return [], width, f"frame {number} of units {has}, the first one {width}: {remedy}"
        flat = list(chain.from_iterable(value))
    if {*map(type, flat)} != {int}:
        position = next(position for position, unit in enumerate(flat) if type(unit) is not int)
        return [], width, f"units holds {quote(str(flat[position]))} at position {position}: give whole numbers"
    return flat, width, None


def _find_outside(flat: Sequence[int] | np.ndarray, sizes: Sequence[int]) -> str | None:
    """Return which unit is not one of its stream, or None."""
    import numpy as np

    if isinstance(flat, np.ndarray):
        if flat.min() >= 0 and (flat.reshape(-1, len(sizes)).max(axis=0) < np.array(sizes)).all():
            return None
        flat = flat.tolist()
    elif min(flat) >= 0 and max(flat) < min(sizes):
        return None
    for position, unit in enumerate(flat):
        stream = position % len(sizes)
        if not 0 <= unit < sizes[stream]:
            where = f"position {position}" if len(sizes) == 1 else f"frame {position // len(sizes)}, stream {stream}"
            return f"units has {quote(str(unit))} at {where}, not a number from 0 to {sizes[stream] - 1:,}: correct it, or --num_units"
    return None
