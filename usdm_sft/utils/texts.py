"""Checks of transcripts, and helpers for the wording of messages."""

import re

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # Unicode category Cc, and unpaired surrogates
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
