"""Read the Parquet files of a dataset folder, whole or in ranges that processes share out.

The files may be untrusted: columns, types and missing values are checked first. `expand_rows` and `expand_ids` restore the units of
every frame in rows with collapsed units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from usdm_sft.corpus.features import ROLES, are_collapsed, folder_features
from usdm_sft.folder.layout import PREPARE_AGAIN, data_files, read_counts
from usdm_sft.template.parts import RowLayout
from usdm_sft.template.repetition import expand_units
from usdm_sft.utils.processes import num_cores
from usdm_sft.utils.texts import first_line

ROWS_PER_RANGE = 20_000  # a range has fewer, or is one row group; what is kept of a range waits for those before it
ROWS_PER_PROCESS = 20_000  # a process takes a few seconds to start, in which this one checks about as many rows


def open_rows(path: Path) -> pq.ParquetFile:
    """Open a Parquet file that has every column of a dataset folder.

    Raises:
        ValueError: The file is not a Parquet file, or a column is missing or has another type.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file ({first_line(error)}): {PREPARE_AGAIN}") from error
    schema = file.schema_arrow
    lists = "user_text" in schema.names and pa.types.is_list(schema.field("user_text").type)
    for expected in folder_features(lists=lists, collapsed=are_collapsed(schema.names)).arrow_schema:
        if expected.name not in schema.names:
            raise ValueError(f"{path} has no column {expected.name}: {PREPARE_AGAIN}")
        found = schema.field(expected.name).type
        if _unwrap(found) != _unwrap(expected.type):
            raise ValueError(f"{path}: column {expected.name} is of type {found}: {PREPARE_AGAIN}")
    return file


def iter_rows(
    path: Path,
    *,
    batch_size: int = 256,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a Parquet file in batches.

    Args:
        path: The file.
        batch_size: Largest number of rows in a batch.
        columns: Columns to read; all by default.
        row_groups: Row groups to read; all by default.

    Raises:
        ValueError: The error of `open_rows`, or the file is damaged, or a value is missing.
    """
    file = open_rows(path)
    groups = None if row_groups is None else list(row_groups)
    try:
        for batch in file.iter_batches(batch_size=batch_size, columns=columns, row_groups=groups):
            for name in batch.schema.names:
                if _has_nulls(batch[name]):
                    raise ValueError(f"{path}: a value of column {name} is missing: {PREPARE_AGAIN}")
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): {PREPARE_AGAIN}") from error


def _unwrap(kind: pa.DataType) -> tuple[pa.DataType, int]:
    """The innermost type, and the number of lists around it."""
    depth = 0
    while pa.types.is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return kind, depth


def _has_nulls(column: pa.Array) -> bool:
    while not column.null_count and pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    return bool(column.null_count)


def read_rows(dataset_dir: str | Path, split: str, index: int, num_examples: int) -> list[dict[str, Any]]:
    """Rows `index` to `index + num_examples` of a split, fewer at its end.

    Raises:
        FileNotFoundError: `dataset_dir` is not a finished dataset folder, or one of its files is missing.
        IndexError: The split has no row `index`.
        ValueError: The folder has no such split, or a file is damaged.
    """
    counts = read_counts(dataset_dir)
    if split not in counts["splits"]:
        raise ValueError(f"{dataset_dir} has no split {split!r}: name one of {', '.join(counts['splits'])}")
    rows: list[dict[str, Any]] = []
    start = 0
    for path in data_files(dataset_dir, counts)[split]:
        stop = start + open_rows(path).metadata.num_rows
        if start < index + num_examples and index < stop:
            first = max(index - start, 0)
            table = pa.Table.from_batches(iter_rows(path))
            rows += table.slice(first, index + num_examples - start - first).to_pylist()
        start = stop
    if index < 0 or not rows:
        raise IndexError(
            f"split {split} of {dataset_dir} has {start} rows and no row {index}: name one from 0 to {start - 1}"
        )
    return rows


class RowRange(NamedTuple):
    """Rows of one Parquet file, which one process reads.

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
        """Yield the rows in batches. Same arguments and errors as `iter_rows`."""
        return iter_rows(self.path, batch_size=batch_size, columns=columns, row_groups=self.row_groups)

    def read_row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Read one row of the range again."""
        for batch in self.read(columns=columns):
            if number < len(batch):
                [row] = batch.slice(number, 1).to_pylist()
                return dict(row)
            number -= len(batch)
        raise IndexError(f"{self.path} has fewer rows than before")


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


def check_num_proc(num_proc: int | None) -> None:
    """Check the largest number of processes.

    Raises:
        ValueError: It is not positive.
    """
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}: give a positive number")


def count_processes(ranges: Sequence[RowRange], num_proc: int | None, rows_per_process: int | None = None) -> int:
    """Choose the number of processes for ranges; one for few rows.

    Args:
        ranges: All ranges.
        num_proc: Largest number; None means one per core that this process may use.
        rows_per_process: Rows for which a process is worth its start; by default `ROWS_PER_PROCESS`.

    Raises:
        ValueError: `num_proc` is not positive.
    """
    check_num_proc(num_proc)
    return min(num_proc or num_cores(), sum(each.num_rows for each in ranges) // (rows_per_process or ROWS_PER_PROCESS))


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
