"""Write a file under a temporary name and rename it: a file with its final name is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SUFFIX = ".unfinished"  # a fixed name: the next run overwrites what a killed run left


@contextmanager
def write_then_replace(path: str | Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a file that appears as `path` when the block ends without an error.

    The caller keeps other processes from the same path.

    Args:
        path: The final name; its folder is made where it does not exist.
        mode: "w" or "wb".
        options: Further arguments of `open`; text is UTF-8 by default.

    Yields:
        The open file. After an error it is removed, and an existing `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + SUFFIX)
    if "b" not in mode:
        options = {"encoding": "utf-8"} | options
    try:
        with open(unfinished, mode, **options) as file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8, line ends as they are) so that `path` holds the old or the new text, never a part."""
    with write_then_replace(path, newline="") as file:
        file.write(text)
