"""Find rows that repeat an id, with memory that does not grow with the number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from usdm_sft.folder.sorted_digests import iter_stretches


class Place(NamedTuple):
    """A row: the number of its range, and its number in the range."""

    range: int
    row: int


def find_repeated(files: Sequence[Path], limit: int) -> list[tuple[Place, Place]]:
    """Find the rows whose id an earlier row has.

    Args:
        files: The digests of the ids of each range, in order, as `write_digests` writes them.
        limit: Largest number of rows to find.

    Returns:
        The first rows, in order, each with the nearest earlier row of the same id.
    """
    found: list[tuple[Place, Place]] = []
    for parts in iter_stretches(files):
        ranges = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        digests = np.concatenate(parts)
        order = np.lexsort((digests["low"], digests["high"]))  # stable: equal digests stay in the order of the rows
        ordered = digests[order][["high", "low"]]
        equal = np.flatnonzero(ordered[1:] == ordered[:-1])
        rows, before = order[equal + 1], order[equal]
        chosen = np.lexsort((digests["row"][rows], ranges[rows]))[:limit]
        places = [
            [Place(*place) for place in zip(ranges[each].tolist(), digests["row"][each].tolist(), strict=True)]
            for each in (rows[chosen], before[chosen])
        ]
        found = sorted([*found, *zip(*places, strict=True)])[:limit]
    return found
