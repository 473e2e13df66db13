"""Write the rows into Parquet files, which processes share out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.corpus.features import TRAINER_COLUMNS, folder_features
from usdm_sft.dataset_folder.statistics import SplitStatistics, compute_statistics
from usdm_sft.template.parts import RowLayout
from usdm_sft.utils.cache import sha256_file
from usdm_sft.utils.progress import quiet

if TYPE_CHECKING:
    from datasets import Dataset

    from usdm_sft.utils.processes import ProcessPool

NUM_OUTPUT_SHARDS = {"train": 64, "test": 8}


class Part(NamedTuple):
    """An output file, and what it adds to the folder."""

    path: Path
    num_bytes: int  # in memory
    statistics: SplitStatistics
    sha256: str


def write_parquet(
    folder: Path, splits: Mapping[str, Dataset], num_output_shards: int | None, layout: RowLayout, pool: ProcessPool
) -> dict[str, list[Part]]:
    """Write the rows of each split, with `TRAINER_COLUMNS`, into files.

    Args:
        folder: Where the files go; it must not exist.
        splits: The rows, at least one in each split.
        num_output_shards: Files per split, never more than rows; by default those of `NUM_OUTPUT_SHARDS`.
        pool: Processes that share out the files, whose bytes do not depend on their number.

    Returns:
        The files of each split, in order.
    """
    folder.mkdir()
    tasks: list[tuple[Path, Dataset, list[str], RowLayout]] = []
    files: dict[str, range] = {}
    for split, rows in splits.items():
        num_files = max(1, min(num_output_shards or NUM_OUTPUT_SHARDS.get(split, 8), len(rows)))
        files[split] = range(len(tasks), len(tasks) + num_files)
        for index in range(num_files):
            path = folder / f"{split}-{index:05d}-of-{num_files:05d}.parquet"
            tasks.append((path, rows.shard(num_files, index, contiguous=True), rows.column_names, layout))
    made = dict(pool.map(_write_part, tasks, name="Parquet files"))
    return {split: [made[index] for index in indices] for split, indices in files.items()}


def _write_part(task: tuple[Path, Dataset, list[str], RowLayout]) -> Part:
    """Write one file; its statistics are those of the rows that can be read from it."""
    path, rows, columns, layout = task
    with quiet():
        # The columns of a `Dataset` that was pickled may have another order.
        num_bytes = _with_trainer_columns(rows.select_columns(columns)).to_parquet(str(path))
    return Part(path, num_bytes, compute_statistics({"": [path]}, layout)[""], sha256_file(path))


def _with_trainer_columns(rows: Dataset) -> Dataset:
    """Return the rows of one output file in memory, with `TRAINER_COLUMNS` at the end."""
    features = folder_features(lists=isinstance(rows[0]["user_text"], list))
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
