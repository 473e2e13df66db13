"""Texts: what the template cannot hold, lines of a file, and values in error messages."""

import gzip
import re
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TextIO, cast

MAX_LINE = 1_000_000  # characters; DailyTalk's longest line has 752

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # Unicode category Cc, and unpaired surrogates
_UNDECODED = re.compile(r"[\udc80-\udcff]")  # bytes that are not UTF-8, as surrogateescape gives them
_MARKERS = ("<|", "|>", "<s>", "</s>", "<unk>", "<pad>")


def text_problem(text: str) -> str | None:
    """Return why `text` cannot stand in the template, or None where it can.

    A control character would end a line of the template, and the string of a special token would become that token. The
    check lower-cases the text first, as the template does.
    """
    text = text.lower()
    if not text.strip():
        return "is empty or white space only"
    if control := CONTROL.search(text):
        return f"holds the control character {control.group()!r}"
    for marker in _MARKERS:
        if marker in text:
            return f"holds {marker!r}, which is part of a special token"
    return None


def quote(value: str, limit: int = 80) -> str:
    """Quote a value for an error message; one longer than `limit` characters is cut."""
    return repr(value if len(value) <= limit else value[:limit] + "...")


def printable(text: str) -> str:
    """Escape every character of `text` that a terminal would obey or hide, except newlines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def count_noun(number: int, noun: str) -> str:
    """Format a count with its noun, such as "1 row" or "2,048 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_hours(hours: float) -> str:
    """Format hours with two decimals, or with two digits where these would be lost."""
    return f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.2g}"


# Raised by gzip for bytes that are missing or changed.
DAMAGED_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)


class LineError(ValueError):
    """A line that is not UTF-8 text of a sensible length. The message names file, line and remedy."""


def open_text(path: str | Path, *, errors: str = "strict", newline: str | None = None) -> TextIO:
    """Open a UTF-8 text for reading, which gzip may have compressed (.gz). A byte order mark is skipped."""
    opener = gzip.open if str(path).lower().endswith(".gz") else open
    return cast("TextIO", opener(path, "rt", encoding="utf-8-sig", errors=errors, newline=newline))


def read_limited_lines(path: str | Path, *, newline: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield the number (from 1) and the text of each line of a UTF-8 file, with its line end; gzip is unpacked (.gz).

    A line is read only up to `MAX_LINE` characters, so that a file of any content needs little memory. A byte order mark is
    skipped.

    Args:
        path: The file.
        newline: As in `open`: None translates every line end to a newline; a newline character leaves them as they are.

    Raises:
        LineError: A line is too long, is not UTF-8, has a NUL character, or cannot be unpacked.
    """
    with open_text(path, errors="surrogateescape", newline=newline) as file:
        for number in count(1):
            try:
                line = file.readline(MAX_LINE + 1)
            except DAMAGED_GZIP as error:
                raise LineError(f"{path}:{number}: damaged ({first_line(error)}): compress the file again") from error
            if not line:
                return
            if problem := _line_problem(line.removesuffix("\n")):
                raise LineError(f"{path}:{number}: {problem}")
            yield number, line


def _line_problem(line: str) -> str | None:
    if len(line) > MAX_LINE:
        return f"line of more than {MAX_LINE:,} characters, {quote(line)}: name a split list or manifest, or write a manifest with so long rows as Parquet"
    if match := _UNDECODED.search(line):
        return f"not UTF-8 (byte 0x{ord(match.group()) - 0xDC00:02X} in {quote(line)}): save the file as UTF-8"
    if "\0" in line:
        return f"a NUL in {quote(line)}: save the file as UTF-8"
    return None


def format_bytes(number: float) -> str:
    """Format a size for people, such as "3.9 GB"; 1 GB is 1,000,000,000 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.0f} kB"
