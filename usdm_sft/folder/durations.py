"""Restore the units of every frame in the rows of a dataset folder with collapsed units, from their durations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from usdm_sft.corpus.features import ROLES, are_collapsed
from usdm_sft.template.parts import RowLayout
from usdm_sft.template.repetition import expand_units


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
