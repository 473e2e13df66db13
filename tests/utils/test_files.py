import errno
import os
from pathlib import Path

import pytest

from usdm_sft.utils.files import remove_path, replace_path, replace_text, sync_folder, write_then_replace


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_has_its_final_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "list.txt"
    with write_then_replace(path) as file:
        file.write("ß")
        assert names(path.parent) == ["list.txt.unfinished"]
    assert names(path.parent) == ["list.txt"]
    assert path.read_bytes() == "ß".encode()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "list.txt"
    path.write_text("old")
    with pytest.raises(error), write_then_replace(path) as file:
        file.write("new")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["list.txt"]


def test_file_that_a_killed_run_left_is_overwritten(tmp_path):
    (tmp_path / "list.txt.unfinished").write_text("a longer text than the new one")
    replace_text(tmp_path / "list.txt", "new")
    assert names(tmp_path) == ["list.txt"]
    assert (tmp_path / "list.txt").read_text() == "new"


def test_bytes_are_written_unchanged(tmp_path):
    with write_then_replace(tmp_path / "sound", "wb") as file:
        file.write(b"\xff\n")
    assert (tmp_path / "sound").read_bytes() == b"\xff\n"


def test_replace_text_keeps_line_ends(tmp_path):
    replace_text(tmp_path / "text", "é\r\nb\n")
    assert (tmp_path / "text").read_bytes() == "é\r\nb\n".encode()


def test_links_are_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in ("list.txt", "list.txt.unfinished"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    replace_text(tmp_path / "list.txt", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "list.txt").read_text() == "new" and not (tmp_path / "list.txt").is_symlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("")
    for name in ("link", "folder/link"):
        (tmp_path / name).symlink_to(tmp_path)
    for name in ("link", "folder", "list.txt", "nothing"):
        remove_path(tmp_path / name)
    assert names(tmp_path) == ["precious"]


@pytest.fixture
def calls(monkeypatch):
    """Each file or folder that is synced, and each rename, in order."""
    calls, fsync, replace = [], os.fsync, os.replace

    def record(file):
        calls.append(("sync", Path(os.readlink(f"/proc/self/fd/{file}")).name))
        fsync(file)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append(("rename", Path(paths[1]).name)) or replace(*paths))
    return calls


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell the names of open files")
def test_bytes_are_on_the_disk_before_the_name(tmp_path, calls):
    replace_text(tmp_path / "list.txt", "new")
    assert calls == [("sync", "list.txt.unfinished"), ("rename", "list.txt"), ("sync", tmp_path.name)]
    calls.clear()
    (tmp_path / "made" / "inner").mkdir(parents=True)
    (tmp_path / "made" / "inner" / "file").write_text("new")
    replace_path(tmp_path / "made", tmp_path / "model")
    assert sorted(calls[:3]) == [("sync", "file"), ("sync", "inner"), ("sync", "made")]
    assert calls[3:] == [("rename", "model"), ("sync", tmp_path.name)]
    calls.clear()
    with write_then_replace(tmp_path / "recording", "wb", sync=False) as file:
        file.write(b"sound")
    assert calls == [("rename", "recording")]


def test_folder_that_the_system_cannot_sync_is_no_error(tmp_path, monkeypatch):
    def refuse(number):
        def fsync(file):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
