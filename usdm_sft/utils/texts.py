"""Texts: what the template cannot hold, and values in error messages."""

import re

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # Unicode category Cc, and unpaired surrogates
_MARKERS = ("<|", "|>", "<s>", "</s>", "<unk>", "<pad>")


def text_problem(text: str) -> str | None:
    """What keeps `text` out of the template, or None. The text is judged lower-cased, as the template sees it.

    A control character would end a line of the template, and a special-token string would become the token.
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
    """A value for an error message."""
    return repr(value if len(value) <= limit else value[:limit] + "...")


def printable(text: str) -> str:
    """The text with what a terminal would obey or hide escaped, newlines apart."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def count_noun(number: int, noun: str) -> str:
    """A number with thousands separators and its noun, such as "1 row" or "2,048 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
