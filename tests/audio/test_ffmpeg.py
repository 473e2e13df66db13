"""Formats that libsndfile does not read: decoded by FFmpeg to the end, and refused where a part is missing."""

import io
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
import soundfile

from tests.audio.test_containers import RATE, encode, noise, ogg, ogg_pages, result, vbr_without_a_tag
from usdm_sft.audio import reading
from usdm_sft.audio.addresses import format_address
from usdm_sft.audio.digests import AudioCheck, audio_digests, check_audio, read_recording
from usdm_sft.audio.ffmpeg import FFmpegFile
from usdm_sft.audio.playable import make_playable
from usdm_sft.audio.reading import AudioError, read_audio
from usdm_sft.audio.sound import open_sound
from usdm_sft.units.tokenizer import audio_seconds

av = pytest.importorskip("av", reason="needs PyAV, which makes the recordings as well")

# File name, FFmpeg's format and codec, the number of samples of 2 s at 24 kHz (48 kHz for Opus): AAC has frames of 1,024, WMA of 2,048
# whose first and last are lost.
LOSSY = [("a.m4a", "ipod", "aac"), ("a.webm", "webm", "libopus"), ("a.wma", "asf", "wmav2"), ("a.aac", "adts", "aac")]
LOSSLESS = [("a.m4a", "ipod", "alac"), ("a.mka", "matroska", "flac"), ("a.oga", "ogg", "flac")]


def mux(samples, form, codec, rate=RATE, options=None, target=None):
    """Encode (num_samples, num_channels) int16, and return the file, where it is not written to `target`."""
    file = io.BytesIO()
    target = file if target is None else target
    samples = samples.reshape(len(samples), -1)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[samples.shape[1]]
    with av.open(target, "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 64_000 * samples.shape[1]
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.reshape(1, -1)), "s16", layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


class Pipe:
    """A file that cannot be completed at its end."""

    def __init__(self):
        self.content = b""

    def write(self, data):
        self.content += bytes(data)
        return len(data)


def integers(seconds=2, channels=1):
    return (noise(seconds, channels=channels) * 32_768).astype(np.int16)


@pytest.mark.parametrize(("name", "form", "codec"), LOSSLESS)
def test_lossless_samples_are_exact(tmp_path, name, form, codec):
    samples = integers(channels=2)
    content = mux(samples, form, codec)
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(io.BytesIO(content))
    assert result(content, tmp_path) == 48_000
    with open_sound(io.BytesIO(content)) as sound:
        assert (sound.format, sound.channels, sound.can_seek, sound.is_patched) == ("FFmpeg", 2, False, False)
    path = tmp_path / name
    path.write_bytes(content)
    for channel in (0, 1):
        segment = format_address(str(path), 0.5, 1.25, channel)
        assert np.array_equal(read_audio(segment)[0], samples[12_000:30_000, channel] / np.float32(32_768))
        assert check_audio(segment) == AudioCheck(18_000, RATE)
    stored = make_playable(str(path))
    assert stored.suffix == ".wav" or stored.suffix == ".flac"
    assert np.array_equal(read_audio(stored.content)[0], read_audio(content)[0])


@pytest.mark.parametrize(
    ("name", "form", "codec", "expected"),
    [(*LOSSY[0], 48_128), (*LOSSY[1], 96_000), (*LOSSY[2], 47_104), (*LOSSY[3], 49_152)],
)
def test_lossy_samples_are_those_that_were_encoded(tmp_path, name, form, codec, expected):
    rate = 48_000 if codec == "libopus" else RATE
    tone = (np.sin(np.arange(2 * rate) * 2 * np.pi * 440 / rate) * 16_384).astype(np.int16)
    content = mux(tone, form, codec, rate)
    assert abs(result(content, tmp_path) - expected) <= (648 if codec == "libopus" else 0)
    samples, found_rate = read_audio(content)
    middle = samples[rate // 2 : rate]
    assert found_rate == rate and abs(np.abs(middle).max() - 0.5) < 0.02
    assert np.abs(np.fft.rfft(middle)).argmax() == 220  # periods in half a second
    stored = make_playable(str(tmp_path / "recording.bin"))
    assert stored.suffix == ".wav" and np.array_equal(read_audio(stored.content)[0], samples)


def test_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    contents = {"MP4 or M4A": mux(integers(), "ipod", "aac"), "AAC": mux(integers(), "adts", "aac")}
    contents["MP3 of variable bit rate without a Xing tag"], _ = vbr_without_a_tag()
    monkeypatch.setitem(sys.modules, "av", None)
    for name, content in contents.items():
        said = (
            f"is {name}, for which PyAV is needed (pip install 'dailytalk-usdm[av]', or write it again as FLAC or WAV)"
        )
        assert result(content, tmp_path) == said
    assert result(encode(noise(1)[:24_000], format="WAV"), tmp_path) == 24_000


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}])
def test_mp4_that_is_cut(tmp_path, options):
    path = tmp_path / "a.m4a"
    mux(integers(), "ipod", "aac", options=options, target=str(path))
    content = path.read_bytes()
    assert result(content, tmp_path) in (48_128, 49_152)
    for size in (len(content) * 6 // 10, len(content) - 1):
        said = result(content[:size], tmp_path)
        assert said.startswith("is cut short (it should have ") and said.endswith(
            f" bytes or more, {size:,} are there)"
        )


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
    assert 47_000 < whole < 50_000 or codec == "libopus"
    for size in (len(content) * 6 // 10, len(content) - 60):
        assert str(result(content[:size], tmp_path)).startswith(("is cut short (", "is damaged ("))


def test_part_of_a_duration_is_refused(tmp_path):
    """The header of Matroska promises 2 s, and a whole cluster is missing."""
    content = mux(integers(), "matroska", "flac", options={"cluster_time_limit": "500"})
    cluster, segment = b"\x1f\x43\xb6\x75", b"\x18\x53\x80\x67"
    places = [place for place in range(len(content)) if content.startswith(cluster, place)]
    assert len(places) == 5
    start = content.index(segment) + 4
    content = content[:start] + b"\x01" + b"\xff" * 7 + content[start + 8 :]  # so that the size of the whole is unknown
    assert result(content[: places[3]], tmp_path).startswith("is cut short (its header promises ")
    missing = content[: places[1]] + content[places[2] :]
    assert result(missing, tmp_path).startswith("has gaps (its time stamps cover 2.00 s, 1.")


@pytest.mark.parametrize(("form", "codec"), [("ipod", "aac"), ("webm", "libopus"), ("asf", "wmav2"), ("adts", "aac")])
def test_junk_between_the_parts_is_refused(tmp_path, form, codec):
    content = mux(integers(), form, codec)
    assert result(content + b"junk" * 16, tmp_path).startswith(("is damaged (", "is cut short ("))


def test_first_bytes_decide_and_not_ffmpeg(tmp_path):
    """FFmpeg takes a playlist for audio, and opens the files that it names."""
    encoded = tmp_path / "secret.aac"
    encoded.write_bytes(mux(integers(), "adts", "aac"))
    for content in (f"#EXTM3U\n#EXTINF:2,\n{encoded}\n", f"ffconcat version 1.0\nfile {encoded.name}\n"):
        said = result(content.encode(), tmp_path)
        assert said == "is not audio that soundfile can read (Format not recognised)"


def test_text_with_the_first_bytes_of_a_format(tmp_path):
    assert result(struct.pack(">I", 1000) + b"ftypM4A " + b"text" * 247, tmp_path).startswith(
        "is not MP4 or M4A that FFmpeg can"
    )
    content = mux(integers(), "adts", "aac")
    assert result(content + b"TAG" + bytes(125), tmp_path) == result(content, tmp_path) == 49_152
    assert result(b"\xff\xf1" + b"\0" * 400, tmp_path) == "is damaged (the part at byte 0 is none of its format)"


def test_several_tracks(tmp_path):
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        for stream in [container.add_stream("flac", rate=RATE, layout="mono") for _ in range(2)]:
            frame = av.AudioFrame.from_ndarray(integers().reshape(1, -1), "s16", "mono")
            frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
            container.mux([*stream.encode(frame), *stream.encode(None)])
    assert result(file.getvalue(), tmp_path) == "has 2 tracks of audio (write the one to use as FLAC or WAV)"


def test_segments_of_a_recording_are_decoded_once(tmp_path, monkeypatch):
    samples = integers(channels=2)
    path = tmp_path / "call.m4a"
    path.write_bytes(mux(samples, "ipod", "alac"))
    addresses = [format_address(str(path), turn / 10, (turn + 1) / 10, turn % 2) for turn in range(20)]
    opened = []

    def open_counted(file):
        opened.append(file)
        return open_sound(file)

    monkeypatch.setattr("usdm_sft.audio.digests.open_sound", open_counted)
    monkeypatch.setattr(reading, "open_sound", open_counted)
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
    contents = [
        (encode(samples, 48_000, format="WAV"), tones),
        (encode(samples, 48_000, format="FLAC"), tones),
        (mux(samples, "ipod", "alac", 48_000), tones),
        (mux(samples, "ipod", "aac", 48_000), tones),
        (mux(samples, "webm", "libopus", 48_000), tones),
        (mux(samples, "ogg", "libopus", 48_000), [300, 800, 500, 1300, 2100, 60]),
    ]
    path = tmp_path / "six"
    for content, expected in contents:
        path.write_bytes(content)
        found = [read_audio(format_address(str(path), 0, 0.9, channel))[0] for channel in range(6)]
        assert [int(np.abs(np.fft.rfft(each, 48_000)).argmax()) for each in found] == expected


# Read by libsndfile in several parts


def test_vbr_mp3_without_a_tag_is_read_to_the_end(tmp_path, monkeypatch):
    content, there = vbr_without_a_tag()
    with soundfile.SoundFile(io.BytesIO(content)) as sound:
        first = sound.read(sound.frames, dtype="float32")
    assert len(first) < 0.9 * there
    assert result(content, tmp_path) == there
    assert np.abs(read_audio(content)[0][: len(first)] - first).max() < 1e-4  # no sample is shifted
    tagged = b"ID3\4\0\0\0\0\0\12" + bytes(10) + content
    assert np.array_equal(read_audio(tagged)[0], read_audio(content)[0])
    assert result(content[:-7], tmp_path) == "is cut short (it ends inside an MPEG frame)"
    monkeypatch.setattr(
        FFmpegFile, "read", lambda self, frames, dtype, read=FFmpegFile.read: read(self, frames, dtype)[:-1]
    )
    assert result(content, tmp_path) == (
        f"has no Xing tag with its length, and {there - 1:,} of {there:,} samples are read (write it again as FLAC or WAV)"
    )


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_chained_ogg_is_read_to_the_end(tmp_path, codec):
    contents = [ogg(codec, 2), ogg(codec, 1, seed=1), ogg(codec, 0.5, seed=2)]
    expected = np.concatenate([read_audio(content)[0] for content in contents])
    chained = b"".join(contents)
    assert result(chained, tmp_path) == len(expected) == 84_000
    assert np.array_equal(read_audio(chained)[0], expected)
    path = tmp_path / "recording.bin"
    assert np.array_equal(read_audio(format_address(str(path), 1.5, 2.5))[0], expected[36_000:60_000])
    assert audio_seconds(str(path)) == 3.5
    stored = make_playable(str(path))
    assert stored.suffix == ".wav" and np.array_equal(read_audio(stored.content)[0], expected)


def test_damaged_chain_of_ogg_streams(tmp_path):
    first, second = ogg("VORBIS", 2), ogg("VORBIS", 2, seed=1)
    pages = ogg_pages(first)
    cut = b"".join(pages[:-1])
    assert result(cut + second, tmp_path) == (
        f"is damaged (the Ogg stream before byte {len(cut):,} is not marked as ended) (write it again as FLAC or WAV)"
    )
    assert result(first + second[:-5], tmp_path) == "is cut short (it ends inside an Ogg page)"
    flipped = bytearray(first + second)
    flipped[-5] ^= 8
    assert "has another checksum than its header says)" in result(bytes(flipped), tmp_path)
    other = encode(noise(2, rate=16_000), 16_000, format="OGG", subtype="VORBIS")
    assert result(first + other, tmp_path) == (
        "holds Ogg streams with several sample rates or numbers of channels (write it again as FLAC or WAV)"
    )


@pytest.mark.parametrize("codec", ["shorten", "wavpack"])
def test_sphere_that_needs_sph2pipe(tmp_path, codec):
    header = (
        "NIST_1A\n   1024\nsample_count -i 16000\nsample_n_bytes -i 2\nchannel_count -i 2\n"
        f"sample_rate -i 8000\nsample_coding -s26 pcm,embedded-{codec}-v2.00\nend_head\n"
    )
    content = header.encode().ljust(1024) + b"ajkg" + bytes(500)
    assert (
        result(content, tmp_path)
        == f"is SPHERE with {codec}, which is not read (convert it with: sph2pipe -f wav IN OUT)"
    )


def test_mistakes_of_ffmpeg_name_the_file(tmp_path):
    content = bytearray(mux(integers(), "ipod", "aac"))
    middle = len(content) // 2
    content[middle - 200 : middle + 200] = bytes(400)
    path = tmp_path / "a.m4a"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=rf"audio file {path} is damaged \(FFmpeg: .*: replace the file"):
        read_audio(path)
