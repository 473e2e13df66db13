"""A dataset of datasets on disk with the recordings in it: a folder of `save_to_disk`, or Parquet files, such as those of the Hub.

It has the columns of a manifest. Manifests and recordings are written to the cache, as for a dataset on the Hub (`usdm_sft.corpus.hub_corpus`). Of a
dataset folder that was prepared with `--keep_audio`, the config `utterances` is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from usdm_sft.corpus.dialogs import FilePath
from usdm_sft.corpus.hub_corpus import RECIPE as HUB
from usdm_sft.corpus.hub_corpus import write_manifest
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.corpus.tables import SPLITS, split_of
from usdm_sft.utils.cache_keys import cache_root
from usdm_sft.utils.texts import first_line

_DICT, _DATASET = "dataset_dict.json", "state.json"  # of `DatasetDict.save_to_disk` and `Dataset.save_to_disk`
_FOLDERS = (UTTERANCES, "data", "")  # of Parquet files, in the folder of a dataset


def is_saved_dataset(data_dir: FilePath) -> bool:
    """Return True if a folder, or a Parquet file, is a dataset with recordings in it."""
    folder = Path(data_dir).expanduser()
    return _is_saved(folder) or bool(_find_parquet(folder))


def _is_saved(folder: Path) -> bool:
    return (folder / _DICT).is_file() or (folder / _DATASET).is_file()


def _find_parquet(folder: Path) -> list[Path]:
    """Return the Parquet files of a dataset whose column `audio` holds recordings, those of one folder."""
    for name in _FOLDERS:
        files = [folder] if folder.is_file() else sorted(folder.joinpath(name).glob("*.parquet"))
        if files and _has_recordings(files[0]):
            return files
    return []


def _has_recordings(file: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq  # slow to import

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return False
    kind = schema.field("audio").type if "audio" in schema.names else pa.null()
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)  # type: ignore[no-any-return]


def _find(
    data_dir: FilePath, cache_dir: str | Path | None, may_download: bool, with_units: bool
) -> dict[str, Path] | None:
    if not is_saved_dataset(data_dir):
        return None
    if not may_download:
        return {}
    folder, cache = Path(data_dir).expanduser().resolve(), cache_root(cache_dir)
    splits = _open_saved(folder) if _is_saved(folder) else _open_parquet(folder, cache)
    return {
        split: write_manifest(rows, identity, f"{data_dir}, split {split}", folder, cache, with_units)
        for split, (identity, rows) in splits.items()
    }


def _open_saved(folder: Path) -> dict[str, tuple[str, Any]]:
    """Return the identity and the rows of each split."""
    import datasets  # slow to import

    try:
        found = datasets.load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise OSError(f"{folder} cannot be opened as a saved dataset ({first_line(error)}): save it again") from error
    if isinstance(found, datasets.Dataset):
        found = {str(found.split) if str(found.split) in SPLITS else "train": found}
    return {split: (rows._fingerprint, rows) for split, rows in found.items()}


def _open_parquet(folder: Path, cache: Path) -> dict[str, tuple[str, Any]]:
    """Return the identity and the rows of each split. They are streamed: datasets would copy the recordings to a cache of its own."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    files: dict[str, list[str]] = {}
    for file in _find_parquet(folder):
        files.setdefault(split_of(file.stem) or "train", []).append(str(file))
    builder = Parquet(data_files={split: files[split] for split in SPLITS if split in files}, cache_dir=str(cache))
    rows = builder.as_streaming_dataset()
    return {split: (f"{builder.config_id} {split}", rows[split]) for split in rows}


RECIPE = HUB._replace(
    looks_for="a folder of save_to_disk, or Parquet files with the recordings in a column audio, here or in data/",
    reads=lambda path: False,  # `HUB` reads its manifests
    find=_find,
)
