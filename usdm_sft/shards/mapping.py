"""A work shard that goes through a `.map` callable into an Arrow file."""

from __future__ import annotations

import importlib.metadata
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from usdm_sft.utils.progress import quiet


def map_shard(
    batch: Dataset, function: Any, path: str, fingerprint: str, *, remove_columns: Sequence[str] | None = None
) -> Dataset:
    """Map a work shard, as one batch, into an Arrow file.

    Args:
        batch: The rows of the shard.
        function: Takes and returns a dict of columns.
        path: The Arrow file to write: the columns that `function` returns, and the old ones that are not removed.
        fingerprint: Key of the shard, which becomes the fingerprint of the dataset.
        remove_columns: Old columns to remove; by default all of them.

    Raises:
        OSError: The file cannot be written, such as on a full disk.
    """
    try:
        with quiet():
            return batch.map(
                function,
                batched=True,
                batch_size=None,
                remove_columns=batch.column_names if remove_columns is None else list(remove_columns),
                load_from_cache_file=False,  # `ShardCache` decides what is made
                cache_file_name=path,
                new_fingerprint=fingerprint[:16],
            )
    except ValueError as error:
        # After an error of the disk, datasets closes the file again, and reports that it is closed.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


_MAKE_UNITS = ("numpy", "soundfile", "soxr", "torch", "transformers")  # packages that read, resample and compute
_ONLY_UNITS = ("soxr", "torch")  # those that do nothing else in a run
_VERSIONS = b"versions"  # key in the metadata of a unit shard's schema
_UNKNOWN = "unknown"  # the version in a unit shard of an earlier version of this package, which recorded none


def record_versions(units: Dataset, path: str) -> None:
    """Copy a unit shard, and add the versions of the packages that made its units. They are no part of its key.

    Args:
        units: The unit shard.
        path: The Arrow file to write.
    """
    table = units.data.table
    versions = json.dumps({name: importlib.metadata.version(name) for name in _MAKE_UNITS})
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _VERSIONS: versions.encode()})
    with open(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


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
