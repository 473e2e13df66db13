"""Conversion of .pt checkpoints, and the published unit model."""

import json
import pickle
import shutil
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from transformers import Wav2Vec2Config, Wav2Vec2Model

from tests.units.small_models import UNITS, Evil, convert_small
from usdm_sft.units import convert as module
from usdm_sft.units import published
from usdm_sft.units.published import find_unit_model
from usdm_sft.utils import download


def changed(path, change):
    """Save the small checkpoint after `change` was applied to its model."""
    loaded = torch.load(UNITS / "model_fairseq.pt", weights_only=True)
    change(loaded["model"])
    torch.save(loaded, path)
    return path


def test_both_key_layouts_give_the_same_folder(tmp_path):
    """So does the format that torch wrote before zip files."""
    fairseq = torch.load(UNITS / "model_fairseq.pt", weights_only=True)
    torch.save(fairseq, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    sources = UNITS / "model_fairseq.pt", UNITS / "model_fairseq2.pt", tmp_path / "old.pt"
    folders = [convert_small(tmp_path / source.stem, source) for source in sources]
    for name in ("model.safetensors", "config.json", "kmeans.npy"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_values_are_unchanged_and_later_layers_dropped(tmp_path):
    folder = convert_small(tmp_path / "model")
    source = torch.load(UNITS / "model_fairseq.pt", weights_only=True)["model"]
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(
        weights["encoder.layers.4.feed_forward.output_dense.weight"], source["encoder.layers.4.fc2.weight"]
    )
    assert not any(key.startswith("encoder.layers.5.") for key in weights)
    values = sum(tensor.double().sum() for tensor in weights.values())
    unused = ("mask_emb", "quantizer.", "project_q.", "final_proj.", "encoder.layers.5.")
    assert values == sum(tensor.double().sum() for key, tensor in source.items() if not key.startswith(unused))
    assert np.array_equal(np.load(folder / "kmeans.npy"), np.load(UNITS / "kmeans.npy"))
    description = json.loads((folder / "unit_model.json").read_text())
    assert (description["layer"], description["sample_rate"], description["num_units"]) == (5, 16_000, 200)
    assert description["sources"] == {
        "checkpoint": download.sha256_file(UNITS / "model_fairseq.pt"),
        "kmeans": download.sha256_file(UNITS / "kmeans.npy"),
    }


def test_transformers_opens_the_unit_model_folder(tmp_path):
    model, report = Wav2Vec2Model.from_pretrained(convert_small(tmp_path / "model"), output_loading_info=True)
    assert len(model.encoder.layers) == 5
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_half_precision_checkpoint_is_widened(tmp_path):
    path = changed(tmp_path / "half.pt", lambda model: model.update({key: t.half() for key, t in model.items()}))
    weights = load_file(convert_small(tmp_path / "model", path) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def small_config(path, **changes):
    """Save the config of the small checkpoint with some keys changed."""
    path.write_text(json.dumps(json.loads((UNITS / "config.json").read_text()) | changes))
    return path


def test_converting_again_leaves_the_folder(tmp_path):
    folder = convert_small(tmp_path / "model")
    before = (folder / "unit_model.json").stat().st_mtime_ns
    assert convert_small(folder) == folder
    assert (folder / "unit_model.json").stat().st_mtime_ns == before
    message = "exists and was not made from these files and settings, or was changed: remove"
    with pytest.raises(FileExistsError, match=message):
        convert_small(folder, layer=4)
    with pytest.raises(FileExistsError, match=message):  # the shapes are the same
        convert_small(folder, model_config=small_config(tmp_path / "heads.json", num_attention_heads=2))
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(FileExistsError, match=message):
        convert_small(folder)


def test_simultaneous_conversions_take_turns(tmp_path):
    with ThreadPoolExecutor(4) as threads:
        folders = list(threads.map(lambda _: convert_small(tmp_path / "model"), range(4)))
    assert folders == [tmp_path / "model"] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_lock_does_not_depend_on_the_cache(tmp_path, monkeypatch):
    """A run with another cache would remove what this one has written."""
    write = module._write

    def write_locked(*args):
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".model.lock").acquire(timeout=0)
        write(*args)

    monkeypatch.setattr(module, "_write", write_locked)
    convert_small(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_link_beside_the_folder_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    (tmp_path / "model.unfinished").symlink_to(tmp_path / "precious")
    convert_small(tmp_path / "model")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "precious"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("encoder.layers.3.fc1.bias"), r"lacks encoder\.layers\.3\.feed_forward\.intermediate_dense\.bias"),
        (lambda m: m.update({"layer_norm.weight": torch.ones(3)}), r"has shape \(3,\), the config says \(32,\)"),
        (lambda m: m.update({"surprise.weight": torch.ones(3)}), r"surprise\.weight is not a parameter of a wav2vec 2\.0"),
        (lambda m: m["layer_norm.weight"].fill_(float("nan")), "holds NaN or infinite values: download"),
        (lambda m: m.update({"layer_norm.weight": Evil()}), "is not a checkpoint of plain tensors"),
        (lambda m: m.update({7: torch.ones(3)}), "7 is not the name of a tensor"),
        (lambda m: m.update({"layer_norm.weight": 1.5}), r"'layer_norm\.weight' is not the name of a tensor"),
    ],
    ids=["missing", "shape", "unknown", "NaN", "code", "number as name", "number as tensor"],
)  # fmt: skip
def test_bad_checkpoint_names_the_tensor(tmp_path, capfd, change, message):
    with pytest.raises(ValueError, match=message):
        convert_small(tmp_path / "model", changed(tmp_path / "bad.pt", change))
    assert not (tmp_path / "model").exists()
    assert "code ran" not in capfd.readouterr().out


def test_compressed_checkpoint_is_refused_unread(tmp_path):
    with zipfile.ZipFile(UNITS / "model_fairseq.pt") as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for part in source.infolist():
            content = bytes(50_000_000) if part.filename.endswith("data.pkl") else source.read(part)
            bomb.writestr(part.filename, content, zipfile.ZIP_DEFLATED if part.filename.endswith("data.pkl") else None)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.pt is not a checkpoint of plain tensors \(its parts are compressed"):
        convert_small(tmp_path / "model", tmp_path / "bomb.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_files_that_are_not_checkpoints(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pt is not a checkpoint of plain tensors"):
        convert_small(tmp_path / "model", tmp_path / "text.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no 'model'"):
        convert_small(tmp_path / "model", tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.pt is not a file or a folder: name the downloaded one"):
        convert_small(tmp_path / "model", tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"none\.npy is not a file: name the downloaded file"):
        convert_small(tmp_path / "model", kmeans=tmp_path / "none.npy")
    with pytest.raises(FileNotFoundError, match=r"none\.json is not a file"):
        convert_small(tmp_path / "model", model_config=tmp_path / "none.json")


def save_array(array):
    return lambda path: np.save(path, array)


def save_npz(path):
    with open(path, "wb") as file:
        np.savez(file, np.zeros((10, 64), np.float32))


def save_pickle(protocol):
    return lambda path: path.write_bytes(pickle.dumps(Evil(), protocol))


# An attacker would send a pickle; writing it here is safe, and reading it is refused.
OBJECTS = np.array([[Evil()] * 64], dtype=object)
NOT_PLAIN = r"k\.npy is not a plain \.npy array"
PICKLE = r"k\.npy is a pickle, as joblib writes it, and reading it would run code that it holds: write its centroids"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (save_array(np.zeros((10, 7), np.float32)), r"has shape \(10, 7\), not \(number of units, 64\)"),
        (save_array(np.zeros((0, 64), np.float32)), r"has shape \(0, 64\), not \(number of units, 64\)"),
        (save_array(np.zeros((10, 64), np.float16)), "is float16, not float32 or float64: save it as float32"),
        (save_array(np.zeros((65_537, 64), np.float32)), "has 65,537 centroids"),
        (save_array(np.full((10, 64), np.nan, np.float32)), "holds NaN or infinite values"),
        (save_pickle(2), PICKLE),
        (save_pickle(5), PICKLE),
        (lambda path: np.save(path, OBJECTS, allow_pickle=True), NOT_PLAIN),
        (save_npz, NOT_PLAIN + r' .*np\.save\("kmeans\.npy", kmeans\.cluster_centers_\)'),
        (lambda path: path.touch(), NOT_PLAIN),
    ],
    ids=["width", "rows", "type", "number", "NaN", "pickle 2", "pickle 5", "objects", "npz", "empty"],
)
def test_bad_centroids_name_the_difference(tmp_path, capfd, write, message):
    write(tmp_path / "k.npy")
    with pytest.raises(ValueError, match=message):
        convert_small(tmp_path / "model", kmeans=tmp_path / "k.npy")
    assert not (tmp_path / "model").exists()
    assert "code ran" not in capfd.readouterr().out


def test_source_that_changes_while_it_is_converted_is_refused(tmp_path, monkeypatch):
    """The unit model would name the digest of a file that it was not made from."""
    kmeans = tmp_path / "k.npy"
    shutil.copyfile(UNITS / "kmeans.npy", kmeans)
    real = module._read_kmeans

    def change_and_read(path, config):
        np.save(path, np.load(path)[::-1].copy())
        return real(path, config)

    monkeypatch.setattr(module, "_read_kmeans", change_and_read)
    with pytest.raises(ValueError, match=r"k\.npy was changed while it was converted: let nothing write to it"):
        convert_small(tmp_path / "model", kmeans=kmeans)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "layer", "message"),
    [
        ({}, 7, "layer 7 does not exist: the model has 6 layers"),
        ({"model_type": "bert"}, 5, "model_type is 'bert'"),
        ({"do_stable_layer_norm": False}, 5, "only models with pre-norm layers"),
    ],
    ids=["layer", "kind", "post-norm"],
)
def test_bad_config(tmp_path, change, layer, message):
    with pytest.raises(ValueError, match=message):
        convert_small(tmp_path / "model", model_config=small_config(tmp_path / "c.json", **change), layer=layer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "is not a JSON object but a list: correct the file, or download it again"),
        ("{", "is not JSON"),
        (
            "<html>404</html>",
            "is HTML and not JSON, such as a page to log in or of an error: correct the file, or download it again",
        ),
        ('{"do_stable_layer_norm": true}', "hidden_size is None: complete"),
    ],
    ids=["list", "cut", "HTML", "incomplete"],
)
def test_unreadable_config(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=rf"c\.json.* {message}"):
        convert_small(tmp_path / "model", model_config=tmp_path / "c.json")


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0}, {"num_attention_heads": 7}, {"hidden_act": "evil"}, {"conv_dim": [1]},
        {"dtype": "nonsense"}, {"intermediate_size": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_config_that_transformers_cannot_use_is_one_line(tmp_path, change):
    message = r"the config is not that of a Wav2Vec2 or HuBERT model \(.*\): correct it"
    with pytest.raises(ValueError, match=message) as raised:
        convert_small(tmp_path / "model", model_config=small_config(tmp_path / "c.json", **change))
    assert "\n" not in str(raised.value)


def test_default_config_is_xls_r_1b():
    with torch.device("meta"):
        model = Wav2Vec2Model(Wav2Vec2Config(**module._read_config(None, 35)))
    final_norm = 2 * 1280
    assert sum(parameter.numel() for parameter in model.parameters()) - final_norm == 706_686_848


class TestPublished:
    """`xlsr2_1b_v2`, against a stand-in for the server that serves two small files under the published names."""

    @pytest.fixture(autouse=True)
    def server(self, monkeypatch):
        self.fetched = []
        files = {"xlsr2_1b_v2.pt": UNITS / "model_fairseq.pt", "kmeans_10k.npy": UNITS / "kmeans.npy"}

        self.broken = []

        def fetch(url, path, *, sha256=None):
            if path.name in self.broken:
                raise OSError("the connection broke")
            assert url.startswith("https://dl.fbaipublicfiles.com/seamlessM4T/models/unit_extraction/")
            self.fetched.append(path.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path.name].read_bytes())
            digest = download.sha256_file(path)
            if sha256 not in (None, digest):
                raise ValueError("it is not the known file and was deleted")
            return digest

        monkeypatch.setattr(published, "download", fetch)
        monkeypatch.setattr(module, "XLSR_1B", json.loads((UNITS / "config.json").read_text()))
        monkeypatch.setattr(module.convert, "__kwdefaults__", {"model_config": None, "layer": 5, "final_norm": False})

    def test_files_are_downloaded_and_converted_once(self, tmp_path, caplog):
        folder = find_unit_model("xlsr2_1b_v2", tmp_path)
        assert (folder / "unit_model.json").is_file()
        assert find_unit_model("xlsr2_1b_v2", tmp_path) == folder
        assert self.fetched == ["xlsr2_1b_v2.pt", "kmeans_10k.npy"]
        recorded = json.loads((tmp_path / "xlsr2_1b_v2.sha256.json").read_text())
        assert recorded["kmeans_10k.npy"] == download.sha256_file(UNITS / "kmeans.npy")
        assert recorded["kmeans_10k.npy"] in caplog.text
        assert not (tmp_path / "xlsr2_1b_v2.sources").exists()

    def test_digest_is_recorded_even_if_a_later_download_fails(self, tmp_path):
        self.broken = ["kmeans_10k.npy"]
        with pytest.raises(OSError, match="the connection broke"):
            find_unit_model("xlsr2_1b_v2", tmp_path)
        self.broken = []
        find_unit_model("xlsr2_1b_v2", tmp_path)
        assert self.fetched == ["xlsr2_1b_v2.pt", "kmeans_10k.npy"]
        assert set(json.loads((tmp_path / "xlsr2_1b_v2.sha256.json").read_text())) == set(self.fetched)

    def test_download_must_match_the_known_digest(self, tmp_path, monkeypatch):
        monkeypatch.setitem(published.KNOWN_DIGESTS, "kmeans_10k.npy", "0" * 64)
        monkeypatch.setattr("usdm_sft.units.convert.convert", None)
        with pytest.raises(ValueError, match="it is not the known file"):
            find_unit_model("xlsr2_1b_v2", tmp_path)

    def test_later_download_must_match_the_record(self, tmp_path):
        (tmp_path / "xlsr2_1b_v2.sha256.json").write_text(json.dumps({"kmeans_10k.npy": "0" * 64}))
        with pytest.raises(ValueError, match="it is not the known file"):
            find_unit_model("xlsr2_1b_v2", tmp_path)


def test_folder_without_a_unit_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a unit model folder .* 'dailytalk-usdm convert'"):
        find_unit_model(tmp_path)
    (tmp_path / "unit_model.json").write_text("{}")
    with pytest.raises(ValueError, match=r"unit_model\.json is not what convert wrote"):
        find_unit_model(tmp_path)
