"""Files that end early, hold more than their header tells, or do not tell their length: refused, or read to the end."""

import io
import shutil
import struct
import subprocess
import tracemalloc

import numpy as np
import pytest
import soundfile

from usdm_sft.audio.addresses import format_address
from usdm_sft.audio.digests import AudioCheck, audio_digests, check_audio, read_recording
from usdm_sft.audio.playable import make_playable
from usdm_sft.audio.reading import AudioError, SharedBytes, read_audio
from usdm_sft.audio.sound import BLOCK_SAMPLES, Sound
from usdm_sft.units.stream import audio_seconds

RATE = 24_000
MP3 = {"format": "MP3", "subtype": "MPEG_LAYER_III"}


def noise(seconds=3.0, *, rate=RATE, channels=1, seed=0, scale=0.5):
    shape = (round(seconds * rate), channels) if channels > 1 else round(seconds * rate)
    return np.random.default_rng(seed).uniform(-scale, scale, shape)


def encode(samples, rate=RATE, **options):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options)
    return file.getvalue()


def decode(content):
    """All samples in one reading, as librosa reads them."""
    with soundfile.SoundFile(io.BytesIO(content)) as sound:
        return sound.read(sound.frames, dtype="float32")


def mpeg_frames(content):
    """The frames of an MP3 file without a tag before or after them, by the distance between headers of the same kind."""
    starts, start = [0], 0
    while (start := content.find(content[:2], start + 4)) > 0:
        if content[start + 3] == content[3] or content[start + 3] >> 6 == content[3] >> 6:
            starts.append(start)
    return [content[start:stop] for start, stop in zip(starts, [*starts[1:], len(content)], strict=True)]


def ogg_pages(content):
    pages, start = [], 0
    while start < len(content):
        num = content[start + 26]
        stop = start + 27 + num + sum(content[start + 27 : start + 27 + num])
        pages.append(content[start:stop])
        start = stop
    return pages


def cbr(seconds=3.0, seed=0):
    return encode(noise(seconds, seed=seed), **MP3, bitrate_mode="CONSTANT", compression_level=0.5)


def result(content, folder):
    """The number of samples that are read, or what is wrong; the check and the reading must agree."""
    path = folder / "recording.bin"
    path.write_bytes(content)
    check = check_audio(path)
    try:
        samples, rate = read_audio(content)
    except AudioError as error:
        assert check.problem is not None and check.problem in str(error)
        return check.problem
    assert check == AudioCheck(len(samples), rate)
    return len(samples)


# MP3


def vbr_without_a_tag():
    """libsndfile estimates the size of all frames from some of them."""
    samples = np.concatenate([noise(3, scale=0.9), noise(3, scale=1e-4)])
    tag, *frames = mpeg_frames(encode(samples, **MP3, bitrate_mode="VARIABLE"))
    assert b"Xing" in tag or b"Info" in tag
    return b"".join(frames), 576 * len(frames)


def test_mp3_one_after_the_other(tmp_path):
    content = cbr()
    assert result(content, tmp_path) == 72_000
    num_frames = len(mpeg_frames(content)) - 1
    assert result(content * 2, tmp_path) == (
        f"holds {2 * num_frames + 1:,} MPEG frames, of which its header counts only {num_frames:,} "
        "(write it again as FLAC or WAV)"
    )
    plain = b"".join(mpeg_frames(content)[1:])
    assert result(plain * 2, tmp_path) == 2 * 576 * num_frames  # without tags, both are read


@pytest.mark.parametrize("tagged", [True, False])
def test_mp3_that_is_cut_or_has_a_hole(tmp_path, tagged):
    content = cbr()
    frames = mpeg_frames(content)
    if not tagged:
        content = b"".join(frames[1:])
    cut = (
        "is cut short (its header promises 72,000 samples, "
        if tagged
        else "is cut short (it ends inside an MPEG frame)"
    )
    for size in (len(content) // 2 + 5, len(content) - 1, len(content) - len(frames[-1]) + 2):
        assert result(content[:size], tmp_path).startswith(cut)
    middle = len(content) // 2
    for missing in (1, 100, 5000):
        assert result(content[:middle] + content[middle + missing :], tmp_path).startswith(
            "is damaged (there is no MPEG"
        )
    if tagged:
        assert result(b"".join(frames[:-1]), tmp_path).startswith(cut)  # at the end of a frame


def id3v1():
    return b"TAG" + b"a" * 125


def ape(size=500):
    footer = b"APETAGEX" + struct.pack("<III", 2000, size + 32, 1)
    return footer + struct.pack("<I", 0xA0000000) + bytes(8) + b"\xff\xfb" * (size // 2) + footer + bytes(12)


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize(
    "tail",
    [id3v1(), ape(), ape() + id3v1(), b"LYRICSBEGININD0000200LYRICS200" + id3v1(), b"\n", b"junk" * 30],
    ids=["ID3v1", "APE", "APE and ID3v1", "Lyrics3", "newline", "text"],
)
def test_what_follows_mp3_frames_changes_no_sample(tmp_path, tail, tagged):
    content = cbr() if tagged else b"".join(mpeg_frames(cbr())[1:])
    expected, _ = read_audio(content)
    assert result(content + tail, tmp_path) == len(expected)
    assert np.array_equal(read_audio(content + tail)[0], expected)


def test_xing_tag_that_counts_its_own_frame(tmp_path):
    content = bytearray(cbr())
    place = max(content.find(b"Info"), content.find(b"Xing")) + 8
    [count] = struct.unpack(">I", content[place : place + 4])
    assert count == len(mpeg_frames(bytes(content))) - 1
    content[place : place + 4] = struct.pack(">I", count + 1)
    assert 72_000 <= result(bytes(content), tmp_path) <= 72_000 + 576
    content[place : place + 4] = struct.pack(">I", count + 2)
    assert result(bytes(content), tmp_path).startswith("is cut short (its header promises ")


def test_mp3_inside_wav(tmp_path):
    frames = b"".join(mpeg_frames(cbr())[1:])
    expected, _ = read_audio(frames)
    layout = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 8000, 1, 0, 12, 1, 2, 192, 1, 1393)
    content = b"RIFF" + struct.pack("<I", len(frames) + 50) + b"WAVEfmt " + struct.pack("<I", len(layout)) + layout
    content += b"data" + struct.pack("<I", len(frames)) + frames
    assert result(content, tmp_path) == len(expected)
    assert np.array_equal(read_audio(content)[0], expected)
    assert result(content[:-2000], tmp_path).startswith("is cut short (its header promises ")


# Ogg


def ogg(codec, seconds=6.0, seed=0):
    return encode(noise(seconds, seed=seed), format="OGG", subtype=codec)


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_damaged_ogg_is_refused(tmp_path, codec):
    content = ogg(codec)
    pages = ogg_pages(content)
    assert result(content, tmp_path) == 144_000 and len(pages) > 5
    lost = b"".join(pages[:4] + pages[5:])
    assert result(lost, tmp_path) == f"is damaged (Ogg pages are missing before byte {len(b''.join(pages[:4])):,})"
    for place in (len(b"".join(pages[:4])) + 300, len(content) - 5):
        flipped = bytearray(content)
        flipped[place] ^= 8
        assert "has another checksum than its header says)" in result(bytes(flipped), tmp_path)
    assert result(content[:-5], tmp_path) == "is cut short (it ends inside an Ogg page)"
    assert result(b"".join(pages[:-1]), tmp_path).startswith(
        "is cut short (its last Ogg page is not marked as the end)"
    )
    assert result(content + bytes(100), tmp_path) == 144_000


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_chained_ogg_is_read_to_the_end(tmp_path, codec):
    contents = [ogg(codec, 2), ogg(codec, 1, seed=1), ogg(codec, 0.5, seed=2)]
    expected = np.concatenate([read_audio(content)[0] for content in contents])
    assert result(b"".join(contents), tmp_path) == len(expected) == 84_000
    path = tmp_path / "recording.bin"
    assert np.array_equal(read_audio(path)[0], expected)
    assert np.array_equal(read_audio(format_address(str(path), 1.5, 2.5))[0], expected[36_000:60_000])
    assert audio_seconds(str(path)) == 3.5
    stored = make_playable(str(path))
    assert stored.suffix == ".wav" and np.array_equal(read_audio(stored.content)[0], expected)


def test_damaged_chain_of_ogg_streams(tmp_path):
    first, second = ogg("VORBIS", 2), ogg("VORBIS", 2, seed=1)
    cut = b"".join(ogg_pages(first)[:-1])
    again = "(write it again as FLAC or WAV)"
    said = f"is damaged (the Ogg stream before byte {len(cut):,} is not marked as ended) {again}"
    assert result(cut + second, tmp_path) == said
    assert result(first + second[:-5], tmp_path) == "is cut short (it ends inside an Ogg page)"
    flipped = first + second[:-5] + bytes([second[-5] ^ 8]) + second[-4:]
    assert "has another checksum than its header says)" in result(flipped, tmp_path)
    other = encode(noise(2, rate=16_000), 16_000, format="OGG", subtype="VORBIS")
    said = f"holds Ogg streams with several sample rates or numbers of channels {again}"
    assert result(first + other, tmp_path) == said


# FLAC


def with_flac_total(content, total):
    place = content.index(b"fLaC") + 21
    head = bytes([content[place] & 0xF0 | total >> 32])
    return content[:place] + head + struct.pack(">I", total & 0xFFFFFFFF) + content[place + 5 :]


@pytest.mark.parametrize("tag", [b"", b"ID3\4\0\0\0\0\0\12" + bytes(10)], ids=["plain", "ID3v2"])
def test_flac_of_a_pipe_is_read_to_the_end(tmp_path, tag, monkeypatch):
    monkeypatch.setattr("usdm_sft.audio.sound.BLOCK_SAMPLES", 1000)
    content = encode(noise(), format="FLAC")
    unknown = tag + with_flac_total(content, 0)
    assert result(unknown, tmp_path) == 72_000
    expected, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    assert np.array_equal(read_audio(unknown)[0], expected)
    assert result(unknown[:-2000], tmp_path).startswith("is not audio that soundfile can read (")
    path = tmp_path / "a.flac"
    path.write_bytes(unknown)
    assert np.array_equal(read_audio(format_address(str(path), 1, 2))[0], expected[RATE : 2 * RATE])
    assert audio_seconds(str(path)) == np.inf  # read alone, whatever its length
    assert soundfile.info(io.BytesIO(make_playable(str(path)).content)).frames == 72_000


@pytest.mark.parametrize("total", [71_999, 20_000])
def test_flac_with_more_samples_than_its_header_tells(tmp_path, total):
    content = with_flac_total(encode(noise(), format="FLAC"), total)
    assert result(content, tmp_path) == (
        f"holds 72,000 samples, of which its header counts only {total:,} (write it again as FLAC or WAV)"
    )


def test_flac_with_fewer_samples_than_its_header_tells(tmp_path):
    content = with_flac_total(encode(noise(), format="FLAC"), 72_001)
    assert result(content, tmp_path) == "is cut short (its header promises 72,001 samples, 72,000 are there)"


# Containers whose header holds the number of bytes

CONTAINERS = [
    ("WAV", "PCM_16", {}), ("WAV", "PCM_24", {}), ("WAV", "FLOAT", {}), ("WAV", "ULAW", {}), ("WAV", "PCM_16", {"endian": "BIG"}),
    ("WAVEX", "PCM_16", {}), ("RF64", "PCM_16", {}), ("W64", "PCM_16", {}), ("AIFF", "PCM_16", {}), ("AIFF", "FLOAT", {}),
    ("AIFF", "PCM_16", {"endian": "LITTLE"}), ("AU", "PCM_16", {}), ("AU", "PCM_16", {"endian": "LITTLE"}), ("NIST", "PCM_16", {}),
    ("NIST", "ULAW", {}), ("CAF", "PCM_16", {}), ("SVX", "PCM_16", {}),
]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("kind", "codec", "options"), CONTAINERS)
def test_container_that_is_cut(tmp_path, kind, codec, options, channels):
    if (kind, channels) == ("SVX", 2):
        pytest.skip("8SVX has one channel")
    content = encode(noise(1, channels=channels), format=kind, subtype=codec, **options)
    assert result(content, tmp_path) == RATE
    for size in (len(content) * 6 // 10, len(content) - 2 * channels * 4 - 1):
        said = result(content[:size], tmp_path)
        assert said.startswith("is cut short (its header promises ") or (kind == "CAF" and "file is malformed" in said)
    assert result(content * 2, tmp_path).startswith("holds several files one after the other, of which only the first")


def test_segments_before_the_missing_end_are_good(tmp_path):
    samples = noise(2)
    for kind in ("WAV", "AIFF", "AU"):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(encode(samples, format=kind, subtype="PCM_16")[:-18])
        expected = soundfile.read(path, dtype="float32")[0]
        addresses = [format_address(str(path), *ends) for ends in ((0, 1), (1, 1.999), (1, 1.9998), (1.5, 2))]
        found = audio_digests([*addresses, str(path)], tmp_path / "cache")
        said = "is cut short (its header promises 96,000 bytes of samples, 95,982 are there)"
        assert [found[each].problem for each in (*addresses, str(path))] == [None, None, said, said, said]
        assert np.array_equal(read_audio(addresses[1])[0], expected[RATE : round(1.999 * RATE)])
        for bad in addresses[2:]:
            with pytest.raises(AudioError, match="is cut short"):
                read_audio(bad)


@pytest.mark.parametrize("codec", ["shorten", "wavpack"])
def test_sphere_that_needs_sph2pipe(tmp_path, codec):
    header = (
        f"NIST_1A\n   1024\nsample_count -i 16000\nsample_n_bytes -i 2\nsample_coding -s26 pcm,embedded-{codec}-v2.00\n"
    )
    content = header.encode().ljust(1024) + b"ajkg" + bytes(500)
    said = f"is SPHERE with {codec}, which is not read (convert it with: sph2pipe -f wav IN OUT)"
    assert result(content, tmp_path) == said


def wav(size, *, there=48_000, channels=1, bits=16):
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", 1, channels, RATE, RATE * block, block, bits)
    head = b"RIFF" + struct.pack("<I", min(size + 36, 0xFFFFFFFF)) + b"WAVEfmt " + struct.pack("<I", 16) + fmt
    return head + b"data" + struct.pack("<I", size) + np.random.default_rng(0).bytes(there)


@pytest.mark.parametrize(
    ("size", "channels", "bits"),
    [
        (0x7FFFF000, 1, 16), (0x7FFFF000 // 3 * 3, 1, 24), (0x7FFFF000 // 6 * 6, 3, 16), (0x7FFFF000 // 12 * 12, 6, 16),
        (0x7FFFFF00, 1, 16), (0x80000000, 1, 16), (0xFFFFFFFF, 1, 16), (0xFFFFFFFF - 36, 1, 16), (0xFFFFFF9B, 1, 16),
        (0x7FFFFFFF, 2, 16), (0x7FFF0000, 1, 16), (0, 1, 16), (0, 2, 24),
    ],
)  # fmt: skip
def test_size_that_stands_for_an_unknown_one(tmp_path, size, channels, bits):
    """By sox, arecord, ffmpeg, node-wav, GStreamer and mpg123, which write to a pipe."""
    content = wav(size, channels=channels, bits=bits)
    assert result(content, tmp_path) == 48_000 // (channels * bits // 8)
    assert np.array_equal(read_audio(content)[0], read_audio(wav(48_000, channels=channels, bits=bits))[0])


@pytest.mark.parametrize("size", [3_000_000_000, 0x7FFFF000 + 2000, 0x7FFFF000 - 2000, 0xFFFFF000, 4_000_000_000])
def test_large_wav_that_is_cut(tmp_path, size):
    assert (
        result(wav(size), tmp_path) == f"is cut short (its header promises {size:,} bytes of samples, 48,000 are there)"
    )


def test_wav_of_size_0(tmp_path):
    assert result(wav(0, there=0), tmp_path) == "holds no samples"
    assert result(wav(0, there=0) + b"LIST" + struct.pack("<I", 4) + b"INFO", tmp_path) == "holds no samples"
    silence = wav(0, there=0) + bytes(48_000)
    assert result(silence, tmp_path) == 24_000
    recording = make_playable(str(tmp_path / "recording.bin"))
    assert soundfile.info(io.BytesIO(recording.content)).frames == 24_000  # also for programs that believe the header


def test_wav_larger_than_its_header_can_tell(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav(1 << 20, there=0))
    with open(path, "r+b") as file:
        file.truncate((1 << 32) + (1 << 20) + 44)  # sparse
    assert check_audio(path).problem.startswith("holds 4,296,015,872 bytes of samples, more than its header can count")


def test_header_that_lies_ends_no_run(tmp_path):
    """Sizes beyond the file, or beyond what a file can have."""
    for kind, codec, _ in CONTAINERS:
        content = encode(noise(0.1), format=kind, subtype=codec)
        for start in range(0, 60, 2):
            path = tmp_path / "a.bin"
            path.write_bytes(content[:start] + b"\xff" * 8 + content[start + 8 :])
            check = check_audio(path)
            assert check.problem is not None or check.frames > 0


# Segments of compressed audio

COMPRESSED = [("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16"), ("WAV", "IMA_ADPCM")]


@pytest.mark.parametrize(("kind", "codec"), COMPRESSED)
def test_segment_is_a_part_of_the_whole(tmp_path, kind, codec, monkeypatch):
    monkeypatch.setattr("usdm_sft.audio.sound.BLOCK_SAMPLES", 7777)
    path = tmp_path / "call"
    options = {"bitrate_mode": "VARIABLE"} if kind == "MP3" else {}
    path.write_bytes(encode(noise(20, channels=2), format=kind, subtype=codec, **options))
    whole = decode(path.read_bytes())
    shared = {str(path): read_recording(str(path))[0]}
    for start in np.random.default_rng(0).uniform(0, 19, 40).round(3):
        address = format_address(str(path), start, start + 0.7, 1)
        expected = whole[round(start * RATE) : round((start + 0.7) * RATE), 1]
        assert np.array_equal(read_audio(address)[0], expected)
        assert np.array_equal(read_audio(address, shared)[0], expected)


@pytest.fixture
def decoded(monkeypatch):
    """How many frames were decoded in all."""
    counts, blocks = [0], Sound._blocks

    def counted(sound):
        for block in blocks(sound):
            counts[0] += len(block)
            yield block

    monkeypatch.setattr(Sound, "_blocks", counted)
    return counts


def test_compressed_recording_is_decoded_once_for_its_segments(tmp_path, decoded, monkeypatch):
    path = tmp_path / "call.mp3"
    path.write_bytes(cbr(4))
    addresses = [format_address(str(path), start, start + 0.1) for start in np.arange(39) / 10]
    found = audio_digests(addresses, tmp_path / "cache")
    assert not any(digest.problem for digest in found.values()) and decoded == [4 * RATE]  # in the first pass
    content = SharedBytes(path.read_bytes())
    for address in addresses:
        read_audio(address, {str(path): content})
    assert decoded == [8 * RATE]  # for the units
    monkeypatch.setattr("usdm_sft.audio.reading.MAX_DECODED_BYTES", 4 * 4 * RATE - 1)
    content = SharedBytes(path.read_bytes())
    for address in addresses[:2]:
        read_audio(address, {str(path): content})
    assert decoded == [16 * RATE] and content.decoded is None  # too long to keep


def test_blocks_are_the_samples_of_one_reading(tmp_path):
    """soundfile seeks after each reading, and then libsndfile decodes other samples."""
    seconds = BLOCK_SAMPLES / RATE + 1
    content = encode(noise(seconds), **MP3, bitrate_mode="VARIABLE")
    assert np.array_equal(read_audio(content)[0], decode(content))


def test_segment_without_the_sample_that_is_not_finite(tmp_path):
    samples = noise(2).astype(np.float32)
    samples[RATE] = np.nan
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    addresses = [format_address(str(path), start, start + 0.5) for start in (0.25, 0.75, 1.25)]
    found = audio_digests(addresses, tmp_path / "cache")
    assert [each.problem for each in found.values()] == [None, "holds NaN or infinite samples", None]


# Programs


@pytest.mark.parametrize(
    "command",
    [
        "lame --quiet -V4 {} -", "lame --quiet -b 64 {} -", "lame --quiet -b 64 -t {} -", "lame --quiet --abr 48 --tt x {} -",
        "lame --quiet --freeformat -b 160 {} -", "ffmpeg -loglevel error -i {} -f mp3 -", "ffmpeg -loglevel error -i {} -f mp2 -",
        "ffmpeg -loglevel error -i {} -c:a libmp3lame -f wav -", "ffmpeg -loglevel error -i {} -f wav -",
        "ffmpeg -loglevel error -i {} -f flac -", "ffmpeg -loglevel error -i {} -f aiff -", "ffmpeg -loglevel error -i {} -f au -",
        "ffmpeg -loglevel error -i {} -f w64 -", "ffmpeg -loglevel error -i {} -rf64 always -f wav -",
        "ffmpeg -loglevel error -i {} -c:a libopus -f ogg -", "ffmpeg -loglevel error -i {} -c:a libvorbis -f ogg -",
        "sox {} -t wav -", "sox {} -b 24 -t wav -", "sox {} -c 3 -t wav -", "sox {} -t aiff -", "sox {} -t aifc -", "sox {} -t au -",
        "sox {} -t sph -", "oggenc -Q -o - {}", "opusenc --quiet {} -", "flac --totally-silent -c {}",
    ],
)  # fmt: skip
def test_file_that_a_program_writes_to_a_pipe(tmp_path, command):
    """All of it is read, or the file is refused."""
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not installed")
    rate = 16_000
    soundfile.write(tmp_path / "a.wav", noise(3, rate=rate, scale=0.1), rate)
    done = subprocess.run(command.format(tmp_path / "a.wav").split(), stdout=subprocess.PIPE, check=True)
    found = result(done.stdout, tmp_path)
    assert 48_000 <= found <= 48_000 + 3 * 1152  # MP3 without a tag has the encoder's delay at both ends


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s.wav", 47_453),
        ("r1.mp3", 48_960),
        ("r1b.mp3", 48_960),
        ("r2.mp3", "holds 171 MPEG frames, of which its header counts only 85"),
        ("r2.ogg", 94_906),
        ("r3.mp3", "is cut short (its header promises 47,453 samples, "),
        ("r4.flac", 47_453),
        ("r5.aiff", "is cut short (its header promises 94,906 bytes of samples, "),
        ("r5.au", "is cut short (its header promises 94,906 bytes of samples, "),
        ("r5.w64", "is cut short (its header promises 94,906 bytes of samples, "),
        ("r5.sph", "is cut short (its header promises 94,906 bytes of samples, "),
        ("r5.wav", "is cut short (its header promises 94,906 bytes of samples, "),
        ("r7.wav", 34_433),
        ("r7b.wav", 34_433),
    ],
)
def test_faults(shared, tmp_path, name, expected):
    found = result((shared / "faults" / name).read_bytes(), tmp_path)
    print(f"{name}: {found}")
    assert found == expected if isinstance(expected, int) else found.startswith(expected)


def test_segment_of_a_long_recording_is_read_without_a_copy_of_it(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros((5_000_000, 2), np.int16), 16_000)
    contents = {str(path): read_recording(str(path))[0]}
    tracemalloc.start()
    samples, _ = read_audio(f"{path}#t=1,2&channel=1", contents)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(samples) == 16_000 and peak < 2_000_000  # the recording has 20 MB
