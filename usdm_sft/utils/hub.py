"""What all exchanges with the Hub share: names that are checked, repositories to push to, and errors in one line with the reason that the server gave."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but its stubs do not export it

from usdm_sft.utils.texts import first_line, quote

RepoType = Literal["model", "dataset"]

LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"
_SENT_ONCE = "push again, nothing is sent twice"
_PATIENCE = 5  # seconds in which the Hub answers
_SHOWN = 300  # characters of the server's reason: that of a wrong licence lists all licences

# What git allows in no name of a branch or tag (git help check-ref-format).
_NO_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(/|$)|^[-/.]|[/.]$|^@?$")
_TOKEN = re.compile(r"Bearer [^\s'\"\\]+|\bhf_\w{16,}")
_NO_ROOM = re.compile(r"storage|quota", re.IGNORECASE)
_SECONDS_LEFT = re.compile(r"\bt\s*=\s*(\d+)")  # in the header ratelimit: "api";r=0;t=55

_OF_HUB = (HTTPError, HFValidationError, OfflineModeIsEnabled, FileMetadataError, LocalTokenNotFoundError)
_OF_CONTENT = (ValueError, LookupError, TypeError, AttributeError, AssertionError)
_PARSERS = ("json", "httpx", "httpx2")  # modules that huggingface_hub calls to read an answer


def check_revision(revision: str | None) -> None:
    """Check that a branch, tag or commit can have this name.

    Raises:
        ValueError: No revision can.
    """
    if revision is not None and _NO_REVISION.search(revision):
        raise ValueError(f"revision {quote(revision)} is not the name of a branch, a tag or a commit: correct it")


def check_repository(repo_id: str) -> None:
    """Check the name of a repository to push to.

    Raises:
        ValueError: It is not USER/NAME.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the name of a repository ({error}): give USER/NAME") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} does not say whose repository it is: give USER/NAME")


def create_repository(
    api: HfApi, repo_id: str, repo_type: RepoType, *, private: bool | None, branch: str | None
) -> None:
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


def only_cached(
    repo_id: str, file: str, repo_type: RepoType = "model", *, revision: str | None, cache_dir: str | Path | None
) -> dict[str, bool]:
    """Return the argument that makes huggingface_hub take what its cache has, where a file is there and the Hub does not answer.

    huggingface_hub itself asks again for half a minute, and transformers several times so, before they take it.
    """
    known = try_to_load_from_cache(repo_id, file, cache_dir=cache_dir, revision=revision, repo_type=repo_type)
    if not isinstance(known, str) or constants.HF_HUB_OFFLINE:
        return {}
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file, repo_type=repo_type, revision=revision), timeout=_PATIENCE)
    except (HfHubHTTPError, FileMetadataError):  # it answers, and says no
        return {}
    except (HTTPError, OSError):
        return {"local_files_only": True}
    return {}


def size_on_hub(
    repo_id: str, file: str, repo_type: RepoType = "model", *, revision: str | None = None, timeout: float
) -> int | None:
    """Ask the Hub for the size of a file, in bytes. None if the repository has no such file.

    It raises the errors of huggingface_hub: call it within `hub_errors`.
    """
    url = hf_hub_url(repo_id, file, repo_type=repo_type, revision=revision)
    try:
        found = get_hf_file_metadata(url, token=get_token(), timeout=timeout)
    except EntryNotFoundError:
        return None
    if found.commit_hash is None:
        raise FileMetadataError(f"{url} has no commit")
    return found.size or 0


@contextmanager
def hub_errors(
    repo_id: str,
    revision: str | None = None,
    *,
    repo_type: RepoType = "model",
    writes: bool = False,
    intro: str = "",
    outro: str = "",
) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one line: what happened, what the server said, what to do. Other errors pass.

    Args:
        repo_id: The repository.
        revision: Its branch, tag or commit, if one is named.
        repo_type: "dataset" or "model".
        writes: A push, not a download.
        intro: What the line begins with, such as "NAME is not a folder, and ".
        outro: What it ends with, such as another remedy.

    Raises:
        OSError: The Hub refuses, cannot be reached, or something else answers in its place; or offline mode is on.
        ValueError: A name is wrong, or the revision does not exist.
    """
    check_revision(revision)
    try:
        yield
    except Exception as error:
        if (found := _find_cause(error)) is None:
            raise
        line = f"{intro}{_explain(found, _Request(repo_id, revision, repo_type, writes))}{outro}"
        raise (ValueError if isinstance(found, HFValidationError | RevisionNotFoundError) else OSError)(line) from None


class _Request(NamedTuple):
    """What was asked of the Hub; the arguments of `hub_errors`."""

    repo_id: str
    revision: str | None = None
    repo_type: RepoType = "model"
    writes: bool = False


def _explain(found: BaseException, request: _Request) -> str:
    """Explain an error of huggingface_hub in one line."""
    repo_id, again = request.repo_id, _SENT_ONCE if request.writes else "run the command again"
    if isinstance(found, HFValidationError):
        return f"{repo_id!r} is not the name of a repository ({first_line(found)}): give USER/NAME"
    if isinstance(found, LocalTokenNotFoundError):
        return f"{repo_id} was to be opened with your token, but nobody is logged in: {LOG_IN}"
    if isinstance(found, OfflineModeIsEnabled):
        if request.writes:
            return f"offline mode (HF_HUB_OFFLINE) forbids a push to {repo_id}: unset it and push again"
        return f"offline mode (HF_HUB_OFFLINE) forbids fetching {repo_id}: run once without offline mode"
    if isinstance(found, HfHubHTTPError):
        if not _is_page(found.response.status_code, found.response.headers):
            return _explain_answer(found, request, again)
    elif isinstance(found, HTTPError):  # no answer came
        reason = _TOKEN.sub("(token)", first_line(found))
        return f"the Hub cannot be reached at {constants.ENDPOINT} ({reason}): check the network and the proxy, and {again}"
    elif str(found).startswith("LFS batch API returned errors"):
        reason = _shorten(str(found).partition(":")[2])
        return f"the Hub does not take a file for {repo_id} ({reason}): {_what_to_do_about(reason)}"
    return (
        f"what answers at {constants.ENDPOINT} is not the Hub: check HF_ENDPOINT, the proxy, and whether the network "
        "shows a page to log in"
    )


def _find_cause(error: BaseException | None) -> BaseException | None:
    """Find the first error in the chain that is about the Hub; transfers of files wrap it."""
    while error is not None:
        if isinstance(error, _OF_HUB) or (isinstance(error, _OF_CONTENT) and _comes_from_parsing(error)):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _comes_from_parsing(error: BaseException) -> bool:
    """Return True for an error that huggingface_hub raised itself, as it does about an answer that is not the Hub's."""
    modules = [
        frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    while modules and modules[-1] in _PARSERS:
        modules.pop()
    return bool(modules) and modules[-1] == "huggingface_hub"


def _is_page(status: int, headers: Mapping[str, str]) -> bool:
    """Return True for a page of a proxy or a network. The Hub's own refusals say why in a header, and it is busy in HTML at times."""
    is_busy = status == 429 or 500 <= status <= 510
    return "html" in headers.get("Content-Type", "") and "X-Error-Message" not in headers and not is_busy


def _explain_answer(error: HfHubHTTPError, request: _Request, again: str) -> str:
    """Explain an answer of the Hub with an error status."""
    repo_id, response = request.repo_id, error.response
    status = response.status_code
    reason = _shorten(error.server_message or response.headers.get("X-Error-Message"))  # whoami keeps the header only
    said = f"status {status}: {reason}" if reason else f"status {status}"
    is_anonymous = "authorization" not in response.request.headers
    page = f"{constants.ENDPOINT}/{'datasets/' if request.repo_type == 'dataset' else ''}{repo_id}"
    if isinstance(error, RevisionNotFoundError):
        if request.writes:
            return f"{repo_id} has no branch {request.revision!r}: name one that exists, or push without create_pr"
        return f"{repo_id} has no revision {request.revision or 'main'!r}: name a branch, a tag or a commit of it"
    if status == 429:
        return f"the Hub takes no more requests for now ({said}): {_format_wait(error)}, and {again}"
    if status >= 500 and status != 507:
        return f"the Hub has a failure of its own ({said}): wait a few minutes, and {again}"
    if status == 412 and request.writes:
        return (
            f"somebody else changed {repo_id} during this push, and nothing was pushed ({said}): look at their commit "
            f"({page}/commits/{request.revision or 'main'}) before you decide what belongs there, or push to a branch "
            "of your own with --revision"
        )
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated ({said}): ask for access at {page}" + (f", and {LOG_IN}" if is_anonymous else "")
    if request.writes:
        start = "the Hub does not let you write to" if status in (401, 403, 404) else "the Hub refuses the push to"
        return f"{start} {repo_id} ({said}): {_what_to_do_about(reason, status)}"
    if status == 401 and not is_anonymous:
        return f"the Hub does not accept your token ({said}): log in again with 'hf auth login', or correct HF_TOKEN"
    if status in (401, 404):
        remedy = LOG_IN if is_anonymous else "ask its owner for access"
        return f"the Hub has no {repo_id}, or it is private ({said}): correct the name, or {remedy}"
    remedy = f"{LOG_IN} to a token that may read it" if status == 403 else again
    return f"the Hub does not give {repo_id} ({said}): {remedy}"


def _what_to_do_about(reason: str, status: int = 0) -> str:
    """Return the remedy for a push that the Hub refuses."""
    if _NO_ROOM.search(reason) or status in (413, 507):
        return f"free storage or raise its limit on the Hub, and {_SENT_ONCE}; or push to another owner"
    if status in (401, 403, 404):  # the Hub's answers to a token without write permission
        return f"{LOG_IN} to a token that may write there"
    return f"correct what it names, and {_SENT_ONCE}" if reason else _SENT_ONCE


def _format_wait(error: HfHubHTTPError) -> str:
    """Say how long the server asks to wait."""
    headers = error.response.headers
    if (left := _SECONDS_LEFT.search(headers.get("ratelimit", ""))) is not None:
        return f"wait {left[1]} s"
    after = _shorten(headers.get("Retry-After"))
    return f"wait {after} s" if after.isdigit() else f"wait until {after}" if after else "wait a few minutes"


def _shorten(text: str | None) -> str:
    """Put what the server said into one line without tokens, cut where it is long."""
    line = _TOKEN.sub("(token)", " ".join((text or "").split()))
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
