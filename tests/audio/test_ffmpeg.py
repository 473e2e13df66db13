"""Formats that libsndfile does not read: decoded by FFmpeg to the end, and refused where a part is missing."""

import io
import sys
from fractions import Fraction

import numpy as np
import pytest
import soundfile

from tests.audio.test_containers import RATE, encode, noise, result, vbr_without_a_tag
from usdm_sft.audio import reading
from usdm_sft.audio.addresses import format_address
from usdm_sft.audio.digests import AudioCheck, audio_digests, check_audio, read_recording
from usdm_sft.audio.ffmpeg import FFmpegFile
from usdm_sft.audio.playable import make_playable
from usdm_sft.audio.reading import AudioError, read_audio
from usdm_sft.audio.sound import open_sound

av = pytest.importorskip("av", reason="needs PyAV, which makes the recordings as well")


def mux(samples, form, codec, rate=RATE, options=None, target=None, tracks=1):
    """Encode (num_samples, num_channels) int16, and return the file, where it is not written to `target`."""
    file = io.BytesIO()
    samples = samples.reshape(len(samples), -1)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[samples.shape[1]]
    with av.open(target or file, "w", format=form, options=options or {}) as container:
        for stream in [container.add_stream(codec, rate=rate, layout=layout) for _ in range(tracks)]:
            stream.bit_rate = 64_000 * samples.shape[1]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.reshape(1, -1)), "s16", layout)
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            container.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


class Pipe:
    """A file that cannot be completed at its end."""

    content = b""

    def write(self, data):
        self.content += bytes(data)
        return len(data)


def integers(seconds=2, channels=1):
    return (noise(seconds, channels=channels) * 32_768).astype(np.int16)


@pytest.mark.parametrize(("form", "codec"), [("ipod", "alac"), ("matroska", "flac"), ("ogg", "flac")])
def test_lossless_samples_are_exact(tmp_path, form, codec):
    samples = integers(channels=2)
    content = mux(samples, form, codec)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(io.BytesIO(content))
    assert result(content, tmp_path) == 48_000
    path = str(tmp_path / "recording.bin")
    for channel in (0, 1):
        segment = format_address(path, 0.5, 1.25, channel)
        assert np.array_equal(read_audio(segment)[0], samples[12_000:30_000, channel] / np.float32(32_768))
        assert check_audio(segment) == AudioCheck(18_000, RATE)
    stored = make_playable(path)
    assert stored.suffix in (".flac", ".wav") and np.array_equal(read_audio(stored.content)[0], read_audio(content)[0])


@pytest.mark.parametrize(
    ("form", "codec", "rate", "least", "most"),
    [
        ("ipod", "aac", RATE, 47 * 1024, 47 * 1024), ("adts", "aac", RATE, 48 * 1024, 48 * 1024),
        ("asf", "wmav2", RATE, 46 * 1024, 46 * 1024), ("webm", "libopus", 48_000, 96_000, 96_648),
    ],
)  # fmt: skip
def test_lossy_samples_are_those_that_were_encoded(tmp_path, form, codec, rate, least, most):
    tone = (np.sin(np.arange(2 * rate) * 2 * np.pi * 440 / rate) * 16_384).astype(np.int16)
    content = mux(tone, form, codec, rate)
    assert least <= result(content, tmp_path) <= most
    samples, found_rate = read_audio(content)
    middle = samples[rate // 2 : rate]
    assert found_rate == rate and abs(np.abs(middle).max() - 0.5) < 0.02
    assert np.abs(np.fft.rfft(middle)).argmax() == 220  # periods in half a second
    stored = make_playable(str(tmp_path / "recording.bin"))
    assert stored.suffix == ".wav" and np.array_equal(read_audio(stored.content)[0], samples)


def test_vbr_mp3_without_a_tag_is_read_to_the_end(tmp_path, monkeypatch):
    content, there = vbr_without_a_tag()
    with soundfile.SoundFile(io.BytesIO(content)) as sound:
        first = sound.read(sound.frames, dtype="float32")
    assert len(first) < 0.9 * there == 0.9 * result(content, tmp_path)
    assert np.abs(read_audio(content)[0][: len(first)] - first).max() < 1e-4  # no sample is shifted
    tagged = b"ID3\4\0\0\0\0\0\12" + bytes(10) + content
    assert np.array_equal(read_audio(tagged)[0], read_audio(content)[0])
    assert result(content[:-7], tmp_path) == "is cut short (it ends inside an MPEG frame)"
    read = FFmpegFile.read
    monkeypatch.setattr(FFmpegFile, "read", lambda *args, **options: read(*args, **options)[:-1])
    said = f"has no Xing tag with its length, and {there - 1:,} of {there:,} samples are read (write it again as FLAC or WAV)"
    assert result(content, tmp_path) == said


def test_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    contents = {"MP4 or M4A": mux(integers(), "ipod", "aac"), "AAC": mux(integers(), "adts", "aac")}
    contents["MP3 of variable bit rate without a Xing tag"], _ = vbr_without_a_tag()
    monkeypatch.setitem(sys.modules, "av", None)
    for name, content in contents.items():
        remedy = "(pip install 'dailytalk-usdm[av]', or write it again as FLAC or WAV)"
        assert result(content, tmp_path) == f"is {name}, for which PyAV is needed {remedy}"
    assert result(encode(noise(1), format="WAV"), tmp_path) == 24_000


@pytest.mark.parametrize("flags", ["disable_chpl", "faststart", "frag_keyframe+empty_moov"])
def test_mp4_that_is_cut(tmp_path, flags):
    mux(integers(), "ipod", "aac", options={"movflags": flags}, target=str(tmp_path / "a.m4a"))
    content = (tmp_path / "a.m4a").read_bytes()
    assert result(content, tmp_path) in (48_128, 49_152)
    for size in (len(content) * 6 // 10, len(content) - 1):
        said = result(content[:size], tmp_path)
        assert said.startswith("is cut short (it should have ") and said.endswith(f"more, {size:,} are there)")
    if "frag" in flags:
        assert result(content[: content.index(b"moof") - 4], tmp_path) == "holds no samples"


@pytest.mark.parametrize("is_piped", [False, True])
@pytest.mark.parametrize(
    ("form", "codec"), [("webm", "libopus"), ("asf", "wmav2"), ("adts", "aac"), ("matroska", "flac")]
)
def test_file_for_ffmpeg_that_is_cut(tmp_path, form, codec, is_piped):
    pipe = Pipe()
    content = mux(integers(), form, codec, target=pipe if is_piped else None) or pipe.content
    whole = result(content, tmp_path)
    if is_piped and form == "asf":
        assert whole == "has no length in its header (write it again as FLAC or WAV)"
        return
    assert whole > 47_000
    for size in (len(content) * 6 // 10, len(content) - 60):
        assert str(result(content[:size], tmp_path)).startswith("is cut short (it should have ")


def test_part_of_a_duration_is_refused(tmp_path):
    """The header of Matroska promises 2 s, and a whole cluster is missing."""
    content = mux(integers(), "matroska", "flac", options={"cluster_time_limit": "500"})
    places = [place for place in range(len(content)) if content.startswith(b"\x1f\x43\xb6\x75", place)]
    start = content.index(b"\x18\x53\x80\x67") + 4
    content = content[:start] + b"\x01" + b"\xff" * 7 + content[start + 8 :]  # so that the size of the whole is unknown
    assert result(content[: places[3]], tmp_path).startswith("is cut short (its header promises ")
    missing = content[: places[1]] + content[places[2] :]
    assert result(missing, tmp_path).startswith("has gaps (its time stamps cover 2.00 s, 1.")


@pytest.mark.parametrize(("form", "codec"), [("ipod", "aac"), ("webm", "libopus"), ("asf", "wmav2"), ("adts", "aac")])
def test_damage_is_refused(tmp_path, form, codec):
    content = mux(integers(), form, codec)
    said = str(result(content + b"junk" * 16, tmp_path))
    assert said.startswith(("is damaged (the part at byte ", "is cut short (it should have "))
    path = tmp_path / "a.m4a"
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(400) + content[middle + 400 :])
    if form == "ipod":
        with pytest.raises(AudioError, match=rf"audio file {path} is damaged \(FFmpeg: .*: replace the file"):
            read_audio(path)


def test_first_bytes_decide_and_not_ffmpeg(tmp_path):
    """FFmpeg takes a playlist for audio, and opens the files that it names."""
    encoded = tmp_path / "secret.aac"
    encoded.write_bytes(mux(integers(), "adts", "aac"))
    for content in (f"#EXTM3U\n#EXTINF:2,\n{encoded}\n", f"ffconcat version 1.0\nfile {encoded.name}\n"):
        assert result(content.encode(), tmp_path) == "is not audio that soundfile can read (Format not recognised)"
    assert result(b"\0\0\3\xe8ftypM4A " + b"text" * 247, tmp_path).startswith(
        "is not MP4 or M4A that FFmpeg can read ("
    )
    assert result(b"\xff\xf1" + bytes(400), tmp_path) == "is damaged (the part at byte 0 is none of its format)"
    assert result(encoded.read_bytes() + b"TAG" + bytes(125), tmp_path) == 49_152


def test_tracks_and_rates(tmp_path):
    two = mux(integers(), "matroska", "flac", tracks=2)
    assert result(two, tmp_path) == "has 2 tracks of audio (write the one to use as FLAC or WAV)"
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=5, width=16, height=16)
        container.mux([*stream.encode(av.VideoFrame(16, 16, "yuv420p")), *stream.encode(None)])
    assert result(file.getvalue(), tmp_path) == "has 0 tracks of audio"
    rates = b"".join(mux(integers(), "adts", "aac", rate) for rate in (RATE, 16_000))
    said = "changes its sample rate or its number of channels (write it again as FLAC or WAV)"
    assert result(rates, tmp_path) == said


def test_segments_of_a_recording_are_decoded_once(tmp_path, monkeypatch):
    samples = integers(channels=2)
    path = tmp_path / "call.m4a"
    path.write_bytes(mux(samples, "ipod", "alac"))
    addresses = [format_address(str(path), turn / 10, (turn + 1) / 10, turn % 2) for turn in range(20)]
    opened = []
    for module in ("usdm_sft.audio.digests", reading.__name__):
        monkeypatch.setattr(f"{module}.open_sound", lambda file: opened.append(file) or open_sound(file))
    digests = audio_digests(addresses, tmp_path / "cache")
    assert [digest.num_samples for digest in digests.values()] == [1600] * 20 and len(opened) == 1
    contents = {str(path): read_recording(str(path))[0]}
    for turn, address in enumerate(addresses):
        expected = samples[2400 * turn : 2400 * (turn + 1), turn % 2] / np.float32(32_768)
        assert np.array_equal(read_audio(address, contents)[0], expected)
    assert len(opened) == 2


def test_six_channels_have_the_order_of_wav(tmp_path):
    """Left, right, centre, bass, back left, back right; libsndfile gives those of Ogg in the order of Vorbis."""
    seconds = np.arange(48_000) / 48_000
    tones = [300, 500, 800, 60, 1300, 2100]
    samples = (np.stack([np.sin(2 * np.pi * tone * seconds) for tone in tones], 1) * 8000).astype(np.int16)
    contents = [(encode(samples, 48_000, format=form), tones) for form in ("WAV", "FLAC")]
    for form, codec in (("ipod", "alac"), ("ipod", "aac"), ("webm", "libopus")):
        contents.append((mux(samples, form, codec, 48_000), tones))
    contents.append((mux(samples, "ogg", "libopus", 48_000), [300, 800, 500, 1300, 2100, 60]))
    path = tmp_path / "six"
    for content, expected in contents:
        path.write_bytes(content)
        found = [read_audio(format_address(str(path), 0, 0.5, channel))[0] for channel in range(6)]
        assert [int(np.abs(np.fft.rfft(each, 48_000)).argmax()) for each in found] == expected
