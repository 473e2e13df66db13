"""A unit model folder that changes after it was opened: what is loaded has the digest that units are cached under, or nothing is."""

import json
import os
import pickle
import shutil
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from tests.helpers import options
from usdm_sft.prepare import open_run as opening
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units.convert import convert
from usdm_sft.units.folder import unit_model_digest
from usdm_sft.units.model import UnitModel
from usdm_sft.units.tokenizer import UnitTokenizer

CHANGED = r"was changed after it was converted or opened: let nothing write to the folder, and run again"
NOISE = [np.random.default_rng(0).standard_normal(16_000).astype(np.float32)]


@pytest.fixture
def folder(unit_model, tmp_path):
    return shutil.copytree(unit_model, tmp_path / "model")


@pytest.fixture(scope="module")
def other(mini, tmp_path_factory):
    """A unit model of which each file differs."""
    source, made = mini / "unit_model", tmp_path_factory.mktemp("other")
    np.save(made / "kmeans.npy", np.load(source / "kmeans.npy")[::-1].copy())
    config = json.loads((source / "config.json").read_text()) | {"layer_norm_eps": 1e-3}
    (made / "config.json").write_text(json.dumps(config))
    layer = config["num_hidden_layers"] - 2
    options = {"model_config": made / "config.json", "layer": layer}
    return convert(source / "checkpoint.pt", made / "kmeans.npy", made / "model", **options)


def replace(folder, other, *names):
    """Put files of another unit model in their place, as rsync does."""
    for name in names or [path.name for path in other.iterdir()]:
        shutil.copyfile(other / name, folder / f"{name}.new")
        os.replace(folder / f"{name}.new", folder / name)


FILES = [("kmeans.npy",), ("config.json",), ("model.safetensors",), ("unit_model.json",), ()]


@pytest.mark.parametrize("names", FILES, ids=str)
@pytest.mark.parametrize("reopen", [lambda tokenizer: tokenizer, lambda tokenizer: tokenizer.with_settings(batch_seconds=1.0),
                                    lambda tokenizer: pickle.loads(ForkingPickler.dumps(tokenizer))],
                         ids=["same object", "other settings", "other process"])  # fmt: skip
def test_model_that_changes_after_it_was_opened_makes_no_units(folder, other, names, reopen):
    tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu")
    replace(folder, other, *names)
    with pytest.raises(ValueError, match=CHANGED):
        reopen(tokenizer).tokenize_waveforms(NOISE)


def test_overwritten_file_changes_no_unit_of_a_loaded_model(folder, other, unit_model):
    tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu")
    [expected] = UnitTokenizer.from_pretrained(unit_model, device="cpu").tokenize_waveforms(NOISE)
    assert tokenizer.tokenize_waveforms(NOISE)[0].tolist() == expected.tolist()
    for path in other.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes(b"")
    assert tokenizer.tokenize_waveforms(NOISE)[0].tolist() == expected.tolist()
    tokenizer.release()
    with pytest.raises(ValueError, match=CHANGED):
        tokenizer.tokenize_waveforms(NOISE)


@pytest.mark.parametrize("names", [("kmeans.npy",), ()], ids=str)
def test_run_caches_no_units_of_a_model_that_changed(folder, other, mini, tmp_path, monkeypatch, names):
    real = opening.plan_shards

    def plan_and_replace(*args):
        plan = real(*args)
        replace(folder, other, *names)
        return plan

    monkeypatch.setattr(opening, "plan_shards", plan_and_replace)
    with pytest.raises(ValueError, match=CHANGED):
        prepare(**options(mini, folder, tmp_path))
    assert not list((tmp_path / "cache" / "units").glob("*.arrow")) and not (tmp_path / "out" / "counts.json").exists()


def test_loading_names_the_file_that_differs(folder, other):
    digest = unit_model_digest(folder)
    replace(folder, other, "kmeans.npy")
    with pytest.raises(ValueError, match=f"kmeans.npy {CHANGED}"):
        UnitModel.from_pretrained(folder, digest=digest)


def test_num_units_and_normalization_are_those_of_the_digest(folder):
    for name, value in (("num_units", 7), ("normalization", "none")):
        tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu")
        description = json.loads((folder / "unit_model.json").read_text())
        (folder / "unit_model.json").write_text(json.dumps(description | {name: value, "layer": 1}))
        with pytest.raises(ValueError, match=f"unit_model.json {CHANGED}"):
            getattr(tokenizer, name)
        (folder / "unit_model.json").write_text(json.dumps(description))
        assert getattr(tokenizer, name) == {"num_units": description["num_units"], "normalization": "fairseq"}[name]
