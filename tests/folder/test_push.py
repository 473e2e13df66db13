"""Pushes to a local stand-in for the Hub, each in its own process: huggingface_hub reads the address when it is imported."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import datasets
import pytest

from tests.helpers import content
from tests.mini_hub import serve
from usdm_sft.cli.main import make_parser
from usdm_sft.folder.push import push
from usdm_sft.folder.verify import VerificationError
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.tokenizer import load_tokenizer

TOKEN = "hf_aVerySecretToken"


@pytest.fixture
def hub():
    server, hub, url = serve(token=TOKEN)
    hub.url, hub.handler = url, server.RequestHandlerClass
    yield hub
    server.shutdown()


def run(hub, tmp_path, *command, token=TOKEN, given="", **variables):
    variables = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"),
    } | variables  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, *command], env=environment | variables, input=given, capture_output=True, text=True
    )
    assert TOKEN not in done.stdout + done.stderr
    return done


def run_push(hub, tmp_path, folder, *args, **options):
    return run(hub, tmp_path, "-m", "usdm_sft.cli", "push", str(folder), "tester/pairs", *args, **options)


def files_on(hub, branch="main"):
    repo = hub.repos["datasets", "tester/pairs"]
    files = repo["commits"][repo["refs"][branch]]["files"]
    return {name: hub.blob(entry) for name, entry in files.items() if name != ".gitattributes"}


def files_in(folder):
    """The files of a dataset folder, without the lock of its runs."""
    return {name: data for name, data in content(folder).items() if name != ".lock"}


def commits(hub):
    return hub.repos["datasets", "tester/pairs"]["commits"]


LOAD = """
import json, sys
from datasets import load_dataset
rows = [list(load_dataset("tester/pairs", split="train", streaming=streaming)) for streaming in (False, True)]
print(json.dumps(rows))
"""


# As in the card, and with this package.
TOKENIZER = """
import json
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerFast
from dailytalk_usdm import load_tokenizer
folder = snapshot_download("tester/pairs", repo_type="dataset", allow_patterns="tokenizer/*")
tokenizers = [
    PreTrainedTokenizerFast.from_pretrained(f"{folder}/tokenizer"),
    load_tokenizer("tester/pairs", subfolder="tokenizer", repo_type="dataset"),
]
print(json.dumps([each("<|correspond|> yes.\\n### Agent\\n no<|unit5|>\\n</s>").input_ids for each in tokenizers]))
"""
WRONG_SUBFOLDER = """
from dailytalk_usdm import load_tokenizer
load_tokenizer("tester/pairs", subfolder="tokens", repo_type="dataset")
"""


def load(hub, tmp_path, **options):
    done = run(hub, tmp_path, "-c", LOAD, **options)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr


@pytest.mark.slow
def test_push_load_stream_and_push_again(hub, dataset_folder, folder_copy, mini, unit_model, tmp_path):
    (folder_copy / "thesis.txt").write_text("mine")
    (folder_copy / "dailytalk_usdm.py").write_text("a script")
    done = run_push(hub, tmp_path, folder_copy)
    assert done.returncode == 0, done.stderr
    assert "load_dataset('tester/pairs') opens it" in done.stdout
    assert files_on(hub) == files_in(dataset_folder)  # byte for byte, and nothing else
    key = json.loads((dataset_folder / "counts.json").read_text())["key"]
    titles = [commit["title"] for commit in commits(hub).values()]
    assert titles == ["initial commit", f"Upload single_turn: {key[:16]}"]  # the first is the Hub's own

    expected = list(datasets.load_dataset(str(dataset_folder), split="train", cache_dir=str(tmp_path / "datasets")))
    assert load(hub, tmp_path) == [expected, expected]
    done = run(hub, tmp_path, "-c", TOKENIZER)
    assert done.returncode == 0, done.stderr
    text = "<|correspond|> yes.\n### Agent\n no<|unit5|>\n</s>"
    assert (
        json.loads(done.stdout.splitlines()[-1]) == [load_tokenizer(dataset_folder / "tokenizer")(text).input_ids] * 2
    )
    last_line = run(hub, tmp_path, "-c", WRONG_SUBFOLDER).stderr.splitlines()[-1]
    assert last_line.startswith("OSError: tokenizer tester/pairs is not a folder and cannot be fetched from the Hub (")

    assert run_push(hub, tmp_path, folder_copy).returncode == 0  # unchanged
    assert len(commits(hub)) == 2

    prepare(
        data_dir=str(mini / "corpus"), output_path=str(tmp_path / "fewer"), unit_model=str(unit_model), max_length=300, num_output_shards=2,
        pretrained_model_name_or_path="mistral-common", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    assert run_push(hub, tmp_path, tmp_path / "fewer").returncode == 0
    assert files_on(hub) == files_in(tmp_path / "fewer")  # files of the first push are gone
    assert len(commits(hub)) == 3


def test_private_and_revision(hub, dataset_folder, tmp_path):
    assert run_push(hub, tmp_path, dataset_folder, "--private", "--revision", "v1").returncode == 0
    assert hub.repos["datasets", "tester/pairs"]["private"]
    assert files_on(hub, "v1") == files_in(dataset_folder)
    assert files_on(hub) == {}
    assert "tester/pairs" in load(hub, tmp_path, token="")  # not for everyone


@pytest.mark.parametrize(("options", "expected"), [([], True), (["--public"], False)])
def test_visibility_follows_the_option_or_the_default(hub, dataset_folder, tmp_path, options, expected):
    hub.private_by_default = True
    assert run_push(hub, tmp_path, dataset_folder, *options).returncode == 0
    assert hub.repos["datasets", "tester/pairs"]["private"] is expected


def test_private_and_public_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(["push", "folder", "tester/pairs", "--private", "--public"])
    assert "--public: not allowed with argument --private" in capsys.readouterr().err


def test_command_line_has_no_token_option(capsys):
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(["push", "folder", "tester/pairs", "--token", "x"])
    assert "--token" in capsys.readouterr().err


def test_commit_message_is_used(hub, dataset_folder, tmp_path):
    assert run_push(hub, tmp_path, dataset_folder, "--commit_message", "Second take: 12").returncode == 0
    assert [commit["title"] for commit in commits(hub).values()] == ["initial commit", "Second take: 12"]


def test_empty_commit_message_is_refused(dataset_folder):
    with pytest.raises(ValueError, match="commit_message ' ' is empty: give a text, or leave it out"):
        push(dataset_folder, "tester/pairs", commit_message=" ")


def test_pull_request_leaves_the_branch_unchanged(hub, dataset_folder, tmp_path):
    done = run_push(hub, tmp_path, dataset_folder, "--create_pr")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{hub.url}/datasets/tester/pairs/discussions/1"]
    assert files_on(hub) == {}
    assert files_on(hub, "refs/pr/1") == files_in(dataset_folder)


def test_pull_request_creates_no_branch(hub, dataset_folder, tmp_path):
    hub.create("datasets", "tester/pairs", False)
    done = run_push(hub, tmp_path, dataset_folder, "--create_pr", "--revision", "v1")
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        ["dailytalk-usdm push: tester/pairs has no branch 'v1': name one that exists, or push without create_pr"],
    )
    assert set(hub.repos["datasets", "tester/pairs"]["refs"]) == {"main"}


PUSH_WITH_TOKEN = """
import sys
from usdm_sft.folder.push import push
push(sys.argv[1], "tester/pairs", token=sys.stdin.read())
"""


def test_token_of_the_function_is_used(hub, dataset_folder, tmp_path):
    done = run(hub, tmp_path, "-c", PUSH_WITH_TOKEN, str(dataset_folder), token="hf_other", given=TOKEN)
    assert done.returncode == 0, done.stderr
    assert files_on(hub) == files_in(dataset_folder)


def test_private_push_to_a_public_repository_is_refused(hub, dataset_folder, tmp_path):
    hub.create("datasets", "tester/pairs", False)
    done = run_push(hub, tmp_path, dataset_folder, "--private")
    assert done.returncode == 1 and "exists and is public: make it private" in done.stderr
    assert files_on(hub) == {}


def test_repository_with_other_data_is_refused(hub, dataset_folder, tmp_path):
    repo = hub.create("datasets", "tester/pairs", False)
    hub.commit(repo, "main", {"README.md": ("reg", b"# mine"), "data.csv": ("reg", b"1,2")}, [], "mine", None)
    done = run_push(hub, tmp_path, dataset_folder)
    assert done.returncode == 1
    assert "tester/pairs has data.csv, which no push of a dataset folder wrote: name another repository" in done.stderr
    assert set(files_on(hub)) == {"README.md", "data.csv"}


@contextmanager
def broken(hub, after):
    """Let every upload after the first `after` fail."""
    put = hub.handler.do_PUT
    left = iter(range(after))

    def fail(self):
        if next(left, None) is None:
            self.body()
            return self.fail(400, "BrokenConnection")
        return put(self)

    hub.handler.do_PUT = fail
    yield
    hub.handler.do_PUT = put


@pytest.mark.slow
def test_failed_upload_is_invisible_and_the_next_push_resumes_it(hub, dataset_folder, tmp_path):
    with broken(hub, after=4):
        done = run_push(hub, tmp_path, dataset_folder)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("dailytalk-usdm push:")]
    assert line.endswith("the upload to tester/pairs failed (status 400): push again, nothing is sent twice")
    assert "Traceback" not in done.stderr
    assert files_on(hub) == {} and len(hub.lfs) == 4

    sent = len([line for line in hub.log if line.startswith("PUT")])
    assert run_push(hub, tmp_path, dataset_folder).returncode == 0
    again = len([line for line in hub.log if line.startswith("PUT")]) - sent
    assert files_on(hub) == files_in(dataset_folder)
    assert len(hub.lfs) == 13 and again == 9  # the Parquet files; what had arrived was not sent again


def test_wrong_token_gives_one_line(hub, dataset_folder, tmp_path):
    done = run_push(hub, tmp_path, dataset_folder, token="hf_wrongToken")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "dailytalk-usdm push: the Hub does not let you write to tester/pairs (status 401): "
        "log in with 'hf auth login', or set HF_TOKEN to a token that may write there"
    ]
    assert "hf_wrongToken" not in done.stderr


def test_missing_network_gives_one_line(hub, dataset_folder, tmp_path):
    done = run_push(hub, tmp_path, dataset_folder, HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "dailytalk-usdm push: the Hub cannot be reached ([Errno 111] Connection refused): "
        "check the network and push again, nothing is sent twice"
    ]


def test_missing_network_raises_one_error_without_a_chain(hub, dataset_folder, tmp_path):
    done = run(hub, tmp_path, "-c", PUSH_WITH_TOKEN, str(dataset_folder), given=TOKEN, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith("OSError: the Hub cannot be reached (")


@pytest.mark.slow
def test_network_failure_during_the_lookup_gives_one_line(hub, dataset_folder, tmp_path):
    assert run_push(hub, tmp_path, dataset_folder).returncode == 0
    answer = hub.handler.do_HEAD

    def hang_up(self):
        self.close_connection = True

    hub.handler.do_HEAD = hang_up
    done = run_push(hub, tmp_path, dataset_folder, HF_HOME=str(tmp_path / "other"))
    hub.handler.do_HEAD = answer
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("dailytalk-usdm push: the Hub cannot be reached (")


@pytest.mark.slow
def test_offline_mode_pushes_nothing(hub, dataset_folder, tmp_path):
    done = run_push(hub, tmp_path, dataset_folder, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        [
            "dailytalk-usdm push: offline mode (HF_HUB_OFFLINE) forbids a push to tester/pairs: unset it and push again",
        ],
    )
    assert hub.log == []


def test_folder_that_does_not_verify_is_not_pushed(folder_copy):
    (folder_copy / "README.md").write_text("other")
    with pytest.raises(VerificationError, match=r"README\.md was changed"):
        push(folder_copy, "tester/pairs")


def test_invalid_name_of_a_repository_is_refused(hub, dataset_folder, tmp_path):
    done = run(hub, tmp_path, "-m", "usdm_sft.cli", "push", str(dataset_folder), "a/b/c")
    assert done.returncode == 1 and "'a/b/c' is not the name of a repository" in done.stderr
