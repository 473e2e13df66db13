"""Codecs as unit models, compared with transformers itself, one utterance at a time."""

import json
import shutil
import sys
from functools import cache

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, SeamlessM4TFeatureExtractor

from tests.units.small_codecs import CODECS, EXTRACTORS, LOG_MEL, NUM_CODES, save_codec
from usdm_sft.audio.reading import AudioError, read_waveform
from usdm_sft.template.streams import UnitStreams, unflatten_units
from usdm_sft.units.codecs import kaldi_fbank
from usdm_sft.units.convert import convert
from usdm_sft.units.folder import ChangedError
from usdm_sft.units.promise import measure
from usdm_sft.units.tokenizer import UnitTokenizer, open_for

# sample rate, samples from frame to frame, and streams of each small codec
FACTS = {
    "dac": (16_000, 320, 3),
    "encodec": (24_000, 320, 6),
    "mimi": (24_000, 1_920, 4),
    "neucodec": (16_000, 320, 1),
    "wavtokenizer": (24_000, 600, 1),
    "xcodec": (16_000, 320, 4),
    "xcodec2": (16_000, 320, 1),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return cache(lambda kind: save_codec(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def opened(made):
    """Return the tokenizer of a codec with all its streams."""
    return cache(
        lambda kind: UnitTokenizer.from_pretrained(
            made(kind), device="cpu", streams=None if FACTS[kind][2] == 1 else "flatten"
        )
    )


def make_waveform(num_samples, seed=0):
    rng = np.random.default_rng([seed, num_samples])
    return (np.linspace(0.05, 0.8, num_samples) * rng.standard_normal(num_samples)).astype(np.float32)


def log_mel_inputs(kind, waveform):
    """What the feature extractors of Xcodec2 and NeuCodec make without torchaudio, by the log-mel features of transformers in NumPy."""
    padded = np.concatenate([waveform, np.zeros(320 - len(waveform) % 320, np.float32)])
    source = np.concatenate([np.zeros(160), padded, np.zeros(160)]) if kind == "xcodec2" else padded
    mel = SeamlessM4TFeatureExtractor()._extract_fbank_features(source.astype(np.float32))
    mel = (mel - mel.mean(0)) / np.sqrt(mel.var(0, ddof=1) + 1e-7)
    pairs = torch.from_numpy(mel[: len(mel) // 2 * 2].reshape(1, -1, 160).astype(np.float32))
    return {"input_values": torch.from_numpy(padded)[None, None], "input_features": pairs}


@torch.inference_mode()
def run_transformers(folder, kind, waveform):
    """Return the codes of transformers, (num_frames, num_streams)."""
    model = open_with_transformers(folder)
    if kind in LOG_MEL:
        inputs = log_mel_inputs(kind, waveform)
    else:
        extractor = AutoFeatureExtractor.from_pretrained(folder)
        inputs = {
            "input_values": extractor(waveform, sampling_rate=FACTS[kind][0], return_tensors="pt")["input_values"]
        }
    if kind in ("encodec", "xcodec"):
        inputs["bandwidth"] = max(model.config.target_bandwidths)
    codes = model.encode(**inputs).audio_codes
    return codes.reshape(-1, codes.shape[-1]).T.numpy()


@cache
def open_with_transformers(folder):
    return AutoModel.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", CODECS)
def test_units_are_the_codes_of_transformers(made, opened, kind):
    rate, step, num_streams = FACTS[kind]
    tokenizer, seen = opened(kind), set()
    assert (tokenizer.framing.sample_rate, tokenizer.framing.step) == (rate, step)
    assert tokenizer.streams.num_units == (NUM_CODES,) * num_streams
    for length in (rate // 40, 2 * step - 1, 2 * step, 2 * step + 1, 9_000):
        waveform = make_waveform(max(length, rate // 40))
        expected = run_transformers(made(kind), kind, waveform)
        [units] = tokenizer.tokenize_waveforms([waveform])
        assert units.dtype == np.uint16 and len(units) == tokenizer.count_units(len(waveform))
        assert unflatten_units(units, tokenizer.streams.kept).tolist() == expected.tolist()
        seen |= set(units.tolist())
    assert len(seen) > 8 * num_streams


@pytest.mark.slow
@pytest.mark.parametrize("kind", CODECS)
def test_units_of_200_utterances_are_those_of_each_alone(opened, kind):
    tokenizer = opened(kind)
    lengths = np.random.default_rng(1).integers(600, 4_000, 200).tolist()
    waveforms = [make_waveform(length, seed) for seed, length in enumerate(lengths)]
    torch.set_num_threads(4)
    together = tokenizer.tokenize_waveforms(waveforms)
    torch.set_num_threads(1)
    assert [len(units) for units in together] == [tokenizer.count_units(length) for length in lengths]
    for waveform, units in zip(waveforms, together, strict=True):
        assert tokenizer.tokenize_waveforms([waveform])[0].tolist() == units.tolist()


@pytest.mark.parametrize("kind", [kind for kind, facts in FACTS.items() if facts[2] > 1])
def test_first_streams_of_a_codec(made, opened, kind):
    waveform = make_waveform(9_000)
    frames = unflatten_units(opened(kind).tokenize_waveforms([waveform])[0], opened(kind).streams.kept)
    rate, step, num_streams = FACTS[kind]
    first = UnitTokenizer.from_pretrained(made(kind), device="cpu", streams="first")
    assert first.streams == UnitStreams(rate / step, (NUM_CODES,) * num_streams, "first")
    assert first.tokenize_waveforms([waveform])[0].tolist() == frames[:, 0].tolist()
    two = UnitTokenizer.from_pretrained(made(kind), device="cpu", streams="flatten", num_streams=2)
    assert two.num_units == 2 * NUM_CODES
    assert unflatten_units(two.tokenize_waveforms([waveform])[0], (NUM_CODES,) * 2).tolist() == frames[:, :2].tolist()
    one = UnitTokenizer.from_pretrained(made(kind), device="cpu", num_streams=1)
    assert one.streams.streams is None
    assert one.tokenize_waveforms([waveform])[0].tolist() == frames[:, 0].tolist()
    assert len({each.key[1:] and json.dumps(each.key) for each in (first, two, one, opened(kind))}) == 4


def test_files_are_read_at_the_sample_rate_of_the_codec(opened, tmp_path):
    tokenizer, waveform = opened("wavtokenizer"), make_waveform(22_050)
    soundfile.write(tmp_path / "a.wav", waveform, 22_050, "FLOAT")
    units, seconds = tokenizer.tokenize_files([str(tmp_path / "a.wav")])
    resampled = read_waveform(tmp_path / "a.wav", sample_rate=24_000)
    assert seconds.tolist() == [1.0] and len(resampled) == 24_000 and len(units[0]) == 40
    assert units[0].tolist() == tokenizer.tokenize_waveforms([resampled])[0].tolist()


def test_log_mel_features_are_those_of_transformers():
    for length in (400, 559, 560, 16_000):
        waveform = make_waveform(length)
        expected = SeamlessM4TFeatureExtractor()._extract_fbank_features(waveform)
        found = kaldi_fbank(waveform)
        assert found.shape == expected.shape == ((length - 400) // 160 + 1, 80)
        assert np.abs(found - expected).max() < 1e-3


def test_codec_keeps_its_promise(opened, tmp_path):
    for number, length in enumerate((9_000, 4_000, 7_777)):
        soundfile.write(tmp_path / f"{number}.wav", make_waveform(length), 16_000)
    found = measure(opened("mimi"), [str(tmp_path / f"{number}.wav") for number in range(3)])
    assert found.keeps_promise and [each.num_units - each.num_equal for each in found.comparisons[:2]] == [0, 0]
    assert "precision bf16 does not exist for mimi" in {each.name: each.problem for each in found.comparisons}["bf16"]


def copy(made, kind, tmp_path):
    return shutil.copytree(made(kind), tmp_path / "codec")


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"the codec \(mimi\) has 4 streams: choose with --streams first .* or flatten"),
        ({"streams": "flatten", "num_streams": 5}, r"num_streams is 5, but the codec \(mimi\) has 4 streams: give 4 or fewer"),
        ({"streams": "flatten", "num_streams": 0}, "num_streams is 0"),
        ({"streams": "flatten", "precision": "bf16"}, "precision bf16 does not exist for mimi"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(made, settings, message):
    with pytest.raises(ValueError, match=message):
        open_for("cpu", made("mimi"), **{"precision": "fp32", "batch_seconds": None, "resampler": "soxr"} | settings)


def test_streams_of_a_codec_of_one_stream_are_refused(made):
    [kind] = [kind for kind, (_, _, num_streams) in FACTS.items() if num_streams == 1][:1]
    with pytest.raises(
        ValueError, match=rf"streams is first, but one stream of the codec \({kind}\) is used: leave it out"
    ):
        UnitTokenizer.from_pretrained(made(kind), device="cpu", streams="first")
    assert UnitTokenizer.from_pretrained(made(kind), device="cpu", num_streams=1).streams.streams is None


def test_streams_of_a_model_that_is_no_codec_are_refused(unit_model):
    with pytest.raises(
        ValueError, match="streams and num_streams are given, but the unit model is not a codec: leave them out"
    ):
        UnitTokenizer.from_pretrained(unit_model, device="cpu", streams="first", num_streams=1)


def test_more_units_than_are_stored_are_refused(made, tmp_path):
    folder = copy(made, "dac", tmp_path)
    change_json(folder / "config.json", codebook_size=30_000)
    with pytest.raises(
        ValueError, match="3 streams have 90,000 units in all, more than the 65,536 that are stored: give"
    ):
        UnitTokenizer.from_pretrained(folder, device="cpu", streams="flatten")
    assert UnitTokenizer.from_pretrained(folder, device="cpu", streams="flatten", num_streams=2).num_units == 60_000
    change_json(folder / "config.json", codebook_size=70_000)
    with pytest.raises(ValueError, match="has 70,000 codes, more than the 65,536 that are stored: use another codec"):
        UnitTokenizer.from_pretrained(folder, device="cpu", streams="first")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("config.json", {"audio_channels": 2}, "is a codec for stereo or for chunks of audio: name one for whole mono"),
        ("config.json", {"chunk_length_s": 1.0}, "is a codec for stereo or for chunks"),
        ("config.json", {"quantization_config": {}}, "the weights are quantized: name the checkpoint they were made from"),
        ("config.json", {"codebook_size": 0}, r"cannot read this encodec config"),
        ("config.json", {"target_bandwidths": []}, r"cannot read this encodec config"),
        ("config.json", {"target_bandwidths": [1e12]}, "streams, more than the 65,536 that are stored"),
        ("config.json", {"upsampling_ratios": "eight"}, r"cannot read this encodec config .*: install the newest transformers"),
        ("preprocessor_config.json", {"sampling_rate": 16_000}, "sampling_rate of the feature extractor is 16000, of the codec 24000"),
        ("preprocessor_config.json", {"feature_extractor_type": "DacFeatureExtractor"}, "is a DacFeatureExtractor, not a EncodecF"),
    ],
    ids=str,
)  # fmt: skip
def test_codec_that_cannot_be_used_is_refused(made, tmp_path, name, values, message):
    folder = copy(made, "encodec", tmp_path)
    change_json(folder / name, **values)
    with pytest.raises(ValueError, match=message):
        UnitTokenizer.from_pretrained(folder, device="cpu", streams="first")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "model.safetensors"])
def test_missing_file_of_a_codec_is_named(made, tmp_path, name):
    folder = copy(made, "dac", tmp_path)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no(ne of)? {name}"):
        UnitTokenizer.from_pretrained(folder, device="cpu", streams="first")


def test_config_of_a_huge_model_takes_no_memory(made, tmp_path):
    folder = copy(made, "dac", tmp_path)
    change_json(folder / "config.json", encoder_hidden_size=2_048)
    tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu", streams="first")
    with pytest.raises(
        ValueError, match=r"config\.json describes a model of [\d,]{13,} bytes, its weights have [\d,]{9}:"
    ):
        tokenizer.tokenize_waveforms([make_waveform(2_000)])


@pytest.mark.parametrize("names", [["model.safetensors"], {"a": 5}, {"a": "../model.safetensors"}], ids=str)
def test_index_that_names_other_files_is_refused(made, tmp_path, names):
    folder = copy(made, "dac", tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="weight_map does not name files of the folder"):
        UnitTokenizer.from_pretrained(folder, device="cpu", streams="first")


def test_missing_weight_of_a_codec_is_named(made, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copy(made, "dac", tmp_path)
    weights = load_file(folder / "model.safetensors")
    removed = next(name for name in weights if name.startswith("encoder."))
    save_file({name: values for name, values in weights.items() if name != removed}, folder / "model.safetensors")
    tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu", streams="first")
    with pytest.raises(ValueError, match=f"lacks {removed}: name a complete checkpoint"):
        tokenizer.tokenize_waveforms([make_waveform(2_000)])


def test_codec_that_changes_after_it_was_opened_is_refused(made, tmp_path):
    folder = copy(made, "dac", tmp_path)
    tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu", streams="first")
    shutil.copy(made("xcodec") / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ChangedError, match="was changed after it was converted or opened"):
        tokenizer.tokenize_waveforms([make_waveform(2_000)])


def test_missing_extra_is_named(made, opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldi_native_fbank", None)
    tokenizer = opened("xcodec2").with_settings()
    with pytest.raises(ImportError, match=r"pip install 'dailytalk-usdm\[codecs\]'"):
        tokenizer.tokenize_waveforms([make_waveform(2_000)])


def test_codec_is_not_converted(made, tmp_path):
    np.save(tmp_path / "kmeans.npy", np.zeros((2, 32), np.float32))
    with pytest.raises(
        ValueError, match="is a codec, which needs no k-means and no conversion: give it to prepare as it is"
    ):
        convert(made("dac"), tmp_path / "kmeans.npy", tmp_path / "unit_model", layer=1)


def test_waveform_that_is_too_short_is_refused(opened):
    with pytest.raises(AudioError, match=r"has 598 samples at 24 kHz, fewer than the 599 \(.* ms\) that make a unit"):
        opened("wavtokenizer").tokenize_waveforms([make_waveform(598)])


def test_saved_codec_is_the_folder_that_was_opened(opened, made, tmp_path):
    opened("dac").save_pretrained(tmp_path / "saved")
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert files == {path.name: path.read_bytes() for path in made("dac").iterdir() if path.name in files}
    assert sorted(files) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    again = UnitTokenizer.from_pretrained(tmp_path / "saved", device="cpu", streams="flatten")
    assert again.digest == opened("dac").digest


def test_small_codecs_have_the_extractors_of_the_published_ones(made):
    for kind, extractor in EXTRACTORS.items():
        assert json.loads((made(kind) / "preprocessor_config.json").read_text())["feature_extractor_type"] == extractor
        assert AutoConfig.from_pretrained(made(kind)).model_type == kind
