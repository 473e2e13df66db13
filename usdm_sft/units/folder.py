"""The unit model folder: its files, its description and its digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from usdm_sft.units.batches import NORMALIZATIONS
from usdm_sft.utils.json_files import read_json

FILES = ("config.json", "model.safetensors", "kmeans.npy")
DESCRIPTION = "unit_model.json"


def read_description(folder: Path) -> dict[str, Any]:
    """Read unit_model.json of a unit model folder.

    Raises:
        FileNotFoundError: The folder has none.
        ValueError: `convert` did not write it.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a unit model folder (it holds no {DESCRIPTION}): make one with 'dailytalk-usdm convert'"
        )
    description = read_json(path)
    if (
        not all(isinstance(description.get(name), int) for name in ("layer", "num_units"))
        or not all(isinstance(description.get(name), dict) for name in ("files", "sources"))
        or set(description["files"]) != set(FILES)  # a file without a digest would be opened unchecked
        or description.get("normalization", "fairseq") not in NORMALIZATIONS
    ):
        raise ValueError(f"{path} is not what convert wrote: remove the folder and convert the unit model again")
    return description


def unit_model_digest(folder: str | Path, cache_dir: str | Path | None = None) -> str:
    """Check the files of a unit model folder and return the sha256 over their digests and its settings.

    Raises:
        FileNotFoundError: The folder is not a unit model folder.
        ValueError: A file differs from what `convert` wrote.
    """
    from usdm_sft.audio.digests import file_digest  # imports soundfile, which tests.benchmarks.gpu does without

    folder = Path(folder)
    description = read_description(folder)
    for name, digest in description["files"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: remove the folder and convert the unit model again")
        if file_digest(folder / name, cache_dir) != digest:
            raise ValueError(
                f"{folder / name} is not the file that was converted: remove the folder and convert the unit model again"
            )
    identity = [description["layer"], description["files"]]
    # A folder made from a .pt file has neither setting, and its digest is that of format version 1.
    settings = {name: description[name] for name in ("normalization", "final_norm") if name in description}
    identity += [settings] if settings else []
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
