"""ID3v2 tags before the header, names that soundfile would guess a format from, and codecs that cannot seek."""

import shutil
import struct
import zipfile

import datasets
import librosa
import numpy as np
import pytest
import soundfile

from tests.helpers import options
from usdm_sft.audio.addresses import format_address, zip_address
from usdm_sft.audio.digests import AudioCheck, check_audio
from usdm_sft.audio.reading import AudioError, read_audio, read_waveform
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units.tokenizer import UnitTokenizer

TAGGED = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "MS_ADPCM"), ("AIFF", "PCM_16"), ("AU", "PCM_16")]
UNSEEKABLE = [
    ("WAV", "GSM610"), ("WAV", "G721_32"), ("WAV", "NMS_ADPCM_16"), ("WAV", "NMS_ADPCM_24"), ("WAV", "NMS_ADPCM_32"),
    ("AIFF", "GSM610"), ("AU", "G721_32"), ("AU", "G723_24"), ("AU", "G723_40"),
]  # fmt: skip


def speechlike(num_samples, seed=0):
    walk = np.cumsum(np.random.default_rng(seed).standard_normal(num_samples))
    return 0.9 * walk / np.abs(walk).max()


def id3_tag(size, version=4):
    """An ID3v2 tag of `size` bytes, its header of 10 included: https://id3.org/id3v2.4.0-structure."""
    body = size - 10
    return b"ID3" + bytes([version, 0, 0, *(body >> shift & 0x7F for shift in (21, 14, 7, 0))]) + b"\1" * body


def ways_to(content, folder):
    """The same file content as a file, a member of an archive and bytes."""
    path = folder / "tagged.wav"
    path.write_bytes(content)
    with zipfile.ZipFile(folder / "corpus.zip", "w") as archive:
        archive.writestr("tagged.wav", content)
    return {"path": str(path), "zip": zip_address(folder / "corpus.zip", "tagged.wav"), "bytes": content}


@pytest.mark.parametrize(
    "tag",
    [id3_tag(12), id3_tag(1000), id3_tag(1001, 3), id3_tag(200_000, 2), id3_tag(99) + id3_tag(64)],
    ids=["12 bytes", "1000", "1001", "200000", "two tags"],
)
@pytest.mark.parametrize(("kind", "subtype"), TAGGED)
def test_id3_tag_before_the_header_changes_no_sample(tmp_path, kind, subtype, tag):
    soundfile.write(tmp_path / "plain", speechlike(14_600), 16_000, format=kind, subtype=subtype)
    expected, _ = soundfile.read(tmp_path / "plain", dtype="float32")
    sources = ways_to(tag + (tmp_path / "plain").read_bytes(), tmp_path)
    assert np.array_equal(librosa.load(sources["path"], sr=None)[0], expected)  # the reference reads by path
    for source in sources.values():
        assert np.array_equal(read_waveform(source), expected)
    for address in (sources["path"], sources["zip"]):
        assert check_audio(address) == AudioCheck(len(expected), 16_000)
        assert np.array_equal(read_audio(format_address(address, 0.25, 0.75))[0], expected[4000:12_000])


def test_id3_tag_before_the_header_changes_no_unit(tmp_path, unit_model):
    soundfile.write(tmp_path / "plain.wav", speechlike(14_600), 16_000)
    sources = ways_to(id3_tag(1000) + (tmp_path / "plain.wav").read_bytes(), tmp_path)
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu")
    [expected], _ = tokenizer.tokenize_files([tmp_path / "plain.wav"])
    assert len(expected) == 45
    for units in tokenizer.tokenize_files(list(sources.values()))[0]:
        assert units.tolist() == expected.tolist()


@pytest.mark.parametrize("way", ["path", "zip"])
def test_cut_in_the_samples_after_an_id3_tag(tmp_path, way):
    soundfile.write(tmp_path / "plain.wav", speechlike(8000), 16_000)
    content = id3_tag(1000) + (tmp_path / "plain.wav").read_bytes()
    assert check_audio(ways_to(content, tmp_path)[way]) == AudioCheck(8000, 16_000)
    said = "is cut short (its header promises 16,000 bytes of samples, 15,998 are there)"
    assert check_audio(ways_to(content[:-2], tmp_path)[way]).problem == said


def test_mp3_that_is_cut_after_an_id3_tag(tmp_path):
    """The note of its length lies behind the tag, which is as large as a cover picture makes it."""
    soundfile.write(tmp_path / "plain.mp3", speechlike(60_000), 24_000)
    content = id3_tag(100_000) + (tmp_path / "plain.mp3").read_bytes()
    path = tmp_path / "tagged.mp3"
    path.write_bytes(content)
    assert check_audio(path) == AudioCheck(60_000, 24_000)
    path.write_bytes(content[: 100_000 + (len(content) - 100_000) // 2])
    assert check_audio(path).problem.startswith("is cut short (its header promises 60,000 samples, ")


@pytest.mark.parametrize(
    "content",
    [id3_tag(1000), id3_tag(1000)[:500], id3_tag(1000) + b"not audio", b"ID3\4"],
    ids=["tag", "half a tag", "text", "mark"],
)
def test_id3_tag_without_audio_after_it(tmp_path, content):
    for source in ways_to(content, tmp_path).values():
        with pytest.raises(AudioError, match="is not audio that soundfile can read"):
            read_audio(source)
    assert check_audio(tmp_path / "tagged.wav").problem.startswith("is not audio that soundfile can read")


@pytest.mark.parametrize("suffix", ["au", "snd", "gsm", "vox", "raw"])
def test_format_is_not_guessed_from_the_name(tmp_path, suffix):
    """By path, libsndfile takes anything of these names for samples without a header; soundfile itself stops at .raw."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"<html>404</html>" * 1000)
    assert check_audio(path).problem.startswith("is not audio that soundfile can read")
    soundfile.write(tmp_path / "b.wav", speechlike(8000), 16_000)
    shutil.copyfile(tmp_path / "b.wav", path)
    assert check_audio(path) == AudioCheck(8000, 16_000)
    assert np.array_equal(read_waveform(path), read_waveform(tmp_path / "b.wav"))


@pytest.mark.parametrize(("kind", "subtype"), UNSEEKABLE)
def test_codec_that_cannot_seek(tmp_path, kind, subtype):
    """The reference cannot read it either: librosa.load asks for all frames, and soundfile needs their number."""
    path = tmp_path / "a.wav"
    soundfile.write(path, speechlike(14_601), 8000, format=kind, subtype=subtype)
    with soundfile.SoundFile(path) as sound:
        assert not sound.seekable()
        num_frames = sound.frames
    expected, _ = librosa.load(path, sr=16_000, duration=num_frames / 8000)
    frames, _ = librosa.load(path, sr=None, duration=num_frames / 8000)
    assert check_audio(path) == AudioCheck(num_frames, 8000) and num_frames == len(frames) >= 14_601
    for source in ways_to(path.read_bytes(), tmp_path).values():
        assert np.array_equal(read_waveform(source), expected)
    for start, end in ((0.0, 0.5), (0.5, 1.25)):
        segment = format_address(str(path), start, end)
        assert check_audio(segment) == AudioCheck(round((end - start) * 8000), 8000)
        assert np.array_equal(read_audio(segment)[0], frames[round(start * 8000) : round(end * 8000)])


def test_skipped_blocks_change_no_later_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("usdm_sft.audio.sound.BLOCK_SAMPLES", 777)
    path = tmp_path / "a.wav"
    soundfile.write(path, speechlike(14_600), 8000, subtype="GSM610")
    frames, _ = librosa.load(path, sr=None, duration=1.5)
    assert np.array_equal(read_audio(format_address(str(path), 1, 1.5))[0], frames[8000:])


def test_cut_in_the_samples_of_a_codec_that_cannot_seek(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, speechlike(14_720), 8000, subtype="GSM610")
    content = path.read_bytes()
    [size] = struct.unpack("<I", content[content.index(b"data") + 4 :][:4])
    path.write_bytes(content[:-65])
    assert check_audio(path).problem == (
        f"is cut short (its header promises {size:,} bytes of samples, {size - 65:,} are there)"
    )


@pytest.mark.slow
def test_corpus_with_a_codec_that_cannot_seek(mini, unit_model, tmp_path):
    """Its rows are those of the decoded samples; nothing stops the run, and nothing is left out."""
    rows = {}
    for name in ("gsm", "decoded"):
        corpus = shutil.copytree(mini / "corpus", tmp_path / name)
        path = corpus / "data" / "8" / "2_1_d8.wav"
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples, rate, subtype="GSM610")
        if name == "decoded":
            with soundfile.SoundFile(path) as sound:
                samples = sound.read(sound.frames, dtype="float32")
            soundfile.write(path, samples, rate, subtype="FLOAT")
        given = options(mini, unit_model, tmp_path, data_dir=str(corpus), output_path=str(tmp_path / f"{name}-out"))
        counts = prepare(**given)
        assert prepare(**given, on_bad_audio="skip") == counts  # up to date: no bad audio was found
        assert counts["splits"]["train"]["pairs_left_out"] == {}
        rows[name] = datasets.load_dataset(str(tmp_path / f"{name}-out"), cache_dir=str(tmp_path / "datasets"))
    for split in ("train", "test"):
        assert rows["gsm"][split][:] == rows["decoded"][split][:]
    assert "d8_1" in rows["gsm"]["train"]["id"][:]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RF64"])
def test_16_bits_read_at_once_are_the_samples_of_libsndfile(tmp_path, kind, channels):
    path = tmp_path / "all.wav"
    values = np.arange(-32_768, 32_768, dtype=np.int16).reshape(-1, channels)
    soundfile.write(path, values, 16_000, subtype="PCM_16", format=kind)
    expected, _ = soundfile.read(path, dtype="float32")
    found, _ = read_audio(path)
    assert found.dtype == np.float32 and np.array_equal(
        found, expected if channels == 1 else np.mean(expected.T, axis=0)
    )
    for channel in range(channels):
        segment = format_address(str(path), 0.01, 0.02, channel)
        assert np.array_equal(read_audio(segment)[0], expected.reshape(-1, channels)[160:320, channel])
