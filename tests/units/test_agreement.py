import pytest

from usdm_sft.audio.digests import audio_digests
from usdm_sft.units.agreement import measure_agreement
from usdm_sft.units.tokenizer import UnitTokenizer

DAMAGE = {
    "cut": lambda text: text[:-5],
    "other number": lambda text: text.replace('"utterances": 3', '"utterances": 2'),
    "number": lambda text: "5",
}


@pytest.fixture(scope="module")
def tokenizer(unit_model):
    return UnitTokenizer.from_pretrained(unit_model, device="cpu", precision="bf16")


@pytest.fixture(scope="module")
def paths(mini):
    return [str(path) for path in sorted(mini.glob("corpus/data/*/*.wav"))]


def test_damaged_agreement_is_measured_again(tokenizer, paths, tmp_path):
    audio = audio_digests(paths[:3], tmp_path)
    first = measure_agreement(tokenizer, audio, tmp_path)
    assert first["utterances"] == 3
    [file] = (tmp_path / "agreement").glob("*.json")
    written = file.read_text()
    for name, damage in DAMAGE.items():
        file.write_text(damage(written))
        assert file.read_text() != written
        assert measure_agreement(tokenizer, audio, tmp_path) == first, name


def test_sample_is_spread_over_the_corpus(tokenizer, paths, tmp_path, monkeypatch):
    read = []
    tokenize = UnitTokenizer.tokenize_files
    monkeypatch.setattr(
        UnitTokenizer, "tokenize_files", lambda self, sources: read.append(sources) or tokenize(self, sources)
    )
    found = measure_agreement(tokenizer, audio_digests(paths, tmp_path), tmp_path, num_utterances=3)
    assert found["utterances"] == 3
    assert read == [[paths[0], paths[11], paths[22]]] * 2
