"""Push a dataset folder to a bucket of the Hub, which has files and no commits.

counts.json is written last. Until then a reader finds the counts.json of the earlier push, or none, beside new files, and `verify` refuses
the folder.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from usdm_sft.folder.layout import COUNTS, read_counts
from usdm_sft.folder.own_parts import EMPTY_CARD, Card
from usdm_sft.utils.hub import hub_errors

PREFIX = "buckets/"


def push_to_bucket(
    dataset_dir: str | Path,
    name: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    card: Card = EMPTY_CARD,
) -> str:
    """Upload a verified dataset folder. Files of an earlier push that it no longer has are removed.

    Args:
        dataset_dir: The folder.
        name: The bucket, and a folder in it: "buckets/user/name" or "buckets/user/name/folder".
        private: Create the bucket private or public; a bucket that exists must be private if this is True.
        token: Token of the Hub.
        card: Options of the card, which are refused.

    Returns:
        The name, with which `load_dataset` opens the folder.

    Raises:
        ImportError: This version of huggingface_hub has no buckets.
        ValueError: There are options of the card, the name is wrong, the bucket is public though `private` is True, or the folder in it has other files.
        OSError: The Hub refuses the push or cannot be reached.
    """
    if card.given:
        raise ValueError(
            f"{name} is a bucket, which gets the card of the folder as it is: leave out card.{card.given[0]} here, and give it to prepare"
        )
    api: Any = HfApi(token=token)
    if not hasattr(api, "batch_bucket_files"):
        raise ImportError("this version of huggingface_hub has no buckets: pip install -U huggingface_hub")
    user, bucket, *folders = [*name.removeprefix(PREFIX).split("/"), ""]
    if not (user and bucket):
        raise ValueError(f"{name!r} is not the name of a bucket: give {PREFIX}USER/NAME or {PREFIX}USER/NAME/FOLDER")
    bucket_id, prefix = f"{user}/{bucket}", "".join(f"{folder}/" for folder in folders if folder)
    files = {prefix + file: Path(dataset_dir, file) for file in [*read_counts(dataset_dir)["files"], COUNTS]}
    with hub_errors(name, repo_type="dataset", writes=True):
        api.create_bucket(bucket_id, private=private, exist_ok=True)
        if private and not api.bucket_info(bucket_id).private:
            raise ValueError(f"{bucket_id} exists and is public: make it private on the Hub, or name another bucket")
        gone = _find_replaced(api, bucket_id, prefix, set(files))
        last = prefix + COUNTS
        api.batch_bucket_files(bucket_id, add=[(path, file) for file, path in files.items() if file != last])
        api.batch_bucket_files(bucket_id, add=[(files[last], last)], delete=sorted(gone))
    return name


def _find_replaced(api: Any, bucket_id: str, prefix: str, new: set[str]) -> set[str]:
    """The files of an earlier push that are not in the new one.

    Raises:
        ValueError: There are files that no push wrote.
    """
    tree = api.list_bucket_tree(bucket_id, prefix.rstrip("/") or None, recursive=True)
    existing = {entry.path for entry in tree if entry.type == "file" and entry.path.startswith(prefix)}
    pushed: set[str] = set()
    if prefix + COUNTS in existing:
        with TemporaryDirectory() as folder, suppress(ValueError):  # not the counts.json of a dataset folder
            api.download_bucket_files(bucket_id, [(prefix + COUNTS, Path(folder, COUNTS))])
            pushed = {prefix + file for file in [*read_counts(folder)["files"], COUNTS]}
    if other := sorted(existing - pushed - new):
        raise ValueError(
            f"{bucket_id} has {other[0]}, which no push of a dataset folder wrote: name another folder in it"
        )
    return (existing & pushed) - new
