"""Audio that processes read ahead for a GPU."""

import multiprocessing
import os
import re
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import soundfile

from usdm_sft.audio.addresses import format_address, zip_address
from usdm_sft.audio.digests import audio_digests
from usdm_sft.audio.reading import AudioError
from usdm_sft.units.reading import CHUNK_FILES, AudioReader, choose_read, cut_into_chunks

SOXR = choose_read("soxr", 16_000)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Addresses of audio of many kinds, among them bad ones, and the recordings that are cut into segments."""
    folder, rng = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    whole = [str(folder / f"{index}.wav") for index in range(8)]
    for index, path in enumerate(whole):
        rate, channels = (22_050, 16_000, 44_100)[index % 3], 1 + index % 2
        soundfile.write(path, 0.1 * rng.standard_normal((4_001 + 7 * index, channels)), rate)
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.write(whole[0], "a.wav")
    calls = [str(folder / "left.wav"), str(folder / "right.flac")]
    for path in calls:
        soundfile.write(path, 0.1 * rng.standard_normal((48_000, 2)), 8_000)
    # The two recordings in turns, as two speakers speak.
    segments = [format_address(calls[i % 2], i / 10, i / 10 + 0.25, i % 3 % 2) for i in range(50)]
    (folder / "text.wav").write_text("not audio")
    bad = [str(folder / "none.wav"), str(folder / "text.wav")]
    good = [*whole[:4], zip_address(folder / "archive.zip", "a.wav"), *segments, *whole[4:]]
    return {"good": good, "bad": bad, "segments": segments, "calls": calls}


@pytest.fixture
def open_reader():
    """A function that opens a reader with two processes."""
    readers = []

    def open_reader(read=SOXR):
        readers.append(AudioReader(read, 2))
        return readers[-1]

    yield open_reader
    for reader in readers:
        reader.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("resampler", ["soxr", "torchaudio"])
def test_processes_read_what_threads_read(files, open_reader, resampler):
    sources = [*files["good"], files["good"][0]]  # one of them twice
    digests = {path: digest.sha256 for path, digest in audio_digests(files["good"]).items()}
    for given in (None, digests):
        read = choose_read(resampler, 16_000)
        expected = AudioReader(read).take(sources, given)
        found = list(open_reader(read).take(sources, given))
        for (samples, rate), (expected_samples, expected_rate) in zip(found, expected, strict=True):
            assert samples.dtype == np.float32 and samples.tobytes() == expected_samples.tobytes()
            assert rate == expected_rate
            assert samples.flags.writeable  # torch warns of others


def test_error_of_a_file_is_that_of_threads(files, open_reader):
    good, (missing, text) = files["good"], files["bad"]
    digests = {path: digest.sha256 for path, digest in audio_digests(good).items()} | {good[1]: "0" * 64}
    reader, threads = open_reader(), AudioReader(SOXR)
    reader.start([good[0], missing, text, good[2]])
    for sources, given, kind in (
        ([missing], None, FileNotFoundError),
        ([text], None, AudioError),
        ([good[1]], digests, AudioError),
    ):
        with pytest.raises(kind) as expected:
            list(threads.take(sources, given))
        with pytest.raises(kind) as found:
            list(reader.take(sources, given))
        assert type(found.value) is type(expected.value) and str(found.value) == str(expected.value)
        assert "In the process:" in found.value.__notes__[0]
    assert "was changed during the run" in str(found.value)
    assert len(list(reader.take([good[0], good[2]]))) == 2
    assert len(reader) == 0


def test_files_after_an_error_are_not_taken_and_those_before_are(files, open_reader):
    taken = open_reader().take([*files["good"][:3], files["bad"][0], files["good"][3]])
    assert [rate for _, rate in (next(taken), next(taken), next(taken))] == [16_000] * 3
    with pytest.raises(FileNotFoundError, match=r"none\.wav does not exist: correct the path"):
        next(taken)


def count_torch(source, contents):
    return np.array([len({"torch", "datasets", "transformers"} & set(sys.modules))], np.float32), 1


def test_processes_start_without_torch(files, open_reader):
    """It would take seconds and 200 MB in each of them."""
    [(found, _)] = open_reader(count_torch).take(files["good"][:1])
    assert found.tolist() == [0]


def read_identity(source, contents):
    """The process and the object that holds the recording's bytes, in place of samples."""
    return np.array([os.getpid(), id(contents[source.partition("#")[0]]) >> 4 & 0xFFFFFF], np.float32), 1


def test_each_recording_is_read_once(files, open_reader):
    digests = {path: digest.sha256 for path, digest in audio_digests(files["segments"]).items()}
    found = open_reader(read_identity).take(files["segments"], digests)
    readings = {(path.partition("#")[0], *samples.tolist()) for path, (samples, _) in zip(digests, found, strict=True)}
    assert sorted(path for path, *_ in readings) == files["calls"]


def test_chunks():
    files = [f"{index}.wav" for index in range(100)]
    assert cut_into_chunks(files[:3], 0) == [["0.wav"], ["1.wav"], ["2.wav"]]
    assert cut_into_chunks([], 2) == []
    assert [len(chunk) for chunk in cut_into_chunks(files, 1)] == [CHUNK_FILES] * 3 + [4]
    assert cut_into_chunks(files[:6], 2) == [files[:2], files[2:4], files[4:6]]
    turns = [f"{side}.wav#t={turn},{turn + 1}" for turn in range(40) for side in "ab"]
    assert cut_into_chunks([*turns, *files[:2]], 1) == [turns[::2], turns[1::2], files[:2]]
    assert cut_into_chunks([b"content", b"content 2"], 1) == [[b"content"], [b"content 2"]]


def die(source, contents):
    os._exit(3)


def test_death_of_a_process_is_an_error_of_what_it_read(files, open_reader):
    reader = open_reader(die)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"a process died \(reads audio, process \d, exit code 3\): start the run again"
        ):
            list(reader.take(files["good"]))


def sleep(source, contents):
    time.sleep(600)


def test_closing_waits_for_no_read(files, open_reader):
    reader = open_reader(sleep)
    reader.start(files["good"])
    found = []

    def take():
        try:
            list(reader.take(files["good"]))
        except RuntimeError as error:
            found.append(str(error))

    thread = threading.Thread(target=take)
    thread.start()
    start = time.monotonic()
    reader.close()
    thread.join(60)
    assert time.monotonic() - start < 30
    assert len(found) == 1 and re.match(r"a process died \(reads audio, process \d, exit code -15\)", found[0])


def test_forgotten_audio_is_not_read(files, open_reader):
    reader = open_reader()
    reader.start(files["good"])
    assert len(reader) == len(files["good"])
    future = reader._waiting[files["good"][0]][0]
    reader.forget(files["good"][1:])
    assert len(reader) == 1 and not future.cancelled()
    assert [rate for _, rate in reader.take(files["good"][:1])] == [16_000]
