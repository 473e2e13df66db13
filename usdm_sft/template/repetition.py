"""Runs of equal units: one unit with its duration, and back.

A unit model gives 50 units per second, and neighbours are often equal. Many recipes train on one unit per run (GSLM, TWIST and others).
The durations restore the units of every frame exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MAX_DURATION = 65_535  # durations are stored as uint16; it is 21 minutes and 50 seconds of one unit


def collapse_units(units: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint16]]:
    """Replace each run of equal units by one unit.

    Args:
        units: (num_frames,) units.

    Returns:
        (num_runs,) units, no two neighbours equal, and the (num_runs,) number of frames of each.

    Raises:
        ValueError: `units` is not a flat list, or a run is longer than 65,535 frames.
    """
    units = np.asarray(units)
    if units.ndim != 1:
        raise ValueError(f"units have {units.ndim} dimensions: give a flat list")
    starts = np.flatnonzero(_starts_run(units))
    durations = np.diff(np.append(starts, len(units)))
    if (longest := int(durations.max(initial=0))) > MAX_DURATION:
        unit = units[starts[durations.argmax()]]
        raise ValueError(
            f"unit {unit} follows itself {longest:,} times, but a duration is at most {MAX_DURATION:,}: leave the recording out, or use "
            "unit_repetition keep"
        )
    return units[starts], durations.astype(np.uint16)


def expand_units(units: npt.ArrayLike, durations: npt.ArrayLike) -> npt.NDArray[Any]:
    """Restore the units of every frame.

    Args:
        units: (num_runs,) collapsed units.
        durations: (num_runs,) numbers of frames.

    Returns:
        (num_frames,) units, with the dtype of `units`.

    Raises:
        ValueError: The numbers of units and durations differ.
    """
    units, durations = np.asarray(units), np.asarray(durations)
    if units.ndim != 1 or units.shape != durations.shape:
        raise ValueError(f"units of shape {units.shape} have durations of shape {durations.shape}: give one per unit")
    return np.repeat(units, durations.astype(np.int64))


def drop_repeats(units: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The units without those that equal the one before; a run may have any length."""
    return units[_starts_run(units)]


def find_problem(units: npt.ArrayLike, durations: npt.ArrayLike) -> str | None:
    """Say why units and durations are not what `collapse_units` returns, or None where they are."""
    units, durations = np.asarray(units), np.asarray(durations)
    if len(units) != len(durations):
        return f"{len(units)} units, but {len(durations)} durations"
    if (repeated := np.flatnonzero(~_starts_run(units))).size:
        return f"unit {units[repeated[0]]} at position {repeated[0]} equals the one before, but the units are collapsed"
    if (empty := np.flatnonzero(durations == 0)).size:
        return f"the duration at position {empty[0]} is 0"
    return None


def _starts_run(units: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    starts = np.ones(len(units), dtype=np.bool_)
    starts[1:] = units[1:] != units[:-1]
    return starts
