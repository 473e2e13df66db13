"""DailyTalk's published split lists: recognized by sha256, and downloaded if the data has no lists."""

from collections.abc import Mapping
from pathlib import Path

from usdm_sft.corpus.manifest import is_manifest
from usdm_sft.utils.cache_keys import cache_root
from usdm_sft.utils.download import download
from usdm_sft.utils.files import sha256_file
from usdm_sft.utils.locks import file_lock

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

# What `datasets.DatasetInfo` says of the published lists.
INFO = {
    "homepage": "https://github.com/keonlee9420/DailyTalk",
    "license": "CC BY-SA 4.0, offered for academic use; the texts come from DailyDialog, CC BY-NC-SA 4.0 (not confirmed)",
    "citation": "Keon Lee, Kyumin Park, Daeyoung Kim: DailyTalk: Spoken Dialogue Dataset for Conversational Text-to-Speech. "
    "2022, arXiv:2207.01063",
}


def fetch_split_lists(cache_dir: str | Path | None = None, *, url: str | None = None) -> dict[str, Path]:
    """Return DailyTalk's own split lists, from the cache or else from its repository at a fixed commit.

    Args:
        cache_dir: Where the lists are kept; this package's cache by default.
        url: Another place to download from, for tests.

    Returns:
        The path of the list of each split.

    Raises:
        OSError: There is no network, or offline mode is on.
        ValueError: A downloaded file has another sha256.
    """
    folder = cache_root(cache_dir) / "split_lists"
    lists = {}
    with file_lock(folder / "lock"):
        for split, (name, sha256) in SPLIT_LISTS.items():
            lists[split] = folder / name
            if not lists[split].is_file() or sha256_file(lists[split]) != sha256:
                download(f"{url or SPLIT_LISTS_URL}/{name}", lists[split], sha256=sha256)
    return lists


def cached_split_lists(cache_dir: str | Path | None = None) -> dict[str, Path] | None:
    """Return the lists that `fetch_split_lists` would return without a download, or None."""
    folder = cache_root(cache_dir) / "split_lists"
    lists = {split: folder / name for split, (name, _) in SPLIT_LISTS.items()}
    complete = all(
        lists[split].is_file() and sha256_file(lists[split]) == sha256 for split, (_, sha256) in SPLIT_LISTS.items()
    )
    return lists if complete else None


def are_published_lists(digests: Mapping[str, str]) -> bool:
    """Return True if every list is one that DailyTalk publishes, under any name.

    Args:
        digests: sha256 of each split's list.
    """
    return set(digests.values()) <= {sha256 for _, sha256 in SPLIT_LISTS.values()}


def check_not_swapped(lists: Mapping[str, str | Path], digests: Mapping[str, str]) -> None:
    """Check that DailyTalk's own train and test lists are not swapped; other lists are not known.

    Args:
        lists: Path of the list of each split. A single list may have any split name: datasets calls it "train".
        digests: sha256 of each split's list.

    Raises:
        ValueError: The train list is named as test, or the test list as train.
    """
    for split, other in (("train", "test"), ("test", "train")) if len(lists) > 1 else ():
        if digests.get(split) == SPLIT_LISTS[other][1]:
            raise ValueError(f"{lists[split]} is DailyTalk's {other} list, but is named as {split}: swap the lists")


def describe_corpus(lists: Mapping[str, Path], digests: Mapping[str, str]) -> str:
    """Return the kind of corpus that the lists describe.

    Args:
        lists: Split list or manifest of each split.
        digests: sha256 of each split's list.

    Returns:
        "DailyTalk" for the published lists; otherwise "split list", "manifest", or "manifest and split list".
    """
    if are_published_lists(digests):
        return DAILYTALK
    return " and ".join(sorted({list_kind(path) for path in lists.values()}))


def list_kind(path: Path) -> str:
    """Return "manifest" or "split list"."""
    return "manifest" if is_manifest(path) else "split list"
