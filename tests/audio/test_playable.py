"""Recordings that browsers play: the original bytes or a form without loss, with the same samples and the same units."""

import io
import struct

import numpy as np
import pytest
import soundfile

from usdm_sft.audio import playable
from usdm_sft.audio.addresses import format_address, join_addresses
from usdm_sft.audio.playable import count_samples, make_playable
from usdm_sft.audio.reading import AudioError, read_audio, read_waveform
from usdm_sft.units.tokenizer import UnitTokenizer

RATE = 22_050


def speechlike(num_samples, channels=1, seed=0):
    walk = np.cumsum(np.random.default_rng(seed).standard_normal((num_samples, channels)), axis=0)
    return 0.9 * walk / np.abs(walk).max()


def write(folder, kind, codec, *, channels=1, suffix="bin", rate=RATE):
    path = folder / f"{kind}-{codec}-{channels}.{suffix}"
    soundfile.write(path, speechlike(15_000, channels), rate, codec, format=kind)
    return path


def kind_of(content):
    info = soundfile.info(io.BytesIO(content))
    return info.format, info.subtype, info.channels


@pytest.mark.parametrize(
    ("kind", "codec", "suffix"),
    [
        ("WAV", "PCM_U8", ".wav"),
        ("WAV", "PCM_16", ".wav"),
        ("WAV", "PCM_24", ".wav"),
        ("WAV", "FLOAT", ".wav"),
        ("WAVEX", "PCM_16", ".wav"),
        ("FLAC", "PCM_16", ".flac"),
        ("MP3", "MPEG_LAYER_III", ".mp3"),
        ("OGG", "VORBIS", ".ogg"),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_whole_file_that_browsers_play_is_kept_byte_by_byte(tmp_path, kind, codec, suffix, channels):
    path = write(tmp_path, kind, codec, channels=channels)
    assert make_playable(str(path)) == (path.read_bytes(), suffix)


@pytest.mark.parametrize(
    ("kind", "codec", "expected"),
    [
        ("WAV", "PCM_32", "WAV FLOAT"),
        ("WAV", "DOUBLE", "WAV FLOAT"),
        ("WAV", "ULAW", "FLAC PCM_16"),
        ("WAV", "MS_ADPCM", "FLAC PCM_16"),
        ("WAV", "GSM610", "FLAC PCM_16"),
        ("AIFF", "PCM_16", "FLAC PCM_16"),
        ("AIFF", "PCM_24", "FLAC PCM_24"),
        ("AU", "PCM_16", "FLAC PCM_16"),
        ("NIST", "PCM_16", "FLAC PCM_16"),
        ("W64", "PCM_16", "FLAC PCM_16"),
        ("RF64", "PCM_16", "FLAC PCM_16"),
        ("CAF", "FLOAT", "WAV FLOAT"),
    ],
)
def test_whole_file_in_another_format_keeps_every_sample(tmp_path, kind, codec, expected):
    path = write(tmp_path, kind, codec, rate=8_000 if codec == "GSM610" else RATE)
    recording = make_playable(str(path))
    assert kind_of(recording.content) == (*expected.split(), 1)
    assert recording.suffix == f".{expected.split()[0].lower()}"
    before, after = read_audio(str(path)), read_audio(recording.content)
    assert after[1] == before[1]
    np.testing.assert_array_equal(after[0], before[0])


def test_big_endian_wav_and_wav_after_a_tag_are_not_kept(tmp_path):
    soundfile.write(tmp_path / "big.wav", speechlike(15_000), RATE, "PCM_16", "BIG", "WAV")
    assert (tmp_path / "big.wav").read_bytes()[:4] == b"RIFX"
    tagged = b"ID3\4\0\0\0\0\0\12" + bytes(10) + write(tmp_path, "WAV", "PCM_16").read_bytes()
    (tmp_path / "tagged.wav").write_bytes(tagged)
    for name in ("big.wav", "tagged.wav"):
        recording = make_playable(str(tmp_path / name))
        assert kind_of(recording.content) == ("FLAC", "PCM_16", 1)
        np.testing.assert_array_equal(read_audio(recording.content)[0], read_audio(tmp_path / name)[0])


@pytest.mark.parametrize(
    ("kind", "codec", "channels", "channel", "expected"),
    [
        ("WAV", "PCM_16", 1, None, "FLAC PCM_16"),
        ("WAV", "PCM_16", 2, 1, "FLAC PCM_16"),
        ("WAV", "PCM_16", 2, None, "FLAC PCM_24"),  # the mean of two has one more bit
        ("WAV", "PCM_16", 3, None, "WAV FLOAT"),  # thirds
        ("WAV", "FLOAT", 1, None, "WAV FLOAT"),
        ("MP3", "MPEG_LAYER_III", 2, 0, "WAV FLOAT"),
    ],
)
def test_segment_of_a_recording_keeps_every_sample(tmp_path, kind, codec, channels, channel, expected):
    path = write(tmp_path, kind, codec, channels=channels)
    address = format_address(str(path), 0.1, 0.5, channel)
    recording = make_playable(address)
    assert kind_of(recording.content) == (*expected.split(), 1)
    samples, rate = read_audio(recording.content)
    assert (len(samples), rate) == (round(0.5 * RATE) - round(0.1 * RATE), RATE)
    np.testing.assert_array_equal(samples, read_audio(address)[0])


def test_recordings_in_turn_become_one(tmp_path):
    first, second = write(tmp_path, "WAV", "PCM_16"), write(tmp_path, "AIFF", "PCM_16")
    address = join_addresses(str(first), str(second))
    samples, _ = read_audio(make_playable(address).content)
    np.testing.assert_array_equal(samples, np.concatenate([read_audio(first)[0], read_audio(second)[0]]))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([-1.0, 1 - 2**-15], "FLAC PCM_16"),
        ([1.0, 0.0], "WAV FLOAT"),  # integers end before 1
        ([2**-23, 1 - 2**-23], "FLAC PCM_24"),
        ([2**-24, 0.5], "WAV FLOAT"),
        ([1.5, -1.5], "WAV FLOAT"),
    ],
)
def test_smallest_form_that_holds_the_samples(tmp_path, samples, expected):
    samples = np.tile(np.array(samples, np.float32), 1000)
    soundfile.write(tmp_path / "a.caf", samples, 16_000, "FLOAT")
    recording = make_playable(str(tmp_path / "a.caf"))
    assert kind_of(recording.content) == (*expected.split(), 1)
    np.testing.assert_array_equal(read_audio(recording.content)[0], samples)


def test_rate_that_flac_cannot_hold(tmp_path):
    soundfile.write(tmp_path / "a.aiff", speechlike(50_000), 700_000, "PCM_16")
    recording = make_playable(str(tmp_path / "a.aiff"))
    assert kind_of(recording.content) == ("WAV", "FLOAT", 1)
    np.testing.assert_array_equal(read_audio(recording.content)[0], read_audio(tmp_path / "a.aiff")[0])


def test_blocks_change_no_sample(tmp_path, monkeypatch):
    path = write(tmp_path, "AIFF", "PCM_24")
    whole = make_playable(str(path))
    monkeypatch.setattr(playable, "BLOCK_SAMPLES", 1024)
    np.testing.assert_array_equal(read_audio(make_playable(str(path)).content)[0], read_audio(whole.content)[0])


def test_wav_of_floats_has_the_header_of_the_format_and_no_time():
    """Chunks of a WAV file of floats: RIFF MCI specification, "New WAVE types"."""
    content = playable._make_float_wav(np.array([0.25, -0.5], np.float32), 44_100)
    assert content == (
        b"RIFF" + struct.pack("<I", 4 + 26 + 12 + 16) + b"WAVE"
        b"fmt " + struct.pack("<IHHIIHHH", 18, 3, 1, 44_100, 176_400, 4, 32, 0)
        + b"fact" + struct.pack("<II", 4, 2)
        + b"data" + struct.pack("<I2f", 8, 0.25, -0.5)
    )  # fmt: skip


def test_units_are_those_of_the_original(tmp_path, unit_model):
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu")
    addresses = [
        str(write(tmp_path, "WAV", "PCM_16")),
        str(write(tmp_path, "WAV", "ULAW")),
        str(write(tmp_path, "MP3", "MPEG_LAYER_III", channels=2)),
        format_address(str(write(tmp_path, "WAV", "PCM_24", channels=2)), 0.1, 0.6),
        format_address(str(write(tmp_path, "OGG", "VORBIS", channels=2)), 0.1, 0.6, 1),
    ]
    contents = [make_playable(address).content for address in addresses]
    expected, seconds = tokenizer.tokenize_files(addresses)
    found, found_seconds = tokenizer.tokenize_files(contents)
    assert [units.tolist() for units in found] == [units.tolist() for units in expected]
    assert found_seconds.tolist() == seconds.tolist()
    for rate in (16_000, 24_000):
        lengths = [len(read_waveform(address, sample_rate=rate)) for address in addresses]
        assert [count_samples(content, rate) for content in contents] == lengths


def test_recording_that_is_too_large_for_a_parquet_file(tmp_path, monkeypatch):
    path = write(tmp_path, "WAV", "PCM_16")
    monkeypatch.setattr(playable, "MAX_BYTES", 20_000)
    with pytest.raises(
        AudioError,
        match=r"audio file .*-1\.bin has 30,044 bytes, and a Parquet file holds at most 20,000 .*: cut it into",
    ):
        make_playable(str(path))
