"""Push a dataset folder to the Hub: the verified files, byte for byte, in one commit. The card alone is changed: it names the repository.

All contents are uploaded first and become visible together with the commit. The Hub addresses contents by their sha256, so
a push after a broken connection does not send finished uploads again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.hf_api import RepoFile

from usdm_sft.folder.bucket import PREFIX, push_to_bucket
from usdm_sft.folder.layout import COUNTS, read_counts
from usdm_sft.folder.own_parts import CARD, EMPTY_CARD, Card, fill_in, name_repository, plain_digest, read_card
from usdm_sft.folder.verify import verify
from usdm_sft.utils.hub import check_repository, check_revision, create_repository, hub_errors

logger = logging.getLogger(__name__)

_HARMLESS = {".gitattributes", "README.md", "LICENSE"}  # files that a repository may have before its first push
_SLICE = 100  # files per upload call


def push(
    dataset_dir: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    card: Card = EMPTY_CARD,
) -> str:
    """Verify a dataset folder and upload it. Files of an earlier push that it no longer has are removed.

    The card on the Hub has the name of the repository in its code. What the publisher wrote into the card on the Hub stays, where the
    card of the folder does not have it. The folder is not changed.

    Args:
        dataset_dir: A folder that `prepare` made. Only counts.json and the files that it names are uploaded.
        repo_id: The dataset repository, such as "user/name", or a bucket, "buckets/user/name" or "buckets/user/name/folder";
            created if it does not exist. A bucket has no commits: readers may see a part of a push.
        private: Create the repository private (True) or public (False); by default as in the settings of its owner. An
            existing repository keeps its visibility, but must be private if this is True.
        token: Token of the Hub; by default HF_TOKEN, or the one that `hf auth login` saved.
        revision: Branch to commit to; created if it does not exist. The main branch by default.
        commit_message: First line of the commit; by default "Upload", the config and the first digits of the folder's key.
        create_pr: Open a pull request to the branch, which must exist, instead of a commit.
        card: What the publisher says in the card on the Hub, in place of what it says by now. A bucket gets the card of the folder.

    Returns:
        The URL of the commit or of the pull request. If the files are unchanged, the URL of the last commit. The name of a bucket.

    Raises:
        FileNotFoundError: `dataset_dir` is not a finished dataset folder.
        ValueError: The folder does not pass `verify`; the repository has other files, is public though `private` is True,
            or does not have the branch of the pull request; or a name or the commit message is wrong.
        OSError: The Hub refuses the push or cannot be reached, or offline mode is on.
    """
    if commit_message is not None and not commit_message.strip():
        raise ValueError(f"commit_message {commit_message!r} is empty: give a text, or leave it out")
    if repo_id.startswith(PREFIX) and (revision, commit_message, create_pr) != (None, None, False):
        raise ValueError(
            f"{repo_id} is a bucket, which has no commits: leave out revision, commit_message and create_pr"
        )
    if not repo_id.startswith(PREFIX):
        check_repository(repo_id)
        check_revision(revision)
    verify(dataset_dir)
    if repo_id.startswith(PREFIX):
        return push_to_bucket(dataset_dir, repo_id, private=private, token=token, card=card)
    counts = read_counts(dataset_dir)
    folder = Path(dataset_dir).expanduser()
    additions = _list_additions(folder, counts)
    text = name_repository(_read_verified_card(folder, counts), repo_id)
    api = HfApi(token=token)
    target: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "create_pr": create_pr}
    with hub_errors(repo_id, revision, repo_type="dataset", writes=True):
        create_repository(api, repo_id, "dataset", private=private, branch=None if create_pr else revision)
        head = api.repo_info(repo_id, repo_type="dataset", revision=revision).sha
        existing = _list_existing(api, repo_id, head)
        pushed = _find_pushed(api, repo_id, head, existing)
        earlier = []
        if CARD in pushed:
            earlier = [read_card(Path(api.hf_hub_download(repo_id, CARD, repo_type="dataset", revision=head)))]
        additions.append(CommitOperationAdd(CARD, fill_in(text, card, *earlier).encode()))
        gone = pushed - {addition.path_in_repo for addition in additions}
        if not gone and all(_is_there(addition, existing) for addition in additions):
            logger.info("%s has all files of %s already: nothing was pushed", repo_id, dataset_dir)
            return f"{constants.ENDPOINT}/datasets/{repo_id}/commit/{head}"
        for start in range(0, len(additions), _SLICE):
            files = additions[start : start + _SLICE]
            api.preupload_lfs_files(repo_id, files, free_memory=False, **target)
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in sorted(gone))],
            commit_message=commit_message or f"Upload {counts['config']}: {counts['key'][:16]}",
            parent_commit=head,
            **target,
        )
    url: str = commit.pr_url or commit.commit_url
    return url


def _list_additions(folder: Path, counts: Mapping[str, Any]) -> list[CommitOperationAdd]:
    """The files to upload except the card, with the digests that counts.json names."""
    additions = [CommitOperationAdd(name, folder / name) for name in [*counts["files"], COUNTS] if name != CARD]
    for addition in additions:
        name = addition.path_in_repo
        if name != COUNTS and addition.upload_info.sha256.hex() != counts["files"][name]:
            raise ValueError(f"{folder / name} was changed after it was verified: push again")
    return additions


def _read_verified_card(folder: Path, counts: Mapping[str, Any]) -> str:
    text = read_card(folder / CARD)
    if plain_digest(text, counts["corpus"]) != counts["files"][CARD]:
        raise ValueError(f"{folder / CARD} was changed after it was verified: push again")
    return text


def _list_existing(api: HfApi, repo_id: str, head: str | None) -> dict[str, RepoFile]:
    """The files of the repository at commit `head`, by name."""
    tree = api.list_repo_tree(repo_id, recursive=True, repo_type="dataset", revision=head)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _is_there(addition: CommitOperationAdd, existing: Mapping[str, RepoFile]) -> bool:
    """Return True if the repository has the file with the same bytes. Git names the bytes of small files by a sha1."""
    if (file := existing.get(addition.path_in_repo)) is None:
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == addition.upload_info.sha256.hex())
    with addition.as_file() as opened:
        content = opened.read()
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _find_pushed(api: HfApi, repo_id: str, head: str | None, existing: Collection[str]) -> set[str]:
    """The files of an earlier push at commit `head`.

    Raises:
        ValueError: The repository has files that no push wrote.
    """
    pushed: set[str] = set()
    if COUNTS in existing:
        path = api.hf_hub_download(repo_id, COUNTS, repo_type="dataset", revision=head)
        with suppress(ValueError):  # not the counts.json of a dataset folder
            pushed = {*read_counts(Path(path).parent)["files"], COUNTS}
    if other := sorted({*existing} - pushed - _HARMLESS):
        raise ValueError(f"{repo_id} has {other[0]}, which no push of a dataset folder wrote: name another repository")
    return pushed.intersection(existing)
