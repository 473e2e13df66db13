"""Write the rows into Parquet files, which processes or tasks share out."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from usdm_sft.corpus.features import are_collapsed, arrow_schema, folder_features
from usdm_sft.folder.statistics import SplitStatistics, compute_statistics
from usdm_sft.template.parts import RowLayout
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.files import SUFFIX, sha256_file
from usdm_sft.utils.lazily import Lazily
from usdm_sft.utils.memory import give_back_memory
from usdm_sft.utils.processes import in_order

if TYPE_CHECKING:
    from usdm_sft.utils.pool import Pool

NUM_OUTPUT_SHARDS = {"train": 64, "test": 8}
# Mean number in the output files of a split, unless the user sets the number of files. A file of so many takes 90 MB.
MAX_TOKENS = 20_000_000
_GROUP_BYTES = 100_000_000  # in memory, of a row group, as `Dataset.to_parquet` writes
_MOST_TOKENS = 2**31 - 1  # of a file: positions in a column of lists are int32


class SplitRows(Protocol):
    """The rows of a split, which are loaded part by part."""

    @property
    def num_rows(self) -> int:
        """Number of rows, at least one."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all rows."""

    @property
    def loader(self) -> Callable[[Any], pa.Table]:
        """Loads a part, with all columns but `TRAINER_COLUMNS`. It is pickled once for all parts."""

    def part(self, start: int, stop: int) -> Any:
        """Describe rows `start` to `stop`, for `loader`. It is pickled."""


class WrittenFile(NamedTuple):
    """An output file, and what it adds to the folder."""

    path: Path
    num_bytes: int  # in memory
    statistics: SplitStatistics
    sha256: str


class WrittenSplit(NamedTuple):
    """The output files of a split, in order, and what they add up to."""

    digests: dict[Path, str]  # sha256 of each file
    num_bytes: int  # in memory
    statistics: SplitStatistics


def write_parquet(
    folder: Path,
    splits: Mapping[str, SplitRows],
    num_output_shards: int | None,
    layout: RowLayout,
    pool: Pool,
    *,
    key: str,
) -> dict[str, WrittenSplit]:
    """Write the rows of each split, with `TRAINER_COLUMNS`, into files.

    Args:
        folder: Where the files go. It may hold files of an interrupted run; those that have another name are removed.
        splits: The rows.
        num_output_shards: Files per split, never more than rows; by default those of `NUM_OUTPUT_SHARDS`, or more if these
            would have more than `MAX_TOKENS` each.
        pool: Shares out the files, whose bytes do not depend on it.
        key: Key of the rows and of all else that decides the files.

    Returns:
        The files of each split.

    Raises:
        ValueError: `num_output_shards` puts more tokens into a file than it can hold.
    """
    folder.mkdir(exist_ok=True)
    tasks: list[_Task] = []
    for split, rows in splits.items():
        default = max(NUM_OUTPUT_SHARDS.get(split, 8), -(-rows.num_tokens // MAX_TOKENS))
        num_files = max(1, min(num_output_shards or default, rows.num_rows))
        if rows.num_tokens // num_files > _MOST_TOKENS:
            raise ValueError(
                f"num_output_shards {num_output_shards} puts {rows.num_tokens // num_files:,} tokens of {split} into each file, "
                f"more than the {_MOST_TOKENS:,} that one can hold: raise it to {-(-rows.num_tokens // MAX_TOKENS):,}"
            )
        for index in range(num_files):
            path = folder / f"{split}-{index:05d}-of-{num_files:05d}.parquet"
            start, stop = (_start(number, rows.num_rows, num_files) for number in (index, index + 1))
            tasks.append(_Task(split, path, start, stop, cache_key(key, str(path))))

    def describe(index: int) -> tuple[_Task, Any]:
        task = tasks[index]
        return task, splits[task.split].part(task.start, task.stop)

    write = partial(_write_part, {split: rows.loader for split, rows in splits.items()}, layout)
    keys = [task.key for task in tasks]
    parts = Lazily(describe, len(tasks))
    written = {split: WrittenSplit({}, 0, SplitStatistics()) for split in splits}
    for index, part in in_order(pool.map(write, parts, name="Parquet files", keys=keys, holds=_is_whole)):
        digests, num_bytes, statistics = written[tasks[index].split]
        digests[part.path] = part.sha256
        statistics.merge(part.statistics)
        written[tasks[index].split] = WrittenSplit(digests, num_bytes + part.num_bytes, statistics)
    for path in {*folder.iterdir()} - {task.path for task in tasks}:
        path.unlink()
    return written


def _start(index: int, num_rows: int, num_files: int) -> int:
    """Return the first row of a file; the first files have one row more than the others, as with `Dataset.shard`."""
    return num_rows // num_files * index + min(index, num_rows % num_files)


class _Task(NamedTuple):
    """An output file to write: rows `start` to `stop` of a split."""

    split: str
    path: Path
    start: int
    stop: int
    key: str


def _write_part(
    loaders: Mapping[str, Callable[[Any], pa.Table]], layout: RowLayout, described: tuple[_Task, Any]
) -> WrittenFile:
    """Write one file; its statistics are those of the rows that can be read from it."""
    task, part = described
    path = task.path
    # A task of the same run with another executor may write this file at the same time. Each file is complete when it gets the name.
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}{SUFFIX}")
    rows = _with_trainer_columns(loaders[task.split](part))
    num_bytes = sum(map(_count_bytes, rows.columns))
    group = max(1, len(rows) * _GROUP_BYTES // num_bytes)
    # `Dataset.to_parquet` of datasets 5 writes the same file, but for the schema. Content-defined pages let the Hub store equal
    # rows of two versions once.
    pq.write_table(rows, unfinished, group, use_content_defined_chunking=True, write_page_index=True)
    written = WrittenFile(path, num_bytes, compute_statistics({"": [unfinished]}, layout)[""], sha256_file(unfinished))
    os.replace(unfinished, path)
    give_back_memory()
    return written


def _is_whole(part: WrittenFile) -> bool:
    """Return True if the file that an earlier run wrote is still there, unchanged."""
    return part.path.is_file() and sha256_file(part.path) == part.sha256


def _with_trainer_columns(rows: pa.Table) -> pa.Table:
    """Return the rows of one output file, with `TRAINER_COLUMNS` at the end. What lies in files of the cache is not copied."""
    lists, collapsed = pa.types.is_list(rows.schema.field("user_text").type), are_collapsed(rows.column_names)
    features = folder_features(lists=lists, collapsed=collapsed)
    lengths = pc.list_value_length(rows["input_ids"]).to_numpy()
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32())
    ones = pa.ListArray.from_arrays(offsets, pa.array(np.ones(lengths.sum(), np.int8)))
    return pa.table([*rows.columns, ones, pa.array(lengths)], arrow_schema(features))


def _count_bytes(column: pa.ChunkedArray) -> int:
    """Return the size of a column without nulls in memory; `Table.nbytes` also counts masks of nulls, which depend on the history."""
    if pa.types.is_list(column.type):
        return 4 * len(column) + _count_bytes(pc.list_flatten(column))
    if pa.types.is_string(column.type):
        return 4 * len(column) + int(pc.sum(pc.binary_length(column)).as_py())
    return len(column) * int(column.type.bit_width) // 8
