"""The config `utterances` of a dataset folder: each recording of the corpus once, with its text and units.

Its columns are those of a manifest, so that a pushed folder is a corpus: `prepare --data_dir hub:USER/NAME` reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from usdm_sft.audio.frames import SAMPLE_RATE, num_frames
from usdm_sft.audio.playable import count_samples
from usdm_sft.corpus.features import ROLES, are_collapsed, utterance_features
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.dataset_folder.durations import expand_rows
from usdm_sft.dataset_folder.layout import COUNTS, PREPARE_AGAIN, data_files
from usdm_sft.dataset_folder.rows import iter_rows, open_rows
from usdm_sft.utils.texts import first_line

# Of recordings in a Parquet file, as `push_to_hub` of datasets; a larger recording is alone.
MAX_FILE_BYTES = 500_000_000
_GROUP_BYTES = 50_000_000  # of recordings in a row group, which the viewer of the Hub reads whole
_GROUP_ROWS = 100
_TEXTS = ("speaker", "text", "emotion")
_ALWAYS = ("dialog", "turn", *_TEXTS)
_SPOKEN = ("audio", "units", "seconds")  # all three are null where bad audio was left out
# Statistics of the bytes of audio would be of no use.
_WITH_STATISTICS = [*_ALWAYS, "audio.path", "units.list.element", "seconds"]

Row = Mapping[str, Any]


class _Counts:
    """The counts of a split, added up row by row."""

    def __init__(self) -> None:
        self.utterances = self.recordings = self.audio_bytes = 0
        self.seconds = 0.0

    def add(self, row: Row) -> None:
        self.utterances += 1
        self.recordings += row["audio"] is not None
        self.audio_bytes += audio_bytes(row)
        self.seconds += row["seconds"] or 0.0

    def summary(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("utterances", "recordings", "audio_bytes")}
        return numbers | {"hours": round(self.seconds / 3600, 6)}


def audio_bytes(row: Row) -> int:
    """Return the size of the recording in a row, 0 without one."""
    return 0 if row["audio"] is None else len(row["audio"]["bytes"])


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
    counts, num_bytes, size = _Counts(), 0, 0
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
                counts.add(row)
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


def iter_utterances(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file of the config.

    Raises:
        ValueError: The file cannot be read, has other columns, or a value is missing.
    """
    try:
        file = pq.ParquetFile(path)
        found, expected = file.schema_arrow.remove_metadata(), utterance_features().arrow_schema.remove_metadata()
        if not found.equals(expected):
            raise ValueError(f"{path} does not have the columns of the config {UTTERANCES}: {PREPARE_AGAIN}")
        for batch in file.iter_batches(batch_size=_GROUP_ROWS):
            for row in batch.to_pylist():
                missing = [name for name in _SPOKEN if row[name] is None]
                if any(row[name] is None for name in _ALWAYS) or len(missing) not in (0, len(_SPOKEN)):
                    raise ValueError(f"{path}: a value of {row['dialog']}_{row['turn']} is missing: {PREPARE_AGAIN}")
                if row["audio"] is not None and row["audio"]["bytes"] is None:
                    raise ValueError(f"{path}: {row['dialog']}_{row['turn']} has no recording: {PREPARE_AGAIN}")
                yield row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): {PREPARE_AGAIN}") from error


def check_utterances(folder: Path, counts: Mapping[str, Any]) -> Iterator[str]:
    """Check the recordings against their units, the rows of the folder against the utterances, and the counts.

    Yields:
        Each problem with its place.
    """
    files = data_files(folder, counts, UTTERANCES)
    info = datasets.load_dataset_builder(str(folder), UTTERANCES).info
    for split, row_files in data_files(folder, counts).items():
        numbers, known = _Counts(), {}
        for path in files[split]:
            for row in iter_utterances(path):
                place, key = f"{path}: {row['dialog']}_{row['turn']}", (row["dialog"], row["turn"])
                if key in known:
                    yield f"{place} is there twice"
                if row["audio"] is not None and (problem := _recording_problem(row)):
                    yield f"{place}: {problem}"
                known[key] = _digest(*(row[name] for name in (*_TEXTS, "units", "seconds")))
                numbers.add(row)
        yield from _check_rows(row_files, known, counts["settings"]["history"])
        if counts[UTTERANCES][split] != numbers.summary():
            yield f"{folder / COUNTS}: {UTTERANCES} of {split} are {numbers.summary()}, not {counts[UTTERANCES][split]}"
        if not info.splits or split not in info.splits or info.splits[split].num_examples != numbers.utterances:
            yield f"{folder / 'README.md'}: its YAML does not say that {split} has {numbers.utterances} {UTTERANCES}"


def _recording_problem(row: Row) -> str | None:
    """Return what is wrong with the recording of a row, or None."""
    try:
        samples = count_samples(row["audio"]["bytes"])
    except ValueError as error:
        return str(error)
    if num_frames(samples) != len(row["units"]):
        return f"the recording makes {num_frames(samples)} units, not {len(row['units'])}"
    if np.float32(samples) / np.float32(SAMPLE_RATE) != np.float32(row["seconds"]):
        return f"the recording has {samples / SAMPLE_RATE} seconds, not {row['seconds']}"
    return None


def _check_rows(files: Iterable[Path], known: Mapping[tuple[str, int], bytes], history: int) -> Iterator[str]:
    """Compare each turn of the rows of a split with its utterance."""
    fields = (*_TEXTS, "units", "seconds")
    for path in files:
        collapsed = are_collapsed(open_rows(path).schema_arrow.names)
        names = (*fields, "durations") if collapsed else fields
        columns = ["id", "dialog_id", "turn", *(f"{role}_{name}" for role in ROLES for name in names)]
        for row in (row for batch in iter_rows(path, columns=columns) for row in batch.to_pylist()):
            row = expand_rows(row) if collapsed else row
            sides = [[row[f"{role}_{name}"] for name in fields] for role in ROLES]
            if not isinstance(row["user_text"], list):
                sides = [[[value] for value in side] for side in sides]
            exchanges = len(sides[0][0])
            # A row with history is named after its last pair, every other row after its first.
            first = row["turn"] - 2 * (exchanges - 1) if history else row["turn"]
            for offset in range(2 * exchanges):
                key = (row["dialog_id"], first + offset)
                values = [column[offset // 2] for column in sides[offset % 2]]
                if key not in known:
                    yield f"{path}: turn {key[1]} of row {row['id']} is not among the {UTTERANCES}"
                elif known[key] != _digest(*values):
                    yield f"{path}: turn {key[1]} of row {row['id']} differs from the utterance {key[0]}_{key[1]}"


def _digest(*values: Any) -> bytes:
    """Return a digest that needs little memory."""
    return hashlib.sha256(json.dumps(values).encode()).digest()[:16]
