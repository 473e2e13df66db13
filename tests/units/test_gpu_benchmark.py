"""The GPU benchmark runs on the CPU with a tiny model, and without the packages that a GPU machine may lack."""

import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY

CODE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        lacks = ("datasets", "soundfile", "soxr", "pyarrow", "multiprocess", "jsonargparse")
        return None if name.split(".")[0] in lacks else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
from tests.benchmarks.gpu import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_tiny_run_on_the_cpu_prints_every_part():
    command = [sys.executable, "-c", CODE, "--device", "cpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n## ") == 7 and "minutes are over" not in done.stdout
    assert "skipped on the CPU: tf32, peak memory" in done.stdout
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    agreement = {row[0]: row[2] for row in cells if len(row) == 7}
    assert agreement["fp32"] == agreement["fp16x3"] == "100.0000%"
    assert "a default needs CUDA and 100,000 frames" in done.stdout
