"""Freed memory goes back to the operating system."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

from usdm_sft.utils import memory


def test_command_line_lets_arrow_use_the_allocator_of_the_system():
    script = "from usdm_sft.cli.main import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
    script += "import pyarrow; print(pyarrow.default_memory_pool().backend_name)"
    environment = {name: value for name, value in os.environ.items() if name != "ARROW_DEFAULT_MEMORY_POOL"}
    command = [sys.executable, "-c", script]
    assert subprocess.check_output(command, env=environment, text=True).splitlines()[1:] == ["system"]


def test_allocator_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "mimalloc")
    memory.use_system_allocator()
    assert os.environ["ARROW_DEFAULT_MEMORY_POOL"] == "mimalloc"


def test_only_glibc_is_asked_to_give_memory_back(monkeypatch):
    asked = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=asked.append))
    memory.give_back_memory()
    assert asked == [0]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # musl
    memory.give_back_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    memory.give_back_memory()
    assert asked == [0]
