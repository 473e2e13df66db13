"""Recordings that processes or tasks read."""

import os
from collections import Counter

import numpy as np
import pytest
import soundfile

from usdm_sft.audio import addresses, check, digest_database, digests
from usdm_sft.audio.addresses import format_address
from usdm_sft.audio.digests import audio_digests, read_file, read_unchanged
from usdm_sft.audio.reading import AudioError
from usdm_sft.units.reading import cut_into_chunks
from usdm_sft.utils.processes import ProcessPool


class Pool:
    """Makes the calls here, and records them."""

    def __init__(self):
        self.items, self.keys = [], []

    def start(self, num_proc):
        raise AssertionError

    def map(self, function, items, *, name, keys, holds=None):
        self.items, self.keys, self.holds = list(items), list(keys), holds
        return enumerate(map(function, items))


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(digest_database, "SETTLED_NS", -(10**18))


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
    monkeypatch.setattr(digests, "FEW", 1)
    monkeypatch.setattr(digests, "BATCH", 2)
    hashed.clear()
    pool = Pool()
    found = audio_digests(corpus, tmp_path / "cache", pool=pool)
    assert dict(found) == expected
    assert hashed == dict.fromkeys(("a.wav", "b.wav", "c.wav", "call.wav", "call.flac"), 1)
    names = [[os.path.basename(address).partition("#")[0] for address in batch] for batch in pool.items]
    assert names == [["a.wav", "b.wav"], ["call.wav"] * 2, ["call.flac"] * 2, ["none.wav", "c.wav"]]
    assert len(set(pool.keys)) == 4
    again = Pool()
    found = audio_digests(corpus, tmp_path / "cache", pool=again)
    assert dict(found) == expected
    assert again.items == [[str(tmp_path / "none.wav")]]  # a bad file is not remembered
    assert max(hashed.values()) == 1


def test_few_recordings_are_read_here(tmp_path, corpus, settled, monkeypatch):
    monkeypatch.setattr(digests, "FEW", 9)  # the corpus has 8
    pool = Pool()
    audio_digests(corpus, tmp_path / "cache", pool=pool)
    assert pool.items == []
    monkeypatch.setattr(digests, "FEW", 8)
    audio_digests(corpus, tmp_path / "other", pool=pool)
    assert len(pool.items) == 1


def test_recording_that_changes_after_a_process_read_it_is_refused_and_read_by_the_next_run(
    tmp_path, corpus, settled, monkeypatch
):
    monkeypatch.setattr(digests, "FEW", 1)

    class Late(Pool):
        def map(self, *args, **kwargs):
            yield from list(super().map(*args, **kwargs))
            soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
            soundfile.write(tmp_path / "call.wav", np.zeros(32_000), 16_000)

    found = audio_digests(corpus, tmp_path / "cache", pool=Late())
    for address in (corpus[0], corpus[2]):
        with pytest.raises(AudioError, match="was changed during the run: let nothing write to it, and run again"):
            read_unchanged(address, found[address].sha256, read_file)
    assert read_unchanged(corpus[1], found[corpus[1]].sha256, read_file)
    pool = Pool()
    again = audio_digests(corpus, tmp_path / "cache", pool=pool)
    assert again[corpus[0]].seconds == 1
    assert pool.items == [[corpus[0], corpus[2], corpus[4], corpus[6]]]  # two stretches of call.wav, and none.wav
    for address in (corpus[0], corpus[2]):
        assert read_unchanged(address, again[address].sha256, read_file)


def test_results_of_earlier_tasks_hold_while_their_recordings_do_not_change(tmp_path, corpus, settled, monkeypatch):
    """Such as while a job of Slurm waits."""
    monkeypatch.setattr(digests, "FEW", 1)
    pool = Pool()
    audio_digests(corpus, tmp_path / "cache", pool=pool)
    result = digests.read_recordings(corpus)
    assert pool.holds(result)
    for name in ("b.wav", "call.wav", "call.flac"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-2])
        assert not pool.holds(result)
        (tmp_path / name).unlink()
        assert not pool.holds(result)
        (tmp_path / name).write_bytes(content)
        result = digests.read_recordings(corpus)
        assert pool.holds(result)


def test_results_of_tasks_of_another_version_are_not_found(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(digests, "FEW", 1)
    keys = []
    for table in ("files_5", "files_5", "files_6"):
        monkeypatch.setattr(digests, "TABLE", table)
        pool = Pool()
        audio_digests(corpus, tmp_path / "cache", pool=pool)
        keys += pool.keys
    assert keys[0] == keys[1] != keys[2]


def test_files_that_a_process_read_are_not_looked_at_again(tmp_path, corpus, settled, monkeypatch):
    """A later run looks at each file once."""
    monkeypatch.setattr(digests, "FEW", 1)
    looks = Counter()

    def watch(owner, name):
        real = getattr(owner, name)

        def look(path, *args, **kwargs):
            if str(path).endswith((".wav", ".flac")):
                looks[os.path.basename(path)] += 1
            return real(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, look)

    class Elsewhere(Pool):
        def map(self, *args, **kwargs):
            made = list(super().map(*args, **kwargs))
            looks.clear()
            return made

    corpus.remove(str(tmp_path / "none.wav"))
    monkeypatch.setattr(addresses, "open", open, raising=False)
    for owner, name in ((os, "stat"), (os, "lstat"), (addresses, "open")):
        watch(owner, name)
    found = audio_digests(corpus, tmp_path / "cache", pool=Elsewhere())
    assert looks == {}
    assert audio_digests(corpus, tmp_path / "cache") == found
    assert looks == dict.fromkeys(("a.wav", "b.wav", "c.wav", "call.wav", "call.flac"), 1)


def test_problems_are_in_the_order_of_the_addresses(tmp_path, settled, monkeypatch):
    monkeypatch.setattr(digests, "FEW", 1)
    monkeypatch.setattr(digests, "BATCH", 2)
    soundfile.write(tmp_path / "call.wav", np.zeros(32_000), 16_000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    call = str(tmp_path / "call.wav")
    bad = {
        format_address(call, 1, 3): "is to be cut up to 3 s, but has 2 s",
        str(tmp_path / "empty.wav"): "holds no samples",
        str(tmp_path / "none.wav"): "does not exist",
        f"{tmp_path / 'none.wav'}#t=0,1": "does not exist",
        format_address(call, 1, 1): "is to be cut from 1 to 1 s, which is nothing",
    }
    everything = [call, *bad, format_address(call, 0, 1)]
    for _ in range(2):  # the second one knows the recording
        found = audio_digests(everything, tmp_path / "cache", pool=Pool())
        assert [(each, digest.problem) for each, digest in found.items() if digest.problem] == list(bad.items())
        assert [found[each].seconds for each in (call, everything[-1])] == [2, 1]


def test_processes(mini, tmp_path, monkeypatch):
    corpus = [str(path) for path in sorted(mini.glob("corpus/data/*/*.wav"))]
    expected = dict(audio_digests(corpus, tmp_path / "here"))
    monkeypatch.setattr(digests, "FEW", 1)
    monkeypatch.setattr(digests, "BATCH", 8)
    checked, digest_recording = [], digests.digest_recording
    monkeypatch.setattr(digests, "digest_recording", lambda file: checked.append(file) or digest_recording(file))
    with ProcessPool(2) as pool:
        assert dict(audio_digests(corpus, tmp_path / "cache", pool=pool)) == expected
    assert len(expected) == len(corpus) == len(set(corpus)) > 16
    assert sorted(checked) == corpus[16:]  # the first two batches wait for the other process


@pytest.mark.parametrize("name", ["calls #2", "a#t=0,1", "#"])
def test_number_sign_in_a_folder_name_divides_nothing_else(tmp_path, settled, monkeypatch, name):
    """Whole files of such a folder are no stretches of one recording."""
    monkeypatch.setattr(digests, "FEW", 1)
    monkeypatch.setattr(digests, "BATCH", 2)
    folder = tmp_path / name
    folder.mkdir()
    paths = [str(folder / f"{number}.wav") for number in range(6)]
    for path in paths:
        soundfile.write(path, np.zeros(16_000), 16_000)
    pool = Pool()
    found = audio_digests(paths, tmp_path / "cache", pool=pool)
    assert pool.items == [paths[:2], paths[2:4], paths[4:]] and not any(digest.problem for digest in found.values())
    stretches = [format_address(path, start, start + 0.5) for path in paths[:2] for start in (0, 0.5)]
    assert cut_into_chunks(paths, 2) == [paths[:2], paths[2:4], paths[4:]]
    assert cut_into_chunks(stretches, 2) == [stretches[:2], stretches[2:]]
