"""The units of a dataset: their rate, and one sequence of units from several streams.

A codec with several codebooks gives one frame of several units at a time, one unit of each stream. A row needs one sequence:

    frames    [[5, 9, 2], [6, 9, 0]]      three streams of 10 units each
    first     [5, 6]                      stream 0 alone
    flatten   [5, 19, 22, 6, 19, 20]      frame by frame; the units of a stream follow those of the streams before it

No heavy imports, because the command line reads this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from usdm_sft.template.config import MAX_UNITS
from usdm_sft.utils.texts import count_noun

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_RATE = 48_000  # frames per second: one for each sample
UNITS_PER_SECOND = 50.0  # of speech encoders with k-means, such as XLS-R
StreamsName = Literal["first", "flatten"]
EXPECTED_NUM_UNITS = "a whole number, or a list with one for each stream, such as [1024, 1024]"


@dataclass(frozen=True)
class UnitStreams:
    """The units of a dataset: their rate, and the streams that its rows keep.

    Attributes:
        rate: Frames per second.
        num_units: Number of units of each stream.
        streams: "first" or "flatten"; None for one stream.
    """

    rate: float
    num_units: tuple[int, ...]
    streams: StreamsName | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """Number of units of each stream that the rows keep."""
        return self.num_units if self.streams == "flatten" else self.num_units[:1]

    @property
    def units_per_second(self) -> float:
        """Number of units in a second of a row."""
        return self.rate * len(self.kept)

    def count_seconds(self, num_units: int) -> float:
        """Return the seconds of a sequence of so many units, as a row has it."""
        return num_units / len(self.kept) / self.rate

    def find_problem(self, units: npt.ArrayLike) -> str | None:
        """Return why a sequence of units is not one of these streams, or None where it is."""
        if len(self.kept) == 1:
            return None
        try:
            unflatten_units(units, self.kept)
        except ValueError as error:
            return str(error)
        return None

    def settings(self) -> dict[str, Any]:
        """The options as JSON values. `streams` is left out for one stream."""
        streams = {} if self.streams is None else {"streams": self.streams}
        return {"unit_rate": self.rate, "num_units": list(self.num_units), **streams}

    def describe(self) -> str:
        """Return the rate and the streams in words, such as "12.5 frames of 8 units per second"."""
        if len(self.num_units) == 1:
            return f"{self.rate:g} per second"
        if self.streams == "first":
            return f"{self.rate:g} per second, the first of {len(self.num_units)} streams"
        return f"{self.rate:g} frames of {len(self.num_units)} units per second"


def read_streams(counts: Mapping[str, Any]) -> UnitStreams:
    """Return the units of a dataset folder, from the content of counts.json.

    Raises:
        ValueError: Its settings are not what `UnitStreams.settings` returns.
    """
    settings = counts["settings"]
    if "unit_rate" not in settings:  # a speech encoder made them
        return UnitStreams(UNITS_PER_SECOND, (counts["num_units"],))
    rate, num_units, streams = (settings.get(name) for name in ("unit_rate", "num_units", "streams"))
    is_rate = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate <= MAX_RATE
    if not is_rate or not isinstance(num_units, list) or _options_problem(num_units, streams):
        raise ValueError(
            f"unit_rate {rate!r}, num_units {num_units!r} and streams {streams!r} are not units of a dataset"
        )
    assert isinstance(rate, int | float)
    if (streams is None) != (len(num_units) == 1) or sum_problem(
        found := UnitStreams(float(rate), tuple(num_units), streams)
    ):
        raise ValueError(f"num_units {num_units!r} and streams {streams!r} are not units of a dataset")
    return found


def flatten_units(frames: npt.ArrayLike, num_units: Sequence[int]) -> npt.NDArray[np.uint16]:
    """Make one sequence of the units of several streams, frame by frame.

    Args:
        frames: (num_frames, num_streams) units of each frame.
        num_units: Number of units of each stream.

    Returns:
        (num_frames * num_streams,) units. Those of a stream follow the units of the streams before it: with `num_units` of [10, 10], the
        frame [5, 9] is 5, 19.

    Raises:
        ValueError: The shape is another one, a unit is not of its stream, or there are more than 65,536 units in all.
    """
    import numpy as np

    units = _as_integers(frames)
    _check_sum(num_units)
    if units.ndim != 2 or units.shape[1] != len(num_units):
        raise ValueError(f"frames have shape {units.shape}: give {count_noun(len(num_units), 'unit')} for each frame")
    if (wrong := np.argwhere((units < 0) | (units >= np.asarray(num_units)))).size:
        frame, stream = wrong[0].tolist()
        raise ValueError(
            f"unit {units[frame, stream]} of frame {frame} is not of stream {stream}, which has {num_units[stream]:,}: "
            "give the number of units of each stream"
        )
    return (units.astype(np.int64) + _find_starts(num_units)).astype(np.uint16).reshape(-1)


def unflatten_units(units: npt.ArrayLike, num_units: Sequence[int]) -> npt.NDArray[np.int64]:
    """Restore the frames that `flatten_units` made one sequence of, for the decoder of a codec.

    Args:
        units: (num_frames * num_streams,) units, such as `row["agent_units"]` or what a model generated.
        num_units: Number of units of each stream.

    Returns:
        (num_frames, num_streams) int64 units, those of each stream from 0.

    Raises:
        ValueError: The last frame is not complete, or a unit is not of the stream of its position.
    """
    import numpy as np

    flat = _as_integers(units)
    _check_sum(num_units)
    if flat.ndim != 1 or len(flat) % len(num_units):
        shape = f"shape {flat.shape}" if flat.ndim != 1 else count_noun(len(flat), "unit")
        raise ValueError(
            f"{shape} instead of whole frames of {len(num_units)}: leave out the units after the last whole frame"
        )
    frames = flat.astype(np.int64).reshape(-1, len(num_units)) - _find_starts(num_units)
    if (wrong := np.argwhere((frames < 0) | (frames >= np.asarray(num_units)))).size:
        frame, stream = wrong[0].tolist()
        position, first = frame * len(num_units) + stream, int(_find_starts(num_units)[stream])
        raise ValueError(
            f"unit {flat[position]} at position {position} is not of stream {stream}, whose units are {first} to "
            f"{first + num_units[stream] - 1}: the units of every frame follow each other stream by stream"
        )
    return frames


def _as_integers(units: npt.ArrayLike) -> npt.NDArray[Any]:
    import numpy as np

    found = np.asarray(units)
    if found.size and found.dtype.kind not in "iu":
        raise ValueError(f"units are {found.dtype}: give whole numbers")
    return found.astype(np.int64) if not found.size else found


def _find_starts(num_units: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the number of the first unit of each stream in a flattened sequence, (num_streams,)."""
    import numpy as np

    return np.cumsum([0, *num_units[:-1]], dtype=np.int64)


def _check_sum(num_units: Sequence[int]) -> None:
    if not num_units or sum(num_units) > MAX_UNITS:
        raise ValueError(f"num_units is {[*num_units]}: give one for each stream, {MAX_UNITS:,} or fewer in all")


def sum_problem(streams: UnitStreams) -> str | None:
    if (total := sum(streams.kept)) <= MAX_UNITS:
        return None
    remedy = (
        "use streams first"
        if streams.streams == "flatten" and streams.num_units[0] <= MAX_UNITS
        else "use another codec"
    )
    return f"{count_noun(len(streams.kept), 'stream')} with {total:,} units in all, more than the {MAX_UNITS:,} that are stored: {remedy}"


def _options_problem(num_units: Any, streams: Any) -> str | None:
    """Return what is wrong with the options `num_units` and `streams` in themselves."""
    each = num_units if isinstance(num_units, list | tuple) else [num_units]
    if not each or not all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in each):
        return f"num_units is {num_units!r}: give {EXPECTED_NUM_UNITS}"
    if streams not in (None, "first", "flatten"):
        return f"streams {streams!r} is unknown: choose one of first, flatten"
    return None


def check_unit_options(unit_rate: float | None, num_units: int | Sequence[int] | None, streams: str | None) -> None:
    """Check the options for units that the corpus has already.

    Raises:
        ValueError: One is missing or wrong.
    """
    if unit_rate is None:
        given = [name for name, value in (("num_units", num_units), ("streams", streams)) if value is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} given without unit_rate: give the units (or frames) per "
                "second of the column units as well, such as --unit_rate 12.5"
            )
        return
    if not isinstance(unit_rate, int | float) or isinstance(unit_rate, bool) or not 0 < unit_rate <= MAX_RATE:
        raise ValueError(
            f"unit_rate is {unit_rate!r}: give a positive number of units (or frames) per second, at most {MAX_RATE:,}"
        )
    if num_units is None:
        raise ValueError(
            f"unit_rate is {unit_rate:g}, but num_units is missing: give the number of units of the codec or unit model, such as --num_units 2048"
        )
    if problem := _options_problem(num_units, streams):
        raise ValueError(problem)
