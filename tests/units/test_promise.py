"""Whether a unit model keeps its promise, as `units --agreement` measures it."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from tests.units.test_encoders import MODELS, save
from usdm_sft.audio.frames import FRAMINGS
from usdm_sft.cli.main import main
from usdm_sft.units import promise
from usdm_sft.units.convert import convert
from usdm_sft.units.promise import Agreement, Comparison, measure
from usdm_sft.units.tokenizer import UnitTokenizer

LENGTHS = (8_000, 3_000, 7_500)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(length), 16_000)
    return [str(folder / f"{number}.wav") for number in range(len(LENGTHS))]


@pytest.fixture(scope="module")
def tokenizer(unit_model):
    return UnitTokenizer.from_pretrained(unit_model, device="cpu")


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wavlm")
    np.save(folder / "kmeans.npy", np.random.default_rng(0).standard_normal((60, 32)).astype(np.float32))
    return convert(save(MODELS["wavlm pre-norm"], folder / "source"), folder / "kmeans.npy", folder / "m", layer=2)


def by_name(found):
    return {each.name: each for each in found.comparisons}


NAMES = ["in batches", "beside a longer utterance", "tf32", "fp16", "bf16", "fp16x3", "bf16x3", "torchaudio"]


@pytest.fixture
def without_torchaudio(monkeypatch):
    monkeypatch.setattr(promise.importlib.util, "find_spec", lambda name: None)


def test_unit_model_keeps_its_promise(tokenizer, files, without_torchaudio):
    found = measure(tokenizer, files)
    assert [each.name for each in found.comparisons] == NAMES
    num_units = sum(FRAMINGS["fairseq"].count(length) for length in LENGTHS)
    rows = by_name(found)
    assert found.keeps_promise
    for name in NAMES[:2]:
        assert rows[name].num_units == num_units == rows[name].num_equal + rows[name].num_ties
    assert 0.5 * num_units < rows["fp16"].num_equal <= num_units
    assert "tf32 exists on CUDA only" in rows["tf32"].problem and "fp16x3 exists on CUDA" in rows["fp16x3"].problem
    assert rows["torchaudio"].problem == "torchaudio is not installed (extra torchaudio)"


def test_model_that_is_never_batched_is_measured_too(wavlm, files, without_torchaudio):
    found = measure(UnitTokenizer.from_pretrained(wavlm, device="cpu"), files)
    rows = by_name(found)
    assert found.keeps_promise and rows["in batches"].num_equal == rows["in batches"].num_units
    assert "does not exist for wavlm models" in rows["bf16"].problem


def test_batches_that_change_units_are_found(tokenizer, files, monkeypatch, without_torchaudio):
    """Every unit of a file but the longest is another one in a call with other files."""
    monkeypatch.setattr(promise, "get_args", lambda names: ["fp32"])
    whole = UnitTokenizer.tokenize_files

    def tokenize_files(self, sources):
        units, seconds = whole(self, sources)
        longest = max(map(len, units))
        return [each if len(each) == longest else (each + 1) % 30 for each in units], seconds

    monkeypatch.setattr(UnitTokenizer, "tokenize_files", tokenize_files)
    monkeypatch.setattr(promise, "_count_ties", lambda *args: 0)
    found = measure(tokenizer, files)
    counts = [FRAMINGS["fairseq"].count(length) for length in LENGTHS]
    assert by_name(found)["in batches"].num_equal == counts[0]
    assert by_name(found)["in batches"].num_changed == counts[1] + counts[2]
    assert not found.keeps_promise and f"batches change {counts[1] + counts[2]} units" in found.table()[-1]


def test_longer_neighbour_that_changes_units_is_found(tokenizer, files, monkeypatch, without_torchaudio):
    seen = []
    monkeypatch.setattr(promise, "get_args", lambda names: ["fp32"])

    def tokenize_waveforms(self, waveforms):
        seen.append([len(each) for each in waveforms])
        return [np.full(FRAMINGS["fairseq"].count(len(each)), 9_999, np.uint16) for each in waveforms]

    monkeypatch.setattr(UnitTokenizer, "tokenize_waveforms", tokenize_waveforms)
    monkeypatch.setattr(promise, "_count_ties", lambda *args: 0)
    found = measure(tokenizer, files)
    assert seen == [[8_000, 8_800], [3_000, 3_320], [7_500, 8_250]]
    assert by_name(found)["beside a longer utterance"].num_equal == 0 and not found.keeps_promise


def test_ties_are_units_whose_centroids_are_equally_near():
    features = torch.tensor([[0.0, 0.0], [0.0, 0.0], [4.0, 0.0], [1e-7, 0.0]], dtype=torch.float64)
    centroids = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [5.0, 0.0]])
    expected, found = np.array([0, 0, 2, 1], np.uint16), np.array([1, 2, 2, 0], np.uint16)
    # Frame 0: 1 and 1. Frame 1: 1 and 25. Frame 2 is equal. Frame 3: 1 + 2e-7 and 1 - 2e-7.
    assert promise._count_ties(expected, found, lambda: features, centroids) == 2
    assert promise._count_ties(expected, expected, None, centroids) == 0


@pytest.mark.parametrize("model", ["unit_model", "wavlm"])
def test_features_of_ties_are_those_of_the_units(request, files, model):
    tokenizer = UnitTokenizer.from_pretrained(request.getfixturevalue(model), device="cpu")
    features = promise._features(tokenizer, files[0])
    assert features.dtype == torch.float64
    [units] = tokenizer.tokenize_files(files[:1])[0]
    assert np.array_equal(tokenizer.model.nearest(features.float()).numpy(), units)


def test_torchaudio_is_measured_where_audio_is_resampled(tokenizer, tmp_path, monkeypatch):
    """A stand-in for torchaudio makes silence."""
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(22_050), 22_050)
    functional = SimpleNamespace(resample=lambda samples, rate, new, **options: torch.zeros(len(samples) * new // rate))
    monkeypatch.setitem(sys.modules, "torchaudio", SimpleNamespace(functional=functional))
    monkeypatch.setitem(sys.modules, "torchaudio.functional", functional)
    monkeypatch.setattr(promise.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(promise, "get_args", lambda names: ["fp32"])
    found = by_name(measure(tokenizer, [str(tmp_path / "a.wav")]))
    assert list(found) == ["in batches", "beside a longer utterance", "torchaudio"]
    assert found["in batches"].problem == "one file makes no batch: give more"
    assert found["torchaudio"].num_units == 49 and found["torchaudio"].num_changed > 24


def test_torchaudio_is_not_measured_where_nothing_is_resampled(tokenizer, files, monkeypatch):
    monkeypatch.setattr(promise.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(promise, "get_args", lambda names: ["fp32"])
    problem = by_name(measure(tokenizer, files[:1]))["torchaudio"].problem
    assert problem == "all files are at 16,000 Hz and need no resampling"


def test_table():
    comparisons = [
        Comparison("in batches", 12_000, 11_998, 2),
        Comparison("beside a longer utterance", 12_000, 11_999, 0),
        Comparison("tf32", problem="no"),
    ]
    assert Agreement("cpu", 2, comparisons).table() == [
        "2 files on cpu, compared with each file alone in fp32, resampled with soxr",
        "                                     equal units        share   ties",
        "in batches                      11,998 of 12,000    99.9833 %      2",
        "beside a longer utterance       11,999 of 12,000    99.9917 %      0",
        "tf32                      not measured: no",
        "The model BREAKS its promise: batches change 1 units that are no ties. Give prepare --batch_seconds 0.01, with which each "
        "utterance is computed alone, and report the model.",
    ]
    kept = Agreement("cpu", 1, comparisons[:1])
    assert kept.table()[0].startswith("1 file on cpu") and kept.table()[-1].startswith("The model keeps its promise")


def test_command_prints_table_or_json(wavlm, files, without_torchaudio, capsys):
    main(["units", str(wavlm), *files, "--device", "cpu", "--agreement"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(NAMES) + 1 and lines[-1].startswith("The model keeps its promise")
    main(["units", str(wavlm), *files, "--device", "cpu", "--agreement", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["files"], found["keeps_promise"]) == ("cpu", 3, True)
    assert [each["name"] for each in found["comparisons"]] == NAMES
    num_units = sum(FRAMINGS["transformers"].count(length) for length in LENGTHS)
    measured = {"units": num_units, "equal_units": num_units, "ties": 0, "share": 1.0}
    assert found["comparisons"][0] == {"name": "in batches", **measured}
    assert found["comparisons"][-1] == {
        "name": "torchaudio",
        "problem": "torchaudio is not installed (extra torchaudio)",
    }


def test_json_without_agreement_is_refused(wavlm, files, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["units", str(wavlm), *files, "--json"])
    assert "--json is for the table: give --agreement as well" in capsys.readouterr().err


def test_agreement_of_one_precision_is_refused(wavlm, files, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["units", str(wavlm), *files, "--agreement", "--precision", "tf32"])
    assert "--agreement measures every precision: leave out --precision tf32" in capsys.readouterr().err
