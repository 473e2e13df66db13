"""Manifests and recordings in remote storage (s3://, gs://, hf://, https://, ...): copies in the cache, which fsspec downloads once.

    remote/<address, size and ETag or time>/<sha256>/call_17.wav

A file with another size or ETag gets another copy, so that the digest of the corpus follows it. The driver of the storage finds its
credentials itself. No message contains the query of an address, which may be a signature.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from usdm_sft.audio.addresses import disk_file, format_address, is_remote, parse_address, zip_address
from usdm_sft.corpus import manifest
from usdm_sft.corpus.dialogs import Split
from usdm_sft.corpus.tables import SPLITS, SUFFIXES
from usdm_sft.utils.cache_keys import cache_key, cache_root
from usdm_sft.utils.files import SUFFIX, sha256_file
from usdm_sft.utils.progress import progress_bar
from usdm_sft.utils.texts import first_line

REMOTE = "remote"  # in the cache
_NUM_THREADS = 16  # they wait for the network
_TIMEOUT = 60  # seconds without a byte
_BAR = 32  # files that are worth a progress bar
# What drivers tell of a file that changes with it. fsspec's own `ukey` takes files of HTTP for unchanging.
_VERSION = (
    "ETag",
    "etag",
    "blob_id",
    "xet_hash",
    "Content-MD5",
    "md5Hash",
    "Last-Modified",
    "LastModified",
    "mtime",
    "created",
)
_NAMES = {f"{split}{suffix}": split for split in SPLITS for suffix in SUFFIXES}


def find_manifests(data_dir: str, cache_dir: str | Path | None = None) -> dict[str, Path]:
    """Download the manifests of a remote folder, or a manifest that is named itself: of the split in its name, or else of train.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A split has two manifests.
        OSError: The storage cannot be read.
    """
    path = Path(_strip(data_dir))
    if manifest.RECIPE.reads(path):
        splits = {data_dir: path.stem if path.stem in SPLITS else SPLITS[0]}
    else:
        splits = {f"{data_dir.rstrip('/')}/{name}": split for name, split in _NAMES.items()}
    found: dict[str, Path] = {}
    for url, copy in fetch_files(splits, cache_dir).items():
        if found.setdefault(splits[url], copy) != copy:
            raise ValueError(f"{_strip(url)} stands beside {found[splits[url]].name}: keep one, or name the one to use")
    if not found:
        wanted = "does not exist" if manifest.RECIPE.reads(path) else f"has no manifest ({', '.join(_NAMES)})"
        raise FileNotFoundError(f"{_strip(data_dir)} {wanted}: correct the address")
    return found


def fetch_named(data_files: Any, cache_dir: str | Path | None = None) -> Any:
    """Return the data files that the user names, of one split or by split, with copies in place of remote ones."""
    if isinstance(data_files, Mapping):
        return {split: fetch_named(files, cache_dir) for split, files in data_files.items()}
    if not isinstance(data_files, str | os.PathLike):
        return [fetch_named(file, cache_dir) for file in data_files]
    if not is_remote(data_files):
        return data_files
    if not (found := fetch_files([str(data_files)], cache_dir)):
        raise FileNotFoundError(f"{_strip(str(data_files))} does not exist: correct the address")
    return found[str(data_files)]


def fetch_recordings(splits: Mapping[str, Split], cache_dir: str | Path | None = None) -> dict[str, Split]:
    """Return splits in which the addresses of remote recordings are those of their copies in the cache.

    A recording that does not exist keeps its address, and is bad audio like any missing file.

    Raises:
        OSError: The storage cannot be read.
    """
    local = fetch_addresses((each.audio for split in splits.values() for each in split.utterances()), cache_dir)
    found = dict(splits)
    for name, split in splits.items() if local else ():
        turns = (
            [replace(each, audio=local.get(each.audio, each.audio)) for each in dialog.utterances]
            for dialog in split.dialogs
        )
        dialogs = [replace(dialog, utterances=tuple(own)) for dialog, own in zip(split.dialogs, turns, strict=True)]
        found[name] = replace(split, dialogs=dialogs)
    return found


def fetch_addresses(addresses: Iterable[str], cache_dir: str | Path | None = None) -> dict[str, str]:
    """Download the files and archives of addresses; return the address in the cache of each address that has remote ones."""
    parsed = {each: parse_address(each, exists=lambda _: False) for each in dict.fromkeys(addresses) if "://" in each}
    remote = {
        address: segments
        for address, segments in parsed.items()
        if any(is_remote(disk_file(segment.file)) for segment in segments)
    }
    if not remote:
        return {}
    files = (disk_file(segment.file) for segments in remote.values() for segment in segments)
    copies = fetch_files(filter(is_remote, files), cache_dir)

    def localize(file: str) -> str:
        url = disk_file(file)
        copy = str(copies.get(url, _strip(url))) if is_remote(url) else url
        return copy if file == url else zip_address(copy, file.removeprefix("zip://").removesuffix(f"::{url}"))

    return {
        address: "\n".join(format_address(localize(segment.file), *segment[1:]) for segment in segments)
        for address, segments in remote.items()
    }


def fetch_files(urls: Iterable[str], cache_dir: str | Path | None = None) -> dict[str, Path]:
    """Download the files that the cache does not have in their present version. A damaged copy is made again.

    Returns:
        Address -> copy in the cache; a file that does not exist is absent.

    Raises:
        OSError: The storage cannot be read, its driver is missing, or offline mode is on. Files that have arrived are kept.
    """
    urls = list(dict.fromkeys(urls))
    for url in urls:
        _open_storage(url)[0].invalidate_cache()
    found: dict[str, Path] = {}
    bar = progress_bar(len(urls), "remote files", "files", disable=len(urls) < _BAR)
    with bar, ThreadPoolExecutor(_NUM_THREADS) as threads:
        for url, copy in zip(urls, threads.map(lambda url: _fetch(url, cache_dir), urls), strict=True):
            found |= {} if copy is None else {url: copy}
            bar.update()
    return found


def _fetch(url: str, cache_dir: str | Path | None) -> Path | None:
    """Return the copy of a file, or None if the file does not exist. Another run may fetch it at the same time."""
    from usdm_sft.audio.digests import (
        file_digest,
    )  # soundfile is slow to import, and the command line reads this module

    storage, path = _open_storage(url)
    try:
        with _errors_of(url):
            info = storage.info(path)
    except FileNotFoundError:
        return None
    if info["type"] != "file":
        return None
    size, version = info.get("size"), next((str(info[name]) for name in _VERSION if info.get(name)), None)
    folder = Path(os.path.realpath(cache_root(cache_dir) / REMOTE), cache_key(_strip(url), size, version)[:32])
    for copy in folder.glob("*/*") if version is not None else ():
        if file_digest(copy, cache_dir) == copy.parent.name:
            return copy
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{uuid.uuid4().hex}{SUFFIX}"
    try:
        with _errors_of(url):
            storage.get_file(path, str(unfinished))
            if size not in (None, arrived := unfinished.stat().st_size):
                raise OSError(f"the connection broke after {arrived:,} of {size:,} bytes")
        copy = folder / sha256_file(unfinished) / re.sub(r"[^\w.-]", "_", _strip(url).rpartition("/")[2])[-100:]
        copy.parent.mkdir(exist_ok=True)
        os.replace(unfinished, copy)
    finally:
        unfinished.unlink(missing_ok=True)
    return copy


def _open_storage(url: str) -> tuple[Any, str]:
    """Return the driver of fsspec and its path for an address."""
    if constants.HF_HUB_OFFLINE and not url.startswith("memory://"):
        raise OSError(
            f"offline mode (HF_HUB_OFFLINE) forbids reading {_strip(url)}: unset it, or copy the corpus to a folder"
        )
    options: dict[str, Any] = {}
    with _errors_of(url):
        import fsspec

        if url.startswith("http"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT
            )  # default: 300 s in total
            options = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
        storage, path = fsspec.core.url_to_fs(url, **options)
    return storage, path


@contextmanager
def _errors_of(url: str) -> Iterator[None]:
    """Turn errors of a driver, each of which has classes of its own, into one line with the remedy.

    Raises:
        FileNotFoundError: The file does not exist.
        OSError: Another error.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__  # fsspec raises it for all errors of HTTP
        status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", None)
        reason = f"status {status}" if status else first_line(cause).replace(url, _strip(url))
        if isinstance(cause, FileNotFoundError) or status in (404, 410):
            raise FileNotFoundError(f"{_strip(url)} does not exist: correct the address") from error
        if isinstance(cause, ImportError):
            from fsspec.registry import known_implementations

            driver = known_implementations[url.partition("://")[0]]["class"].partition(".")[0]
            package = "'fsspec[http]'" if driver == "fsspec" else driver
            said = f"needs the package {driver} ({reason}): pip install {package}"
        elif isinstance(cause, PermissionError) or status in (401, 403):
            said = f"may not be read ({reason}): give its driver credentials, or ask the owner for access"
        else:
            said = f"cannot be read ({reason}): check the address and the network, and run again; files that have arrived are kept"
        raise OSError(f"{_strip(url)} {said}") from error


def _strip(url: str) -> str:
    """Return an address without user, password and query."""
    return re.sub(r"(?<=://)[^/@]*@", "", url.partition("?")[0]) if url.startswith("http") else url
