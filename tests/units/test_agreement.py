import pytest

from usdm_sft.audio.digests import audio_digests
from usdm_sft.units.agreement import measure_agreement
from usdm_sft.units.tokenizer import UnitTokenizer


@pytest.mark.parametrize("damage", [lambda text: text[:-5], lambda text: text.replace("19", "18"), lambda text: "5"])
def test_damaged_agreement_is_measured_again(unit_model, mini, tmp_path, damage):
    paths = [str(path) for path in sorted(mini.glob("corpus/data/*/*.wav"))][:19]
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu", precision="bf16")
    audio = audio_digests(paths, tmp_path)
    first = measure_agreement(tokenizer, audio, tmp_path)
    [file] = (tmp_path / "agreement").glob("*.json")
    file.write_text(damage(file.read_text()))
    assert measure_agreement(tokenizer, audio, tmp_path) == first


def test_sample_is_spread_over_the_corpus(mini, unit_model, tmp_path, monkeypatch):
    paths = [str(path) for path in sorted(mini.glob("corpus/data/*/*.wav"))]
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu", precision="bf16")
    read = []
    tokenize = UnitTokenizer.tokenize_files
    monkeypatch.setattr(
        UnitTokenizer, "tokenize_files", lambda self, sources: read.append(sources) or tokenize(self, sources)
    )
    found = measure_agreement(tokenizer, audio_digests(paths, tmp_path), tmp_path, num_utterances=3)
    assert found["utterances"] == 3
    assert read == [[paths[0], paths[11], paths[22]]] * 2
