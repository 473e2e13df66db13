"""Write the rows into Parquet files, which processes share out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from usdm_sft.dataset_folder.statistics import SplitStatistics, compute_statistics
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
    folder: Path, splits: Mapping[str, Dataset], num_output_shards: int | None, pool: ProcessPool
) -> dict[str, list[Part]]:
    """Write the rows of each split into files; the files do not depend on the number of processes."""
    folder.mkdir()
    tasks: list[tuple[Path, Dataset, list[str]]] = []
    files: dict[str, range] = {}
    for split, rows in splits.items():
        num_files = max(1, min(num_output_shards or NUM_OUTPUT_SHARDS.get(split, 8), len(rows)))
        files[split] = range(len(tasks), len(tasks) + num_files)
        for index in range(num_files):
            path = folder / f"{split}-{index:05d}-of-{num_files:05d}.parquet"
            tasks.append((path, rows.shard(num_files, index, contiguous=True), rows.column_names))
    made = dict(pool.map(_write_part, tasks, name="Parquet files"))
    return {split: [made[index] for index in indices] for split, indices in files.items()}


def _write_part(task: tuple[Path, Dataset, list[str]]) -> Part:
    """Write one file; its statistics are those of the rows that can be read from it."""
    path, rows, columns = task
    with quiet():
        # The columns of a `Dataset` that was pickled may have another order.
        num_bytes = rows.select_columns(columns).to_parquet(str(path))
    return Part(path, num_bytes, compute_statistics({"": [path]})[""], sha256_file(path))
