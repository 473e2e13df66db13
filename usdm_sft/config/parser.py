"""The parser of the command line: what is wrong with the arguments comes in one line, in words."""

from __future__ import annotations

import difflib
import re
from typing import NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from usdm_sft.config.checks import describe_type

set_parsing_settings(import_path_denylist=["*"])  # a YAML file names values, and no code to import


class Parser(ArgumentParser):
    """Tells wrong usage in two lines: where the options are explained, and the reason."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries something out
            super().error(message, ex)
        from usdm_sft.utils.texts import printable

        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        if missing := re.match(r"the following arguments are required: (\w+)\.", message):
            program += f" {missing[1]}"
            message = message.replace(f"{missing[1]}.", "")
        reason = printable(" ".join(self._say(message).split()))
        self.exit(2, f"usage: see {program} --help\n{program}: {reason}\n")

    def _say(self, message: str) -> str:
        """Put a value of the wrong type into words, and name the nearest option where one is unknown."""
        actions = [action for parser in [self, *self._command_parsers()] for action in parser._actions]
        if wrong := re.match(r'Parser key "([\w.]+)":.*\b(?:Got|Given) value: (.*)', message, re.DOTALL):
            name, value = wrong.groups()
            hints = [action._typehint for action in actions if action.dest == name and hasattr(action, "_typehint")]
            return f"{name} is {value!r}: give {describe_type(hints[0])}" if hints else message
        if config := re.match(r'Parser key "(template)":\s+Unable to load config (.*)', message):
            return f"{config[1]} is {config[2]}: give names and values, such as {{user_role: Caller}}, or a YAML file of them"
        unknown = re.search(r"(?:unrecognized arguments: --|does not accept option ')([\w.]+)", message)
        options = [option.removeprefix("--") for action in actions for option in action.option_strings]
        if unknown and (near := difflib.get_close_matches(unknown[1], options, n=1)):
            return f"{message.rstrip()} (did you mean {near[0]}?)"
        return message

    def _command_parsers(self) -> list[ArgumentParser]:
        return [
            parser for action in self._actions if isinstance(action.choices, dict) for parser in action.choices.values()
        ]
