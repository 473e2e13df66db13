"""Read the Parquet files of a dataset folder, whole or in ranges that processes share out.

The files may be untrusted: columns, types and missing values are checked first. `expand_rows` and `expand_ids` restore the units of
every frame in rows with collapsed units.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from usdm_sft.corpus.features import ROLES, SPEECH, TEXTS, are_collapsed, folder_features, utterance_features
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.folder.layout import PREPARE_AGAIN, data_files, read_counts
from usdm_sft.template.parts import RowLayout
from usdm_sft.template.repetition import expand_units
from usdm_sft.utils.processes import ProcessPool, in_order, num_cores
from usdm_sft.utils.texts import first_line

ROWS_PER_RANGE = 20_000  # a range has fewer, or is one row group; what is kept of a range waits for those before it
_UTTERANCES_PER_BATCH = 100
ROWS_PER_PROCESS = 20_000  # a process takes a few seconds to start, in which this one checks about as many rows


def open_rows(path: Path) -> pq.ParquetFile:
    """Open a Parquet file that has every column of a dataset folder.

    Raises:
        ValueError: The file is not a Parquet file, or a column is missing or has another type.
    """
    with reading_errors(path, "is not a Parquet file"):
        file = pq.ParquetFile(path)
    schema = file.schema_arrow
    lists = "user_text" in schema.names and pa.types.is_list(schema.field("user_text").type)
    for expected in folder_features(lists=lists, collapsed=are_collapsed(schema.names)).arrow_schema:
        if expected.name not in schema.names:
            raise ValueError(f"{path} has no column {expected.name}: {PREPARE_AGAIN}")
        found = schema.field(expected.name).type
        if _unwrap(found) != _unwrap(expected.type):
            raise ValueError(f"{path}: column {expected.name} is of type {found}: {PREPARE_AGAIN}")
    return file


def open_utterances(path: Path) -> pq.ParquetFile:
    """Open a Parquet file of the config `utterances`.

    Raises:
        ValueError: The file is not a Parquet file, or has other columns.
    """
    with reading_errors(path):
        file = pq.ParquetFile(path)
    if not file.schema_arrow.equals(utterance_features(_further(file)).arrow_schema):
        raise ValueError(f"{path} does not have the columns of the config {UTTERANCES}: {PREPARE_AGAIN}")
    return file


def _further(file: pq.ParquetFile) -> list[str]:
    """Return the further columns of a file of the config `utterances`."""
    return [name for name in file.schema_arrow.names if name not in utterance_features()]


def iter_utterances(path: Path, row_groups: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the rows of row groups of a Parquet file of the config `utterances`.

    Raises:
        ValueError: The error of `open_utterances`, or the file is damaged, or a value is missing.
    """
    file = open_utterances(path)
    texts = ("dialog", "turn", *TEXTS, *_further(file))
    with reading_errors(path):
        for batch in file.iter_batches(batch_size=_UTTERANCES_PER_BATCH, row_groups=row_groups):
            for row in batch.to_pylist():
                spoken = [row[name] is not None for name in ("audio", *SPEECH)]  # none where bad audio was left out
                if any(row[name] is None for name in texts) or any(spoken) != all(spoken):
                    raise ValueError(f"{path}: a value of {row['dialog']}_{row['turn']} is missing: {PREPARE_AGAIN}")
                if row["audio"] is not None and row["audio"]["bytes"] is None:
                    raise ValueError(f"{path}: {row['dialog']}_{row['turn']} has no recording: {PREPARE_AGAIN}")
                yield row


@contextmanager
def reading_errors(path: Path, problem: str = "is damaged") -> Iterator[None]:
    """Turn the errors of reading a Parquet file into a ValueError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} {problem} ({first_line(error)}): {PREPARE_AGAIN}") from error


def flatten_lists(column: pa.Array) -> pa.Array:
    """Return the innermost values of a column."""
    while pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    return column


def count_exchanges(rows: pa.RecordBatch) -> npt.NDArray[np.integer]:
    """Return the number of exchanges of each row, (num_rows,)."""
    texts = rows["user_text"]
    return np.asarray(pc.list_value_length(texts)) if pa.types.is_list(texts.type) else np.ones(len(rows), np.int64)


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
    for each in divide_files({split: data_files(dataset_dir, counts)[split]}):
        stop = start + each.num_rows
        if start < index + num_examples and index < stop:
            first = max(index - start, 0)
            table = pa.Table.from_batches(each.read())
            rows += table.slice(first, index + num_examples - start - first).to_pylist()
        start = stop
    if index < 0 or not rows:
        raise IndexError(
            f"split {split} of {dataset_dir} has {start} rows and no row {index}: name one from 0 to {start - 1}"
        )
    return rows


class RowRange(NamedTuple):
    """Rows of one Parquet file, which one process reads."""

    split: str
    path: Path
    row_groups: range
    start: int  # number of the first row in the file
    num_rows: int

    def read(self, *, batch_size: int = 256, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches of at most `batch_size`, with all columns by default.

        Raises:
            ValueError: The error of `open_rows`, or the file is damaged, or a value is missing.
        """
        file = open_rows(self.path)
        with reading_errors(self.path):
            for batch in file.iter_batches(batch_size=batch_size, columns=columns, row_groups=self.row_groups):
                for name in batch.schema.names:
                    if _has_nulls(batch[name]):
                        raise ValueError(f"{self.path}: a value of column {name} is missing: {PREPARE_AGAIN}")
                yield batch

    def read_row(self, number: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Read one row of the range again."""
        for batch in self.read(columns=columns):
            if number < len(batch):
                [row] = batch.slice(number, 1).to_pylist()
                return dict(row)
            number -= len(batch)
        raise IndexError(f"{self.path} has fewer rows than before")


def divide_files(files: Mapping[str, Sequence[Path]]) -> list[RowRange]:
    """Divide the rows of the files of each split. Same errors as `divide_rows`."""
    return [rows for split, paths in files.items() for path in paths for rows in divide_rows(path, split)]


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


def find_row(ranges: Sequence[RowRange], number: int) -> tuple[RowRange, int]:
    """Return the range that has a row, counted from the first row of the first range, and the number of the row in it."""
    for rows in ranges:
        if number < rows.num_rows:
            return rows, number
        number -= rows.num_rows
    raise IndexError("the ranges have fewer rows")


def name_row(ranges: Sequence[RowRange], number: int) -> str:
    """Name a row, whose id is read again, by its file, its number in the file, and its id."""
    rows, position = find_row(ranges, number)
    return f"{rows.path}: row {rows.start + position} ({rows.read_row(position, ['id'])['id']})"


def check_num_proc(num_proc: int | None) -> None:
    """Check the largest number of processes.

    Raises:
        ValueError: It is not positive.
    """
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}: give a positive number")


def count_processes(ranges: Sequence[RowRange], num_proc: int | None, rows_per_process: int | None = None) -> int:
    """Choose the number of processes for all ranges; one for few rows.

    Args:
        ranges: All ranges.
        num_proc: Largest number; None means one per core that this process may use.
        rows_per_process: Rows for which a process is worth its start; by default `ROWS_PER_PROCESS`.
    """
    check_num_proc(num_proc)
    return min(num_proc or num_cores(), sum(each.num_rows for each in ranges) // (rows_per_process or ROWS_PER_PROCESS))


def map_ranges(
    function: Callable[[RowRange], Any],
    ranges: Sequence[RowRange],
    *,
    name: str,
    num_proc: int | None,
    rows_per_process: int | None = None,
) -> Generator[tuple[RowRange, Any], None, None]:
    """Call a function with each range, in the processes that `count_processes` allows.

    Yields:
        The range and the result, in the order of the ranges.
    """
    with ProcessPool(count_processes(ranges, num_proc, rows_per_process)) as pool:
        for index, result in in_order(pool.map(function, ranges, name=name)):
            yield ranges[index], result


def expand_rows(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with collapsed units as one whose columns `*_units` have one unit per frame, without `*_durations`."""
    expanded = {name: value for name, value in row.items() if not name.endswith("_durations")}
    for role in ROLES:
        units, durations = row[f"{role}_units"], row[f"{role}_durations"]
        expanded[f"{role}_units"] = (
            [expand_units(*each).tolist() for each in zip(units, durations, strict=True)]
            if isinstance(row["user_text"], list)
            else expand_units(units, durations).tolist()
        )
    return expanded


def expand_ids(row: Mapping[str, Any], layout: RowLayout) -> dict[str, Any]:
    """Return a row whose `input_ids` and `labels` repeat each unit as often as it did before it was collapsed.

    Raises:
        ValueError: The units have no durations, or not one duration each.
    """
    if not are_collapsed(row):
        raise ValueError("the units of this folder are not collapsed: leave out --expand")
    spoken = [row[part.replace("units", "durations")] for part in layout.template.parts if part.endswith("_units")]
    if spoken and isinstance(row["user_text"], list):
        spoken = [durations for exchange in zip(*spoken, strict=True) for durations in exchange]
    ids = np.asarray(row["input_ids"])
    is_unit, durations = layout.is_unit(ids), np.concatenate([np.zeros(0, np.int64), *spoken])
    if is_unit.sum() != len(durations):
        found = f"{is_unit.sum()} units, but {len(durations)} durations"
        raise ValueError(f"row {row['id']} has {found}: verify its folder")
    times: npt.NDArray[np.int64] = np.ones(len(ids), np.int64)
    times[is_unit] = durations
    repeated = {name: np.repeat(np.asarray(row[name]), times).tolist() for name in ("input_ids", "labels")}
    return dict(row) | repeated
