"""Write the Parquet files of a dataset folder, which processes or tasks share out: the rows, and the config `utterances`.

The config `utterances` has each recording of the corpus once, with its text and units. Its columns are those of a manifest, so that a
pushed folder is a corpus: `prepare --data_dir hub:USER/NAME` reads it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from usdm_sft.corpus.features import (
    TEXTS,
    are_collapsed,
    arrow_schema,
    dataset_info,
    folder_features,
    further_columns,
    utterance_features,
)
from usdm_sft.corpus.manifest import UTTERANCES
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
_MOST_TOKENS = 2**31 - 1  # of a file: positions in a column of lists are int32
_GROUP_BYTES = 100_000_000  # in memory, of a row group, as `Dataset.to_parquet` writes
_AUDIO_GROUP_BYTES = 50_000_000  # of recordings in a row group, which the viewer of the Hub reads whole
_AUDIO_GROUP_ROWS = 100
# Statistics of the bytes of audio would be of no use.
_WITH_STATISTICS = ["dialog", "turn", *TEXTS, "audio.path", "units.list.element", "seconds"]

Utterance = Mapping[str, Any]  # a row of the config `utterances`


class SplitRows(Protocol):
    """The rows of a split, which are loaded part by part."""

    num_rows: int  # at least one
    num_tokens: int  # in all rows

    @property
    def loader(self) -> Callable[[Any], pa.Table]:
        """Loads a part, with all columns but `TRAINER_COLUMNS`. It is pickled once for all parts."""

    def part(self, start: int, stop: int) -> Any:
        """Describe rows `start` to `stop`, for `loader`. It is pickled."""


class SplitUtterances(Protocol):
    """The utterances of a split, divided into output files."""

    def __len__(self) -> int:
        """Return the number of files."""

    @property
    def loader(self) -> Callable[[Any], Iterable[Utterance]]:
        """Yields the rows of a file, with the columns of `utterance_features`. It is pickled once for all files."""

    def part(self, index: int) -> Any:
        """Describe a file, for `loader`. It is pickled."""


class FileTask(NamedTuple):
    """An output file to write."""

    split: str
    path: Path
    part: Any  # describes its rows, for the loader of the split


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


@dataclass
class UtteranceCounts:
    """The counts of a split, added up row by row and file by file."""

    utterances: int = 0
    recordings: int = 0
    audio_bytes: int = 0
    seconds: float = 0.0  # exact for 10,000 hours: the lengths are float32

    def add(self, row: Utterance) -> None:
        """Count an utterance, with or without a recording."""
        self.utterances += 1
        self.recordings += row["audio"] is not None
        self.audio_bytes += recording_size(row)
        self.seconds += row["seconds"] or 0.0

    def merge(self, other: UtteranceCounts) -> None:
        """Add the counts of other rows."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def summary(self) -> dict[str, Any]:
        """Return the counts as counts.json has them."""
        numbers = {name: value for name, value in vars(self).items() if name != "seconds"}
        return numbers | {"hours": round(self.seconds / 3600, 6)}


def recording_size(row: Utterance) -> int:
    """Return the size of the recording in a row in bytes, 0 without one."""
    return 0 if row["audio"] is None else len(row["audio"]["bytes"])


def write_files(
    folder: Path,
    parts: Mapping[str, Sequence[Any]],
    write: Callable[[FileTask, Path], tuple[int, Any]],
    pool: Pool,
    *,
    name: str,
    key: str,
) -> dict[str, list[WrittenFile]]:
    """Write the Parquet files of a config.

    Args:
        folder: Where the files go. It may hold files of an interrupted run; those that have another name are removed.
        parts: Describes the rows of each file of a split.
        write: Writes a file under another name; returns its size in memory, and its counts. It is pickled.
        pool: Shares out the files, whose bytes do not depend on it.
        name: Name of the files, for messages.
        key: Key of all that decides the files.

    Returns:
        The written files of each split, in order.
    """
    tasks = [
        FileTask(split, folder / f"{split}-{index:05d}-of-{len(of_split):05d}.parquet", part)
        for split, of_split in parts.items()
        for index, part in enumerate(of_split)
    ]
    folder.mkdir(exist_ok=True)
    keys = [cache_key(key, str(task.path)) for task in tasks]
    made = dict(pool.map(partial(_write_file, write), tasks, name=name, keys=keys, is_valid=_is_whole))
    for path in {*folder.iterdir()} - {task.path for task in tasks}:
        path.unlink()
    return {split: [made[index] for index, task in enumerate(tasks) if task.split == split] for split in parts}


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
        layout: The ids and the template of the rows.
        pool: Shares out the files, whose bytes do not depend on it.
        key: Key of the rows and of all else that decides the files.

    Returns:
        The files of each split.

    Raises:
        ValueError: `num_output_shards` puts more tokens into a file than it can hold.
    """
    parts = {}
    for split, rows in splits.items():
        default = max(NUM_OUTPUT_SHARDS.get(split, 8), -(-rows.num_tokens // MAX_TOKENS))
        num_files = max(1, min(num_output_shards or default, rows.num_rows))
        if rows.num_tokens // num_files > _MOST_TOKENS:
            raise ValueError(
                f"num_output_shards {num_output_shards} puts {rows.num_tokens // num_files:,} tokens of {split} into each file, "
                f"more than the {_MOST_TOKENS:,} that one can hold: raise it to {-(-rows.num_tokens // MAX_TOKENS):,}"
            )
        each, more = divmod(rows.num_rows, num_files)  # as with `Dataset.shard`, the first files have one row more
        starts = [each * index + min(index, more) for index in range(num_files + 1)]
        parts[split] = [rows.part(start, stop) for start, stop in pairwise(starts)]
    write = partial(_write_rows, {split: rows.loader for split, rows in splits.items()}, layout)
    written = {}
    for split, files in write_files(folder, parts, write, pool, name="Parquet files", key=key).items():
        statistics = SplitStatistics()
        for file in files:
            statistics.merge(file.counts)
        digests = {file.path: file.sha256 for file in files}
        written[split] = WrittenSplit(digests, sum(file.num_bytes for file in files), statistics)
    return written


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
    features = folder_features(lists=lists, collapsed=collapsed, columns=further_columns(rows.column_names))
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


def write_utterances(
    folder: Path, splits: Mapping[str, SplitUtterances], pool: Pool, *, key: str, columns: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any], dict[Path, str]]:
    """Write the recordings of each split, with their texts and units, into files.

    Args:
        folder: As in `write_files`.
        splits: The utterances.
        pool: Shares out the files, whose bytes do not depend on it.
        key: Key of the rows of the folder.
        columns: Further columns of the corpus.

    Returns:
        For each split the number of `utterances` and `recordings`, `audio_bytes` and `hours`, as in counts.json; the entry of the
        config in `dataset_info` of the card's YAML; and the sha256 of each file.
    """
    parts = {
        split: [utterances.part(index) for index in range(len(utterances))] for split, utterances in splits.items()
    }
    features = utterance_features(columns)
    write = partial(_write_utterances, {split: utterances.loader for split, utterances in splits.items()}, features)
    counts, infos = {}, datasets.SplitDict()
    digests: dict[Path, str] = {}
    for split, files in write_files(folder, parts, write, pool, name="recordings of the folder", key=key).items():
        total = UtteranceCounts()
        for file in files:
            total.merge(file.counts)
        counts[split] = total.summary()
        infos.add(datasets.SplitInfo(split, sum(file.num_bytes for file in files), total.utterances))
        digests |= {file.path: file.sha256 for file in files}
    info = datasets.DatasetInfo(
        features=features,
        splits=infos,
        download_size=sum(path.stat().st_size for path in digests),
        dataset_size=sum(each.num_bytes for each in infos.values()),
    )
    return counts, dataset_info(UTTERANCES, info), digests


def _write_utterances(
    loaders: Mapping[str, Callable[[Any], Iterable[Utterance]]], features: datasets.Features, task: FileTask, path: Path
) -> tuple[int, UtteranceCounts]:
    """Write the utterances of one file, with one row group in memory at a time."""
    counts, num_bytes = UtteranceCounts(), 0
    schema = arrow_schema(features)
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=_WITH_STATISTICS) as writer:
        for group in _group(loaders[task.split](task.part)):
            table = pa.Table.from_pylist(group, schema)
            writer.write_table(table)
            num_bytes += table.nbytes
            for row in group:
                counts.add(row)
    return num_bytes, counts


def _group(rows: Iterable[Utterance]) -> Iterator[list[Utterance]]:
    """Group the rows of a row group: up to 100 rows and 50 MB of audio, or one larger recording."""
    group: list[Utterance] = []
    size = 0
    for row in rows:
        num_bytes = recording_size(row)
        if group and (len(group) == _AUDIO_GROUP_ROWS or size + num_bytes > _AUDIO_GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(row)
        size += num_bytes
    if group:
        yield group
