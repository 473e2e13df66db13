"""Files from the network, fetched only where the user's data lacks them: checked by sha256 before they get their name."""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from usdm_sft.progress import progress_bar

# The split lists in the DailyTalk repository (github.com/keonlee9420/DailyTalk).
SPLIT_LISTS_URL = (
    "https://raw.githubusercontent.com/keonlee9420/DailyTalk/"
    "05a0173dac8e68fb2b22190cfc5c22248538a1a6/preprocessed_data/DailyTalk"
)
SPLIT_LISTS = {
    "train": ("train_phone.txt", "defdf666637a16db3ea353e2e9477a5e2d20e6a686fb687de62425b7be6fa92e"),
    "test": ("val_phone.txt", "72337e7247a10818af5100f768edb0082b2407b21c99a910a8ad9401969ad9c7"),
}


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """`cache_dir`, or the folder `dailytalk_usdm` in huggingface_hub's HF_HOME."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "dailytalk_usdm"


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_split_lists(cache_dir: str | Path | None = None, *, url: str | None = None) -> dict[str, Path]:
    """DailyTalk's own split lists, from the cache or else from its repository at a fixed commit.

    Raises:
        OSError: No network, or offline mode.
        ValueError: A file is not the one that is known.
    """
    folder = cache_root(cache_dir) / "split_lists"
    folder.mkdir(parents=True, exist_ok=True)
    lists = {}
    with FileLock(folder / "lock"):
        for split, (name, sha256) in SPLIT_LISTS.items():
            lists[split] = folder / name
            if not lists[split].is_file() or sha256_file(lists[split]) != sha256:
                download(f"{url or SPLIT_LISTS_URL}/{name}", lists[split], sha256=sha256)
    return lists


def check_not_swapped(lists: Mapping[str, str | Path], digests: Mapping[str, str]) -> None:
    """DailyTalk's own lists are known, so that it shows where one stands in the other's place. Of other lists nobody can tell.

    Args:
        lists: Path of the list of each split. One alone may have any name: datasets calls it "train".
        digests: Its sha256.

    Raises:
        ValueError: The train list is named as test, or the test list as train.
    """
    for split, other in (("train", "test"), ("test", "train")) if len(lists) > 1 else ():
        if digests.get(split) == SPLIT_LISTS[other][1]:
            raise ValueError(f"{lists[split]} is DailyTalk's {other} list, but is named as {split}: swap the lists")


def download(url: str, path: str | Path, *, sha256: str | None = None) -> str:
    """Download `url` to `path` with a progress bar; `path` appears only when the file is whole and its digest is right.

    The caller keeps other processes from the same path.

    Returns:
        The sha256 of the file, in hex.

    Raises:
        OSError: Offline mode (HF_HUB_OFFLINE), the server cannot be reached, or the connection broke.
        ValueError: The digest is not `sha256`.
    """
    from huggingface_hub import constants

    path = Path(path)
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"offline mode (HF_HUB_OFFLINE) forbids fetching {url}: put the file at {path} by hand")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(unfinished, "wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            with progress_bar(total, path.name, "B", unit_scale=True) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
        if total is not None and unfinished.stat().st_size != total:
            raise OSError(f"the connection broke after {unfinished.stat().st_size:,} of {total:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"could not fetch {url} ({error}): try again, or put the file at {path} by hand") from error
    if sha256 is not None and digest.hexdigest() != sha256:
        unfinished.unlink()
        raise ValueError(
            f"{url} has sha256 {digest.hexdigest()}, not {sha256}: it is not the file that is known; not kept"
        )
    os.replace(unfinished, path)
    return digest.hexdigest()
