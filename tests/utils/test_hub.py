"""What a user reads when the Hub, or something in its place, gives another answer than the wanted one."""

import re

import datasets
import pytest

from usdm_sft.corpus.hub_corpus import fetch_corpus
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.units.folder import find_folder
from usdm_sft.utils.hub import check_revision, hub_errors

TOKEN = "hf_aVerySecretTokenOfAUser"
GATED = "Access to a/b is restricted."
LOG_IN = "log in with 'hf auth login', or set HF_TOKEN"
NOT_HUB = (
    "what answers at {url} is not the Hub: check HF_ENDPOINT, the proxy, and whether the network shows a page to log in"
)

READERS = {
    "tokenizer": (
        lambda: load_tokenizer("a/b"),
        "tokenizer a/b is not a folder, and {}",
    ),
    "unit model": (lambda: find_folder("a/b"), "unit model a/b is not a folder, and {}"),
    "corpus": (lambda: fetch_corpus("hub:a/b"), "dataset a/b cannot be loaded: {}"),
}


@pytest.fixture
def answer(served_hub, monkeypatch):
    """Let the stand-in answer every request in one way."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served_hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def set_answer(status, body=b"", headers=(), kind="application/json"):
        monkeypatch.setattr(
            served_hub.handler, "route", lambda self, path, query, data: self.send(status, body, headers, kind)
        )

    return set_answer


def refusal(message, code=None, **headers):
    return {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


BUSY = "the Hub takes no more requests for now (status 429: Slow down): wait {}, and run the command again"
NONE = "the Hub has no a/b, or it is private (status 404: Not found): correct the name, or ask its owner for access"
NO_TOKEN = "the Hub does not accept your token (status 401: Bad (token)): log in again with 'hf auth login', or correct HF_TOKEN"
DISABLED = f"the Hub does not give a/b (status 403: Access is disabled.): {LOG_IN} to a token that may read it"
FAILURE = (
    f"the Hub has a failure of its own (status 503: {'x' * 300}...): wait a few minutes, and run the command again"
)
TIMEOUT = "the Hub has a failure of its own (status 504): wait a few minutes, and run the command again"
DATE = "Sun, 29 Nov 2026 12:00:00 GMT"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("status", "headers", "line"),
    [
        (403, refusal(GATED, "GatedRepo"), f"a/b is gated (status 403: {GATED}): ask for access at {{page}}"),
        (404, refusal("Not found", "RepoNotFound"), NONE),
        (401, refusal(f"Bad {TOKEN}"), NO_TOKEN),
        (403, refusal("Access is disabled."), DISABLED),
        (429, refusal("Slow down", ratelimit='"api";r=0;t=55'), BUSY.format("55 s")),
        (429, refusal("Slow down", **{"Retry-After": "120"}), BUSY.format("120 s")),
        (429, refusal("Slow down", **{"Retry-After": DATE}), BUSY.format(f"until {DATE}")),
        (503, refusal("x" * 400), FAILURE),
        (504, {"Content-Type": "text/html"}, TIMEOUT),
    ],
)
def test_reason_of_the_hub_is_shown(served_hub, answer, reader, status, headers, line):
    answer(status, headers=headers)
    kind = "datasets/" if reader == "corpus" else ""
    read, sentence = READERS[reader]
    with pytest.raises(OSError, match="a/b") as raised:
        read()
    assert str(raised.value) == sentence.format(line.format(page=f"{served_hub.url}/{kind}a/b"))
    assert raised.value.__suppress_context__ and raised.value.__cause__ is None


def test_gated_and_private_repositories_ask_to_log_in(served_hub, answer, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    answer(401, headers=refusal(GATED, "GatedRepo"))
    with pytest.raises(OSError, match=re.escape(f"ask for access at {served_hub.url}/a/b, and {LOG_IN}")):
        load_tokenizer("a/b")
    answer(401, headers=refusal("Invalid username or password.", "RepoNotFound"))
    with pytest.raises(OSError, match=re.escape(f"Invalid username or password.): correct the name, or {LOG_IN}")):
        find_folder("a/b")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [(status, b"<html>Log in to the hotel</html>", "text/html; charset=utf-8") for status in (200, 403, 511)]
    + [(200, body, "application/json") for body in (b"{}", b"null", b"[]", b"<html>", b"")],
)
def test_answer_that_is_not_the_hubs_is_one_line(served_hub, answer, reader, status, body, kind):
    answer(status, body, kind=kind)
    read, sentence = READERS[reader]
    with pytest.raises(OSError, match="is not the Hub") as raised:
        read()
    assert str(raised.value) == sentence.format(NOT_HUB.format(url=served_hub.url))


@pytest.mark.parametrize("reader", READERS)
def test_revision_that_the_hub_lacks(answer, reader):
    answer(404, headers=refusal("Invalid rev id: main", "RevisionNotFound"))
    read, sentence = READERS[reader]
    with pytest.raises(ValueError, match="revision") as raised:
        read()
    line = "a/b has no revision 'main': name a branch, a tag or a commit of it"
    assert str(raised.value) == sentence.format(line)


@pytest.mark.parametrize(
    "name",
    [
        *("", "@", "a b", "a\nb", "a..b", "a//b", "a@{b", "a\\b", "a:b", "a[b", "v~1", "v^", "v?", "v*"),
        *("-v1", "/v1", "v1/", "v1.", ".v1", "a/.b", "v1.lock", "v1.lock/a"),
    ],
)
def test_name_that_no_revision_has_is_not_asked_for(served_hub, name):
    message = f"revision {name!r} is not the name of a branch, a tag or a commit: correct it"
    with pytest.raises(ValueError, match=re.escape(message)):
        fetch_corpus(f"hub:a/b@{name}")
    assert served_hub.log == []


@pytest.mark.parametrize("name", ["main", "v1.0", "refs/pr/1", "feature/x-1", "0" * 40, "a@b", None])
def test_names_of_revisions(name):
    check_revision(name)


def test_errors_that_are_not_of_the_hub_pass():
    for error in (KeyError("x"), TypeError("x"), ValueError("x"), PermissionError("x")):
        with pytest.raises(type(error)) as raised, hub_errors("a/b"):
            raise error
        assert raised.value is error


def test_token_that_is_required_and_missing(served_hub):
    message = (
        f"unit model a/b is not a folder, and a/b was to be opened with your token, but nobody is logged in: {LOG_IN}"
    )
    with pytest.raises(OSError, match=f"^{message}$"):
        find_folder("a/b", token=True)
    assert served_hub.log == []


def test_token_that_is_no_header_is_not_shown(served_hub):
    with pytest.raises(OSError, match="the Hub cannot be reached at ") as raised:
        find_folder("a/b", token=f"{TOKEN}\n")
    assert TOKEN not in str(raised.value)
