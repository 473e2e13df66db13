import contextlib
import io
import os
import re
import shutil
import time
import zipfile
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import soundfile

from usdm_sft.audio import addresses, digests
from usdm_sft.audio.addresses import (
    AddressError,
    Segment,
    format_address,
    join_addresses,
    list_members,
    parse_address,
    zip_address,
)
from usdm_sft.audio.digests import audio_digests, check_audio, read_file, read_unchanged
from usdm_sft.audio.playable import make_playable
from usdm_sft.audio.reading import AudioError, read_audio, read_waveform
from usdm_sft.utils.once import once_per_key


@pytest.fixture
def call(tmp_path):
    """Two seconds of stereo at 8 kHz: each sample says where it is."""
    samples = np.stack([np.arange(16_000), -np.arange(16_000)], axis=1).astype(np.int16)
    path = tmp_path / "call.wav"
    soundfile.write(path, samples, 8000, subtype="PCM_16")
    return str(path)


def test_addresses_are_read_as_they_are_written(tmp_path):
    for segment in (
        Segment("a.wav"),
        Segment("a.wav", 1.5, 2.25),
        Segment("a.wav", None, None, 1),
        Segment("a b#.wav", 0, 3, 0),
    ):
        assert parse_address(format_address(*segment)) == [segment]
    assert format_address("a.wav", 1.0, 12.345678, 1) == "a.wav#t=1,12.345678&channel=1"
    assert parse_address("a.wav#t=1,2\nb.wav") == [Segment("a.wav", 1, 2), Segment("b.wav")]
    assert parse_address("a.wav#t=x,2") == [Segment("a.wav#t=x,2")]
    strange = tmp_path / "b.wav#t=1,2"
    strange.touch()
    assert parse_address(strange) == [Segment(str(strange))]  # a file of that very name


def test_only_a_segment_is_looked_up_on_disk():
    asked = []
    parse_address("a.wav\nzip://a.wav::b.zip\nb#.wav", lambda name: asked.append(name))
    assert asked == []
    parse_address("a.wav#t=1,2\nb.wav\nc.wav#channel=1", lambda name: asked.append(name))
    assert asked == ["a.wav#t=1,2", "c.wav#channel=1"]


def test_namesake_that_appears_during_the_run(call, tmp_path):
    """The bytes of the digest are used, whatever the address means by now."""
    cut, later = format_address(call, 0.5, 1), format_address(call, 1, 2)
    shutil.copyfile(call, later)
    found = audio_digests([cut, later], tmp_path / "cache")
    assert (found[cut].seconds, found[later].seconds) == (0.5, 2)
    expected = read_waveform(cut)
    soundfile.write(cut, np.zeros(8000), 8000, format="WAV")
    contents = read_unchanged(cut, found[cut].sha256, read_file)
    assert list(contents) == [call] and np.array_equal(read_waveform(cut, contents), expected)
    contents = read_unchanged(later, found[later].sha256, read_file)
    assert list(contents) == [later] and len(read_waveform(later, contents)) == 32_000
    assert make_playable(later, contents).content == Path(call).read_bytes()
    os.unlink(later)
    with pytest.raises(AudioError, match="was changed during the run: let nothing write to it"):
        read_unchanged(later, found[later].sha256, read_file)


@pytest.mark.parametrize(("start", "end"), [(0.5, 1.25), (0, 2), (1.0001, 1.9)])
@pytest.mark.parametrize("channel", [0, 1, None])
def test_segment_has_the_samples_between_start_and_end(call, start, end, channel):
    samples, rate = read_audio(format_address(call, start, end, channel))
    sign = {0: 1, 1: -1, None: 0}[channel]
    assert rate == 8000
    assert (samples * 32768).round().tolist() == [sign * i for i in range(round(start * 8000), round(end * 8000))]
    assert check_audio(format_address(call, start, end, channel))[:2] == (len(samples), 8000)


def test_several_recordings_in_turn(call, tmp_path):
    first, second = format_address(call, 0, 0.5, 0), format_address(call, 1.5, 2, 1)
    samples, _ = read_audio(f"{first}\n{second}")
    assert samples.tolist() == [*read_audio(first)[0].tolist(), *read_audio(second)[0].tolist()]
    soundfile.write(tmp_path / "other.wav", np.zeros(16_000), 16_000)
    with pytest.raises(AudioError, match="has several sample rates"):
        read_audio(f"{first}\n{tmp_path / 'other.wav'}")
    assert check_audio(f"{first}\n{tmp_path / 'other.wav'}").problem == "has several sample rates (8000, 16000 Hz)"


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["a#t=1,2&channel=0", "a#t=2.5,3&channel=0"], "a#t=1,3&channel=0"),  # with the pause between
        (["a#t=1,2&channel=0", "a#t=2.5,3&channel=1"], "a#t=1,2&channel=0\na#t=2.5,3&channel=1"),
        (["a#t=1,2&channel=0", "b#t=2.5,3&channel=0"], "a#t=1,2&channel=0\nb#t=2.5,3&channel=0"),
        (["a#t=1,2&channel=0", "a#t=0,1&channel=0"], "a#t=1,2&channel=0\na#t=0,1&channel=0"),
        (["a#t=1,2&channel=0", "a"], "a#t=1,2&channel=0\na"),
        (["a#t=1,2", "a#t=3,4", "a#t=5,6"], "a#t=1,6"),
        (["a#t=1,5", "a#t=2,3"], "a#t=1,5"),  # contained
        (["a#t=2,3", "a#t=1,5"], "a#t=1,5"),
        (["a#t=1,3", "a#t=2,5"], "a#t=1,5"),
        (["a#t=2,5", "a#t=1,3"], "a#t=1,5"),
        (["a#t=1,3", "a#t=1,3"], "a#t=1,3"),  # identical
        (["a#t=1,3", "a#t=3,5"], "a#t=1,5"),  # touching
        (["a#t=3,5", "a#t=1,3"], "a#t=3,5\na#t=1,3"),
        (["a#t=1,3&channel=1", "a#t=2,5&channel=1"], "a#t=1,5&channel=1"),
        (["a#t=1,3&channel=0", "a#t=2,5&channel=1"], "a#t=1,3&channel=0\na#t=2,5&channel=1"),
        (["a", "a"], "a"),
        (["a", "a#t=1,3"], "a"),
        (["a#channel=1", "a#t=1,3&channel=1", "a#channel=1"], "a#channel=1"),
        (["a", "b", "a"], "a\nb"),
        (["a#t=1,3", "b#t=1,3", "a#t=2,5"], "a#t=1,5\nb#t=1,3"),
        (["a#t=3,4", "a#t=0,1", "a#t=5,6"], "a#t=0,6"),
        (["a#t=1,5", "a#t=2,3", "a#t=4,6"], "a#t=1,6"),
    ],
)
def test_joined_segments_play_no_sample_twice(turns, expected):
    assert reduce(join_addresses, turns) == expected


@pytest.mark.parametrize(
    ("fragment", "problem"),
    [
        ("#t=1,3", "is to be cut up to 3 s, but has 2 s"),
        ("#t=1,1", "is to be cut from 1 to 1 s, which is nothing"),
        ("#channel=2", "has no channel 2 (its channels are 0 to 1)"),
        ("#t=1,1.01", "has 160 samples at 16 kHz, fewer than the 400"),
    ],
)
def test_segment_outside_its_recording_is_reported(call, fragment, problem):
    assert check_audio(call + fragment).problem.startswith(problem)


def test_segment_may_end_slightly_after_its_recording(call):
    assert check_audio(f"{call}#t=1,2.04")[:2] == (8000, 8000)
    assert len(read_audio(f"{call}#t=1,2.04")[0]) == 8000


def test_unchanged_segments_share_one_reading(call, tmp_path):
    addresses = [call, format_address(call, 0.1, 0.6, 1), f"{format_address(call, 1, 2)}\n{format_address(call, 0, 1)}"]
    known = audio_digests(addresses, tmp_path / "cache")
    shared_reads = []

    def read_shared(file):
        shared_reads.append(file)
        return read_file(file)

    for address in addresses:
        contents = read_unchanged(address, known[address].sha256, read_shared)
        assert contents == {call: Path(call).read_bytes()}
        assert np.array_equal(read_waveform(address, contents), read_waveform(address))
    assert shared_reads == [call] * 3  # `read_shared` remembers it
    with open(call, "r+b") as file:
        file.seek(2000)
        file.write(b"\1\2\3")
    for address in addresses:
        with pytest.raises(AudioError, match="was changed during the run: let nothing write to it, and run again"):
            read_unchanged(address, known[address].sha256, read_shared)


def test_threads_share_recordings_and_directories(call, tmp_path, monkeypatch):
    """36 threads hash each recording once, and read the directory of an archive once."""
    path = tmp_path / "calls.zip"
    with zipfile.ZipFile(path, "w") as file:
        for number in range(36):
            file.write(call, f"{number}.wav")
    done, real = [], digests._digest

    class SlowZipFile(zipfile.ZipFile):
        def __init__(self, file):
            done.append(file)
            time.sleep(0.2)
            super().__init__(file)

    def slow(file):
        done.append(getattr(file, "name", None))  # members have no name
        time.sleep(0.2)
        return real(file)

    monkeypatch.setattr(digests, "NUM_THREADS", 36)
    monkeypatch.setattr(addresses.zipfile, "ZipFile", SlowZipFile)
    members = [zip_address(path, f"{number}.wav") for number in range(36)]
    found = audio_digests(members, tmp_path / "cache")
    assert {digest.problem for digest in found.values()} == {None} and done == [str(path)]
    monkeypatch.setattr(digests, "_digest", slow)
    done.clear()
    other = shutil.copyfile(call, tmp_path / "other.wav")
    segments = [format_address(str(file), i / 20, i / 20 + 0.5) for i in range(18) for file in (call, other)]
    found = audio_digests(segments, tmp_path / "cache")
    assert sorted(done) == sorted([call, str(other)])
    assert len({digest.sha256 for digest in found.values()}) == 18  # both files have the same content


def test_failed_call_is_repeated():
    calls = []

    def fail_once(key):
        calls.append(key)
        if len(calls) == 1:
            raise OSError("not yet")
        return key

    call = once_per_key(fail_once)
    with pytest.raises(OSError, match="not yet"):
        call("a")
    assert [call("a"), call("a"), calls] == ["a", "a", ["a", "a"]]


@pytest.fixture
def archive(call, tmp_path):
    path = tmp_path / "corpus.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(call, "data/call.wav")
        file.writestr("../../escape.wav", Path(call).read_bytes())
        file.writestr("/absolute.wav", b"no audio")
        link = zipfile.ZipInfo("link.wav")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
        file.writestr("zeros.wav", bytes(1 << 20))
    return path


def test_a_member_of_an_archive_is_the_file(archive, call, tmp_path):
    member = zip_address(archive, "data/call.wav")
    assert np.array_equal(read_waveform(member), read_waveform(call))
    assert np.array_equal(read_waveform(f"{member}#t=0.5,1&channel=1"), read_waveform(f"{call}#t=0.5,1&channel=1"))
    found = audio_digests([member, call], tmp_path / "cache")
    assert found[member] == found[call]


def test_hostile_archives_write_nothing_and_are_reported(archive, tmp_path, monkeypatch):
    before = sorted(os.listdir(tmp_path))
    assert check_audio(zip_address(archive, "../../escape.wav")).problem is None  # read in memory: a name leads nowhere
    assert check_audio(zip_address(archive, "link.wav")).problem == "is a link in the archive, not a file"
    assert check_audio(zip_address(archive, "/absolute.wav")).problem.startswith("is not audio that soundfile can read")
    assert check_audio(zip_address(archive, "none.wav")).problem == "does not exist in the archive"
    monkeypatch.setattr(addresses, "MAX_MEMBER_BYTES", 1 << 19)
    assert check_audio(zip_address(archive, "zeros.wav")).problem == "unpacks to 1,048,576 bytes, more than 524,288"
    assert sorted(os.listdir(tmp_path)) == before


def test_member_with_a_false_size_is_not_unpacked_further(archive):
    content = bytearray(archive.read_bytes())
    local, central = content.find(b"zeros.wav"), content.rfind(b"zeros.wav")
    for place in (local - 30 + 22, central - 46 + 24):  # where the two headers have the unpacked size
        assert content[place : place + 4] == (1 << 20).to_bytes(4, "little")
        content[place : place + 4] = (1000).to_bytes(4, "little")
    archive.write_bytes(content)
    assert "cannot be unpacked (Bad CRC-32" in check_audio(zip_address(archive, "zeros.wav")).problem


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_member_that_is_damaged(tmp_path, method):
    path = tmp_path / "corpus.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("a.wav", bytes(range(256)) * 400)
    content = bytearray(path.read_bytes())
    for place in range(60, 140):
        content[place] ^= 0xFF
    path.write_bytes(content)
    assert check_audio(zip_address(path, "a.wav")).problem.startswith("cannot be unpacked (")
    with pytest.raises(AudioError, match=r"corpus\.zip cannot be unpacked \("):
        read_audio(zip_address(path, "a.wav"))


def test_damaged_archive(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-40])
    assert check_audio(zip_address(archive, "data/call.wav")).problem.startswith(
        "lies in an archive that is not a zip file"
    )
    assert check_audio(zip_address(tmp_path / "none.zip", "a.wav")).problem == "lies in an archive that does not exist"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_audio(str(tmp_path / "none.wav"))
    with pytest.raises(AddressError, match=r"^is not a zip file \("):
        addresses.list_members(archive)


def zip_with(change):
    """An archive of a.wav whose bytes `change` alters: a dict of places in the directory, or from the beginning, and values."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.wav", b"RIFF" * 100)
    content = bytearray(file.getvalue())
    directory = content.index(b"PK\1\2")
    for (part, place), value in change.items():
        start = place + (directory if part == "directory" else 0)
        content[start : start + len(value)] = value
    return bytes(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({("directory", 6): b"\x63"}, r"lies in an archive that cannot be read \(zip file version 9\.9\)"),
        (
            {("directory", 8): b"\0\x08", ("directory", 46): b"\xff\xfe"},
            r"lies in an archive that cannot be read \('utf-8' codec",
        ),
        ({("directory", 10): b"\x63"}, r"cannot be unpacked \(That compression method is not supported\)"),
        ({("directory", 8): b"\x20"}, r"cannot be unpacked \(compressed patched data \(flag bit 5\)\)"),
        ({("file", 6): b"\0\x08", ("file", 30): b"\xff\xfe"}, r"cannot be unpacked \('utf-8' codec can't decode"),
        ({("directory", 42): b"\xff\xff\xff\x7f"}, r"cannot be unpacked \(.*\)"),
        ({("directory", 46): b"\0"}, "does not exist in the archive"),
    ],
    ids=["version", "name of the directory", "method", "patch", "name of the file", "offset", "empty name"],
)
def test_archive_that_zipfile_refuses_is_named(tmp_path, change, said):
    archive = tmp_path / "corpus.zip"
    archive.write_bytes(zip_with(change))
    address = zip_address(archive, "a.wav")
    assert re.fullmatch(f"{said}.*", check_audio(address).problem)
    assert audio_digests([address], tmp_path / "cache")[address].problem == check_audio(address).problem
    with pytest.raises((AudioError, FileNotFoundError), match=r"corpus\.zip"):
        read_audio(address)
    with contextlib.suppress(AddressError):
        assert set(list_members(archive)) <= {"a.wav"}
