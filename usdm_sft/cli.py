"""The command `dailytalk-usdm`: one subcommand a verb, each a thin layer over a function of the package.

Exit status 0: done; 1: bad input or a failed check (one line on stderr, no traceback); 2: wrong usage. Nothing heavy is
imported before the arguments are understood.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
import sys

from jsonargparse import ArgumentParser

from usdm_sft import __version__
from usdm_sft.checkpoint import convert
from usdm_sft.export import export_text
from usdm_sft.pipeline import prepare


class Parser(ArgumentParser):
    """Names the nearest option where one is unknown, on the command line and in a YAML file alike."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        subparsers = [
            each for action in self._actions if isinstance(action.choices, dict) for each in action.choices.values()
        ]
        actions = [action for parser in [self, *subparsers] for action in parser._actions]
        options = [option.removeprefix("--") for action in actions for option in action.option_strings]
        unknown = re.search(r"(?:unrecognized arguments: --|does not accept option ')(\w+)", message)
        if unknown and (near := difflib.get_close_matches(unknown[1], options, n=1)):
            message = f"{message.rstrip()} (did you mean {near[0]}?)"
        super().error(message, ex)


def units(unit_model_dir: str, file: list[str], device: str | None = None, precision: str = "fp32") -> None:
    """Print the units of audio files, one JSON line a file.

    Args:
        unit_model_dir: A unit model folder.
        file: Audio files.
        device: Where to compute; CUDA where there is one, else the CPU.
        precision: fp32 (the reference's), tf32, fp16 or bf16.
    """
    from usdm_sft.units import UnitTokenizer

    tokenizer = UnitTokenizer.from_pretrained(unit_model_dir, device=device, precision=precision)
    found, _ = tokenizer.tokenize_files(file)
    for name, its_units in zip(file, found, strict=True):
        print(json.dumps({"file": name, "units": its_units.tolist()}))


def make_parser() -> Parser:
    parser = Parser(prog="dailytalk-usdm", description="DailyTalk as training data for spoken-dialog language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subcommands(dest="command", required=True)

    command = Parser(description="Make a dataset folder of examples with units, input_ids and labels.")
    command.add_argument("--config", action="config", help="YAML file with any of the options below.")
    command.add_function_arguments(prepare, skip={"overwrite"})
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="Write into an output folder that holds something else; what has the name of ours is replaced.",
    )
    commands.add_subcommand("prepare", command, help="corpus folder -> dataset folder")

    command = Parser(
        description="Make a unit model folder from a wav2vec 2.0 or HuBERT checkpoint and k-means centroids."
    )
    command.add_function_arguments(convert, as_positional=True, skip={"final_norm"})
    command.add_argument(
        "--final_norm",
        action="store_true",
        help="Apply the norm that follows the last layer of a model with pre-norm layers (for a k-means that was fit on "
        "last_hidden_state, or on hidden_states[-1] of transformers before mid-2026).",
    )
    commands.add_subcommand("convert", command, help="checkpoint -> unit model folder")

    command = Parser(description="Print the units of audio files, one JSON line a file.")
    command.add_argument("unit_model_dir", type=str, help="A unit model folder.")
    command.add_argument("file", type=str, nargs="+", help="Audio files.")
    command.add_function_arguments(units, skip={"unit_model_dir", "file"})
    commands.add_subcommand("units", command, help="audio files -> units")

    command = Parser(description="Write train.txt and test.txt as naver-ai/usdm's train_sft.py reads them.")
    command.add_function_arguments(export_text, as_positional=True)
    commands.add_subcommand("export", command, help="dataset folder -> the reference's text files")
    return parser


def run(command: str, options: dict) -> None:
    if command == "prepare":
        counts = prepare(**options)
        for split, its in counts["splits"].items():
            left_out = len(its["pairs_left_out"])
            print(
                f"{split}: {its['rows']:,} examples from {its['dialogs']:,} dialogs ({its['hours']:.2f} h), "
                f"{its['tokens']:,} tokens, {its['labelled_tokens']:,} labelled; left out: {left_out} too long, "
                f"{len(its['dialogs_left_out'])} dialogs ({_reasons(its['dialogs_left_out'])})"
            )
        print(f"load_dataset({options['output_path']!r}) opens it; counts.json has every number and digest")
    elif command == "convert":
        print(f"{convert(**options)} is a unit model folder")
    elif command == "units":
        units(**options)
    elif command == "export":
        for split, num_lines in export_text(**options).items():
            print(f"{split}.txt: {num_lines:,} lines")


def _reasons(left_out: dict[str, str]) -> str:
    return ", ".join(f"{dialog}: {reason}" for dialog, reason in left_out.items()) or "none"


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script."""
    options = make_parser().parse_args(args)
    command = options.pop("command")
    options = options.pop(command).as_dict()
    options.pop("config", None)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        run(command, options)
    except (OSError, ValueError, ImportError, MemoryError, RuntimeError) as error:
        print(f"dailytalk-usdm {command}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
