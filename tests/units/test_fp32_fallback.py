"""Utterances that overflow in fp16 get the units of fp32 and are listed in counts.json and in the card."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.helpers import options
from tests.units.small_models import change_file, edit_weights
from usdm_sft.audio.frames import num_frames
from usdm_sft.audio.reading import read_waveform
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units.batches import normalize
from usdm_sft.units.features import FeatureExtractor
from usdm_sft.units.model import UnitModel
from usdm_sft.units.tokenizer import UnitTokenizer

LAYER = "encoder.layers.1.feed_forward."
LARGEST_FP16 = 65_504


@pytest.fixture(scope="module")
def loud(unit_model, mini, tmp_path_factory):
    """A unit model in which one utterance of the mini corpus overflows in fp16, and the path of the utterance.

    The first matrix of a feed-forward block is scaled until only the utterance with the largest product exceeds the range of
    fp16; the second matrix is scaled back.
    """
    model = UnitModel.from_pretrained(unit_model)
    largest, products = {}, []
    layer = model.layers[1].feed_forward.intermediate_dense
    layer.register_forward_hook(lambda module, args, output: products.append(output.abs().max().item()))
    for path in sorted(mini.glob("corpus/data/*/*.wav")):
        waveform = torch.from_numpy(read_waveform(path))
        model(normalize(waveform)[None], torch.tensor([num_frames(len(waveform))]))
        largest[str(path)] = products.pop()
    first, second = sorted(largest, key=largest.get, reverse=True)[:2]
    assert largest[first] > 1.1 * largest[second]  # far above the rounding of fp16
    scale = LARGEST_FP16 / (largest[first] * largest[second]) ** 0.5

    def change(weights):
        for part in ("weight", "bias"):
            weights[f"{LAYER}intermediate_dense.{part}"] *= scale
        weights[f"{LAYER}output_dense.weight"] /= scale

    folder = shutil.copytree(unit_model, tmp_path_factory.mktemp("loud") / "model")
    change_file(folder, "model.safetensors", edit_weights(change))
    return folder, first


def test_an_utterance_that_overflows_gets_the_units_of_fp32(loud, mini, caplog):
    folder, path = loud
    others = sorted(str(other) for other in mini.glob("corpus/data/3/*.wav"))[:2]
    tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu", precision="fp16")
    found, _ = tokenizer.tokenize_files([others[0], path, others[1], path])
    assert tokenizer.fp32_fallback == {path}
    warning = f"audio file {path}: the features are not finite in fp16: its units are computed in fp32"
    own = [record.getMessage() for record in caplog.records if record.name == "usdm_sft.units.tokenizer"]
    assert own == [warning, warning]
    [expected], _ = UnitTokenizer.from_pretrained(folder, device="cpu").tokenize_files([path])
    assert found[1].tolist() == found[3].tolist() == expected.tolist()
    beside, _ = tokenizer.tokenize_files(others)
    assert [found[0].tolist(), found[2].tolist()] == [units.tolist() for units in beside]
    assert tokenizer.fp32_fallback == set()
    tokenizer.release()
    assert tokenizer._in_fp32 is None


def test_overflow_in_fp32_too_names_the_utterance(unit_model, tmp_path):
    folder = shutil.copytree(unit_model, tmp_path / "model")
    fill = edit_weights(lambda weights: weights[f"{LAYER}intermediate_dense.weight"].fill_(3e38))
    change_file(folder, "model.safetensors", fill)
    waveforms = [np.random.default_rng(0).standard_normal(1000).astype(np.float32)]
    for precision in ("fp32", "fp16"):
        tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu", precision=precision)
        with pytest.raises(
            ValueError, match=r"waveform 0: the features are not finite in fp32: leave out the utterance, or check"
        ):
            tokenizer.tokenize_waveforms(waveforms)


@pytest.mark.slow
def test_features_that_overflow_are_those_of_fp32(loud, mini):
    """`fit` computes them."""
    folder, path = loud
    other = next(str(each) for each in sorted(mini.glob("corpus/data/3/*.wav")) if str(each) != path)
    half, full = (
        FeatureExtractor.from_pretrained(folder, device="cpu", precision=precision).tokenize_files([other, path])[0]
        for precision in ("fp16", "fp32")
    )
    assert [each.dtype for each in half] == [np.float32, np.float32]
    np.testing.assert_allclose(half[1], full[1], rtol=0, atol=1e-5 * np.abs(full[1]).max())
    assert 0 < np.abs(half[0] - full[0]).max() < 0.1 * np.abs(full[0]).max()


def test_utterances_that_overflow_are_in_counts_and_card(loud, mini, finished, tmp_path, monkeypatch):
    folder, _ = loud

    def run(output, **changes):
        return prepare(**options(mini, folder, tmp_path, output_path=str(tmp_path / output), **changes))

    in_fp32 = json.loads((finished / "out" / "counts.json").read_text())
    assert [split["fp32_fallback"] for split in in_fp32["splits"].values()] == [[], []]
    assert "not finite" not in (finished / "out" / "README.md").read_text()
    first = run("first", precision="fp16")
    assert {split: counts["fp32_fallback"] for split, counts in first["splits"].items()} == {
        "train": ["0_1_d20"],
        "test": [],
    }
    card = (tmp_path / "first" / "README.md").read_text()
    assert (
        "\nThe features of 1 utterance of train are not finite in precision fp16. The units of this utterance were computed in "
        "fp32 (`counts.json` has the whole list): 0_1_d20.\n"
    ) in card
    monkeypatch.setattr(UnitModel, "forward_pack", None)
    assert run("second", precision="fp16") == first
    assert (tmp_path / "second" / "README.md").read_text() == card
