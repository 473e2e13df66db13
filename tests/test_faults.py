"""Runs that are killed or interrupted, or that lack disk space, memory or permission.

Finished work is kept, and a rerun gives the same bytes.
"""

import glob
import os
import random
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch

from tests.forked import run_command
from tests.helpers import command, content, inodes, options
from usdm_sft.folder import layout
from usdm_sft.prepare import unit_shards
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units.model import UnitModel

NUM_KILLS = int(os.environ.get("USDM_KILLS", "3"))  # set it to 50 or more by hand; each takes seconds
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def finished_shards(root):
    return inodes(root, "cache/units/*.arrow") | inodes(root, "cache/tokens/*.arrow")


def count_files(root):
    """Count shards and unfinished output files. glob.glob tolerates that the run removes folders; Path.glob does not."""
    return sum(len(glob.glob(f"{root}/{part}")) for part in ("cache/*/*.arrow", "out/.unfinished/*/*/*"))


@pytest.mark.slow
def test_run_killed_at_random_points_is_resumed(mini, unit_model, tmp_path, undisturbed):
    rng = random.Random(NUM_KILLS)
    num_kills, num_finished = 0, 0
    while num_kills < NUM_KILLS:
        root = tmp_path / f"run{num_finished}"
        root.mkdir(exist_ok=True)
        before, written = finished_shards(root), count_files(root)
        target = written + rng.randint(1, 8)
        signal_number = rng.choice(SIGNALS)
        run = run_command(command(mini, unit_model, root)[3:])
        while run.poll() is None and count_files(root) < target:
            time.sleep(0.0005)
        if run.poll() is None:
            run.send_signal(signal_number)
        _, error = run.communicate()
        after = finished_shards(root)
        assert sum(after.get(path) != inode for path, inode in before.items()) <= 1
        if run.returncode == 0:  # the run was faster than the signal
            assert content(root / "out") == undisturbed
            num_finished += 1
            continue
        num_kills += 1
        assert run.returncode == (130 if signal_number == signal.SIGINT else -signal_number), error[-2000:]
        assert "Traceback" not in error or signal_number != signal.SIGINT
        assert not (root / "out" / "counts.json").exists()
    prepare(**options(mini, unit_model, root))
    assert content(root / "out") == undisturbed
    assert not list(root.rglob("*.unfinished"))


@contextmanager
def small_disk(path, size):
    """Mount a file system of `size` bytes at `path`."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize(("part", "size"), [("cache_dir", "80k"), ("output_path", "80k")])
@pytest.mark.slow
def test_full_disk_stops_the_run_and_a_rerun_completes_it(mini, unit_model, tmp_path, undisturbed, part, size):
    with small_disk(tmp_path / "disk", size) as disk:
        changes = [f"--{part}", str(disk / "here")]
        arguments = command(mini, unit_model, tmp_path, *changes)[3:]
        run = run_command(arguments)
        _, error = run.communicate()
        assert run.returncode == 1
        assert "No space left on device" in error.splitlines()[-1]
        assert error.splitlines()[-1].endswith("make room and start it again, finished work is kept")
        assert "Traceback" not in error
        output = disk / "here" if part == "output_path" else tmp_path / "out"
        assert not (output / "counts.json").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert run_command(arguments).wait() == 0
        assert content(output) == undisturbed


def test_read_only_output_is_refused_before_any_work(mini, unit_model, tmp_path, monkeypatch):
    monkeypatch.setattr(UnitModel, "forward_pack", None)
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match=r"cannot be written .*: name another output_path"):
            prepare(**options(mini, unit_model, tmp_path, output_path=str(disk / "out")))


def test_output_without_write_permission_is_refused(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(layout.tempfile, "TemporaryFile", refuse)  # tests may run as root, who may write anywhere
    with pytest.raises(OSError, match=r"out cannot be written \(Permission denied\): name another output_path"):
        layout.check_output(tmp_path / "out", overwrite=False, finished_too=False)


@pytest.mark.slow
def test_out_of_memory_keeps_finished_work(mini, unit_model, tmp_path, undisturbed, monkeypatch):
    forward, calls = UnitModel.forward_pack, []

    def run_out(self, *args):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(UnitModel, "forward_pack", run_out)
        # The first shard takes three forward passes.
        patch.setattr(unit_shards, "order_shards", lambda shards: sorted(shards, key=lambda shard: -shard.longest))
        with pytest.raises(MemoryError, match=r"out of memory on cpu with a batch of .*(batch_seconds|leave out)"):
            prepare(**options(mini, unit_model, tmp_path))
    before = finished_shards(tmp_path)
    assert before
    prepare(**options(mini, unit_model, tmp_path))
    assert finished_shards(tmp_path).items() >= before.items()
    assert content(tmp_path / "out") == undisturbed
