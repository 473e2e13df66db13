import pytest

from usdm_sft.audio.digests import AudioDigest, audio_digests
from usdm_sft.units.agreement import measure_agreement, pick_sample
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


def test_sample_is_spread_over_the_corpus():
    audio = {f"{number}.wav": AudioDigest(str(number), 16_000, 1.0) for number in range(23)}
    assert list(pick_sample(audio, 3)) == ["0.wav", "11.wav", "22.wav"]
    assert pick_sample(audio, 64) == audio
