"""Audio from one process to another: the samples stay in memory that both share, and only a descriptor goes through the pipe.

The memory is an unnamed file (`memfd_create`). The limit of /dev/shm, 64 MB in most containers, does not apply to it, and nothing is
left behind when a process is killed.
"""

from __future__ import annotations

import io
import os
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import IO

import numpy as np
import numpy.typing as npt


def open_memory() -> IO[bytes]:
    """Open a new file in memory: one that can be shared, or a `BytesIO` where the system has none (Windows, macOS)."""
    try:
        return open(os.memfd_create("audio"), "wb")
    except (AttributeError, OSError):  # the second where a sandbox forbids the call
        return io.BytesIO()


def send_memory(connection: Connection, file: IO[bytes]) -> None:
    """Send what was written to a file of `open_memory`."""
    if isinstance(file, io.BytesIO):
        connection.send((False, file.tell()))
        connection.send_bytes(file.getbuffer())
        return
    file.flush()
    connection.send((True, file.tell()))
    if file.tell():
        reduction.send_handle(connection, file.fileno(), os.getppid())


def receive_floats(connection: Connection) -> npt.NDArray[np.float32]:
    """Receive what `send_memory` sends, as (num_values,) float32. Shared values are not copied.

    Raises:
        EOFError: The other process died.
    """
    shared, num_bytes = connection.recv()
    if not shared:
        content = bytearray(num_bytes)
        connection.recv_bytes_into(content)
        return np.frombuffer(content, np.float32)
    if not num_bytes:
        return np.zeros(0, np.float32)
    import torch  # the sending process does without

    descriptor = reduction.recv_handle(connection)
    try:
        # By its path, because Python's mmap would keep the descriptor open, of which a process may have only 1,024.
        path, size = f"/proc/self/fd/{descriptor}", num_bytes // 4
        values = torch.from_file(path, shared=False, size=size, dtype=torch.float32, device="cpu")
    finally:
        os.close(descriptor)
    return values.numpy()
