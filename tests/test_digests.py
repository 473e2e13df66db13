import hashlib
import os

import numpy as np
import pytest
import soundfile

from usdm_sft import digests
from usdm_sft.audio import AudioError
from usdm_sft.digests import audio_digests, file_digest


@pytest.fixture
def reads(monkeypatch):
    """The files that were really read."""
    done = []
    read = digests.sha256_file
    monkeypatch.setattr(digests, "sha256_file", lambda path: done.append(os.path.basename(path)) or read(path))
    return done


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_NS", -(10**18))


def write_wav(path, seed=0):
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, 4410)
    soundfile.write(path, samples, 22_050)
    return str(path)


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


def test_a_digest_of_any_file_does_not_pass_for_an_audio_header(tmp_path, reads, settled):
    path = write_wav(tmp_path / "a.wav")
    file_digest(path, tmp_path / "cache")
    assert audio_digests([path], tmp_path / "cache")[path].num_samples == 3200
    assert file_digest(path, tmp_path / "cache") == audio_digests([path], tmp_path / "cache")[path].sha256
    assert reads == ["a.wav"] * 2


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.wav does not exist"):
        audio_digests([str(tmp_path / "none.wav")], tmp_path / "cache")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(AudioError, match=r"empty\.wav holds no samples"):
        audio_digests([str(tmp_path / "empty.wav")], tmp_path / "cache")


@pytest.mark.parametrize("kept", [0, 5000])
def test_a_damaged_memo_is_made_anew(tmp_path, reads, settled, caplog, kept):
    path = write_wav(tmp_path / "a.wav")
    memo = tmp_path / "cache" / "digests.sqlite"
    first = audio_digests([path], tmp_path / "cache")
    memo.write_bytes(memo.read_bytes()[:kept] + b"no database" * 1000)
    for _ in range(3):
        assert audio_digests([path], tmp_path / "cache") == first
    assert caplog.text.count("digests are not remembered this time") == 1
    assert len(reads) == 3  # first, damaged, anew


def test_without_a_memo_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "cache" / "digests.sqlite").mkdir(parents=True)
    path = write_wav(tmp_path / "a.wav")
    assert audio_digests([path], tmp_path / "cache")[path].num_samples == 3200
    assert "digests are not remembered this time" in caplog.text
