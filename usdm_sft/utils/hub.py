"""What all pushes to the Hub share: the repository is created where it does not exist, and errors are one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from usdm_sft.utils.texts import first_line


def create_repository(api: HfApi, repo_id: str, repo_type: str, *, private: bool | None, branch: str | None) -> None:
    """Create the repository and the branch where they do not exist.

    Args:
        api: The connection to the Hub.
        repo_id: The repository, such as "user/name".
        repo_type: "dataset" or "model".
        private: Create it private (True) or public (False); by default as in the settings of its owner.
        branch: A branch to create, or None.

    Raises:
        ValueError: The repository exists and is public, though `private` is True.
    """
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(f"{repo_id} exists and is public: make it private on the Hub, or name another repository")
    if branch is not None:
        api.create_branch(repo_id, repo_type=repo_type, branch=branch, exist_ok=True)


@contextmanager
def hub_errors_in_one_line(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the Hub into one line without URLs and headers."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the name of a repository ({error}): give USER/NAME") from None
    except OfflineModeIsEnabled:
        raise OSError(f"offline mode (HF_HUB_OFFLINE) forbids a push to {repo_id}: unset it and push again") from None
    except RevisionNotFoundError:
        raise ValueError(
            f"{repo_id} has no branch {revision!r}: name one that exists, or push without create_pr"
        ) from None
    except (HTTPError, RuntimeError, LocalEntryNotFoundError) as error:
        cause = error if isinstance(error, HTTPError) else error.__cause__  # file transfers wrap it
        if not isinstance(cause, HTTPError):
            raise
        if not isinstance(cause, HfHubHTTPError):  # no answer came
            raise OSError(
                f"the Hub cannot be reached ({first_line(cause)}): check the network and push again, nothing is sent twice"
            ) from None
        status = cause.response.status_code
        if status in (401, 403, 404):  # the Hub's answers to a token without write permission
            remedy = "log in with 'hf auth login', or set HF_TOKEN to a token that may write there"
            raise OSError(f"the Hub does not let you write to {repo_id} (status {status}): {remedy}") from None
        raise OSError(f"the upload to {repo_id} failed (status {status}): push again, nothing is sent twice") from None
