"""The command `dailytalk-usdm`: one function per subcommand, each a thin layer over a function of the package.

Exit status 0: done; 1: bad input or a failed check (one line on stderr, no traceback); 2: wrong usage; 130: interrupted;
141: the reader of a pipe ended first.
The functions of the subcommands import what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import re
import select
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TextIO

from usdm_sft import __version__
from usdm_sft.cli.demo import demo
from usdm_sft.cli.folder import edit, export, push, show, stats, verify
from usdm_sft.cli.models import convert, fit, tokenizer, units
from usdm_sft.cli.parser import (
    ConfigAction,
    Parser,
    add_config_arguments,
    add_function_arguments,
    finish_help,
    split_docstring,
)
from usdm_sft.cli.prepare import doctor, prepare
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.utils.errors import describe_error, find_full_disk
from usdm_sft.utils.memory import use_system_allocator
from usdm_sft.utils.texts import printable

_QUIET = "Show no progress: neither bars nor, where stderr is not a terminal, lines at intervals."

_COMMANDS: dict[Callable[..., None], str] = {
    demo: "the whole pipeline on a small corpus that the package ships",
    doctor: "check the set-up before a run",
    prepare: "corpus folder -> dataset folder",
    convert: "checkpoint -> unit model folder",
    fit: "checkpoint and corpus -> unit model folder with centroids of its own",
    units: "audio files -> units",
    tokenizer: "base model -> tokenizer with tokens for units",
    export: "dataset folder -> files for other trainers",
    show: "examples, with the labelled tokens marked",
    edit: "dataset folder without some of its rows",
    stats: "numbers and pictures of a dataset folder",
    verify: "check a dataset folder",
    push: "dataset folder -> Hub",
}


_DRY_RUN = (
    "Print what would be done and write nothing: rows, hours, what would be left out, work in the cache, bytes, and time "
    "where a rate is known. No audio is computed, and the unit model is not downloaded."
)

# Commands that show progress bars, of their own or of a download.
_WITH_PROGRESS = (demo, doctor, prepare, fit, units, show, push)

_EXAMPLES = [
    "dailytalk-usdm demo                                  a first look, offline, without data",
    "dailytalk-usdm prepare --help                        all options of a command",
    "dailytalk-usdm --print_completion shtab-bash         a script for the shell (also shtab-zsh): docs/cli.md",
]


def make_parser() -> Parser:
    parser = Parser(prog="dailytalk-usdm", description="DailyTalk as training data for spoken-dialog language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subcommands(
        dest="command",
        required=True,
        title="commands",
        description="'dailytalk-usdm COMMAND --help' explains each one.",
    )
    for function, summary in _COMMANDS.items():
        description, examples = split_docstring(function)
        command = Parser(description=description)
        if function in (prepare, doctor):
            command.add_argument(
                "--config",
                action=ConfigAction,
                help="YAML file with any of the options below, or the name of one that the package ships: single_turn, "
                "multi_turn.",
            )
            add_config_arguments(command, PrepareConfig, required=function is prepare)
        else:
            add_function_arguments(command, function, skip={"private"}, positional={"demo_dir"})
        if function is push:
            private = command.add_mutually_exclusive_group()  # without either, the owner's default visibility holds
            private.add_argument(
                "--private",
                action="store_true",
                default=None,
                help="Create the repository private; an existing one must be private.",
            )
            private.add_argument(
                "--public", dest="private", action="store_false", default=None, help="Create it public."
            )
        if function is prepare:
            command.add_argument("--dry_run", action="store_true", help=_DRY_RUN)
        if function in _WITH_PROGRESS:
            command.add_argument("--quiet", action="store_true", help=_QUIET)
        finish_help(command, f"{parser.prog} {function.__name__}", examples)
        commands.add_subcommand(function.__name__, command, help=summary)
    finish_help(parser, f"{parser.prog} COMMAND", _EXAMPLES)
    return parser


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script."""
    if sys.stdout is None:  # it was closed
        _run(args)
        return
    if sys.stdout.errors == "strict":  # a locale may lack characters of texts and names
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            _run(args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest at its end
        sys.exit(141)  # as a program that the signal SIGPIPE ends


def _run(args: list[str] | None) -> None:
    """Run a command."""
    use_system_allocator()
    parser = make_parser()
    try:
        namespace = parser.parse_args(args)
    except (ValueError, OverflowError) as error:  # a YAML file not in UTF-8, a NUL in its name, 1e400 as an integer
        parser.error(str(error))
    command = namespace.pop("command")
    options = namespace.pop(command).clone(with_meta=False).as_dict()
    options.pop("config", None)
    options = {name: value for name, value in options.items() if value is not None}  # null in YAML means the default
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("usdm_sft").setLevel(logging.INFO)
    for library in ("huggingface_hub", "datasets"):  # they print their lines themselves
        logging.getLogger(library).propagate = False
    try:
        if options.pop("quiet", False) is True:
            from usdm_sft.utils.progress import disable_progress_bars

            disable_progress_bars()
        options = {name: _expand_home(value) for name, value in options.items()}
        _check_names(
            options, {"prepare": "\0\ud800-\udfff", "doctor": "\0\ud800-\udfff", "units": "\0\n"}.get(command, "\0")
        )
        {function.__name__: function for function in _COMMANDS}[command](**options)
    except KeyboardInterrupt:
        print(f"dailytalk-usdm {command}: interrupted; start it again, finished work is kept", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:  # a panic of a library in Rust is not an Exception
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            raise
        message = describe_error(error)
        if message is None:
            raise
        if (full := find_full_disk(error)) is not None:
            message = f"{full}: make room and start it again, finished work is kept"
        # Names and values from untrusted files may be in the message.
        print(printable(f"dailytalk-usdm {command}: {message}"), file=sys.stderr)
        sys.exit(1)


def _is_unread(file: TextIO) -> bool:
    """Return True for a pipe whose reader has ended."""
    with suppress(OSError, AttributeError):  # not a file of the system, or a system without polls (Windows)
        poll = select.poll()
        poll.register(file.fileno(), 0)
        return bool(poll.poll(0))
    return False


def _expand_home(value: Any) -> Any:
    """Expand `~`, which the shell leaves as it is in `--option=~/folder`, and which YAML does not know."""
    if isinstance(value, list):
        return [_expand_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _check_names(options: Mapping[str, Any], refused: str) -> None:
    """Refuse characters that no file name can hold.

    Bytes that are not UTF-8 arrive as surrogates, which Arrow and JSON files cannot store. A newline separates the recordings of a turn.
    """
    for name, value in options.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and re.search(f"[{refused}]", text):
                raise ValueError(
                    f"{name} {text!r} holds a NUL, a newline, or bytes that are not UTF-8: rename the file or folder"
                )
