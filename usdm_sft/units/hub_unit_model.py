"""Unit model folders in model repositories of the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # a re-export
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but its stubs do not export it

from usdm_sft.units.folder import DESCRIPTION, FILES
from usdm_sft.utils.texts import first_line


def find_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the unit model folder that `name_or_path` names; a repository is downloaded into the Hub's cache.

    Args:
        name_or_path: A folder, or the id of a model repository such as "user/unit-model". An existing folder wins.
        revision: Branch, tag or commit of the repository.
        token: Token for the Hub, as `huggingface_hub.snapshot_download` takes it.
        cache_dir: Where downloads are kept; by default the Hub's own cache.

    Raises:
        FileNotFoundError: The repository is not one of a unit model.
        OSError: The repository cannot be downloaded.
        ValueError: `revision` is given for a folder.
    """
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir() and _is_repository_id(str(name_or_path)):
        return _download(str(name_or_path), revision, token, cache_dir)
    if revision is not None:
        raise ValueError(f"revision is {revision!r}, but {folder} is not a repository of the Hub: leave it out")
    return folder.resolve()


def find_cached_folder(name_or_path: str | Path, *, cache_dir: str | Path | None = None) -> Path | None:
    """Return the folder that `find_folder` would return without a download; None if a repository is not in the cache."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() or not _is_repository_id(str(name_or_path)):
        return folder.resolve()
    cached = [try_to_load_from_cache(str(name_or_path), file, cache_dir=cache_dir) for file in (DESCRIPTION, *FILES)]
    found = [Path(file) for file in cached if isinstance(file, str)]
    return found[0].parent if len(found) == len(cached) else None


def _is_repository_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _download(repository: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None) -> Path:
    files = [DESCRIPTION, *FILES]
    try:
        folder = Path(
            snapshot_download(repository, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=files)
        )
    except (OSError, HTTPError) as error:  # without network, repository, revision or permission; or with a broken proxy
        raise OSError(
            f"{repository} is not a folder and cannot be downloaded from the Hub ({first_line(error)}): "
            "correct the name or the revision, or check the network and the token"
        ) from error
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"the repository {repository} holds no {DESCRIPTION}: upload a folder that 'dailytalk-usdm convert' made"
        )
    return folder
