"""Unit model folders of strangers: what they hold is checked though the digests beside it fit."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file

from usdm_sft.checkpoint import convert
from usdm_sft.download import sha256_file
from usdm_sft.units import UnitTokenizer


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    source, folder = FIXTURES / "units", tmp_path_factory.mktemp("unit_models") / "model"
    checkpoint = [source / "model_fairseq.pt", source / "kmeans.npy", folder]
    return convert(*checkpoint, model_config=source / "config.json", layer=5)


@pytest.fixture
def folder(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "model")


def change_file(folder, name, change):
    """Change a file of a unit model folder and record its new digest, as a stranger would who knows how."""
    change(folder / name)
    description = json.loads((folder / "unit_model.json").read_text())
    description["files"][name] = sha256_file(folder / name)
    (folder / "unit_model.json").write_text(json.dumps(description))


def set_keys(**keys):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def set_weights(change):
    return lambda path: save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", set_keys(num_hidden_layers=200), "config.json is not of a model of 5 layers"),
        ("config.json", set_keys(num_attention_heads=0), "the config is not that of a Wav2Vec2 or HuBERT model"),
        ("config.json", lambda path: path.write_text("[]"), "config.json is not of a model of 5 layers"),
        ("config.json", lambda path: path.write_text("{"), "Expecting property name"),
        ("model.safetensors", lambda path: path.write_bytes(b"x" * 100), "header too large"),
        ("model.safetensors", set_weights(torch.Tensor.half), "model.safetensors is not float32"),
        ("model.safetensors", set_weights(lambda tensor: tensor[:1].clone()), "size mismatch"),
        ("model.safetensors", lambda path: save_file({str(i): torch.ones(1) for i in range(9)}, path), "Missing key"),
        ("kmeans.npy", lambda path: np.save(path, np.zeros((200, 3), np.float32)), r"kmeans.npy is float32 of shape \(200, 3\)"),
        ("kmeans.npy", lambda path: np.save(path, np.zeros((200, 64))), "kmeans.npy is float64"),
        ("kmeans.npy", lambda path: np.save(path, np.zeros((9, 64), np.float32)), "not 200 float32 centroids"),
        ("kmeans.npy", lambda path: np.save(path, np.full((200, 64), np.nan, np.float32)), "holds NaN"),
        # The pickle that a stranger would send; only reading it must be refused.
        ("kmeans.npy", lambda path: np.save(path, np.array([print]), allow_pickle=True), "allow_pickle=False"),
    ],
)  # fmt: skip
def test_folder_of_a_stranger_with_fitting_digests(folder, name, change, message):
    change_file(folder, name, change)
    with pytest.raises(
        ValueError, match=f"model is not what convert wrote .*{message}.* convert the unit model again$"
    ) as raised:
        UnitTokenizer.from_pretrained(folder, device="cpu").tokenize_waveforms([np.zeros(400, np.float32)])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"files": None}, {"files": []}, {"files": {}}, {"files": {"/etc/passwd": "0"}}, {"files": {"config.json": "0"}},
        {"layer": "5"}, {"num_units": None}, {"sources": []},
    ],
    ids=str,
)  # fmt: skip
def test_description_of_a_stranger(folder, keys):
    """A file that it does not name would be opened unchecked, and would not be in the key of the cache."""
    set_keys(**keys)(folder / "unit_model.json")
    with pytest.raises(ValueError, match=r"unit_model\.json is not what convert wrote: remove the folder"):
        UnitTokenizer.from_pretrained(folder, device="cpu")


def test_more_layers_than_there_are_weights(folder):
    """They would be built first, however many."""
    set_keys(layer=200)(folder / "unit_model.json")
    change_file(folder, "config.json", set_keys(num_hidden_layers=200))
    with pytest.raises(ValueError, match=r"config\.json is not of a model of 200 layers"):
        UnitTokenizer.from_pretrained(folder, device="cpu").tokenize_waveforms([np.zeros(400, np.float32)])


def test_code_beside_a_unit_model_is_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'code-ran')!r}, 'w')")
    change_file(folder, "config.json", set_keys(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}))
    UnitTokenizer.from_pretrained(folder, device="cpu").tokenize_waveforms([np.zeros(400, np.float32)])
    assert not (tmp_path / "code-ran").exists()
