"""Read the Parquet files of a dataset folder. They may be untrusted: columns, types and missing values are checked first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from usdm_sft.corpus.features import are_collapsed, folder_features
from usdm_sft.folder.layout import PREPARE_AGAIN, data_files, read_counts
from usdm_sft.utils.texts import first_line


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
