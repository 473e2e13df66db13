"""The published unit model, which USDM was trained with: found in the model cache, or downloaded and converted once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from usdm_sft.units.folder import find_cached_folder, find_folder, read_description
from usdm_sft.units.settings import DESCRIPTION, PUBLISHED, XLSR_LAYER
from usdm_sft.utils.cache_keys import cache_root
from usdm_sft.utils.download import download
from usdm_sft.utils.files import read_json, remove_path, replace_text, sha256_file
from usdm_sft.utils.locks import file_lock

logger = logging.getLogger(__name__)

PUBLISHED_URL = "https://dl.fbaipublicfiles.com/seamlessM4T/models/unit_extraction"
PUBLISHED_FILES = ("xlsr2_1b_v2.pt", "kmeans_10k.npy")
CONVERTED_BYTES = 2_800_000_000  # the unit model folder that is made from them
KNOWN_DIGESTS: dict[str, str] = {}  # file name -> sha256, checked before the file is opened


def find_unit_model(name_or_path: str | Path, model_cache_dir: str | Path | None = None) -> Path:
    """Return the unit model folder that `name_or_path` names.

    Args:
        name_or_path: A unit model folder, a model repository of the Hub that holds one, or "xlsr2_1b_v2" for the published
            unit model, which is made in the model cache from two published files (about 4 GB) if the cache lacks it.
        model_cache_dir: The model cache; by default `unit_models` in this package's cache.

    Raises:
        FileNotFoundError: The folder is not a unit model folder.
        OSError: The repository cannot be downloaded.
        ValueError: A download has another digest than the one that is known or recorded.
    """
    folder = Path(name_or_path).expanduser()
    if str(name_or_path) == PUBLISHED and not folder.is_dir():
        cache = model_cache(model_cache_dir)
        with file_lock(cache / f"{PUBLISHED}.lock", option="--model_cache_dir or HF_HOME"):
            return _download_and_convert(cache / PUBLISHED, cache)
    folder = find_folder(name_or_path, model_cache_dir=model_cache_dir)
    read_description(folder)
    return folder


def model_cache(model_cache_dir: str | Path | None = None) -> Path:
    """Return `model_cache_dir`, or by default the folder `unit_models` in this package's cache."""
    return cache_root() / "unit_models" if model_cache_dir is None else Path(model_cache_dir).expanduser()


def locate_unit_model(name_or_path: str | Path, model_cache_dir: str | Path | None = None) -> Path | None:
    """Return the unit model folder that `find_unit_model` would return without a download, or None."""
    if str(name_or_path) == PUBLISHED and not Path(name_or_path).is_dir():
        folder = model_cache(model_cache_dir) / PUBLISHED
        return folder if (folder / DESCRIPTION).is_file() else None
    return find_cached_folder(name_or_path, model_cache_dir=model_cache_dir)


def _download_and_convert(folder: Path, cache: Path) -> Path:
    """Make the published unit model; the digests of its sources are recorded, and later downloads must match them."""
    downloads = cache / f"{PUBLISHED}.sources"
    if (folder / DESCRIPTION).is_file():
        remove_path(downloads)  # left if a run was killed right after the conversion
        return folder
    record = cache / f"{PUBLISHED}.sha256.json"
    recorded = read_json(record) if record.is_file() else {}
    for name in PUBLISHED_FILES:
        path = downloads / name
        expected = KNOWN_DIGESTS.get(name) or recorded.get(name)
        if not path.is_file() or (expected is not None and sha256_file(path) != expected):
            download(f"{PUBLISHED_URL}/{name}", path, sha256=expected)
        recorded[name] = sha256_file(path)
        replace_text(record, json.dumps(recorded, indent=2) + "\n")
        logger.warning("%s: sha256 %s", name, recorded[name])
    from usdm_sft.units.convert import convert  # imports the speech encoders of transformers

    checkpoint, kmeans = PUBLISHED_FILES
    convert(downloads / checkpoint, downloads / kmeans, folder)
    remove_path(downloads)
    return folder


def describe_unit_model(folder: Path, description: dict[str, Any] | None = None) -> dict[str, Any]:
    """Describe how a unit model folder was made.

    Args:
        folder: A unit model folder.
        description: Its unit_model.json, if it was read already.

    Returns:
        JSON values: `name`, "xlsr2_1b_v2" if the folder was made from the published files and None otherwise; `layer`,
        counted from 1, None for a codec; `model_type`, `normalization`, `final_norm` and `frames`, if set; and the sha256 of the `sources`.
    """
    description = description or read_description(folder)
    names = ("model_type", "normalization", "final_norm", "frames")
    settings: dict[str, Any] = {key: description[key] for key in names if key in description}
    is_published = (
        not settings
        and description["layer"] == XLSR_LAYER
        and any(description["sources"] == known for known in _published_sources(folder))
    )
    name = PUBLISHED if is_published else None
    return {"name": name, "layer": description.get("layer"), **settings, "sources": description["sources"]}


def _published_sources(folder: Path) -> list[dict[str, str]]:
    """Return the sha256 of the published checkpoint and k-means, as known and as a download recorded them beside the folder."""
    record = folder.with_name(f"{PUBLISHED}.sha256.json")
    found = [KNOWN_DIGESTS, read_json(record) if record.is_file() else {}]
    checkpoint, kmeans = PUBLISHED_FILES
    return [
        {"checkpoint": digests[checkpoint], "kmeans": digests[kmeans]}
        for digests in found
        if checkpoint in digests and kmeans in digests
    ]
