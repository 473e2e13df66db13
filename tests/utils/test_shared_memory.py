import multiprocessing
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from usdm_sft.utils.shared_memory import open_memory, receive_floats, send_memory

needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd_create")


@pytest.fixture
def pipe(monkeypatch):
    """Both ends of a pipe; what a process sends goes to itself."""
    monkeypatch.setattr(os, "getppid", os.getpid)
    ends = multiprocessing.Pipe()
    yield ends
    for end in ends:
        end.close()


def send_and_receive(pipe, values):
    with open_memory() as memory:
        memory.write(values.data)
        send_memory(pipe[0], memory)
    return receive_floats(pipe[1])


@pytest.mark.parametrize("shared", [pytest.param(True, marks=needs_memfd), False])
def test_values_arrive_and_may_be_written(pipe, monkeypatch, shared):
    if not shared:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    values = np.random.default_rng(0).standard_normal(5_000).astype(np.float32)
    found = send_and_receive(pipe, values)
    assert found.dtype == np.float32 and np.array_equal(found, values)
    found[0] = 7  # torch warns of arrays that are read-only
    empty = send_and_receive(pipe, values[:0])
    assert empty.dtype == np.float32 and empty.shape == (0,)


@needs_memfd
def test_call_that_a_sandbox_forbids(pipe, monkeypatch):
    def forbid(name):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbid)
    assert send_and_receive(pipe, np.ones(3, np.float32)).tolist() == [1, 1, 1]


@needs_memfd
def test_values_in_shared_memory_keep_no_descriptor_open(pipe):
    kept = [send_and_receive(pipe, np.full(1_000, number, np.float32)) for number in range(20)]
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    assert not [link for link in links if os.path.islink(link) and "memfd:" in os.readlink(link)]
    with open("/proc/self/maps") as maps:
        assert sum("memfd:audio" in line for line in maps) >= 20  # they are shared
    assert [values[-1] for values in kept] == list(range(20))


@needs_memfd
def test_small_dev_shm_does_not_matter():
    """Containers have 64 MB there; here it holds 64 KB."""
    write = "with open_memory() as memory: print(type(memory).__name__, memory.write(bytes(1 << 20)), memory.tell())"
    code = f"from usdm_sft.utils.shared_memory import open_memory\n{write}"
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm && ! head -c 100000 /dev/zero 2>/dev/null >/dev/shm/x"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"BufferedWriter {1 << 20} {1 << 20}\n", "")
