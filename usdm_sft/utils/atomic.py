"""Files that get their final name only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SUFFIX = ".unfinished"  # fixed, so that the next run overwrites what a killed run left


@contextmanager
def write_then_replace(path: str | Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a file for writing that is renamed to `path` when the block ends without an error.

    The caller makes sure that no other process writes the same path.

    Args:
        path: The final name. Its folder is created if it does not exist.
        mode: "w" or "wb".
        options: Further arguments of `open`; text is UTF-8 by default.

    Yields:
        The open file. An error removes it and leaves an existing `path` as it was.
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
    except BaseException:  # Ctrl-C as well; raised again below
        unfinished.unlink(missing_ok=True)
        raise


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8 with its line ends unchanged. A reader of `path` sees the old or the new text, never a part."""
    with write_then_replace(path, newline="") as file:
        file.write(text)
