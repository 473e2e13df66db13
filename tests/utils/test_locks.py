import errno
import fcntl
import os

import pytest

from tests.helpers import command
from usdm_sft.cli.main import main
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.prepare import _open_pool
from usdm_sft.units.published import find_unit_model
from usdm_sft.utils import locks
from usdm_sft.utils.locks import file_lock, find_local_locks, lock_problem, path_lock
from usdm_sft.utils.shard_cache import ShardCache


def fail_with(number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    return flock


def succeed(file, operation):
    """A file system that grants every lock."""


FAULTS = [
    (fail_with(errno.ENOLCK), "No locks available"),
    (fail_with(errno.ENOSYS), "Function not implemented"),
    (fail_with(errno.EOPNOTSUPP), "Operation not supported"),
    (succeed, "two open files got the same lock"),
]


def test_locks_that_exclude_work(tmp_path):
    assert lock_problem(tmp_path) is None
    assert not list(tmp_path.iterdir())
    with file_lock(tmp_path / "new" / "lock") as lock:
        assert lock.is_locked


@pytest.mark.parametrize(("flock", "reason"), FAULTS, ids=["ENOLCK", "ENOSYS", "EOPNOTSUPP", "silent"])
def test_file_system_without_locks_is_refused(tmp_path, monkeypatch, flock, reason):
    monkeypatch.setattr(fcntl, "flock", flock)
    message = (
        rf"{tmp_path}/\w*/?locks is on a file system without working file locks \(flock: {reason}\), so two runs could write "
        "one file at the same time: name a folder on another file system with --cache_dir or HF_HOME"
    )
    with pytest.raises(OSError, match=message):
        path_lock(tmp_path / "out", tmp_path)
    with pytest.raises(OSError, match=message):
        ShardCache(tmp_path / "units").claim("key")
    with pytest.raises(OSError, match=r"file system with --model_cache_dir$"):
        file_lock(tmp_path / "models" / "lock", option="--model_cache_dir")


def test_locks_are_checked_once_per_folder(tmp_path, monkeypatch):
    file_lock(tmp_path / "one")
    monkeypatch.setattr(fcntl, "flock", succeed)
    file_lock(tmp_path / "two")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_cache_that_cannot_be_written_names_the_option(tmp_path, monkeypatch, number):
    """Tests may run as root, who may write anywhere."""

    def refuse(*args, **options):
        raise OSError(number, os.strerror(number))

    def message(folder, option):
        return rf"^{folder} cannot be written \({os.strerror(number)}\): name another folder with {option}$"

    with monkeypatch.context() as patch:
        patch.setattr(locks.tempfile, "NamedTemporaryFile", refuse)
        with pytest.raises(OSError, match=message(tmp_path / "locks", "--cache_dir or HF_HOME")):
            path_lock(tmp_path / "out", tmp_path)
    monkeypatch.setattr(locks.Path, "mkdir", refuse)
    with pytest.raises(OSError, match=message(tmp_path / "new" / "units" / "locks", "--cache_dir or HF_HOME")):
        ShardCache(tmp_path / "new" / "units").claim("key")
    with pytest.raises(OSError, match=message(tmp_path / "new", "--model_cache_dir or HF_HOME")):
        find_unit_model("xlsr2_1b_v2", tmp_path / "new")


def test_prepare_without_locks_computes_nothing(mini, unit_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", fail_with(errno.ENOLCK))
    with pytest.raises(SystemExit, match="1"):
        main(command(mini, unit_model, tmp_path)[3:])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "without working file locks (flock: No locks available)" in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache" / "units").exists()


MOUNTS = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 21 0:52 / {root}/nfs rw shared:2 - nfs4 server:/a rw,vers=4.2,local_lock=none
41 21 0:53 / {root}/no\040lock rw - nfs server:/b rw,nolock,vers=3
42 21 0:54 / {root}/flock rw - nfs4 server:/c rw,local_lock=flock
43 42 0:55 / {root}/flock/disk rw - xfs /dev/sdb1 rw
44 21 0:56 / {root}/lustre rw - lustre mds:/d rw,localflock
45 21 0:57 / {root}/global rw - lustre mds:/e rw,flock
"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("ext4", None),
        ("nfs/cache", None),
        ("no lock", "nolock of nfs"),
        ("no lock/cache", "nolock of nfs"),
        ("flock", "local_lock=flock of nfs4"),
        ("flock/disk/cache", None),
        ("flock/disks", "local_lock=flock of nfs4"),
        ("lustre/cache", "localflock of lustre"),
        ("global", None),
    ],
)
def test_mount_options_that_keep_locks_on_one_machine(tmp_path, monkeypatch, folder, expected):
    (tmp_path / "mounts").write_text(MOUNTS.strip().format(root=tmp_path))
    monkeypatch.setattr(locks, "_MOUNTS", tmp_path / "mounts")
    assert find_local_locks(tmp_path / folder) == expected
    monkeypatch.setattr(locks, "_MOUNTS", tmp_path / "macos")
    assert find_local_locks(tmp_path / folder) is None


def test_cache_that_machines_share_with_local_locks_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "find_local_locks", lambda folder: "nolock of nfs")
    for executor in (None, "ray", "slurm"):
        config = PrepareConfig(data_dir="data", output_path="out", executor=executor, cache_dir=str(tmp_path))
        with _open_pool(config):
            pass
    warning = f"{tmp_path} is mounted with nolock of nfs: its locks hold on each machine only"
    assert [message.startswith(warning) for message in caplog.messages] == [True, True]
