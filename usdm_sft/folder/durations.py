"""The durations of collapsed units in the rows of a dataset folder: checked, and used to restore the units of every frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from usdm_sft.audio.frames import SAMPLE_RATE, count_units
from usdm_sft.corpus.features import ROLES, are_collapsed
from usdm_sft.template.parts import RowLayout
from usdm_sft.template.repetition import expand_units, find_problem

_CHECKED = ("units", "durations", "seconds")


def describe_missing(schema: pa.Schema, unit_repetition: str) -> str | None:
    """Say why the columns do not fit the setting, or None where they do."""
    if are_collapsed(schema.names) == (unit_repetition == "collapse"):
        return None
    has = "no durations" if unit_repetition == "collapse" else "durations"
    return f"it has {has}, but counts.json says unit_repetition {unit_repetition}"


def find_wrong_durations(rows: pa.RecordBatch, normalization: str) -> set[int]:
    """Find the rows of a batch whose collapsed units do not restore the frames of the recordings."""
    names = [f"{role}_{name}" for role in ROLES for name in _CHECKED]
    return {
        position
        for position, row in enumerate(rows.select(names).to_pylist())
        if next(duration_problems(row, normalization), None) is not None
    }


def duration_problems(row: Mapping[str, Any], normalization: str) -> Iterator[str]:
    """Yield what is wrong with the collapsed units of a row: equal neighbours, or durations that are not the frames of the recording.

    Args:
        row: A row with collapsed units.
        normalization: How the unit model normalizes waveforms.
    """
    for role in ROLES:
        columns = [row[f"{role}_{name}"] for name in _CHECKED]
        if not isinstance(columns[2], list):
            columns = [[value] for value in columns]
        if len({len(column) for column in columns}) != 1:
            yield f"{role}_units, {role}_durations and {role}_seconds have different numbers of exchanges"
            continue
        for units, durations, seconds in zip(*columns, strict=True):
            if problem := find_problem(units, durations):
                yield f"{role}_units: {problem}"
            elif not _may_last(total := sum(durations), seconds, normalization):
                yield f"{role}_durations add up to {total} frames, which is not the length of a recording of {seconds:g} s"


def _may_last(frames: int, seconds: float, normalization: str) -> bool:
    """True if a recording of `seconds`, a length that was rounded to float32, can have that many frames.

    The samples are known up to 17 minutes (2^24 samples); beyond, some more or fewer are possible.
    """
    if not math.isfinite(seconds):
        return False
    rounding = float(np.spacing(np.float32(seconds))) / 2
    fewest, most = math.ceil(SAMPLE_RATE * (seconds - rounding)), math.floor(SAMPLE_RATE * (seconds + rounding))
    return count_units(fewest, normalization) <= frames <= count_units(most, normalization)


def expand_rows(rows: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose columns `*_units` have one unit per frame, without `*_durations`.

    Args:
        rows: A row with collapsed units.
    """
    expanded = {name: value for name, value in rows.items() if not name.endswith("_durations")}
    for role in ROLES:
        units, durations = rows[f"{role}_units"], rows[f"{role}_durations"]
        lists = bool(durations) and isinstance(durations[0], list)
        expanded[f"{role}_units"] = (
            [expand_units(*each).tolist() for each in zip(units, durations, strict=True)]
            if lists
            else expand_units(units, durations).tolist()
        )
    return expanded


def expand_ids(row: Mapping[str, Any], layout: RowLayout) -> dict[str, Any]:
    """A row whose `input_ids` and `labels` repeat each unit as often as it did before it was collapsed.

    Args:
        row: The columns of a dataset folder with collapsed units.
        layout: Tells which ids are units, and the parts of the template.

    Raises:
        ValueError: The units have no durations, or not one duration each.
    """
    if not are_collapsed(row):
        raise ValueError("the units of this folder are not collapsed: leave out --expand")
    spoken = [row[part.replace("units", "durations")] for part in layout.template.parts if part.endswith("_units")]
    if spoken and isinstance(row["user_text"], list):
        spoken = [durations for exchange in zip(*spoken, strict=True) for durations in exchange]
    ids = np.asarray(row["input_ids"])
    times: npt.NDArray[np.int64] = np.ones(len(ids), np.int64)
    is_unit = layout.is_unit(ids)
    durations = np.concatenate([np.zeros(0, np.int64), *spoken])
    if is_unit.sum() != len(durations):
        raise ValueError(
            f"row {row['id']} has {is_unit.sum()} units, but {len(durations)} durations: verify its folder"
        )
    times[is_unit] = durations
    repeated = {name: np.repeat(np.asarray(row[name]), times).tolist() for name in ("input_ids", "labels")}
    return dict(row) | repeated
