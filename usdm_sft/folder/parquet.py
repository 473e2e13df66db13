"""Write the rows into Parquet files, which processes or tasks share out."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
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
from usdm_sft.utils.memory import give_back_memory

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


class FileTask(NamedTuple):
    """An output file to write.

    Attributes:
        split: Such as "train".
        path: The file.
        part: Describes its rows.
    """

    split: str
    path: Path
    part: Any


class WrittenFile(NamedTuple):
    """An output file, and what it adds to the folder."""

    path: Path
    num_bytes: int  # in memory
    counts: Any  # the statistics of its rows, or the counts of its utterances
    sha256: str


class WrittenSplit(NamedTuple):
    """The output files of a split, in order, and what they add up to."""

    digests: dict[Path, str]  # sha256 of each file
    num_bytes: int  # in memory
    statistics: SplitStatistics


def write_files(
    folder: Path,
    tasks: Sequence[FileTask],
    write: Callable[[FileTask, Path], tuple[int, Any]],
    pool: Pool,
    *,
    name: str,
    key: str,
) -> list[WrittenFile]:
    """Write the Parquet files of a config.

    Args:
        folder: Where the files go. It may hold files of an interrupted run; those that have another name are removed.
        tasks: The files.
        write: Writes a file under another name; returns its size in memory, and its counts. It is pickled.
        pool: Shares out the files, whose bytes do not depend on it.
        name: Name of the files, for messages.
        key: Key of all that decides the files.

    Returns:
        The written files, in the order of the tasks.
    """
    folder.mkdir(exist_ok=True)
    keys = [cache_key(key, str(task.path)) for task in tasks]
    made = dict(pool.map(partial(_write_file, write), tasks, name=name, keys=keys, is_valid=_is_whole))
    for path in {*folder.iterdir()} - {task.path for task in tasks}:
        path.unlink()
    return [made[index] for index in range(len(tasks))]


def _write_file(write: Callable[[FileTask, Path], tuple[int, Any]], task: FileTask) -> WrittenFile:
    # A task of the same run with another executor may write this file at the same time. Each file is complete when it gets the name.
    unfinished = task.path.with_name(f"{task.path.name}.{uuid.uuid4().hex}{SUFFIX}")
    num_bytes, counts = write(task, unfinished)
    written = WrittenFile(task.path, num_bytes, counts, sha256_file(unfinished))
    os.replace(unfinished, task.path)
    give_back_memory()
    return written


def _is_whole(file: WrittenFile) -> bool:
    """Return True if the file that an earlier run wrote is still there, unchanged."""
    return file.path.is_file() and sha256_file(file.path) == file.sha256


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
        folder: As in `write_files`.
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
    tasks: list[FileTask] = []
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
            tasks.append(FileTask(split, path, rows.part(start, stop)))
    write = partial(_write_rows, {split: rows.loader for split, rows in splits.items()}, layout)
    files = write_files(folder, tasks, write, pool, name="Parquet files", key=key)
    written = {split: WrittenSplit({}, 0, SplitStatistics()) for split in splits}
    for task, file in zip(tasks, files, strict=True):
        digests, num_bytes, statistics = written[task.split]
        digests[file.path] = file.sha256
        statistics.merge(file.counts)
        written[task.split] = WrittenSplit(digests, num_bytes + file.num_bytes, statistics)
    return written


def _start(index: int, num_rows: int, num_files: int) -> int:
    """Return the first row of a file; the first files have one row more than the others, as with `Dataset.shard`."""
    return num_rows // num_files * index + min(index, num_rows % num_files)


def _write_rows(
    loaders: Mapping[str, Callable[[Any], pa.Table]], layout: RowLayout, task: FileTask, path: Path
) -> tuple[int, SplitStatistics]:
    """Write the rows of one file; its statistics are those of the rows that can be read from it."""
    rows = _with_trainer_columns(loaders[task.split](task.part))
    num_bytes = sum(map(count_bytes, rows.columns))
    group = max(1, len(rows) * _GROUP_BYTES // num_bytes)
    # `Dataset.to_parquet` of datasets 5 writes the same file, but for the schema. Content-defined pages let the Hub store equal
    # rows of two versions once.
    pq.write_table(rows, path, group, use_content_defined_chunking=True, write_page_index=True)
    return num_bytes, compute_statistics({"": [path]}, layout)[""]


def _with_trainer_columns(rows: pa.Table) -> pa.Table:
    """Return the rows of one output file, with `TRAINER_COLUMNS` at the end. What lies in files of the cache is not copied."""
    lists, collapsed = pa.types.is_list(rows.schema.field("user_text").type), are_collapsed(rows.column_names)
    features = folder_features(lists=lists, collapsed=collapsed)
    lengths = pc.list_value_length(rows["input_ids"]).to_numpy()
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int32())
    ones = pa.ListArray.from_arrays(offsets, pa.array(np.ones(lengths.sum(), np.int8)))
    return pa.table([*rows.columns, ones, pa.array(lengths)], arrow_schema(features))


def count_bytes(column: pa.Array | pa.ChunkedArray) -> int:
    """Return the size of a column without nulls in memory; `Table.nbytes` also counts masks of nulls, which depend on the history."""
    if pa.types.is_list(column.type):
        return 4 * len(column) + count_bytes(pc.list_flatten(column))
    if pa.types.is_string(column.type):
        return 4 * len(column) + int(pc.sum(pc.binary_length(column)).as_py())
    return len(column) * int(column.type.bit_width) // 8
