"""The unit model folder: its files, its description and its digest."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tokenize
from pathlib import Path
from typing import IO, Any

import numpy as np

from usdm_sft.units.batches import NORMALIZATIONS
from usdm_sft.utils.files import read_json

FILES = ("config.json", "model.safetensors", "kmeans.npy")
DESCRIPTION = "unit_model.json"
_CHUNK = 1 << 20  # bytes


class ChangedError(ValueError):
    """A file of a unit model folder is not the one of the digest that the unit model was opened with."""

    def __init__(self, path: Path):
        super().__init__(
            f"{path} was changed after it was converted or opened: let nothing write to the folder, and run again"
        )


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
    return description_digest(description)


def description_digest(description: dict[str, Any]) -> str:
    """Return the sha256 over the settings and the digests of the files, which identifies a unit model."""
    identity = [description["layer"], description["files"]]
    # A folder made from a .pt file has neither setting, and its digest is that of format version 1.
    settings = {name: description[name] for name in ("normalization", "final_norm") if name in description}
    identity += [settings] if settings else []
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def read_known_description(folder: Path, digest: str) -> dict[str, Any]:
    """Read unit_model.json of a unit model that was opened before.

    Raises:
        ChangedError: It is of another unit model than `digest`.
    """
    description = read_description(folder)
    if description_digest(description) != digest:
        raise ChangedError(folder / DESCRIPTION)
    return description


def copy_known(path: Path, sha256: str, memory: IO[bytes], max_bytes: int) -> None:
    """Copy a file into memory. The copied bytes have the digest, whatever happens to the file.

    Raises:
        ChangedError: They have another one.
        ValueError: The file is larger than `max_bytes`, which is found before it is read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise ValueError(f"{path.name} has {size:,} bytes, more than the {max_bytes:,} that the config allows")
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            memory.write(chunk)
    if digest.hexdigest() != sha256:
        raise ChangedError(path)
    memory.flush()


def read_array(file: IO[bytes]) -> np.ndarray:
    """Read a .npy file that may be untrusted. Memory is allocated only for what the file holds.

    Raises:
        ValueError: The header cannot be read, is of Python objects, or promises more than the file holds.
    """
    try:
        version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]  # NumPy
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)  # type: ignore[no-untyped-call]  # NumPy
    except (SyntaxError, TypeError, RecursionError, MemoryError, OverflowError, tokenize.TokenError) as error:
        # NumPy evaluates the header as Python.
        raise ValueError(f"its header is not that of a .npy file ({type(error).__name__})") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not unpickled (allow_pickle=False)")
    start, size = file.tell(), math.prod(shape) * dtype.itemsize
    there = file.seek(0, os.SEEK_END) - start
    if min(shape, default=0) < 0 or size > there:
        raise ValueError(f"its header promises {dtype} of shape {str(shape)[:60]}, but {there:,} bytes follow")
    file.seek(start)
    values = np.frombuffer(bytearray(file.read(size)), dtype)
    return values.reshape(shape, order="F" if fortran_order else "C")
