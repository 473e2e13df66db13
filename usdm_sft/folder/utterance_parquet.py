"""The config `utterances` of a dataset folder: each recording of the corpus once, with its text and units.

Its columns are those of a manifest, so that a pushed folder is a corpus: `prepare --data_dir hub:USER/NAME` reads it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from usdm_sft.corpus.features import arrow_schema, dataset_info, utterance_features
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.folder.layout import PREPARE_AGAIN
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.files import SUFFIX, sha256_file
from usdm_sft.utils.lazily import Lazily
from usdm_sft.utils.texts import first_line

if TYPE_CHECKING:
    from usdm_sft.utils.pool import Pool

_GROUP_BYTES = 50_000_000  # of recordings in a row group, which the viewer of the Hub reads whole
_GROUP_ROWS = 100
TEXTS = ("speaker", "text", "emotion")
_ALWAYS = ("dialog", "turn", *TEXTS)
_SPOKEN = ("audio", "units", "seconds")  # all three are null where bad audio was left out
# Statistics of the bytes of audio would be of no use.
_WITH_STATISTICS = [*_ALWAYS, "audio.path", "units.list.element", "seconds"]

Row = Mapping[str, Any]


class SplitUtterances(Protocol):
    """The utterances of a split, divided into output files."""

    def __len__(self) -> int:
        """Return the number of files."""

    @property
    def loader(self) -> Callable[[Any], Iterable[Row]]:
        """Yields the rows of a file, with the columns of `utterance_features`. It is pickled once for all files."""

    def part(self, index: int) -> Any:
        """Describe a file, for `loader`. It is pickled."""


class UtteranceCounts:
    """The counts of a split, added up row by row and file by file."""

    def __init__(self) -> None:
        self.utterances = self.recordings = self.audio_bytes = 0
        self.seconds = 0.0  # exact for 10,000 hours: the lengths are float32

    def add(self, size: int | None, seconds: float | None) -> None:
        """Count an utterance: the size of its recording in bytes and its length, or None without a recording."""
        self.utterances += 1
        self.recordings += size is not None
        self.audio_bytes += size or 0
        self.seconds += seconds or 0.0

    def merge(self, other: UtteranceCounts) -> None:
        """Add the counts of other rows."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def summary(self) -> dict[str, Any]:
        """Return the counts as counts.json has them."""
        numbers = {name: getattr(self, name) for name in ("utterances", "recordings", "audio_bytes")}
        return numbers | {"hours": round(self.seconds / 3600, 6)}


class UtteranceFile(NamedTuple):
    """An output file, and what it adds to the folder."""

    path: Path
    num_bytes: int  # in memory
    counts: UtteranceCounts
    sha256: str


def recording_size(row: Row) -> int | None:
    """Return the size of the recording in a row, or None without one."""
    return None if row["audio"] is None else len(row["audio"]["bytes"])


def write_utterances(
    folder: Path, splits: Mapping[str, SplitUtterances], pool: Pool, *, key: str
) -> tuple[dict[str, Any], dict[str, Any], dict[Path, str]]:
    """Write the Parquet files of each split.

    Args:
        folder: Where the files go. It may hold files of an interrupted run; those that have another name are removed.
        splits: The utterances.
        pool: Shares out the files, whose bytes do not depend on it.
        key: Key of the rows of the folder.

    Returns:
        For each split the number of `utterances` and `recordings`, `audio_bytes` and `hours`, as in counts.json; the entry of the
        config in `dataset_info` of the card's YAML; and the sha256 of each file.
    """
    folder.mkdir(exist_ok=True)
    files = [
        (split, folder / f"{split}-{index:05d}-of-{len(utterances):05d}.parquet", index)
        for split, utterances in splits.items()
        for index in range(len(utterances))
    ]

    def describe(number: int) -> tuple[str, Path, Any]:
        split, path, index = files[number]
        return split, path, splits[split].part(index)

    write = partial(_write_file, {split: utterances.loader for split, utterances in splits.items()})
    keys = [cache_key(key, str(path)) for _, path, _ in files]
    made = dict(
        pool.map(write, Lazily(describe, len(files)), name="recordings of the folder", keys=keys, holds=_is_whole)
    )
    for path in {*folder.iterdir()} - {path for _, path, _ in files}:
        path.unlink()
    counts, infos = {}, datasets.SplitDict()
    for split in splits:
        found = [made[number] for number in range(len(files)) if files[number][0] == split]
        total = UtteranceCounts()
        for file in found:
            total.merge(file.counts)
        counts[split] = total.summary()
        infos.add(datasets.SplitInfo(split, sum(file.num_bytes for file in found), total.utterances))
    info = datasets.DatasetInfo(
        features=utterance_features(),
        splits=infos,
        download_size=sum(path.stat().st_size for path in folder.iterdir()),
        dataset_size=sum(each.num_bytes for each in infos.values()),
    )
    digests = {file.path: file.sha256 for file in made.values()}
    return counts, dataset_info(UTTERANCES, info), digests


def _write_file(loaders: Mapping[str, Callable[[Any], Iterable[Row]]], file: tuple[str, Path, Any]) -> UtteranceFile:
    """Write one file, with one row group in memory at a time."""
    split, path, part = file
    counts, num_bytes = UtteranceCounts(), 0
    # A task of the same run with another executor may write this file at the same time. Each file is complete when it gets the name.
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}{SUFFIX}")
    schema = arrow_schema(utterance_features())
    with pq.ParquetWriter(unfinished, schema, use_dictionary=False, write_statistics=_WITH_STATISTICS) as writer:
        for group in _group(loaders[split](part)):
            table = pa.Table.from_pylist(group, schema)
            writer.write_table(table)
            num_bytes += table.nbytes
            for row in group:
                counts.add(recording_size(row), row["seconds"])
    written = UtteranceFile(path, num_bytes, counts, sha256_file(unfinished))
    os.replace(unfinished, path)
    return written


def _is_whole(file: UtteranceFile) -> bool:
    """Return True if the file that an earlier run wrote is still there, unchanged."""
    return file.path.is_file() and sha256_file(file.path) == file.sha256


def _group(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Group the rows of a row group: up to 100 rows and 50 MB of audio, or one larger recording."""
    group: list[Row] = []
    size = 0
    for row in rows:
        num_bytes = recording_size(row) or 0
        if group and (len(group) == _GROUP_ROWS or size + num_bytes > _GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(row)
        size += num_bytes
    if group:
        yield group


def open_utterances(path: Path) -> pq.ParquetFile:
    """Open a Parquet file of the config.

    Raises:
        ValueError: The file is not a Parquet file, or has other columns.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    found, expected = file.schema_arrow.remove_metadata(), utterance_features().arrow_schema.remove_metadata()
    if not found.equals(expected):
        raise ValueError(f"{path} does not have the columns of the config {UTTERANCES}: {PREPARE_AGAIN}")
    return file


def iter_utterances(path: Path, row_groups: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the rows of row groups of a Parquet file of the config.

    Raises:
        ValueError: The error of `open_utterances`, or the file is damaged, or a value is missing.
    """
    file = open_utterances(path)
    try:
        for batch in file.iter_batches(batch_size=_GROUP_ROWS, row_groups=list(row_groups)):
            for row in batch.to_pylist():
                missing = [name for name in _SPOKEN if row[name] is None]
                if any(row[name] is None for name in _ALWAYS) or len(missing) not in (0, len(_SPOKEN)):
                    raise ValueError(f"{path}: a value of {row['dialog']}_{row['turn']} is missing: {PREPARE_AGAIN}")
                if row["audio"] is not None and row["audio"]["bytes"] is None:
                    raise ValueError(f"{path}: {row['dialog']}_{row['turn']} has no recording: {PREPARE_AGAIN}")
                yield row
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({first_line(error)}): {PREPARE_AGAIN}")
