"""Locks on files among processes and machines, and a check that the file system really excludes a second process."""

from __future__ import annotations

import logging
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.texts import first_line

logger = logging.getLogger(__name__)

_MOUNTS = Path("/proc/self/mountinfo")
# Options of a network file system with which a lock excludes only processes of the same machine (nfs(5), mount.lustre(8)).
_LOCAL_LOCKS = {"nfs": ("nolock", "local_lock=all", "local_lock=flock"), "lustre": ("localflock",)}


def file_lock(path: Path, *, option: str = "--cache_dir or HF_HOME", thread_local: bool = True) -> FileLock:
    """Return a lock on a file, whose folder is created if it does not exist.

    Args:
        path: The file.
        option: What names another folder, for the error.
        thread_local: As in `filelock.FileLock`: only the thread that acquired the lock may release it.

    Raises:
        OSError: Locks do not work in the folder, it cannot be written, or the file is a link.
    """
    require_locks(path.parent, option=option)
    if path.is_symlink():  # filelock before 3.20.1 would empty the file that it points to
        raise OSError(f"{path} is a link, and the lock of one run must not change another file: remove the link")
    return FileLock(path, thread_local=thread_local)


def path_lock(path: str | Path, cache: Path) -> FileLock:
    """Return a lock on writes to `path` among the runs that share the cache.

    Raises:
        OSError: The cache is on a file system without working locks.
    """
    return file_lock(cache / "locks" / cache_key(str(Path(path).resolve()))[:2])


def require_locks(folder: Path, *, option: str = "--cache_dir or HF_HOME") -> None:
    """Check that locks work in a folder, which is created if it does not exist; arguments and errors as of `file_lock`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = _remembered_problem(folder)
    except OSError as error:  # such as EROFS and EACCES
        reason = error.strerror or first_line(error)
        raise OSError(f"{folder} cannot be written ({reason}): name another folder with {option}") from error
    if problem is not None:
        raise OSError(
            f"{folder} is on a file system without working file locks (flock: {problem}), so two runs could write one "
            f"file at the same time: name a folder on another file system with {option}"
        )


def lock_problem(folder: Path) -> str | None:
    """Return what is wrong with file locks in a folder, or None if one open file excludes another.

    Locks of flock belong to the open file, so two open files of one process exclude each other like those of two processes.

    Raises:
        OSError: The folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where filelock uses another call
        return None

    def lock(file: IO[Any]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # flock(2) has EWOULDBLOCK; some file systems report EACCES
            return False
        return True

    with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as first, open(first.name, "ab") as second:
        try:
            if lock(first) and lock(second):
                return "two open files got the same lock"
        except OSError as error:  # such as ENOLCK, ENOSYS and EOPNOTSUPP
            return error.strerror or first_line(error)
    return None


_remembered_problem = cache(lock_problem)  # once per process and folder


def find_local_locks(folder: Path) -> str | None:
    """Return the mount option with which locks in a folder hold on this machine only, as "local_lock=all of nfs4"; None without one.

    Only Linux says how a folder is mounted. Whether a server passes locks on to its other clients cannot be seen from here.
    """
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    folder = folder.resolve()
    kind, options = "", ""
    longest = -1
    for line in lines:  # proc(5): id, parent, device, root, mount point, options, ..., "-", type, source, options
        before, _, after = line.partition(" - ")
        mount = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4]))
        if (folder == mount or mount in folder.parents) and len(
            mount.parts
        ) >= longest:  # the last of two covers the first
            longest = len(mount.parts)
            kind, options = after.split()[0], after.split()[-1]
    for name, local in _LOCAL_LOCKS.items():
        if kind.startswith(name) and (found := {*options.split(",")} & {*local}):
            return f"{min(found)} of {kind}"
    return None


def warn_of_local_locks(folder: Path) -> None:
    """Warn if locks in a folder, which several machines will use, hold on each machine only."""
    if (found := find_local_locks(folder)) is not None:
        logger.warning(
            "%s is mounted with %s: its locks hold on each machine only, so let no two machines work on one corpus at the same "
            "time, or name another file system with --cache_dir",
            folder,
            found,
        )
