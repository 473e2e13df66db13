"""The Arrow file of a work shard.

It has no description of the columns (`huggingface`), because datasets 3 cannot read the one of later versions. Each version of
datasets finds the same columns from the Arrow types.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

_ROWS = 1_000  # of a record batch, as datasets writes it


def map_shard(
    batch: Dataset,
    function: Callable[[Any], Mapping[str, Any]],
    path: str,
    *,
    remove_columns: Sequence[str] | None = None,
    metadata: Mapping[bytes, bytes] | None = None,
) -> None:
    """Map a work shard, as one batch, into an Arrow file.

    Args:
        batch: The rows of the shard.
        function: Takes and returns a dict of columns.
        path: The Arrow file to write: the old columns that are not removed, and those that `function` returns.
        remove_columns: Old columns to remove; by default all of them.
        metadata: Of the schema of the file.

    Raises:
        OSError: The file cannot be written, such as on a full disk.
    """
    table = batch.data.table.drop_columns(batch.column_names if remove_columns is None else list(remove_columns))
    columns = {name: table[name] for name in table.column_names}
    columns |= {name: _array(values) for name, values in function(batch[:]).items()}
    rows = pa.table(columns, metadata=metadata)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=_ROWS)


def _array(values: Sequence[Any]) -> pa.Array:
    if not isinstance(values[0], np.ndarray):
        return pa.array(values)
    offsets = pa.array(np.cumsum([0, *map(len, values)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, np.concatenate(values))  # six times as fast as `pa.array`


def read_shard(path: Path) -> pa.Table:
    """Return the rows of a work shard; they stay in the file, which is memory-mapped.

    `Dataset.from_file` takes ten times as long, which counts for shuffled rows.
    """
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


_MAKE_UNITS = ("numpy", "soundfile", "soxr", "torch", "transformers")  # packages that read, resample and compute
_ONLY_UNITS = ("soxr", "torch")  # those that do nothing else in a run
_VERSIONS = b"versions"  # key in the metadata of a unit shard's schema
_UNKNOWN = "unknown"  # the version in a unit shard of an earlier version of this package, which recorded none


def describe_versions() -> dict[bytes, bytes]:
    """Return the metadata of a unit shard: the versions of the packages that make its units, which are no part of its key."""
    return {_VERSIONS: json.dumps({name: importlib.metadata.version(name) for name in _MAKE_UNITS}).encode()}


def name_versions(versions: Mapping[str, str], units: Iterable[Path]) -> dict[str, str]:
    """Return the versions that counts.json names: those that made the units, also if an earlier run did.

    Args:
        versions: The version of each package in this run.
        units: The files of the unit shards.

    Returns:
        The versions; several of a package are separated by commas.
    """
    made: dict[str, set[str]] = defaultdict(set)
    for path in units:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            recorded = json.loads((reader.schema.metadata or {}).get(_VERSIONS, b"{}"))
        for name in _MAKE_UNITS:
            made[name].add(recorded.get(name, _UNKNOWN))
    for name in made.keys() - {*_ONLY_UNITS}:
        made[name].add(versions[name])
    return {**versions, **{name: ", ".join(sorted(found)) for name, found in made.items()}}
