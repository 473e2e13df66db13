"""Write the rows into Parquet files, which processes or tasks share out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.cache.keys import cache_key
from usdm_sft.corpus.features import TRAINER_COLUMNS, are_collapsed, folder_features
from usdm_sft.dataset_folder.statistics import SplitStatistics, compute_statistics
from usdm_sft.template.parts import RowLayout
from usdm_sft.utils.atomic import SUFFIX
from usdm_sft.utils.hashes import sha256_file
from usdm_sft.utils.progress import quiet

if TYPE_CHECKING:
    from datasets import Dataset

    from usdm_sft.utils.pool import Pool

NUM_OUTPUT_SHARDS = {"train": 64, "test": 8}


class Part(NamedTuple):
    """An output file, and what it adds to the folder."""

    path: Path
    num_bytes: int  # in memory
    statistics: SplitStatistics
    sha256: str


def write_parquet(
    folder: Path,
    splits: Mapping[str, Dataset],
    num_output_shards: int | None,
    layout: RowLayout,
    pool: Pool,
    *,
    key: str,
) -> dict[str, list[Part]]:
    """Write the rows of each split, with `TRAINER_COLUMNS`, into files.

    Args:
        folder: Where the files go. It may hold files of an interrupted run; those that have another name are removed.
        splits: The rows, at least one in each split.
        num_output_shards: Files per split, never more than rows; by default those of `NUM_OUTPUT_SHARDS`.
        pool: Shares out the files, whose bytes do not depend on it.
        key: Key of the rows and of all else that decides the files.

    Returns:
        The files of each split, in order.
    """
    folder.mkdir(exist_ok=True)
    tasks: list[_Task] = []
    files: dict[str, range] = {}
    for split, rows in splits.items():
        num_files = max(1, min(num_output_shards or NUM_OUTPUT_SHARDS.get(split, 8), len(rows)))
        files[split] = range(len(tasks), len(tasks) + num_files)
        for index in range(num_files):
            path = folder / f"{split}-{index:05d}-of-{num_files:05d}.parquet"
            part = rows.shard(num_files, index, contiguous=True)
            tasks.append(_Task(path, part, rows.column_names, layout, cache_key(key, str(path))))
    keys = [task.key for task in tasks]
    made = dict(pool.map(_write_part, tasks, name="Parquet files", keys=keys, holds=_is_whole))
    paths = {task.path for task in tasks}
    for path in folder.iterdir():
        if path not in paths:
            path.unlink()
    return {split: [made[index] for index in indices] for split, indices in files.items()}


class _Task(NamedTuple):
    """An output file to write."""

    path: Path
    rows: Dataset
    columns: list[str]
    layout: RowLayout
    key: str


def _write_part(task: _Task) -> Part:
    """Write one file; its statistics are those of the rows that can be read from it."""
    path, rows, columns, layout, key = task
    # A task of a run with other options may write a file of this name at the same time. Each is complete when it gets the name.
    unfinished = path.with_name(f"{path.name}.{key[:16]}{SUFFIX}")
    with quiet():
        # The columns of a `Dataset` that was pickled may have another order.
        num_bytes = _with_trainer_columns(rows.select_columns(columns)).to_parquet(str(unfinished))
    part = Part(path, num_bytes, compute_statistics({"": [unfinished]}, layout)[""], sha256_file(unfinished))
    os.replace(unfinished, path)
    return part


def _is_whole(part: Part) -> bool:
    """Return True if the file that an earlier run wrote is still there, unchanged."""
    return part.path.is_file() and sha256_file(part.path) == part.sha256


def _with_trainer_columns(rows: Dataset) -> Dataset:
    """Return the rows of one output file in memory, with `TRAINER_COLUMNS` at the end."""
    lists = isinstance(rows[0]["user_text"], list)
    features = folder_features(lists=lists, collapsed=are_collapsed(rows.column_names))
    return rows.with_format("arrow").map(_add_trainer_columns, batched=True, features=features, keep_in_memory=True)


def _add_trainer_columns(rows: pa.Table) -> pa.Table:
    ids = rows["input_ids"].combine_chunks()
    ones = pa.array(np.ones(len(ids.flatten()), np.int8))
    lengths = pc.list_value_length(ids)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    columns = (pa.ListArray.from_arrays(offsets, ones), lengths.cast(pa.int32()))
    for name, column in zip(TRAINER_COLUMNS, columns, strict=True):
        rows = rows.append_column(name, column)
    return rows
