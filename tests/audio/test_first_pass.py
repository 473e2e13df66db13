"""Recordings that processes or tasks read."""

import os
from collections import Counter
from functools import partial

import numpy as np
import pytest
import soundfile

from usdm_sft.audio import check, digest_reader, first_pass, memo
from usdm_sft.audio.addresses import format_address
from usdm_sft.audio.digests import audio_digests
from usdm_sft.audio.first_pass import read_ahead
from usdm_sft.utils.processes import ProcessPool


class Pool:
    """Makes the calls here, and records them."""

    def __init__(self):
        self.items, self.keys = [], []

    def start(self, num_proc):
        raise AssertionError

    def map(self, function, items, *, name, keys, holds=None):
        self.items, self.keys = list(items), list(keys)
        return enumerate(map(function, items))


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(memo, "SETTLED_NS", -(10**18))


@pytest.fixture
def hashed(monkeypatch):
    """How often each file was hashed."""
    counts, real = Counter(), check._digest
    monkeypatch.setattr(check, "_digest", lambda file: counts.update([os.path.basename(file.name)]) or real(file))
    return counts


@pytest.fixture
def corpus(tmp_path):
    """Addresses of three whole files, of stretches of a WAV and a FLAC file in turn, and of a file that does not exist."""
    rng = np.random.default_rng(0)
    for name in ("a.wav", "b.wav", "c.wav", "call.wav", "call.flac"):
        soundfile.write(tmp_path / name, rng.uniform(-0.5, 0.5, 32_000), 16_000)
    whole = [str(tmp_path / name) for name in ("a.wav", "b.wav", "none.wav", "c.wav")]
    return [
        *whole[:2],
        *(
            format_address(str(tmp_path / name), start, start + 0.5)
            for start in (0, 0.5)
            for name in ("call.wav", "call.flac")
        ),
        *whole[2:],
    ]


def test_every_recording_is_hashed_once_and_found_afterwards(tmp_path, corpus, settled, hashed, monkeypatch):
    expected = dict(audio_digests(corpus, tmp_path / "here"))
    assert expected[str(tmp_path / "none.wav")].problem == "does not exist"
    monkeypatch.setattr(first_pass, "FEW", 1)
    monkeypatch.setattr(first_pass, "BATCH", 2)
    hashed.clear()
    pool = Pool()
    found = audio_digests(corpus, tmp_path / "cache", read_ahead=partial(read_ahead, pool=pool))
    assert dict(found) == expected
    assert hashed == dict.fromkeys(("a.wav", "b.wav", "c.wav", "call.wav", "call.flac"), 1)
    names = [[os.path.basename(address).partition("#")[0] for address in batch] for batch in pool.items]
    assert names == [["a.wav", "b.wav"], ["call.wav"] * 2, ["call.flac"] * 2, ["none.wav", "c.wav"]]
    assert len(set(pool.keys)) == 4
    again = Pool()
    found = audio_digests(corpus, tmp_path / "cache", read_ahead=partial(read_ahead, pool=again))
    assert dict(found) == expected
    assert again.items == [[str(tmp_path / "none.wav")]]  # a bad file is not remembered
    assert max(hashed.values()) == 1


def test_few_recordings_are_read_here(tmp_path, corpus, settled, monkeypatch):
    monkeypatch.setattr(first_pass, "FEW", 9)  # the corpus has 8
    pool = Pool()
    audio_digests(corpus, tmp_path / "cache", read_ahead=partial(read_ahead, pool=pool))
    assert pool.items == []
    monkeypatch.setattr(first_pass, "FEW", 8)
    audio_digests(corpus, tmp_path / "other", read_ahead=partial(read_ahead, pool=pool))
    assert len(pool.items) == 1


def test_recordings_that_change_after_the_tasks_are_read_again(tmp_path, corpus, settled, monkeypatch):
    """Such as while a job of Slurm waits."""
    monkeypatch.setattr(first_pass, "FEW", 1)

    class Late(Pool):
        def map(self, *args, **kwargs):
            yield from list(super().map(*args, **kwargs))
            soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)

    found = audio_digests(corpus, tmp_path / "cache", read_ahead=partial(read_ahead, pool=Late()))
    assert found[corpus[0]] == audio_digests(corpus[:1], tmp_path / "other")[corpus[0]]
    assert found[corpus[0]].seconds == 1


def test_processes(mini, tmp_path, monkeypatch):
    corpus = [str(path) for path in sorted(mini.glob("corpus/data/*/*.wav"))]
    expected = dict(audio_digests(corpus, tmp_path / "here"))
    monkeypatch.setattr(first_pass, "FEW", 1)
    monkeypatch.setattr(first_pass, "BATCH", 8)
    checked, check_file = [], digest_reader.check_file
    monkeypatch.setattr(digest_reader, "check_file", lambda file: checked.append(file) or check_file(file))
    with ProcessPool(2) as pool:
        assert dict(audio_digests(corpus, tmp_path / "cache", read_ahead=partial(read_ahead, pool=pool))) == expected
    assert len(expected) == len(corpus) == len(set(corpus)) > 16
    assert sorted(checked) == corpus[16:]  # the first two batches wait for the other process
