"""Ranges of rows of a dataset folder, which processes share out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from usdm_sft.folder.rows import iter_rows, open_rows
from usdm_sft.utils.processes import num_cores

ROWS_PER_RANGE = 20_000  # a range has fewer, or is one row group; what is kept of a range waits for those before it
ROWS_PER_PROCESS = 20_000  # a process takes a few seconds to start, in which this one checks about as many rows


class RowRange(NamedTuple):
    """Rows of one Parquet file.

    Attributes:
        split: Such as "train".
        path: The file.
        row_groups: Numbers of its row groups.
        start: Number of the first row in the file.
        num_rows: Number of rows.
    """

    split: str
    path: Path
    row_groups: range
    start: int
    num_rows: int

    def read(self, *, batch_size: int = 256, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches; arguments and errors as of `iter_rows`."""
        return iter_rows(self.path, batch_size=batch_size, columns=columns, row_groups=self.row_groups)


def divide_rows(path: Path, split: str) -> list[RowRange]:
    """Divide the rows of a file at its row groups.

    Raises:
        ValueError: The error of `open_rows`.
    """
    return divide_groups(path, split, open_rows(path).metadata, ROWS_PER_RANGE)


def divide_groups(path: Path, split: str, metadata: pq.FileMetaData, rows_per_range: int) -> list[RowRange]:
    """Divide a Parquet file at its row groups into ranges that have at most so many rows, or are one row group."""
    ranges: list[RowRange] = []
    first = start = num_rows = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if num_rows and num_rows + size > rows_per_range:
            ranges.append(RowRange(split, path, range(first, group), start, num_rows))
            first, start, num_rows = group, start + num_rows, 0
        num_rows += size
    return [*ranges, RowRange(split, path, range(first, metadata.num_row_groups), start, num_rows)]


def count_processes(ranges: Sequence[RowRange], num_proc: int | None, rows_per_process: int | None = None) -> int:
    """Choose the number of processes for ranges; one for few rows.

    Args:
        ranges: All ranges.
        num_proc: Largest number; None means one per core that this process may use.
        rows_per_process: Rows for which a process is worth its start; by default `ROWS_PER_PROCESS`.

    Raises:
        ValueError: `num_proc` is not positive.
    """
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}: give a positive number")
    return min(num_proc or num_cores(), sum(each.num_rows for each in ranges) // (rows_per_process or ROWS_PER_PROCESS))
