"""The digest of a recording is that of its content, and is remembered while the file does not change. A process, a task or this run may read it."""

import hashlib
import json
import os
import sqlite3
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import soundfile

from usdm_sft.audio import addresses, digest_database, digests
from usdm_sft.audio.addresses import format_address
from usdm_sft.audio.containers import AudioError
from usdm_sft.audio.digest_database import TABLE
from usdm_sft.audio.digests import audio_digests, file_digest, read_file, read_unchanged
from usdm_sft.units.reading import cut_into_chunks
from usdm_sft.utils.processes import ProcessPool


@pytest.fixture
def reads(monkeypatch):
    """The name of each audio file that is opened, at each time."""
    done = []

    def recorded(path, mode):
        done.append(os.path.basename(path))
        return open(path, mode)

    monkeypatch.setattr(addresses, "open", recorded, raising=False)
    return done


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(digest_database, "SETTLED_NS", -(10**18))


def write_wav(path, seed=0):
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, 4410)
    soundfile.write(path, samples, 22_050)
    return str(path)


def fail(file):
    raise OSError(5, "Input/output error")


def test_audio_digest(tmp_path):
    path = write_wav(tmp_path / "a.wav")
    found = audio_digests([path, path], tmp_path / "cache")[path]
    assert found.sha256 == hashlib.sha256((tmp_path / "a.wav").read_bytes()).hexdigest()
    assert (found.num_samples, found.seconds) == (3200, 0.2)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path, reads, settled):
    path = write_wav(tmp_path / "a.wav")
    first = audio_digests([path], tmp_path / "cache")
    assert audio_digests([path], tmp_path / "cache") == first
    assert reads == ["a.wav"]
    os.utime(path)  # touched: read again, but the same bytes
    assert audio_digests([path], tmp_path / "cache") == first
    write_wav(tmp_path / "a.wav", seed=1)
    assert audio_digests([path], tmp_path / "cache") != first
    assert reads == ["a.wav"] * 3


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, reads):
    path = write_wav(tmp_path / "a.wav")
    for _ in range(2):
        audio_digests([path], tmp_path / "cache")
    assert reads == ["a.wav"] * 2


def test_file_that_appears_after_its_stamp_is_not_remembered(tmp_path, settled, monkeypatch):
    """It would be taken for unchanged while it does not exist."""
    path = write_wav(tmp_path / "a.wav")
    with monkeypatch.context() as patch:
        patch.setattr(digests, "find_stamp", lambda file: (0, 0, 0))
        assert audio_digests([path], tmp_path / "cache")[path].problem is None
    os.unlink(path)
    assert audio_digests([path], tmp_path / "cache")[path].problem == "does not exist"


def test_memo_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "digests.sqlite").symlink_to(tmp_path / "precious")
    file_digest(write_wav(tmp_path / "a.wav"), tmp_path / "cache")
    assert not (tmp_path / "precious").exists() and not (tmp_path / "cache" / "digests.sqlite").is_symlink()


def test_file_digest_does_not_replace_the_check_of_audio(tmp_path, reads, settled):
    path = write_wav(tmp_path / "a.wav")
    file_digest(path, tmp_path / "cache")
    assert audio_digests([path], tmp_path / "cache")[path].num_samples == 3200
    assert file_digest(path, tmp_path / "cache") == audio_digests([path], tmp_path / "cache")[path].sha256
    assert reads == ["a.wav"] * 2


def test_bad_audio_is_not_remembered(tmp_path, settled, monkeypatch):
    """So that other permissions, or a soundfile that reads more, get their chance."""
    path = write_wav(tmp_path / "a.wav")
    with monkeypatch.context() as patch:
        patch.setattr(digests, "digest_recording", fail)
        assert audio_digests([path], tmp_path / "cache")[path].problem == "cannot be read (Input/output error)"
    with closing(sqlite3.connect(tmp_path / "cache" / "digests.sqlite")) as database:
        assert database.execute(f"SELECT COUNT(*) FROM {TABLE}").fetchone() == (0,)
    assert audio_digests([path], tmp_path / "cache")[path].problem is None


def test_file_that_fails_while_it_is_hashed(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "a.wav")
    monkeypatch.setattr(digests, "_digest", fail)
    found = audio_digests([path, f"{path}#t=0,0.1"], tmp_path / "cache")
    assert [digest.problem for digest in found.values()] == ["cannot be read (Input/output error)"] * 2


def test_a_file_that_changes_after_the_first_pass(tmp_path):
    path = write_wav(tmp_path / "a.wav")
    sha256 = audio_digests([path], tmp_path / "cache")[path].sha256
    os.utime(path)
    content = (tmp_path / "a.wav").read_bytes()
    assert read_unchanged(path, sha256, read_file) == {path: content}  # touched, but the same bytes
    write_wav(tmp_path / "a.wav", seed=1)
    with pytest.raises(AudioError, match=r"a\.wav was changed during the run: let nothing write to it, and run again"):
        read_unchanged(path, sha256, read_file)


def test_a_file_that_cannot_be_read_after_the_first_pass(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "a.wav")
    sha256 = audio_digests([path], tmp_path / "cache")[path].sha256
    with monkeypatch.context() as patch:
        patch.setattr(digests, "open_file", lambda file: os.listdir(file))  # not a folder
        with pytest.raises(
            AudioError, match=r"a\.wav was changed during the run \(it cannot be read \(Not a directory\)\)"
        ):
            read_unchanged(path, sha256, read_file)
    os.unlink(path)
    with pytest.raises(AudioError, match=r"a\.wav was changed during the run \(it does not exist\): let nothing write"):
        read_unchanged(path, sha256, read_file)
    os.mkfifo(path)
    with pytest.raises(
        AudioError, match=r"a\.wav was changed during the run \(it cannot be read \(it is not a regular file"
    ):
        read_unchanged(path, sha256, read_file)


@pytest.mark.parametrize("kept", [0, 5000])
def test_damaged_digest_file_is_made_again(tmp_path, reads, settled, caplog, kept):
    path = write_wav(tmp_path / "a.wav")
    memo = tmp_path / "cache" / "digests.sqlite"
    first = audio_digests([path], tmp_path / "cache")
    memo.write_bytes(memo.read_bytes()[:kept] + b"no database" * 1000)
    for _ in range(3):
        assert audio_digests([path], tmp_path / "cache") == first
    assert caplog.text.count("digests are not remembered this time") == 1
    assert len(reads) == 3  # first, damaged, anew


def test_run_goes_on_without_a_digest_file(tmp_path, caplog):
    (tmp_path / "cache" / "digests.sqlite").mkdir(parents=True)
    path = write_wav(tmp_path / "a.wav")
    assert audio_digests([path], tmp_path / "cache")[path].num_samples == 3200
    assert "digests are not remembered this time" in caplog.text


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_recording_of_segments_is_opened_once_in_all_runs(tmp_path, reads, settled, kind):
    """Their digest is that of their recording's digest, start, end and channel. FLAC is decoded to its end."""
    path = tmp_path / f"call.{kind}"
    soundfile.write(path, np.zeros((32_000, 2)), 16_000)
    cut = [f"{path}#t={start / 100:g},{start / 100 + 0.05:g}&channel={start % 2}" for start in range(100, 130)]
    found = audio_digests([*cut, cut[0]], tmp_path / "cache")
    assert audio_digests(cut, tmp_path / "cache") == found
    assert reads == [f"call.{kind}"]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    expected = hashlib.sha256(json.dumps([[sha256, 1.03, 1.08, 1]]).encode()).hexdigest()
    assert found[cut[3]] == (expected, 800, 0.05, None)
    with closing(sqlite3.connect(tmp_path / "cache" / "digests.sqlite")) as database:
        rows = database.execute(f"SELECT path, sha256, frames, channels FROM {TABLE}").fetchall()
    assert rows == [(str(path), sha256, 32_000, 2)]
    soundfile.write(path, np.ones((32_000, 2)) / 2, 16_000)
    assert audio_digests(cut, tmp_path / "cache")[cut[3]].sha256 != found[cut[3]].sha256


def test_files_that_passed_older_checks_are_checked_again(tmp_path, settled):
    path = write_wav(tmp_path / "a.au")
    soundfile.write(path, np.zeros(16_000), 16_000, format="AU")
    (tmp_path / "a.au").write_bytes((tmp_path / "a.au").read_bytes()[:-1000])
    stat = os.stat(path)
    (tmp_path / "cache").mkdir()
    with closing(sqlite3.connect(tmp_path / "cache" / "digests.sqlite")) as database:
        database.execute("CREATE TABLE files_5 (path TEXT, size, mtime_ns, ctime_ns, sha256, frames, rate, channels)")
        row = (path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, "0" * 64, 15_500, 16_000, 0)
        database.execute("INSERT INTO files_5 VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        database.commit()
    assert audio_digests([path], tmp_path / "cache")[path].problem.startswith("is cut short")


# Recordings that processes or tasks read


class Pool:
    """Makes the calls here, and records them."""

    def __init__(self):
        self.items, self.keys = [], []

    def start(self, num_proc):
        raise AssertionError

    def map(self, function, items, *, name, keys, is_valid=None):
        self.items, self.keys, self.is_valid = list(items), list(keys), is_valid
        return enumerate(map(function, items))


@pytest.fixture
def hashed(monkeypatch):
    """How often each file was hashed."""
    counts, real = Counter(), digests._digest
    monkeypatch.setattr(digests, "_digest", lambda file: counts.update([os.path.basename(file.name)]) or real(file))
    return counts


@pytest.fixture
def share(monkeypatch):
    """A function that lets even few addresses be shared out, this many in a call."""

    def share(batch=512):
        monkeypatch.setattr(digests, "FEW", 1)
        monkeypatch.setattr(digests, "BATCH", batch)

    return share


@pytest.fixture
def corpus(tmp_path):
    """Addresses of three whole files, of segments of a WAV and a FLAC file in turn, and of a file that does not exist."""
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


def test_every_recording_is_hashed_once_and_found_afterwards(tmp_path, corpus, settled, hashed, share):
    expected = dict(audio_digests(corpus, tmp_path / "here"))
    assert expected[str(tmp_path / "none.wav")].problem == "does not exist"
    share(2)
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


def test_recording_that_changes_after_the_pass_is_refused(tmp_path, corpus, settled, share):
    share()

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
    assert pool.items == [[corpus[0], corpus[2], corpus[4], corpus[6]]]  # two segments of call.wav, and none.wav
    for address in (corpus[0], corpus[2]):
        assert read_unchanged(address, again[address].sha256, read_file)


def test_results_of_tasks_hold_until_recordings_change(tmp_path, corpus, settled, share):
    """Such as while a job of Slurm waits."""
    share()
    pool = Pool()
    audio_digests(corpus, tmp_path / "cache", pool=pool)
    result = digests.read_recordings(corpus)
    assert pool.is_valid(result)
    for name in ("b.wav", "call.wav", "call.flac"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-2])
        assert not pool.is_valid(result)
        (tmp_path / name).unlink()
        assert not pool.is_valid(result)
        (tmp_path / name).write_bytes(content)
        result = digests.read_recordings(corpus)
        assert pool.is_valid(result)


def test_results_of_tasks_of_another_version_are_not_found(tmp_path, corpus, monkeypatch, share):
    share()
    keys = []
    for table in ("files_5", "files_5", "files_6"):
        monkeypatch.setattr(digests, "TABLE", table)
        pool = Pool()
        audio_digests(corpus, tmp_path / "cache", pool=pool)
        keys += pool.keys
    assert keys[0] == keys[1] != keys[2]


def test_files_that_a_process_read_are_not_looked_at_again(tmp_path, corpus, settled, monkeypatch, share):
    """A later run looks at each file once."""
    share()
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


def test_problems_are_in_the_order_of_the_addresses(tmp_path, settled, share):
    share(2)
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


def test_processes(mini, tmp_path, forked_processes, monkeypatch, share):
    corpus = [str(path) for path in sorted(mini.glob("corpus/data/*/*.wav"))]
    expected = dict(audio_digests(corpus, tmp_path / "here"))
    share(8)
    checked, digest_recording = [], digests.digest_recording
    monkeypatch.setattr(digests, "digest_recording", lambda file: checked.append(file) or digest_recording(file))
    with ProcessPool(2) as pool:
        assert dict(audio_digests(corpus, tmp_path / "cache", pool=pool)) == expected
    assert len(expected) == len(corpus) == len(set(corpus)) > 16
    assert sorted(checked) == corpus[16:]  # the first two batches wait for the other process


@pytest.mark.parametrize("name", ["calls #2", "a#t=0,1", "#"])
def test_number_sign_in_a_folder_name_divides_nothing_else(tmp_path, settled, share, name):
    """Whole files of such a folder are no segments of one recording."""
    share(2)
    folder = tmp_path / name
    folder.mkdir()
    paths = [str(folder / f"{number}.wav") for number in range(6)]
    for path in paths:
        soundfile.write(path, np.zeros(16_000), 16_000)
    pool = Pool()
    found = audio_digests(paths, tmp_path / "cache", pool=pool)
    assert pool.items == [paths[:2], paths[2:4], paths[4:]] and not any(digest.problem for digest in found.values())
    segments = [format_address(path, start, start + 0.5) for path in paths[:2] for start in (0, 0.5)]
    assert cut_into_chunks(paths, 2) == [paths[:2], paths[2:4], paths[4:]]
    assert cut_into_chunks(segments, 2) == [segments[:2], segments[2:]]
