"""Unit models in model repositories of the Hub, against a stand-in for the server."""

import json
import shutil

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from tests.mini_hub import serve
from usdm_sft.units.folder import read_description
from usdm_sft.units.published import find_unit_model
from usdm_sft.units.tokenizer import UnitTokenizer

REPOSITORY = "tester/unit-model"


@pytest.fixture
def hub(unit_model, tmp_path, monkeypatch):
    """Serve the toy unit model as a public and as a private repository -> the stand-in's state."""
    server, hub, url = serve()
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    files = {path.name: ("reg", path.read_bytes()) for path in unit_model.iterdir()}
    for name, private in ((REPOSITORY, False), ("tester/private", True)):
        repository = hub.create("models", name, private)
        hub.commit(repository, "main", files | {"notes.txt": ("reg", b"hello")}, [], "unit model", None)
    yield hub
    server.shutdown()
    server.server_close()


def commit(hub, files=None, removed=(), branch="main"):
    """Change the files of the public repository -> the new commit."""
    changes = {name: ("reg", content) for name, content in (files or {}).items()}
    return hub.commit(hub.repos[("models", REPOSITORY)], branch, changes, list(removed), "change", None)


def test_unit_model_of_the_hub_is_the_folder_that_was_uploaded(hub, unit_model, tmp_path, monkeypatch):
    expected = UnitTokenizer.from_pretrained(unit_model, device="cpu")
    tokenizer = UnitTokenizer.from_pretrained(REPOSITORY, device="cpu")
    assert tokenizer.key == expected.key
    assert sorted(path.name for path in tokenizer.folder.iterdir()) == sorted(
        path.name for path in unit_model.iterdir()
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert UnitTokenizer.from_pretrained(REPOSITORY, device="cpu").folder == tokenizer.folder
    assert hub.log == []


def test_unit_model_of_the_hub_is_kept_in_the_model_cache(hub, unit_model, tmp_path):
    found = find_unit_model(REPOSITORY, tmp_path / "models")
    assert found.is_relative_to(tmp_path / "models")
    assert read_description(found) == read_description(find_unit_model(REPOSITORY)) == read_description(unit_model)


def test_broken_proxy_is_one_error_without_network(hub, monkeypatch):
    def fail(*args, **kwargs):
        raise HTTPError("proxy refused")

    monkeypatch.setattr("usdm_sft.units.hub_unit_model.snapshot_download", fail)
    with pytest.raises(OSError, match=r"cannot be downloaded from the Hub \(proxy refused\)"):
        UnitTokenizer.from_pretrained(REPOSITORY, device="cpu")


def test_offline_mode_forbids_the_download(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = rf"^{REPOSITORY} is not a folder and cannot be downloaded from the Hub \(.*HF_HUB_OFF"
    with pytest.raises(OSError, match=message):
        UnitTokenizer.from_pretrained(REPOSITORY, device="cpu")
    assert hub.log == []


def test_files_of_a_repository_are_checked_against_their_digests(hub, unit_model):
    good = hub.rev(hub.repos[("models", REPOSITORY)], "main")
    content = bytearray((unit_model / "kmeans.npy").read_bytes())
    content[-1] ^= 1
    commit(hub, {"kmeans.npy": bytes(content)})
    with pytest.raises(ValueError, match=r"kmeans\.npy is not the file that was converted"):
        UnitTokenizer.from_pretrained(REPOSITORY, device="cpu")
    assert UnitTokenizer.from_pretrained(REPOSITORY, device="cpu", revision=good).num_units == 100


def test_private_repository_needs_a_token(hub):
    message = r"tester/private is not a folder and cannot be downloaded .* check the network and"
    with pytest.raises(OSError, match=message):
        UnitTokenizer.from_pretrained("tester/private", device="cpu", token=False)
    assert UnitTokenizer.from_pretrained("tester/private", device="cpu", token="hf_test").num_units == 100


def test_unknown_repository_and_revision(hub):
    for name, revision in (("tester/none", None), (REPOSITORY, "none")):
        with pytest.raises(OSError, match=f"^{name} is not a folder and cannot be downloaded from the Hub"):
            UnitTokenizer.from_pretrained(name, device="cpu", revision=revision)


def test_repository_without_a_unit_model(hub):
    commit(hub, removed=["unit_model.json"])
    message = rf"the repository {REPOSITORY} holds no unit_model\.json: upload a folder"
    with pytest.raises(FileNotFoundError, match=message):
        UnitTokenizer.from_pretrained(REPOSITORY, device="cpu")
    commit(hub, {"unit_model.json": json.dumps({}).encode()})
    with pytest.raises(ValueError, match=r"unit_model\.json is not what convert wrote"):
        UnitTokenizer.from_pretrained(REPOSITORY, device="cpu")


def test_existing_folder_comes_before_a_repository_of_its_name(hub, unit_model, tmp_path):
    folder = shutil.copytree(unit_model, tmp_path / REPOSITORY)
    assert UnitTokenizer.from_pretrained(REPOSITORY, device="cpu").folder == folder
    assert hub.log == []
    with pytest.raises(ValueError, match="revision is 'main', but tester/unit-model is not a repository of the Hub"):
        UnitTokenizer.from_pretrained(REPOSITORY, device="cpu", revision="main")


@pytest.mark.parametrize("name", ["unit_model", "./unit_model", "/no/unit/model", "a/b/c", "~/unit_model", "a--b/c"])
def test_path_that_is_not_a_repository_id_is_not_asked_for(hub, name):
    with pytest.raises(FileNotFoundError, match=r"is not a unit model folder \(it holds no unit_model\.json\)"):
        UnitTokenizer.from_pretrained(name, device="cpu")
    assert hub.log == []
