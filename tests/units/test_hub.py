"""Unit models in model repositories of the Hub, against a stand-in for the server."""

import json
import shutil

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError

from tests.helpers import content
from usdm_sft.units.folder import read_description
from usdm_sft.units.published import find_unit_model
from usdm_sft.units.tokenizer import UnitTokenizer

REPOSITORY = "tester/unit-model"


@pytest.fixture
def hub(served_hub, unit_model, tmp_path, monkeypatch):
    """Serve the toy unit model as a public and as a private repository -> the stand-in's state."""
    monkeypatch.chdir(tmp_path)
    hub = served_hub
    files = {path.name: ("reg", path.read_bytes()) for path in unit_model.iterdir()}
    for name, private in ((REPOSITORY, False), ("tester/private", True)):
        repository = hub.create("models", name, private)
        hub.commit(repository, "main", files | {"notes.txt": ("reg", b"hello")}, [], "unit model", None)
    return hub


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

    monkeypatch.setattr("usdm_sft.units.folder.snapshot_download", fail)
    with pytest.raises(OSError, match=r"the Hub cannot be reached at .* \(proxy refused\)"):
        UnitTokenizer.from_pretrained(REPOSITORY, device="cpu")


def test_offline_mode_forbids_the_download(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = rf"^unit model {REPOSITORY} is not a folder, and offline mode \(HF_HUB_OFFLINE\) forbids fetching"
    with pytest.raises(OSError, match=message):
        UnitTokenizer.from_pretrained(REPOSITORY, device="cpu")
    assert hub.log == []


def test_files_of_a_repository_are_checked_against_their_digests(hub, unit_model):
    good = hub.rev(hub.repos[("models", REPOSITORY)], "main")
    centroids = bytearray((unit_model / "kmeans.npy").read_bytes())
    centroids[-1] ^= 1
    commit(hub, {"kmeans.npy": bytes(centroids)})
    with pytest.raises(ValueError, match=r"kmeans\.npy is not the file that was converted"):
        UnitTokenizer.from_pretrained(REPOSITORY, device="cpu")
    assert UnitTokenizer.from_pretrained(REPOSITORY, device="cpu", revision=good).num_units == 100


def test_private_repository_needs_a_token(hub):
    message = r"the Hub has no tester/private, or it is private \(status 401: Repository not found\): correct the name, or log in"
    with pytest.raises(OSError, match=message):
        UnitTokenizer.from_pretrained("tester/private", device="cpu", token=False)
    assert UnitTokenizer.from_pretrained("tester/private", device="cpu", token="hf_test").num_units == 100


@pytest.mark.parametrize(
    ("name", "revision", "kind", "message"),
    [
        (
            "tester/none",
            None,
            OSError,
            r"the Hub has no tester/none, or it is private \(status 401: Repository not found\)",
        ),
        (
            REPOSITORY,
            "none",
            ValueError,
            f"{REPOSITORY} has no revision 'none': name a branch, a tag or a commit of it",
        ),
        (REPOSITORY, "a b", ValueError, "revision 'a b' is not the name of a branch, a tag or a commit: correct it"),
    ],
)
def test_unknown_repository_and_revision(hub, name, revision, kind, message):
    with pytest.raises(kind, match=message):
        UnitTokenizer.from_pretrained(name, device="cpu", revision=revision)


def test_repository_without_a_unit_model(hub):
    commit(hub, removed=["unit_model.json"])
    message = rf"the repository {REPOSITORY} holds no unit_model\.json and is not one of a codec .*: upload a folder"
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


def test_saved_unit_model_is_the_converted_folder(unit_model, tmp_path):
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu")
    tokenizer.save_pretrained(tmp_path / "deep" / "saved")
    assert content(tmp_path / "deep" / "saved") == content(unit_model)
    assert UnitTokenizer.from_pretrained(tmp_path / "deep" / "saved", device="cpu").key == tokenizer.key
    with pytest.raises(FileExistsError, match=r"saved is not an empty folder: name a new one"):
        tokenizer.save_pretrained(tmp_path / "deep" / "saved")


def test_unit_model_is_saved_into_an_empty_folder(unit_model, tmp_path, monkeypatch):
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    tokenizer.save_pretrained(tmp_path / "link")
    assert content(tmp_path / "there") == content(unit_model) and (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "here")
    tokenizer.save_pretrained(".")
    assert content(tmp_path / "here") == content(unit_model)


@pytest.mark.parametrize("name", ["kmeans.npy", "unit_model.json"])
def test_changed_unit_model_is_not_saved_or_pushed(hub, unit_model, tmp_path, name):
    folder = shutil.copytree(unit_model, tmp_path / "model")
    tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu")
    changed = (folder / name).read_bytes().replace(b'"layer": 35', b'"layer": 34')
    (folder / name).write_bytes(changed if name.endswith("json") else changed[:-1] + bytes([changed[-1] ^ 1]))
    hub.log.clear()
    for call in (lambda: tokenizer.save_pretrained(tmp_path / "saved"), lambda: tokenizer.push_to_hub("tester/new")):
        with pytest.raises(ValueError, match=f"model/{name} was changed after it was converted or opened"):
            call()
    assert hub.log == [] and not (tmp_path / "saved").exists()


def test_pushed_unit_model_is_opened_from_the_hub(hub, unit_model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu")
    url = tokenizer.push_to_hub("tester/new", private=True, commit_message="toy")
    repository = hub.repos["models", "tester/new"]
    head = repository["commits"][repository["refs"]["main"]]
    assert (repository["private"], head["title"], url.rpartition("/")[2]) == (True, "toy", repository["refs"]["main"])
    files = {name: hub.blob(entry) for name, entry in head["files"].items() if name != ".gitattributes"}
    assert files == content(unit_model)
    assert UnitTokenizer.from_pretrained("tester/new", device="cpu").key == tokenizer.key
    hub.create("models", "tester/other", True)
    assert tokenizer.push_to_hub("tester/other", create_pr=True).endswith("/discussions/1")
    with pytest.raises(ValueError, match=f"{REPOSITORY} exists and is public: make it private on the Hub"):
        tokenizer.push_to_hub(REPOSITORY, private=True)
    with pytest.raises(OSError, match=r"does not let you write to tester/new \(status 401: "):
        tokenizer.push_to_hub("tester/new", token="wrong")
