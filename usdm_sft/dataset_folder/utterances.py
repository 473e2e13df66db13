"""The config `utterances` of a dataset folder: each recording of the corpus once, with its text and units.

Its columns are those of a manifest, so that a pushed folder is a corpus: `prepare --data_dir hub:USER/NAME` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from usdm_sft.corpus.features import utterance_features
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.dataset_folder.layout import PREPARE_AGAIN
from usdm_sft.utils.texts import first_line

# Of recordings in a Parquet file, as `push_to_hub` of datasets; a larger recording is alone.
MAX_FILE_BYTES = 500_000_000
_GROUP_BYTES = 50_000_000  # of recordings in a row group, which the viewer of the Hub reads whole
_GROUP_ROWS = 100
TEXTS = ("speaker", "text", "emotion")
_ALWAYS = ("dialog", "turn", *TEXTS)
_SPOKEN = ("audio", "units", "seconds")  # all three are null where bad audio was left out
# Statistics of the bytes of audio would be of no use.
_WITH_STATISTICS = [*_ALWAYS, "audio.path", "units.list.element", "seconds"]

Row = Mapping[str, Any]


class UtteranceCounts:
    """The counts of a split, added up row by row."""

    def __init__(self) -> None:
        self.utterances = self.recordings = self.audio_bytes = 0
        self.seconds = 0.0

    def add(self, size: int | None, seconds: float | None) -> None:
        """Count an utterance: the size of its recording in bytes and its length, or None without a recording."""
        self.utterances += 1
        self.recordings += size is not None
        self.audio_bytes += size or 0
        self.seconds += seconds or 0.0

    def summary(self) -> dict[str, Any]:
        """Return the counts as counts.json has them."""
        numbers = {name: getattr(self, name) for name in ("utterances", "recordings", "audio_bytes")}
        return numbers | {"hours": round(self.seconds / 3600, 6)}


def audio_bytes(row: Row) -> int:
    """Return the size of the recording in a row, 0 without one."""
    return recording_size(row) or 0


def recording_size(row: Row) -> int | None:
    """Return the size of the recording in a row, or None without one."""
    return None if row["audio"] is None else len(row["audio"]["bytes"])


def write_utterances(folder: Path, splits: Mapping[str, Iterable[Row]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the Parquet files of each split, with one row group in memory at a time.

    Args:
        folder: Where the files go; it must not exist.
        splits: Rows with the columns of `utterance_features`.

    Returns:
        For each split the number of `utterances` and `recordings`, `audio_bytes` and `hours`, as in counts.json; and the entry of
        the config in `dataset_info` of the card's YAML.
    """
    folder.mkdir()
    counts, infos = {}, datasets.SplitDict()
    for split, rows in splits.items():
        counts[split], num_bytes = _write_split(folder, split, rows)
        infos.add(datasets.SplitInfo(split, num_bytes, counts[split]["utterances"]))
    info = datasets.DatasetInfo(
        features=utterance_features(),
        splits=infos,
        download_size=sum(path.stat().st_size for path in folder.iterdir()),
        dataset_size=sum(each.num_bytes for each in infos.values()),
    )
    return counts, {"config_name": UTTERANCES, **info._to_yaml_dict()}


def _write_split(folder: Path, split: str, rows: Iterable[Row]) -> tuple[dict[str, Any], int]:
    """Write the files of a split; returns its counts and its size in memory."""
    schema = utterance_features().arrow_schema
    counts, num_bytes, size = UtteranceCounts(), 0, 0
    files: list[Path] = []
    writer = None
    try:
        for group in _group(rows):
            group_bytes = sum(map(audio_bytes, group))
            if writer is None or size + group_bytes > MAX_FILE_BYTES:
                if writer is not None:
                    writer.close()
                files.append(folder / f"{split}-{len(files):05d}.parquet")
                writer = pq.ParquetWriter(files[-1], schema, use_dictionary=False, write_statistics=_WITH_STATISTICS)
                size = 0
            table = pa.Table.from_pylist(group, schema)
            writer.write_table(table)
            size += group_bytes
            num_bytes += table.nbytes
            for row in group:
                counts.add(recording_size(row), row["seconds"])
    finally:
        if writer is not None:
            writer.close()
    for path in files:
        path.rename(path.with_stem(f"{path.stem}-of-{len(files):05d}"))
    return counts.summary(), num_bytes


def _group(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Group the rows of a row group: up to 100 rows and 50 MB of audio, or one larger recording."""
    group: list[Row] = []
    size = 0
    for row in rows:
        if group and (len(group) == _GROUP_ROWS or size + audio_bytes(row) > _GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(row)
        size += audio_bytes(row)
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
