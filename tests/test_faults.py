"""Runs that are killed, interrupted, out of disk or of rights: what is finished stands, and a rerun gives the same bytes."""

import glob
import os
import random
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest

from tests.helpers import command, content, options
from usdm_sft.dataset_folder import layout as folder
from usdm_sft.prepare import prepare
from usdm_sft.units.model import UnitModel

NUM_KILLS = int(os.environ.get("USDM_KILLS", "5"))  # 50 and more by hand: it takes seconds each
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module")
def undisturbed(mini, unit_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    prepare(**options(mini, unit_model, root))
    return content(root / "out")


def finished_files(root):
    """Of the cache and of the unfinished output, with what shows that a file was written again."""
    return {path: path.stat().st_ino for level in ("units", "tokens") for path in root.glob(f"cache/{level}/*.arrow")}


def num_written(root):
    """Beside a run that moves and removes folders, which Path.glob would trip over."""
    return sum(len(glob.glob(f"{root}/{part}")) for part in ("cache/*/*.arrow", "out/.unfinished/*/*"))


def test_killed_again_and_again(mini, unit_model, tmp_path, undisturbed):
    chance = random.Random(NUM_KILLS)
    kills, lives = 0, 0
    while kills < NUM_KILLS:
        root = tmp_path / f"life{lives}"
        root.mkdir(exist_ok=True)
        before, written = finished_files(root), num_written(root)
        target = written + chance.randint(1, 8)
        number = chance.choice(SIGNALS)
        run = subprocess.Popen(command(mini, unit_model, root), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while run.poll() is None and num_written(root) < target:
            time.sleep(0.0005)
        if run.poll() is None:
            run.send_signal(number)
        _, error = run.communicate()
        after = finished_files(root)
        assert sum(after.get(path) != inode for path, inode in before.items()) <= 1
        if run.returncode == 0:  # it was faster
            assert content(root / "out") == undisturbed
            lives += 1
            continue
        kills += 1
        assert run.returncode == (130 if number == signal.SIGINT else -number), error.decode()[-2000:]
        assert b"Traceback" not in error or number != signal.SIGINT
        assert not (root / "out" / "counts.json").exists()
    subprocess.run(command(mini, unit_model, root), check=True, capture_output=True)
    assert content(root / "out") == undisturbed
    assert not list(root.rglob("*.unfinished"))


@contextmanager
def small_disk(path, size):
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize(("part", "size"), [("cache_dir", "80k"), ("output_path", "80k")])
def test_disk_full(mini, unit_model, tmp_path, undisturbed, part, size):
    with small_disk(tmp_path / "disk", size) as disk:
        changes = [f"--{part}", str(disk / "here")]
        done = subprocess.run(command(mini, unit_model, tmp_path, *changes), capture_output=True, text=True)
        assert done.returncode == 1
        assert "No space left on device" in done.stderr.splitlines()[-1]
        assert done.stderr.splitlines()[-1].endswith("make room and start it again, finished work is kept")
        assert "Traceback" not in done.stderr
        output = disk / "here" if part == "output_path" else tmp_path / "out"
        assert not (output / "counts.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        subprocess.run(command(mini, unit_model, tmp_path, *changes), check=True, capture_output=True)
        assert content(output) == undisturbed


def test_output_that_cannot_be_written_is_told_before_the_work(mini, unit_model, tmp_path, monkeypatch):
    monkeypatch.setattr(UnitModel, "forward", None)
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match=r"cannot be written .*: name another output_path"):
            prepare(**options(mini, unit_model, tmp_path, output_path=str(disk / "out")))


def test_output_without_the_right_to_write(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder.tempfile, "TemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(OSError, match=r"out cannot be written \(Permission denied\): name another output_path"):
        folder.check_output(tmp_path / "out", overwrite=False, finished_too=False)


def test_out_of_memory_keeps_what_is_finished(mini, unit_model, tmp_path, undisturbed, monkeypatch):
    import torch

    forward, calls = UnitModel.forward, []

    def run_out(self, *args):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(UnitModel, "forward", run_out)
        with pytest.raises(MemoryError, match=r"out of memory on cpu with a batch of .*(batch_seconds|leave out)"):
            prepare(**options(mini, unit_model, tmp_path))
    before = finished_files(tmp_path)
    assert before
    prepare(**options(mini, unit_model, tmp_path))
    assert {path: path.stat().st_ino for path in before} == before
    assert content(tmp_path / "out") == undisturbed
