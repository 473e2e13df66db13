import hashlib
import json
import os
import sqlite3
from contextlib import closing

import numpy as np
import pytest
import soundfile

from usdm_sft.audio import addresses, check, digest_database, digests
from usdm_sft.audio.containers import AudioError
from usdm_sft.audio.digest_database import TABLE
from usdm_sft.audio.digests import audio_digests, file_digest, read_file, read_unchanged


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


def test_file_that_appears_after_its_time_was_asked_for_is_not_remembered(tmp_path, settled, monkeypatch):
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


def test_bad_files(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    paths = [str(tmp_path / "none.wav"), str(tmp_path / "empty.wav"), write_wav(tmp_path / "good.wav")]
    found = audio_digests(paths, tmp_path / "cache")
    assert [found[path].problem for path in paths] == ["does not exist", "holds no samples", None]
    assert found[paths[1]][:3] == ("", 0, 0.0)


def test_bad_audio_is_not_remembered(tmp_path, settled, monkeypatch):
    """So that other permissions, or a soundfile that reads more, get their chance."""
    path = write_wav(tmp_path / "a.wav")
    with monkeypatch.context() as patch:
        patch.setattr(digests, "digest_recording", fail)
        assert audio_digests([path], tmp_path / "cache")[path].problem == "cannot be read (Input/output error)"
    with closing(sqlite3.connect(tmp_path / "cache" / "digests.sqlite")) as database:
        assert database.execute(f"SELECT COUNT(*) FROM {TABLE}").fetchone() == (0,)
    assert audio_digests([path], tmp_path / "cache")[path].problem is None


def test_digests_of_an_older_version_are_not_used(tmp_path, settled):
    """What was remembered before audio was checked."""
    soundfile.write(tmp_path / "nan.wav", np.full(4410, np.nan), 22_050, subtype="FLOAT")
    path = str(tmp_path / "nan.wav")
    stat = os.stat(path)
    (tmp_path / "cache").mkdir()
    with closing(sqlite3.connect(tmp_path / "cache" / "digests.sqlite")) as memo:
        memo.execute("CREATE TABLE files (path TEXT PRIMARY KEY, size, mtime_ns, ctime_ns, sha256, frames, rate)")
        row = (path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, "0" * 64, 4410, 22_050)
        memo.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        memo.commit()
    assert audio_digests([path], tmp_path / "cache")[path].problem == "holds NaN or infinite samples"


def test_file_that_fails_while_it_is_hashed(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "a.wav")
    monkeypatch.setattr(check, "_digest", fail)
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


def test_recording_of_stretches_is_opened_once_in_all_runs(tmp_path, reads, settled):
    """Their digest is that of their recording's digest, start, end and channel."""
    path = tmp_path / "call.wav"
    soundfile.write(path, np.zeros((32_000, 2)), 16_000)
    cut = [f"{path}#t={start / 100:g},{start / 100 + 0.05:g}&channel={start % 2}" for start in range(100, 130)]
    found = audio_digests([*cut, cut[0]], tmp_path / "cache")
    assert audio_digests(cut, tmp_path / "cache") == found
    assert reads == ["call.wav"]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found[cut[3]] == (
        hashlib.sha256(json.dumps([[sha256, 1.03, 1.08, 1]]).encode()).hexdigest(),
        800,
        0.05,
        None,
    )
    with closing(sqlite3.connect(tmp_path / "cache" / "digests.sqlite")) as database:
        assert database.execute(f"SELECT path, sha256, frames FROM {TABLE}").fetchall() == [(str(path), sha256, 32_000)]
    soundfile.write(path, np.ones((32_000, 2)) / 2, 16_000)
    assert audio_digests(cut, tmp_path / "cache")[cut[3]].sha256 != found[cut[3]].sha256


def test_compressed_recording_is_opened_once_in_all_runs(tmp_path, reads, settled):
    """It is decoded to its end, and its stretches follow from what that found."""
    path = tmp_path / "call.flac"
    soundfile.write(path, np.zeros(32_000), 16_000)
    cut = [f"{path}#t={start},{start + 0.5}" for start in (0, 1)]
    found = audio_digests(cut, tmp_path / "cache")
    with closing(sqlite3.connect(tmp_path / "cache" / "digests.sqlite")) as database:
        rows = database.execute(f"SELECT path, frames, channels FROM {TABLE}").fetchall()
    assert rows == [(str(path), 32_000, 1)]
    assert audio_digests(cut, tmp_path / "cache") == found
    assert reads == ["call.flac"]


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
