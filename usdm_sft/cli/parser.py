"""The parser of the command line: options from dataclasses and functions, and wrong usage reported in two lines."""

from __future__ import annotations

import argparse
import difflib
import importlib.resources
import inspect
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, set_parsing_settings  # type: ignore[attr-defined]  # a re-export

from usdm_sft.prepare.config import describe_type
from usdm_sft.utils.texts import printable

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


# A YAML file names values, not code to import; the docstrings of fields are their help.
set_parsing_settings(
    import_path_denylist=["*"], docstring_parse_attribute_docstrings=True, add_print_completion_argument=True
)

PRESETS = "templates"  # folder in configs/ of the values of `--template`
_OPTION = re.compile(r"--[^\s=]+(?=\Z|=)")  # as in argparse, for which a word with a space is a value


class Parser(ArgumentParser):
    """Takes options with - as well as with _, and tells wrong usage in two lines: where the options are explained, and the reason."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options: dict[str, Any] = {"formatter_class": HelpFormatter, "allow_abbrev": True}
        super().__init__(*args, **options | kwargs)

    def parse_args(  # type: ignore[override]  # as in ArgumentParser of jsonargparse
        self, args: Sequence[str] | None = None, *more: Any, **options: Any
    ) -> Any:
        words = _use_underscores(sys.argv[1:] if args is None else args)
        if "--config" in self._option_string_actions:
            words = _put_wholes_first(words)
        return super().parse_args(words, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries something out
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        if missing := re.match(r"the following arguments are required: (\w+)\.", message):
            program += f" {missing[1]}"
            message = message.replace(f"{missing[1]}.", "")
        reason = printable(" ".join(self._say(message).split()))
        self.exit(2, f"usage: see {program} --help\n{program}: {reason}\n")

    def _say(self, message: str) -> str:
        """Put a value of the wrong type into words, and name the nearest option where one is unknown."""
        actions = [action for parser in [self, *self._commands().values()] for action in parser._actions]
        if wrong := re.match(r'Parser key "([\w.]+)":.*\b(?:Got|Given) value: (.*)', message, re.DOTALL):
            name, value = wrong.groups()
            hints = [action._typehint for action in actions if action.dest == name and hasattr(action, "_typehint")]
            return f"{name} is {value!r}: give {describe_type(hints[0], name)}" if hints else message
        if config := re.match(r'Parser key "(template)":\s+Unable to load config (.*)', message):
            return (
                f"{config[1]} is {config[2]}: give names and values, such as {{user_role: Caller}}, a YAML file such as "
                f"./template.yaml, or one of {', '.join(list_presets())}"
            )
        if config := re.match(r'Parser key "card":.*?\'(.+?)\'', message, re.DOTALL):
            return f"card is {config[1]}: give names and values, such as {{license: cc-by-4.0}}, or a YAML file such as ./card.yaml"
        if command := re.match(r"argument command: invalid choice: '(.*)' \(choose from ", message, re.DOTALL):
            return f"there is no command {command[1]!r}{_did_you_mean(command[1], [*self._commands()])}: choose one of {', '.join(self._commands())}"
        if 'expected "command" to be one of' in message:
            return f"the command is missing: name one of {', '.join(self._commands())}"
        no_shtab = message.startswith("argument --print_completion: invalid choice: 'shtab-")
        if no_shtab and "shtab-bash" not in message[60:]:
            return "completion needs shtab: pip install 'dailytalk-usdm[completion]'"
        unknown = re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.-]+)", message)
        options = [option.removeprefix("--") for action in actions for option in action.option_strings]
        if unknown:
            return message.rstrip() + _did_you_mean(unknown[1].replace("-", "_"), options)
        return message

    def _commands(self) -> dict[str, ArgumentParser]:
        commands = [action.choices for action in self._actions if isinstance(action.choices, dict)]
        return commands[0] if commands else {}


def _use_underscores(words: Sequence[str]) -> list[str]:
    """Replace - by _ in the names of options, which are defined with _; values and what follows -- stay as they are."""
    end = _find_end(words)
    options = [_OPTION.sub(lambda name: re.sub(r"(?<=\w)-", "_", name[0]), word) for word in words[:end]]
    return [*options, *words[end:]]


def _put_wholes_first(words: Sequence[str]) -> list[str]:
    """Put options that set several values at once before those that set one of them.

    Later words override earlier ones. An option therefore overrides `--config`, and `--template.user_role` overrides `--template`,
    wherever they stand. Otherwise the order stays as it is.
    """
    end = _find_end(words)
    options: list[list[str]] = [[]]  # each with the words that are its values
    for word in words[:end]:
        if _OPTION.match(word):
            options.append([])
        options[-1].append(word)

    def rank(option: list[str]) -> int:
        name = option[0].partition("=")[0]
        return 0 if name == "--config" else 2 if "." in name else 1

    return [*options[0], *(word for option in sorted(options[1:], key=rank) for word in option), *words[end:]]


def _find_end(words: Sequence[str]) -> int:
    """Return the index of the word --, after which there are no options, or the number of words."""
    return list(words).index("--") if "--" in words else len(words)


def _did_you_mean(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class ConfigAction(ActionConfigFile):
    """The option `--config`: a YAML file, or the name of one that the package ships, such as single_turn."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        values = find_shipped(values, "")
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]  # jsonargparse has no annotation


def find_shipped(value: Any, folder: str) -> Any:
    """Return the path of a YAML file that the package ships, if `value` is its name and not a file; otherwise `value` itself.

    Args:
        value: The value of an option.
        folder: A folder in configs/, or "" for configs/ itself.
    """
    if not re.fullmatch(r"\w+", str(value)) or Path(value).exists():
        return value
    shipped = importlib.resources.files("usdm_sft.configs").joinpath(folder, f"{value}.yaml")
    return str(shipped) if shipped.is_file() else value


def list_presets() -> list[str]:
    """Return the names of the templates that the package ships."""
    files = importlib.resources.files("usdm_sft.configs").joinpath(PRESETS).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def add_config_arguments(parser: ArgumentParser, config: type, *, required: bool = True) -> None:
    """Add an option for each field of a config dataclass, in one group for each of its base classes.

    The docstring of a base class is the title of its group, and the docstring of a field is its help. A field of type bool is
    a flag.

    Args:
        parser: The parser of the command.
        config: The dataclass.
        required: Whether fields without a default are required on the command line.
    """
    for group in config.__bases__:
        hints = get_type_hints(group)
        flags = [field.name for field in fields(group) if hints[field.name] is bool]
        parser.add_class_arguments(group, skip=set(flags))
        title = inspect.getdoc(group)
        [container] = [each for each in parser._action_groups if each.title == title]
        helps = _help_texts(group)
        for name in flags:
            container.add_argument(f"--{name}", action="store_true", help=helps[name])
    for action in parser._actions:
        if action.option_strings == ["--template"]:
            _find_presets(action)
            parser.set_defaults({"template.loss": None})  # follows template.parts
    if not required:
        for action in parser._actions:
            action.required = False


def _find_presets(template: Any) -> None:
    """Let the option `--template`, and `template` in a YAML file, name a template that the package ships."""
    template.help = (
        "The options below in one: a YAML file, names and values such as {user_role: Caller}, or the name of a template that the "
        f"package ships: {', '.join(list_presets())}."
    )
    load = template._load_config
    template._load_config = lambda value, parser: load(find_shipped(value, PRESETS), parser)


def add_function_arguments(
    parser: ArgumentParser,
    function: Callable[..., Any],
    *,
    skip: Collection[str] = (),
    positional: Collection[str] = (),
) -> None:
    """Add the parameters of a function: positional ones where they have no default and are not keyword-only, flags for bool, options for the rest.

    The docstring of the function is the help.

    Args:
        parser: The parser of the command.
        function: The function of the command.
        skip: Parameters to leave out.
        positional: Parameters with a default that are positional all the same; they may be left out on the command line.
    """
    hints, helps = get_type_hints(function), _help_texts(function)
    done: set[str | int] = set(skip)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in done:
            continue
        if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            several = {"nargs": "+", "type": str} if get_origin(hints[name]) is list else {"type": hints[name]}
            parser.add_argument(name, help=helps[name], **several)
        elif name in positional:
            parser.add_argument(name, help=helps[name], nargs="?", type=hints[name], default=parameter.default)
        elif hints[name] is bool:
            parser.add_argument(f"--{name}", action="store_true", help=helps[name])
        else:
            continue
        done.add(name)
    parser.add_function_arguments(function, as_group=False, skip=done)


def _help_texts(documented: Any) -> dict[str, str]:
    return {each.arg_name: " ".join((each.description or "").split()) for each in parse_from_object(documented).params}
