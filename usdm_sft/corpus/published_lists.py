"""DailyTalk's published split lists: recognized by sha256, and downloaded where the data lacks them."""

from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from usdm_sft.corpus.manifest import is_manifest
from usdm_sft.utils.cache import cache_root, sha256_file
from usdm_sft.utils.download import download

DAILYTALK = "DailyTalk"


# The split lists in the DailyTalk repository (github.com/keonlee9420/DailyTalk).
SPLIT_LISTS_URL = (
    "https://raw.githubusercontent.com/keonlee9420/DailyTalk/"
    "05a0173dac8e68fb2b22190cfc5c22248538a1a6/preprocessed_data/DailyTalk"
)
SPLIT_LISTS = {
    "train": ("train_phone.txt", "defdf666637a16db3ea353e2e9477a5e2d20e6a686fb687de62425b7be6fa92e"),
    "test": ("val_phone.txt", "72337e7247a10818af5100f768edb0082b2407b21c99a910a8ad9401969ad9c7"),
}


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


def are_published_lists(digests: Mapping[str, str]) -> bool:
    """Whether every list is one that DailyTalk publishes, under whatever name: the sha256 of each split's list."""
    return set(digests.values()) <= {sha256 for _, sha256 in SPLIT_LISTS.values()}


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


def describe_corpus(lists: Mapping[str, Path], digests: Mapping[str, str]) -> str:
    """The kind of corpus that the lists describe.

    Args:
        lists: Split list or manifest of each split.
        digests: Their sha256.

    Returns:
        "DailyTalk" for the lists that DailyTalk publishes; otherwise "split list", "manifest", or "manifest and split list".
    """
    if are_published_lists(digests):
        return DAILYTALK
    return " and ".join(sorted({list_kind(path) for path in lists.values()}))


def list_kind(path: Path) -> str:
    """ "manifest" or "split list"."""
    return "manifest" if is_manifest(path) else "split list"
