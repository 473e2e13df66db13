"""What `--help` shows: a short usage, options with their defaults, and examples."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter

_EXAMPLES = "examples:\n"


class HelpFormatter(DefaultHelpFormatter):  # type: ignore[misc]  # jsonargparse has no types
    """Shows defaults and no Python types, and keeps the lines of examples."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        hidden = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        if action.option_strings and not hidden and "default" not in text:
            return f"{text} (default: {format_default(action.default)})"
        return text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_EXAMPLES):
            return text
        filled: str = super()._fill_text(text, width, indent)
        return filled


def format_default(value: Any) -> str:
    """Return the default of an option in one line, as it is given on the command line."""
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return " ".join(str(value).split()).replace("%", "%%")


def split_docstring(function: Callable[..., Any]) -> tuple[str, list[str]]:
    """Return the description of a command and the lines of its section "Examples:"."""
    text, _, _ = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")
    description, _, examples = text.partition("\n\nExamples:\n")
    return description, [line.strip() for line in examples.splitlines() if line.strip()]


def finish_help(parser: ArgumentParser, program: str, examples: list[str]) -> None:
    """Give a parser its usage, with required arguments only, its examples, and the choices of options that may be left out.

    Args:
        parser: A parser with all its arguments.
        program: Program and command, such as "dailytalk-usdm prepare".
        examples: Lines to show below the options.
    """
    words = [program]
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        choices = [each for each in get_args(hint) if get_origin(each) is Literal] if NoneType in get_args(hint) else []
        if choices:
            action.metavar = "{" + ",".join(get_args(choices[0])) + "}"
        if action.option_strings and action.required:
            words.append(f"{action.option_strings[-1]} {action.dest.upper()}")
        elif not action.option_strings and not isinstance(action.choices, dict):
            word = action.dest.upper() + (" ..." if action.nargs == "+" else "")
            words.append(f"[{word}]" if action.nargs == "?" else word)
            action.metavar = action.dest.upper()
    parser.usage = " ".join([*words, "[options]"])
    if examples:
        parser.epilog = _EXAMPLES + "\n".join(f"  {line}" for line in examples)
