import hashlib
import json
import sys
import types

import librosa
import numpy as np
import pytest
import soundfile
import torch

from usdm_sft.audio.digests import check_audio
from usdm_sft.audio.frames import resampled_length
from usdm_sft.audio.reading import AudioError, read_waveform
from usdm_sft.units.batches import resample_on
from usdm_sft.units.columns import audio_source

FORMATS = [
    ("wav", "PCM_16", 22_050, 1),
    ("wav", "PCM_16", 44_100, 2),
    ("wav", "PCM_U8", 8_000, 1),
    ("wav", "PCM_24", 48_000, 2),
    ("wav", "FLOAT", 16_000, 1),
    ("wav", "FLOAT", 96_000, 6),
    ("wav", "PCM_32", 11_025, 2),
    ("flac", "PCM_16", 24_000, 2),
    ("ogg", "VORBIS", 32_000, 1),
    ("mp3", "MPEG_LAYER_III", 44_100, 2),
]


def speechlike(num_samples, channels, seed=0):
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.standard_normal((num_samples, channels)), axis=0)
    return (0.9 * (walk - walk.mean(0)) / np.abs(walk - walk.mean(0)).max()).astype(np.float32)


@pytest.mark.parametrize(("suffix", "subtype", "rate", "channels"), FORMATS)
@pytest.mark.parametrize("num_samples", [20_001, 33_333])
def test_samples_equal_those_of_librosa(tmp_path, suffix, subtype, rate, channels, num_samples):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, speechlike(num_samples, channels), rate, subtype=subtype)
    expected, _ = librosa.load(path, sr=16_000)
    assert np.array_equal(read_waveform(path), expected)
    assert np.array_equal(read_waveform(path.read_bytes()), expected)
    assert read_waveform(path).dtype == np.float32
    frames, rate, problem = check_audio(path)
    assert (resampled_length(frames, rate), problem) == (len(expected), None)


@pytest.mark.oracle
def test_clip_of_dailytalk(shared):
    golden = json.loads((shared / "oracle" / "units" / "golden.json").read_text())
    assert golden["files"]
    for name, expected in golden["files"].items():
        waveform = read_waveform(shared / "oracle" / "units" / "files" / name)
        assert len(waveform) == expected["samples_16k"]
        assert hashlib.sha256(waveform.astype("<f4").tobytes()).hexdigest() == expected["sha256_16k_float32le"]


def test_values_of_an_audio_column(tmp_path):
    assert audio_source({"bytes": None, "path": "a.wav"}) == audio_source("a.wav") == "a.wav"
    assert audio_source({"bytes": b"RIFF", "path": "a.wav"}) == audio_source(b"RIFF") == b"RIFF"
    assert audio_source(tmp_path) == str(tmp_path)
    with pytest.raises(TypeError, match=r"audio is a list, not a path or bytes: .*Audio\(decode=False\)"):
        audio_source([0.1, 0.2])


def test_resampling_on_the_device_without_torchaudio(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(
        ImportError, match=r"needs torchaudio .*pip install 'dailytalk-usdm\[torchaudio\]', or use .* soxr"
    ):
        resample_on("cpu", np.zeros(100, np.float32), 22_050)


@pytest.mark.parametrize("missing", [-1, 0, 1])
def test_resampling_on_the_device_has_the_right_length(monkeypatch, missing):
    """With a stand-in for torchaudio, which cannot be installed beside a CPU torch."""

    def resample(waveform, rate, new_rate, **options):
        assert options["resampling_method"] == "sinc_interp_kaiser"
        return torch.ones(resampled_length(len(waveform), rate) + missing)

    functional = types.SimpleNamespace(resample=resample)
    monkeypatch.setitem(sys.modules, "torchaudio", types.SimpleNamespace(functional=functional))
    monkeypatch.setitem(sys.modules, "torchaudio.functional", functional)
    resampled = resample_on("cpu", np.zeros(22_051, np.float32), 22_050)
    assert resampled.tolist() == [1.0] * (16_001 + min(missing, 0)) + [0.0] * (missing == -1)
    assert resample_on("cpu", np.zeros(5, np.float32), 16_000).tolist() == [0.0] * 5


def test_bytes_that_are_not_audio():
    with pytest.raises(AudioError, match=r"audio bytes \(9 bytes\) is not audio"):
        read_waveform(b"not audio")
