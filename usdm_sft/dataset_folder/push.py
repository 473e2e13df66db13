"""A dataset folder to the Hub: the files that `verify` checked, byte for byte, in one commit.

All contents are uploaded first and become visible together, when the commit names them. Contents are addressed by their sha256, so what
an upload had brought over before the connection broke is not sent again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_sft.dataset_folder.layout import COUNTS, read_counts
from usdm_sft.dataset_folder.verify import verify

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_HARMLESS = {".gitattributes", "README.md", "LICENSE"}  # what a repository may hold before its first push
_SLICE = 100  # files uploaded at a time


def push(
    dataset_dir: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Verify a dataset folder and upload it; files of an earlier push that are no longer in it are removed.

    Args:
        dataset_dir: A folder that `prepare` made. Only the files that its counts.json names are uploaded, and counts.json.
        repo_id: The dataset repository, such as "user/name"; created where it does not exist.
        private: Create the repository private (True) or public (False); by default as its owner's settings say. An existing
            repository keeps its visibility, but with True it must be private.
        token: Token of the Hub; by default HF_TOKEN, or the one that `hf auth login` saved.
        revision: Branch to commit to; created where it does not exist. The main branch by default.
        commit_message: First line of the commit; by default "Upload", the config and the first digits of the folder's key.
        create_pr: Open a pull request instead of a commit to the branch, which must exist then.

    Returns:
        The URL of the commit, or of the pull request. The URL of the last commit if the files are there already.

    Raises:
        FileNotFoundError: `dataset_dir` is not a finished dataset folder.
        ValueError: The folder does not pass `verify`, the repository holds something else, is public though `private` is set,
            or lacks the branch that a pull request is for; a name or the commit message is wrong.
        OSError: The Hub refused or cannot be reached, or offline mode is on.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if commit_message is not None and not commit_message.strip():
        raise ValueError(f"commit_message {commit_message!r} is empty: give a text, or leave it out")
    folder = Path(dataset_dir)
    verify(folder)
    counts = read_counts(folder)
    additions = [CommitOperationAdd(name, folder / name) for name in [*counts["files"], COUNTS]]
    for addition in additions:
        expected = counts["files"].get(addition.path_in_repo)
        if expected is not None and addition.upload_info.sha256.hex() != expected:
            raise ValueError(f"{addition.path_or_fileobj} was changed after it was verified: push again")
    api = HfApi(token=token)
    with _told(repo_id, revision):
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if private and not api.repo_info(repo_id, repo_type="dataset").private:
            raise ValueError(f"{repo_id} exists and is public: make it private on the Hub, or name another repository")
        if revision is not None and not create_pr:
            api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
        head = api.repo_info(repo_id, repo_type="dataset", revision=revision).sha
        there = set(api.list_repo_files(repo_id, repo_type="dataset", revision=head))
        ours = set(_pushed_before(api, repo_id, there, head))
        if other := sorted(there - ours - _HARMLESS):
            raise ValueError(
                f"{repo_id} holds {other[0]}, which no push of a dataset folder wrote: name another repository"
            )
        for start in range(0, len(additions), _SLICE):
            api.preupload_lfs_files(
                repo_id,
                additions[start : start + _SLICE],
                repo_type="dataset",
                revision=revision,
                create_pr=create_pr,
                free_memory=False,
            )
        gone = sorted((ours & there) - {addition.path_in_repo for addition in additions})
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in gone)],
            commit_message=commit_message or f"Upload {counts['config']}: {counts['key'][:16]}",
            repo_type="dataset",
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
        )
    return commit.pr_url or commit.commit_url


def _pushed_before(api: HfApi, repo_id: str, there: set[str], revision: str) -> list[str]:
    """The files that an earlier push wrote, which a new one may replace."""
    if COUNTS not in there:
        return []
    path = api.hf_hub_download(repo_id, COUNTS, repo_type="dataset", revision=revision)
    try:
        return [*read_counts(Path(path).parent)["files"], COUNTS]
    except ValueError:
        return []


@contextmanager
def _told(repo_id: str, revision: str | None) -> Iterator[None]:
    """Tell what went wrong with the Hub in one line, without URLs and headers."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository ({error}): give USER/NAME") from None
    except OfflineModeIsEnabled:
        raise OSError(f"offline mode (HF_HUB_OFFLINE) forbids a push to {repo_id}: unset it, and push again") from None
    except RevisionNotFoundError:
        raise ValueError(
            f"{repo_id} has no branch {revision!r}: name one that exists, or push without create_pr"
        ) from None
    except (HTTPError, RuntimeError, LocalEntryNotFoundError) as error:
        cause = error if isinstance(error, HTTPError) else error.__cause__  # a file's transfer is wrapped once more
        if not isinstance(cause, HTTPError):
            raise
        if not isinstance(cause, HfHubHTTPError):  # there was no answer
            raise OSError(
                f"the Hub cannot be reached ({str(cause) or type(cause).__name__}): see that there is a network, and push "
                "again, nothing is sent twice"
            ) from None
        status = cause.response.status_code
        if status in (401, 403, 404):  # what the Hub answers to a token that may not
            remedy = "log in with 'hf auth login', or set HF_TOKEN to a token that may write there"
            raise OSError(f"the Hub does not let you write to {repo_id} (status {status}): {remedy}") from None
        raise OSError(f"the upload to {repo_id} broke (status {status}): push again, nothing is sent twice") from None
