"""Write the CLI reference from the parser of the command `dailytalk-usdm`.

python docs/make_cli.py    # writes docs/cli.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from usdm_sft.cli.main import make_parser
from usdm_sft.cli.parser import format_default

DOCS = Path(__file__).resolve().parent
HEAD = """\
# Command line

`dailytalk-usdm COMMAND --help` prints the same tables. Options of `prepare` can also stand in a YAML file that `--config`
names, under the same names. On the command line, `--data-dir` and `--data_dir` are the same. `docs/make_cli.py` writes this page from the parser.

The exit status is 0 if the command is done, 1 if the input is bad or a check failed (a message on stderr, no traceback), 2 for
wrong usage, 130 if the command was interrupted, and 141 if the reader of a pipe, such as `head`, ended first.

With the extra `completion`, `--print_completion` prints a script that completes commands, options and file names in the shell:

```shell
pip install 'dailytalk-usdm[completion]'
mkdir -p ~/.local/share/bash-completion/completions
dailytalk-usdm --print_completion shtab-bash > ~/.local/share/bash-completion/completions/dailytalk-usdm
```

`shtab-zsh` prints the script for zsh; put it as `_dailytalk-usdm` into a folder of `$fpath`.
"""


def make_cli() -> str:
    """The text of docs/cli.md."""
    [commands] = [action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return "\n".join([HEAD, *(_section(name, parser) for name, parser in commands.choices.items())])


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if action.dest not in ("help", "print_config")]
    usage = f"```text\n{parser.usage}\n```\n"
    examples = [line.strip() for line in (parser.epilog or "").splitlines()[1:]]
    rows = [f"| {_name(action)} | {_cell(_default(action))} | {_cell(action.help or '')} |" for action in actions]
    table = ["| option | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join([f"## {name}", "", _cell(parser.description), "", usage, "```bash", *examples, "```", "", *table])


def _metavar(action: argparse.Action) -> str:
    return action.dest.upper() + (" ..." if action.nargs == "+" else "")


def _name(action: argparse.Action) -> str:
    choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices else ""
    return f"`{action.option_strings[-1] if action.option_strings else _metavar(action)}{choices}`"


def _default(action: argparse.Action) -> str:
    if action.required or not (action.option_strings or action.nargs == "?"):
        return "required"
    if action.default is None or action.default is False or action.default == argparse.SUPPRESS:
        return ""
    return f"`{format_default(action.default)}`"


def _cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    (DOCS / "cli.md").write_text(make_cli(), encoding="utf-8")
