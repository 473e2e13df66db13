"""Fixtures, and the skip of tests marked `oracle` where the reference's own output is not at hand."""

import atexit
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

import pytest

# Before anything reads them: no cache of the user's, and no network but the servers that a test starts itself.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="usdm-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
for _name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN"):
    os.environ.pop(_name, None)
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a background job of a shell; its children would ignore Ctrl-C as well
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# torch and huggingface_hub read the environment when they are imported.
from huggingface_hub import constants  # noqa: E402

from tests.forked import FORKS  # noqa: E402
from tests.helpers import DEMO, SHARED, content, options  # noqa: E402
from tests.made_once import keep_what_is_made  # noqa: E402
from tests.mini_hub import serve  # noqa: E402


def pytest_collection_modifyitems(items):
    if (SHARED / "oracle").is_dir():
        return
    # Its licence keeps it out of the clone; what may be shipped is in fixtures/ and never skipped.
    skip = pytest.mark.skip(reason=f"the reference's output is not at {SHARED} (set USDM_SHARED)")
    for item in items:
        if "oracle" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _make_once():
    keep_what_is_made()


@pytest.fixture(scope="module", autouse=True)
def _end_chat_renderer():
    """End the process that renders chat templates, which lives as long as its parent: other tests count processes."""
    yield
    if (chat_render := sys.modules.get("usdm_sft.template.chat_render")) is not None:
        while chat_render._processes:
            chat_render._processes.popitem()[1].close()


@pytest.fixture(scope="session")
def shared() -> Path:
    return SHARED


@pytest.fixture(scope="session")
def mini() -> Path:
    """The files of the demo: `corpus`, `unit_model`, and `expected`, the output of the reference for them."""
    return DEMO


@pytest.fixture(scope="session")
def unit_model(mini, tmp_path_factory) -> Path:
    """The toy unit model of the mini corpus, converted."""
    from usdm_sft.units.convert import convert

    source = mini / "unit_model"
    folder = tmp_path_factory.mktemp("unit_model") / "mini"
    return convert(source / "checkpoint.pt", source / "kmeans.npy", folder, model_config=source / "config.json")


@pytest.fixture(scope="session")
def tokenizer():
    from usdm_sft.template.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def small_tokenizer():
    """USTM's tokenizer with 100 units, of which encoders are made in a fraction of the time."""
    from usdm_sft.template.tokenizer import build_tokenizer

    return build_tokenizer(num_units=100)


@pytest.fixture(scope="session")
def encoder(tokenizer):
    from usdm_sft.template.encoder import TemplateEncoder

    return TemplateEncoder(tokenizer)


@pytest.fixture(scope="session")
def dataset_folder(mini, unit_model, tmp_path_factory) -> Path:
    """The mini corpus as a dataset folder; copy it to change it. Folders are given as `Path`."""
    from usdm_sft.prepare.prepare import prepare

    root = tmp_path_factory.mktemp("dataset_folder")
    prepare(
        data_dir=mini / "corpus",
        output_path=root / "dataset",
        unit_model=unit_model,
        pretrained_model_name_or_path="mistral-common",
        cache_dir=root / "cache",
    )
    return root / "dataset"


@pytest.fixture(scope="session")
def finished(mini, unit_model, tmp_path_factory) -> Path:
    """A folder with `out` and `cache`, which one process made without a fault, with `options`; copy it to change it."""
    from usdm_sft.prepare.prepare import prepare

    root = tmp_path_factory.mktemp("finished")
    prepare(**options(mini, unit_model, root))
    return root


@pytest.fixture(scope="session")
def undisturbed(finished) -> dict[str, bytes]:
    """The files of the finished dataset folder: the bytes by relative path."""
    return content(finished / "out")


@pytest.fixture
def forked_processes(monkeypatch):
    """Let the processes that the package starts be forks, for tests that are about the work and not about the start."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKS)


@pytest.fixture
def refused(capsys):
    """Run a command that must fail with one line on stderr, and return the line."""
    from usdm_sft.cli.main import main

    def run(*args):
        with pytest.raises(SystemExit, match="1"):
            main([*map(str, args)])
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        return captured.err.removesuffix("\n")

    return run


@pytest.fixture
def no_network(monkeypatch):
    """Fail at every connection and look-up."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def served_hub(tmp_path, monkeypatch):
    """A stand-in for the Hub, which huggingface_hub in this process asks -> its state, `url` and `handler` of requests."""
    server, hub, url = serve()
    hub.url, hub.handler = url, server.RequestHandlerClass
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it keeps the address of its first call
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder_copy(dataset_folder, tmp_path) -> Path:
    return Path(shutil.copytree(dataset_folder, tmp_path / "dataset"))


@pytest.fixture(scope="module")
def workplace(dataset_folder, unit_model, tmp_path_factory) -> Path:
    """A folder with small versions of the files that README.md and docs/ use."""
    from tests.code_blocks import make_workplace
    from tests.helpers import tiny_mistral

    return make_workplace(tmp_path_factory.mktemp("workplace"), dataset_folder, unit_model, tiny_mistral())
