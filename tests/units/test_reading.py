"""Audio is read ahead in threads, in processes, in forked processes, and by the command that prints units as files finish."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch

from usdm_sft.audio.addresses import format_address
from usdm_sft.audio.reading import AudioError
from usdm_sft.cli.main import main
from usdm_sft.units import reading
from usdm_sft.units import tokenizer as process
from usdm_sft.units.batches import prepare_waveform
from usdm_sft.units.reading import AudioReader
from usdm_sft.units.stream import audio_seconds, group_up_to, stream_units
from usdm_sft.units.tokenizer import UnitTokenizer

NAMES = ("0_0_d3", "1_1_d3", "2_0_d3", "3_1_d3")


@pytest.fixture
def corpus_files(mini):
    """Paths of four utterances, and the reference's units of each."""
    expected = json.loads((mini / "expected" / "units.json").read_text())
    paths = [mini / "corpus" / "data" / "3" / f"{name}.wav" for name in NAMES]
    return [str(path) for path in paths], [expected[path.stem] for path in paths]


@pytest.fixture
def two_seconds(tmp_path):
    """Ten files with two seconds of noise each."""
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{index}.wav") for index in range(10)]
    for path in paths:
        soundfile.write(path, 0.1 * rng.standard_normal(32_000), 16_000)
    return paths


@pytest.fixture(scope="module")
def forked(unit_model, mini):
    """Units of `corpus_files` from processes that were forked after a call, and the number of torch's threads in such a process.

    The forked process inherits torch without torch's threads. A script that hangs is an error.
    """
    code = """
import json, multiprocessing, sys
import torch
from torch.utils.data import DataLoader
from usdm_sft.audio.reading import read_waveform
from usdm_sft.units.tokenizer import UnitTokenizer

folder, *paths = sys.argv[1:]
tokenizer = UnitTokenizer.from_pretrained(folder, device="cpu")
tokenizer.tokenize_files(paths[:1])
tokenizer.read_ahead(paths[2:])

class Units:
    def __len__(self):
        return len(paths)

    def __getitem__(self, index):
        return tokenizer.tokenize_files([paths[index]])[0][0].tolist()

found = {"loader": list(DataLoader(Units(), batch_size=None, num_workers=2, multiprocessing_context="fork"))}
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
context = multiprocessing.get_context("fork")
queue = context.Queue()

def work():
    of_files, _ = tokenizer.tokenize_files(paths)
    of_waveforms = tokenizer.tokenize_waveforms([read_waveform(path) for path in paths])
    queue.put([[units.tolist() for units in each] for each in (of_files, of_waveforms)] + [torch.get_num_threads()])

process = context.Process(target=work)
process.start()
found["files"], found["waveforms"], found["threads"] = queue.get()
process.join()
print(json.dumps(found))
"""
    paths = [str(mini / "corpus" / "data" / "3" / f"{name}.wav") for name in NAMES]
    command = [sys.executable, "-c", code, str(unit_model), *paths]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_data_loader_that_forks_after_a_call(forked, corpus_files):
    assert forked["loader"] == corpus_files[1]


@pytest.mark.slow
def test_forked_process_without_a_data_loader(forked, corpus_files):
    assert forked["files"] == forked["waveforms"] == corpus_files[1] and forked["threads"] == 1


def test_cuda_tokenizer_in_a_forked_process(unit_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cuda")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def work():
        for use in (lambda: tokenizer.tokenize_files(["a.wav"]), lambda: tokenizer.model):
            try:
                use()
            except RuntimeError as error:
                queue.put(str(error))

    process = context.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    message = "CUDA does not survive a fork: call multiprocess.set_start_method('spawn') before .map with num_proc"
    assert [queue.get(), queue.get()] == [message, message]


def test_cuda_tokenizer_that_is_pickled_into_a_forked_process(unit_model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cuda")
    monkeypatch.setattr(process, "_IMPORTED_IN", os.getpid() + 1)
    with pytest.raises(RuntimeError, match=r"CUDA does not survive a fork: call multiprocess\.set_start_method"):
        UnitTokenizer.__new__(UnitTokenizer).__setstate__(tokenizer.__getstate__())


def test_sources_that_wait_are_not_read_after_an_error(monkeypatch):
    one_thread = ThreadPoolExecutor(1)
    monkeypatch.setattr(reading, "ThreadPoolExecutor", lambda *_, **__: one_thread)
    begun, held = [], threading.Event()

    def read(source, contents):
        begun.append(source)
        if source == "held":
            held.wait(60)
        if source == "bad":
            raise AudioError("bad")

    reader = AudioReader(read)
    reader.start(["bad", "held"])
    with pytest.raises(AudioError, match="bad"):
        list(reader.take(["bad", "held", "waiting", "bad"]))
    reader.start(["forgotten"])
    reader.forget(["forgotten", "never read"])
    assert len(reader) == 0
    held.set()
    reader._threads.shutdown()
    assert begun[0] == "bad" and not {"waiting", "forgotten"} & set(begun)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_reader_threads_start_no_team_of_openmp_threads(tmp_path):
    path = str(tmp_path / "odd.wav")
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(80_001), 16_000)
    counted = []

    def read(source, contents):
        before = len(os.listdir("/proc/self/task"))
        audio = reading.read_resampled(source, contents)
        counted.append(len(os.listdir("/proc/self/task")) - before)
        return audio

    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        [(samples, rate)] = AudioReader(read).take([path])
    finally:
        torch.set_num_threads(num_threads)
    assert counted == [0]
    assert np.array_equal(samples, reading.read_waveform(path)) and (len(samples), rate) == (80_001, 16_000)
    waveform = prepare_waveform(torch.from_numpy(samples), "")
    padded = torch.nn.functional.pad(torch.from_numpy(samples), (0, 1), value=1.0)  # as the reference does
    assert torch.equal(waveform.samples, torch.nn.functional.layer_norm(padded, padded.shape))
    assert waveform.num_samples == 80_001


def test_audio_seconds_is_the_length_in_the_header(tmp_path, two_seconds):
    assert audio_seconds(two_seconds[0]) == 2
    assert audio_seconds(format_address(two_seconds[0], 0.5, 1.25)) == 0.75
    assert audio_seconds(f"{two_seconds[0]}\n{format_address(two_seconds[1], 0.5, 1)}") == 2.5
    os.mkfifo(tmp_path / "fifo.wav")
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "text.zip").write_text("not an archive")
    for name in ("none.wav", "fifo.wav", "text.wav"):
        assert audio_seconds(str(tmp_path / name)) == math.inf
    assert audio_seconds(f"zip://a.wav::{tmp_path / 'text.zip'}") == math.inf


def test_groups_are_neighbours_up_to_the_given_seconds(two_seconds):
    long = "\n".join(two_seconds[:4])
    sources = [*two_seconds[:3], long, two_seconds[3], "none.wav", *two_seconds[4:6]]
    assert list(group_up_to(4, sources, audio_seconds)) == [
        two_seconds[:2],
        two_seconds[2:3],
        [long],
        two_seconds[3:4],
        ["none.wav"],
        two_seconds[4:6],
    ]
    assert list(group_up_to(4, [], audio_seconds)) == []


@pytest.fixture
def given(monkeypatch):
    """The sources that are read, in order."""
    given, read = [], reading.read_waveform
    monkeypatch.setattr(
        reading, "read_waveform", lambda source, contents, sample_rate: given.append(source) or read(source)
    )
    return given


def test_streaming_reads_at_most_two_groups_ahead(unit_model, two_seconds, given):
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu", batch_seconds=4)
    stream = stream_units(tokenizer, two_seconds)
    expected, _ = UnitTokenizer.from_pretrained(unit_model, device="cpu").tokenize_files(two_seconds)
    given.clear()
    for index, units in enumerate(expected):
        assert np.array_equal(next(stream), units)
        assert set(given) <= set(two_seconds[: 4 + 2 * (index // 2)])
    assert next(stream, None) is None
    assert sorted(given) == sorted(two_seconds)


def test_a_bad_file_ends_the_stream_after_those_before_it(unit_model, two_seconds, given):
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu", batch_seconds=6)
    samples, rate = soundfile.read(two_seconds[4])
    samples[5] = np.nan  # its header is valid
    soundfile.write(two_seconds[4], samples, rate, subtype="FLOAT")
    expected, _ = tokenizer.tokenize_files(two_seconds[:4])
    given.clear()
    stream = stream_units(tokenizer, two_seconds)
    for units in expected:
        assert np.array_equal(next(stream), units)
    with pytest.raises(AudioError, match=r"4\.wav holds NaN or infinite samples"):
        next(stream)
    assert len(tokenizer._reader) == 0
    assert set(given) <= set(two_seconds[:9])


def test_command_prints_each_file_when_it_is_finished(unit_model, corpus_files, capsys, monkeypatch):
    paths, units = corpus_files
    seen = []
    tokenize = UnitTokenizer.tokenize_files

    def spy(self, sources):
        seen.append((list(sources), capsys.readouterr().out))
        return tokenize(self, sources)

    monkeypatch.setattr(UnitTokenizer, "tokenize_files", spy)
    with pytest.raises(SystemExit, match="1"):
        main(["units", str(unit_model), *paths[:3], "none.wav", paths[3]])
    captured = capsys.readouterr()
    assert [sources for sources, _ in seen] == [paths[:3], ["none.wav"], ["none.wav"]]
    lines = [json.loads(line) for line in "".join([out for _, out in seen] + [captured.out]).splitlines()]
    assert lines == [{"file": path, "units": row} for path, row in zip(paths[:3], units[:3], strict=True)]
    assert seen[1][1].count("\n") == 3  # before the next file starts
    assert captured.err == (
        "dailytalk-usdm units: audio file none.wav does not exist: correct the path, or complete the corpus\n"
    )
