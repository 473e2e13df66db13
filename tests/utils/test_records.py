"""Records come back as they were, from memory and from the temporary file."""

import errno
import os
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from usdm_sft.utils import records
from usdm_sft.utils.lazily import Lazily
from usdm_sft.utils.records import Records

CONTENT = [b"first", b"", b"x" * 40, b"\0\xff", b"last"]


@pytest.fixture(params=[0, 10, 45, 1000])
def stored(request, monkeypatch):
    """The records, of which more than `request.param` bytes never wait."""
    monkeypatch.setattr(records, "_IN_MEMORY", request.param)
    stored = Records()
    for record in CONTENT:
        stored.append(record)
    return stored


def test_records_come_back(stored):
    assert len(stored) == 5 and [stored[index] for index in range(5)] == CONTENT
    assert [stored[index] for index in (4, 0, 2)] == [b"last", b"first", b"x" * 40]
    with pytest.raises(IndexError):
        stored[5]


def test_records_appended_after_a_read_are_found(stored):
    assert stored[0] == b"first"
    stored.append(b"later" * 20)
    assert [stored[index] for index in range(6)] == [*CONTENT, b"later" * 20]


def test_pickled_records_are_independent(stored):
    copy = pickle.loads(pickle.dumps(stored))
    copy.append(b"more")
    assert [copy[index] for index in range(6)] == [*CONTENT, b"more"] and len(stored) == 5


def test_threads_read_at_the_same_time(stored):
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(stored.__getitem__, [*range(5)] * 20)) == CONTENT * 20


def test_forked_process_reads_what_its_parent_wrote(stored):
    stored[0]
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        os._exit([stored[index] for index in range(5)] != CONTENT)
    assert stored[2] == CONTENT[2]


def test_only_the_last_records_are_in_memory(monkeypatch):
    monkeypatch.setattr(records, "_IN_MEMORY", 100)
    stored = Records()
    for _ in range(50):
        stored.append(b"123456789")
        assert len(stored._waiting) <= 100


def test_full_folder_for_temporary_files_is_named(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "_IN_MEMORY", 1)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/scratch")
    message = r"No space left on device \(temporary file; name another folder with TMPDIR\): '/scratch'"
    with pytest.raises(OSError, match=message):
        Records().append(b"ab")


def test_lazy_items_are_made_at_each_access():
    made = []
    items = Lazily(lambda index: made.append(index) or index * 2, 4)
    assert made == [] and len(items) == 4
    assert (items[1], items[-1], items[1:3], list(items)) == (2, 6, [2, 4], [0, 2, 4, 6])
    assert made == [1, 3, 1, 2, 0, 1, 2, 3]
    with pytest.raises(IndexError):
        items[4]
