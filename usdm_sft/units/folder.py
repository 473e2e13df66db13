"""The unit model folder: its files, its description and its digest, on this machine or in a model repository of the Hub."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tokenize
from pathlib import Path
from typing import IO, Any

import numpy as np
from huggingface_hub import CommitOperationAdd, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but its stubs do not export it

from usdm_sft.units.batches import NORMALIZATIONS
from usdm_sft.units.families import CODECS, is_codec, is_known, takes_log_mel
from usdm_sft.units.settings import DESCRIPTION
from usdm_sft.utils.files import SUFFIX, read_json, remove_path, replace_path
from usdm_sft.utils.hub import hub_errors, only_cached

FILES = ("config.json", "model.safetensors", "kmeans.npy")
# What a repository of a codec has beside config.json and model.safetensors.
CODEC_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors.index.json",
    "model-*.safetensors",
)
_CHUNK = 1 << 20  # bytes


class ChangedError(ValueError):
    """A file of a unit model folder is not the one of the digest that the unit model was opened with."""

    def __init__(self, path: Path):
        super().__init__(
            f"{path} was changed after it was converted or opened: let nothing write to the folder, and run again"
        )


def read_description(folder: Path) -> dict[str, Any]:
    """Read unit_model.json of a unit model folder, or describe the folder of a codec.

    Raises:
        FileNotFoundError: The folder has none, or a file of a codec is missing.
        ValueError: `convert` did not write it, or the codec cannot be used.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        if holds_codec(folder):
            from usdm_sft.units.codecs import (
                describe_codec,  # imports transformers, a second that other unit models do without
            )

            return describe_codec(folder)
        raise FileNotFoundError(
            f"{folder} is not a unit model folder (it holds no {DESCRIPTION}) and not that of a codec ({', '.join(CODECS)}): make one with "
            "'dailytalk-usdm convert'"
        )
    description = read_json(path)
    if (
        not all(isinstance(description.get(name), int) for name in ("layer", "num_units"))
        or not all(isinstance(description.get(name), dict) for name in ("files", "sources"))
        or set(description["files"]) != set(FILES)  # a file without a digest would be opened unchecked
        or description.get("normalization", "fairseq") not in NORMALIZATIONS
        or not is_known(description)
        or takes_log_mel(description) != (description.get("normalization") == "seamless_m4t")
        or "frames" in description  # of codecs, which have no such file
    ):
        raise ValueError(f"{path} is not what convert wrote: remove the folder and convert the unit model again")
    return description


def holds_codec(folder: Path) -> bool:
    """Return whether a folder is that of a codec of transformers, and not one that `convert` made."""
    try:
        return not (folder / DESCRIPTION).is_file() and is_codec(read_json(folder / "config.json"))
    except (FileNotFoundError, ValueError):
        return False


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
    identity = [description.get("layer"), description["files"]]
    # A folder made from a .pt file has neither setting, and its digest is that of format version 1. `model_type` is in config.json, a file.
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


def copy_known(path: Path, sha256: str, target: IO[bytes], max_bytes: int | None = None) -> None:
    """Copy a file into memory or another file. The copied bytes have the digest, whatever happens to the file.

    Raises:
        ChangedError: They have another one.
        ValueError: The file is larger than `max_bytes`, if given, which is found before it is read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if max_bytes is not None and (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise ValueError(f"{path.name} has {size:,} bytes, more than the {max_bytes:,} that the config allows")
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != sha256:
        raise ChangedError(path)
    target.flush()


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


def save_folder(folder: Path, digest: str, target: Path) -> None:
    """Copy a unit model folder. The copied files have the digests of the unit model that was opened.

    Raises:
        ChangedError: The folder, or a file of it, was changed since then.
        FileExistsError: `target` is a file, or a folder that is not empty.
    """
    target = target.resolve()  # a link to an empty folder is followed
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(f"{target} is not an empty folder: name a new one")
    description = read_known_description(folder, digest)
    unfinished = target.with_name(target.name + SUFFIX)
    remove_path(unfinished)
    unfinished.mkdir(parents=True)
    for name, sha256 in description["files"].items():
        with open(unfinished / name, "wb") as file:
            copy_known(folder / name, sha256, file)
    if (folder / DESCRIPTION).is_file():  # a codec has none
        (unfinished / DESCRIPTION).write_bytes((folder / DESCRIPTION).read_bytes())
    if read_description(unfinished) != description:
        raise ChangedError(folder / DESCRIPTION)
    replace_path(unfinished, target)


def list_additions(folder: Path, digest: str) -> list[CommitOperationAdd]:
    """Return the files of a unit model folder for a commit to the Hub. They have the digests of the unit model that was opened.

    Raises:
        ChangedError: The folder, or a file of it, was changed since then.
    """
    description = read_known_description(folder, digest)
    additions = [CommitOperationAdd(name, folder / name) for name in description["files"]]
    for addition in additions:
        if addition.upload_info.sha256.hex() != description["files"][addition.path_in_repo]:
            raise ChangedError(folder / addition.path_in_repo)
    is_converted = (folder / DESCRIPTION).is_file()
    return [*additions, CommitOperationAdd(DESCRIPTION, folder / DESCRIPTION)] if is_converted else additions


def find_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    model_cache_dir: str | Path | None = None,
) -> Path:
    """Return the unit model folder that `name_or_path` names; a repository is downloaded into the Hub's cache.

    Args:
        name_or_path: A folder, or the id of a model repository such as "user/unit-model". An existing folder wins.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub, as `huggingface_hub.snapshot_download` takes it.
        model_cache_dir: Where downloads are kept; by default the Hub's own cache.

    Raises:
        FileNotFoundError: The repository is not one of a unit model.
        OSError: The repository cannot be downloaded.
        ValueError: `revision` is given for a folder.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir() and _is_repository_id(str(name_or_path)):
        return _download(str(name_or_path), revision, token, model_cache_dir)
    if revision is not None:
        raise ValueError(f"revision is {revision!r}, but {folder} is not a repository of the Hub: leave it out")
    return folder.resolve()


def find_cached_folder(name_or_path: str | Path, *, model_cache_dir: str | Path | None = None) -> Path | None:
    """Return the folder that `find_folder` would return without a download; None if a repository is not in the cache."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() or not _is_repository_id(str(name_or_path)):
        return folder.resolve()
    config = try_to_load_from_cache(str(name_or_path), "config.json", cache_dir=model_cache_dir)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if all((folder / name).is_file() for name in (DESCRIPTION, *FILES)):
        return folder
    try:
        return folder if holds_codec(folder) and read_description(folder) else None
    except FileNotFoundError:  # the cache has a part of the codec
        return None


def _is_repository_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _download(
    repository: str, revision: str | None, token: str | bool | None, model_cache_dir: str | Path | None
) -> Path:
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": model_cache_dir}
    with hub_errors(repository, revision, intro=f"unit model {repository} is not a folder, and "):
        options |= only_cached(repository, "config.json", revision=revision, cache_dir=model_cache_dir)
        folder = Path(snapshot_download(repository, allow_patterns=[DESCRIPTION, *FILES, *CODEC_FILES], **options))
    if not (folder / DESCRIPTION).is_file() and not holds_codec(folder):
        raise FileNotFoundError(
            f"the repository {repository} holds no {DESCRIPTION} and is not one of a codec that transformers has: upload a folder that "
            "'dailytalk-usdm convert' made"
        )
    return folder
