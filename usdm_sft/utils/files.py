"""Files and folders that get their final name only when they are complete and on the disk, digests of files, and JSON.

No link is ever followed when something is written or removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

SUFFIX = ".unfinished"  # fixed, so that the next run overwrites what a killed run left


@contextmanager
def write_then_replace(path: str | Path, mode: str = "w", *, sync: bool = True) -> Iterator[IO[Any]]:
    """Open a file for writing that is renamed to `path` when the block ends without an error.

    The caller makes sure that no other process writes the same path.

    Args:
        path: The final name. Its folder is created if it does not exist. A link is replaced, not the file that it points to.
        mode: "w" or "wb". Text is written in UTF-8, with its line ends unchanged.
        sync: Write the bytes to the disk before the file gets its name. False suits many small files with a known digest.

    Yields:
        The open file. An error removes it and leaves an existing `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + SUFFIX)
    options: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    unfinished.unlink(missing_ok=True)  # of a killed run, or a link
    try:
        with open(unfinished, mode.replace("w", "x"), **options) as file:
            yield file
        (replace_path if sync else os.replace)(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)  # after an error or Ctrl-C


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` to a file. A reader of `path` sees the old or the new text, never a part."""
    with write_then_replace(path) as file:
        file.write(text)


def replace_path(unfinished: Path, path: Path) -> None:
    """Rename a finished file or folder to `path` when all its bytes are on the disk.

    After a power cut, `path` is therefore the old or the new file, and never an empty one.
    """
    if unfinished.is_dir():
        for folder, _, names in os.walk(unfinished):
            for name in names:
                _sync(os.path.join(folder, name))
            sync_folder(folder)
    else:
        _sync(unfinished)
    os.replace(unfinished, path)
    sync_folder(path.parent)


def remove_path(path: Path) -> None:
    """Remove a file, a folder with its content, or a link but not what it points to. Do nothing if there is nothing."""
    if path.is_dir() and not path.is_symlink():
        with suppress(FileNotFoundError):  # another process removes it as well
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: str | Path) -> None:
    """Write the names in a folder to the disk, where the system can do that."""
    if os.name == "nt":
        return
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def print_json(value: Any) -> None:
    """Print a value as JSON in plain ASCII, which no terminal changes."""
    print(json.dumps(value, indent=2))


def describe_bad_json(path: str | Path, error: Exception) -> str:
    """Say that a file is not JSON. A page of HTML has often been saved in its place, such as one to log in."""
    if is_html(path):
        return f"{path} is HTML and not JSON, such as a page to log in or of an error"
    return f"{path} is not JSON ({error})"


def is_html(path: str | Path) -> bool:
    """Return True for a file that begins as HTML does."""
    with Path(path).expanduser().open("rb") as file:
        return file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")


def read_json(path: str | Path, remedy: str = "correct the file, or download it again") -> dict[str, Any]:
    """Read a JSON file whose top-level value is an object. The errors end with the remedy.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not JSON, or its top-level value is not an object.
    """
    try:
        values = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"{path} is not a file: name a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{describe_bad_json(path, error)}: {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object but a {type(values).__name__}: {remedy}")
    return values
