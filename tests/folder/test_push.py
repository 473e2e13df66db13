"""Pushes to a local stand-in for the Hub."""

import json
import os
import re
import subprocess
import sys

import datasets
import pytest
from huggingface_hub import constants

from tests.helpers import content, edit_counts
from usdm_sft.cli.main import main, make_parser
from usdm_sft.folder.push import push
from usdm_sft.folder.verify import VerificationError
from usdm_sft.template.tokenizer import load_tokenizer

TOKEN = "hf_aVerySecretToken"
NO_NETWORK = "http://127.0.0.1:9"


@pytest.fixture
def hub(served_hub, monkeypatch):
    """The stand-in for the Hub, where the user is logged in; every folder counts as verified."""
    served_hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("usdm_sft.folder.push.verify", lambda folder: None)
    return served_hub


@pytest.fixture
def run_push(hub, capsys):
    """Run the command; return what it printed."""

    def run(folder, *options):
        main(["push", str(folder), "tester/pairs", "--quiet", *options])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(run_push, capsys):
    """Run the command, which must fail with one line; return the line."""

    def run(folder, *options):
        with pytest.raises(SystemExit, match="1"):
            run_push(folder, *options)
        captured = capsys.readouterr()
        assert captured.out == "" and "hf_" not in captured.err and captured.err.count("\n") == 1
        return captured.err.removeprefix("dailytalk-usdm push: ").removesuffix("\n")

    return run


def files_on(hub, branch="main"):
    repo = hub.repos["datasets", "tester/pairs"]
    files = repo["commits"][repo["refs"][branch]]["files"]
    return {name: hub.blob(entry) for name, entry in files.items() if name != ".gitattributes"}


def files_in(folder):
    """The files that a push of a dataset folder uploads: the card names the repository, and the lock of runs stays here."""
    files = {name: data for name, data in content(folder).items() if name != ".lock"}
    local = 'folder = "path/to/this/folder"  # or snapshot_download("USER/NAME", '
    card = files["README.md"].decode().replace(local, 'folder = snapshot_download("tester/pairs", ')
    return files | {"README.md": card.replace('"path/to/this/folder"', '"tester/pairs"').encode()}


def titles(hub):
    """The titles of all commits; the first commit is the Hub's own."""
    first, *pushed = [commit["title"] for commit in hub.repos["datasets", "tester/pairs"]["commits"].values()]
    assert first == "initial commit"
    return pushed


def test_push_and_push_again(hub, run_push, dataset_folder, folder_copy, caplog):
    (folder_copy / "thesis.txt").write_text("mine")
    (folder_copy / "dailytalk_usdm.py").write_text("a script")
    assert "load_dataset('tester/pairs') opens it" in run_push(folder_copy)
    assert files_on(hub) == files_in(dataset_folder)  # byte for byte, and nothing else
    key = json.loads((dataset_folder / "counts.json").read_text())["key"]
    assert titles(hub) == [f"Upload single_turn: {key[:16]}"]
    hub.log.clear()
    run_push(folder_copy)
    assert len(titles(hub)) == 1 and not [line for line in hub.log if "preupload" in line or "/commit/" in line]
    assert caplog.messages[-1] == f"tester/pairs has all files of {folder_copy} already: nothing was pushed"
    last = "single_turn/train-00009-of-00010.parquet"
    edit_counts(folder_copy, lambda counts: counts["files"].pop(last))
    run_push(folder_copy, "--commit_message", "Second take: 12")
    assert files_in(dataset_folder).keys() - files_on(hub).keys() == {last}
    assert titles(hub)[1:] == ["Second take: 12"]


# The rows, and ids of the tokenizer as in the card and with this package.
LOAD = """
import json
from datasets import load_dataset
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerFast
from dailytalk_usdm import load_tokenizer
rows = [list(load_dataset("tester/pairs", split="train", streaming=streaming)) for streaming in (False, True)]
folder = snapshot_download("tester/pairs", repo_type="dataset", allow_patterns="tokenizer/*")
tokenizers = [
    PreTrainedTokenizerFast.from_pretrained(f"{folder}/tokenizer"),
    load_tokenizer("tester/pairs", subfolder="tokenizer", repo_type="dataset"),
]
ids = [each("<|correspond|> yes.\\n### Agent\\n no<|unit5|>\\n</s>").input_ids for each in tokenizers]
try:
    load_tokenizer("tester/pairs", subfolder="tokens", repo_type="dataset")
except OSError as error:
    print(json.dumps([rows, ids, str(error)]))
"""


@pytest.mark.slow
def test_pushed_folder_is_loaded_and_streamed(hub, run_push, dataset_folder, tmp_path):
    run_push(dataset_folder)
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run([sys.executable, "-c", LOAD], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, ids, error = json.loads(done.stdout.splitlines()[-1])
    assert rows == [[*datasets.load_dataset(str(dataset_folder), split="train", cache_dir=str(tmp_path))]] * 2
    text = "<|correspond|> yes.\n### Agent\n no<|unit5|>\n</s>"
    assert ids == [load_tokenizer(dataset_folder / "tokenizer")(text).input_ids] * 2
    assert error == "folder tokens of tester/pairs on the Hub has no tokenizer.json: name one with a fast tokenizer"


def test_private_and_revision(hub, run_push, dataset_folder):
    run_push(dataset_folder, "--private", "--revision", "v1")
    assert hub.repos["datasets", "tester/pairs"]["private"]
    assert files_on(hub, "v1") == files_in(dataset_folder)
    assert files_on(hub) == {}


@pytest.mark.parametrize(("options", "expected"), [([], True), (["--public"], False)])
def test_visibility_follows_the_option_or_the_default(hub, run_push, dataset_folder, options, expected):
    hub.private_by_default = True
    run_push(dataset_folder, *options)
    assert hub.repos["datasets", "tester/pairs"]["private"] is expected


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--private", "--public"], "--public: not allowed with argument --private"), (["--token", "x"], "--token")],
)
def test_command_line_has_no_token_option(capsys, options, message):
    """Nor does it take both visibilities."""
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(["push", "folder", "tester/pairs", *options])
    assert message in capsys.readouterr().err


def test_empty_commit_message_is_refused(dataset_folder):
    with pytest.raises(ValueError, match="commit_message ' ' is empty: give a text, or leave it out"):
        push(dataset_folder, "tester/pairs", commit_message=" ")


def test_pull_request_leaves_the_branch_unchanged(hub, run_push, dataset_folder):
    assert run_push(dataset_folder, "--create_pr") == f"{hub.url}/datasets/tester/pairs/discussions/1\n"
    assert files_on(hub) == {}
    assert files_on(hub, "refs/pr/1") == files_in(dataset_folder)


def test_pull_request_creates_no_branch(hub, refused, dataset_folder):
    assert refused(dataset_folder, "--create_pr", "--revision", "v1") == (
        "tester/pairs has no branch 'v1': name one that exists, or push without create_pr"
    )
    assert set(hub.repos["datasets", "tester/pairs"]["refs"]) == {"main"}


def test_token_of_the_function_is_used(hub, dataset_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    push(dataset_folder, "tester/pairs", token=TOKEN)
    assert files_on(hub) == files_in(dataset_folder)


def test_private_push_to_a_public_repository_is_refused(hub, refused, dataset_folder):
    hub.create("datasets", "tester/pairs", False)
    assert "exists and is public: make it private" in refused(dataset_folder, "--private")
    assert files_on(hub) == {}


def test_repository_with_other_data_is_refused(hub, refused, dataset_folder):
    repo = hub.create("datasets", "tester/pairs", False)
    hub.commit(repo, "main", {"README.md": ("reg", b"# mine"), "data.csv": ("reg", b"1,2")}, [], "mine", None)
    message = "tester/pairs has data.csv, which no push of a dataset folder wrote: name another repository"
    assert message in refused(dataset_folder)
    assert set(files_on(hub)) == {"README.md", "data.csv"}


def test_failed_upload_is_invisible_and_the_next_push_resumes_it(hub, run_push, refused, dataset_folder, monkeypatch):
    put, left = hub.handler.do_PUT, iter(range(4))

    def fail_after_four(self):
        if next(left, None) is not None:
            return put(self)
        self.body()
        return self.fail(400, "BrokenConnection")

    with monkeypatch.context() as patch:
        patch.setattr(hub.handler, "do_PUT", fail_after_four)
        assert refused(dataset_folder) == (
            "the Hub refuses the push to tester/pairs (status 400: BrokenConnection): correct what it names, and push again, "
            "nothing is sent twice"
        )
    assert files_on(hub) == {} and len(hub.lfs) == 4
    hub.log.clear()
    run_push(dataset_folder)
    assert files_on(hub) == files_in(dataset_folder)
    assert (
        len(hub.lfs) == 13 and sum(line.startswith("PUT") for line in hub.log) == 9
    )  # what had arrived is not sent again


def test_wrong_token_gives_one_line(refused, dataset_folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongToken")
    assert refused(dataset_folder) == (
        "the Hub does not let you write to tester/pairs (status 401: Unauthorized): "
        "log in with 'hf auth login', or set HF_TOKEN to a token that may write there"
    )


def test_missing_network_gives_one_line(refused, dataset_folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", NO_NETWORK)
    assert refused(dataset_folder) == (
        f"the Hub cannot be reached at {NO_NETWORK} ([Errno 111] Connection refused): check the network and the proxy, and "
        "push again, nothing is sent twice"
    )


def test_missing_network_raises_one_error_without_a_chain(hub, dataset_folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", NO_NETWORK)
    with pytest.raises(OSError, match=r"^the Hub cannot be reached at ") as raised:
        push(dataset_folder, "tester/pairs")
    assert raised.value.__suppress_context__ and raised.value.__cause__ is None


def test_network_failure_during_the_lookup_gives_one_line(hub, run_push, refused, dataset_folder, monkeypatch):
    run_push(dataset_folder)
    monkeypatch.setattr(hub.handler, "do_HEAD", lambda self: setattr(self, "close_connection", True))
    assert refused(dataset_folder).startswith("the Hub cannot be reached at ")


def test_offline_mode_pushes_nothing(hub, refused, dataset_folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(dataset_folder) == (
        "offline mode (HF_HUB_OFFLINE) forbids a push to tester/pairs: unset it and push again"
    )
    assert hub.log == []


def test_folder_that_does_not_verify_is_not_pushed(folder_copy):
    (folder_copy / "README.md").write_text("other")
    with pytest.raises(VerificationError, match=r"README\.md was edited in its text"):
        push(folder_copy, "tester/pairs")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b/c", "'a/b/c' is not the name of a repository (Repo id must be in the form"),
        ("pairs", "'pairs' does not say whose repository it is: give USER/NAME"),
    ],
)
def test_invalid_name_of_a_repository_is_refused(hub, dataset_folder, name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        push(dataset_folder, name)
    assert hub.log == []


def test_lost_race_is_not_pushed_over(hub, run_push, refused, folder_copy, monkeypatch):
    """Somebody else commits between the look-up and the commit of this push."""
    run_push(folder_copy, "--revision", "v1")
    files = files_on(hub, "v1")
    preupload = hub.handler.repo_api

    def commit_first(self, kind, name, verb, *rest):
        if verb == "commit":
            hub.commit(hub.repos["datasets", name], "v1", {"notes.txt": ("reg", b"theirs")}, [], "theirs", None)
        preupload(self, kind, name, verb, *rest)

    monkeypatch.setattr(hub.handler, "repo_api", commit_first)
    edit_counts(folder_copy, lambda counts: None)  # another form of the same values
    assert refused(folder_copy, "--revision", "v1") == (
        "somebody else changed tester/pairs during this push, and nothing was pushed (status 412: parent commit moved): look at "
        f"their commit ({hub.url}/datasets/tester/pairs/commits/v1) before you decide what belongs there, or push to a branch of "
        "your own with --revision"
    )
    assert files_on(hub, "v1") == files | {"notes.txt": b"theirs"}


def test_file_that_the_hub_does_not_take(hub, refused, dataset_folder, monkeypatch):
    route = hub.handler.route
    error = {"oid": "1", "size": 1, "error": {"code": 413, "message": "Your storage quota is used up"}}

    def refuse(self, path, query, data):
        if not path.endswith("/info/lfs/objects/batch"):
            return route(self, path, query, data)
        return self.send(200, {"objects": [error]}, ctype="application/vnd.git-lfs+json")

    monkeypatch.setattr(hub.handler, "route", refuse)
    assert refused(dataset_folder) == (
        "the Hub does not take a file for tester/pairs (Encountered error for file with OID 1: `Your storage quota is used up): "
        "free storage or raise its limit on the Hub, and push again, nothing is sent twice; or push to another owner"
    )
