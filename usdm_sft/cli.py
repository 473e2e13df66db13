"""The command `dailytalk-usdm`: one subcommand a verb, each a thin layer over a function of the package.

Exit status 0: done; 1: bad input or a failed check (one line on stderr, no traceback); 2: wrong usage. Nothing heavy is
imported before the arguments are understood.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys

from usdm_sft import __version__
from usdm_sft.config.parser import Parser
from usdm_sft.convert.convert import convert
from usdm_sft.dataset_folder.export import export_text
from usdm_sft.prepare import Submitted, prepare
from usdm_sft.template.config import Template

QUIET = {"action": "store_true", "help": "Show no progress bars; there are none either where stderr is not a terminal."}


def units(unit_model_dir: str, file: list[str], device: str | None = None, precision: str = "fp32") -> None:
    """Print the units of audio files, one JSON line a file.

    Args:
        unit_model_dir: A unit model folder.
        file: Audio files.
        device: Where to compute; CUDA where there is one, else the CPU.
        precision: fp32 (the reference's), tf32, fp16 or bf16.
    """
    from usdm_sft.units.stream import stream_units
    from usdm_sft.units.tokenizer import UnitTokenizer

    tokenizer = UnitTokenizer.from_pretrained(unit_model_dir, device=device, precision=precision)
    for name, file_units in zip(file, stream_units(tokenizer, file), strict=True):
        print(json.dumps({"file": name, "units": file_units.tolist()}), flush=True)


def show(
    dataset_dir: str,
    split: str = "train",
    index: int = 0,
    num_examples: int | None = None,
    html: str | None = None,
    data_dir: str | None = None,
    ids: bool = False,
) -> None:
    """Print examples with what bears loss set apart, or write them to an HTML page.

    Args:
        dataset_dir: A folder that prepare made.
        split: Split of the examples.
        index: First row.
        num_examples: How many rows; 1 in the terminal and 20 on a page by default.
        html: Write one self-contained HTML page to this file instead.
        data_dir: The corpus that the folder was made from: with it both sides can be heard on the page.
        ids: Print the ids as well (the page always has them).
    """
    from usdm_sft.dataset_folder.page import write_page
    from usdm_sft.dataset_folder.rows import read_rows

    if html is not None:
        shown = write_page(
            dataset_dir, html, split=split, index=index, num_examples=num_examples or 20, data_dir=data_dir
        )
        print(f"{html} shows {shown} examples")
        return
    if data_dir is not None:
        raise ValueError("data_dir is for the sound on a page: name the page with --html")
    from usdm_sft.template.tokenizer import load_tokenizer
    from usdm_sft.template.view import format_example

    rows = read_rows(dataset_dir, split, index, num_examples or 1)
    tokenizer = load_tokenizer(os.path.join(dataset_dir, "tokenizer")).backend_tokenizer
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n\n".join(format_example(row, tokenizer, color=color, ids=ids) for row in rows))


def stats(dataset_dir: str) -> None:
    """Print what a dataset folder holds in numbers, and draw the pictures of its card.

    Args:
        dataset_dir: A folder that prepare made.
    """
    from usdm_sft.dataset_folder.layout import PICTURES, read_counts
    from usdm_sft.dataset_folder.statistics import format_table
    from usdm_sft.dataset_folder.writer import replace_pictures

    print(format_table(replace_pictures(dataset_dir), read_counts(dataset_dir)["num_units"]))
    print(f"pictures: {os.path.join(dataset_dir, PICTURES)}")


def verify(dataset_dir: str, against: str | None = None) -> None:
    """Check a dataset folder: files, schema, counts, labels, and every row against the template.

    Args:
        dataset_dir: A folder that prepare made, or a copy of it.
        against: A folder with the reference's train.txt and test.txt, whose lines must be the rows in any order.
    """
    from usdm_sft.dataset_folder.verify import verify

    for split, num_rows in verify(dataset_dir, against).items():
        compared = f" and identical to {os.path.join(against, f'{split}.txt')} (any order)" if against else ""
        print(f"{split}: {_count(num_rows, 'row')} {'is' if num_rows == 1 else 'are'} correct{compared}")


def push(dataset_dir: str, repo_id: str, **options) -> None:
    """Verify and upload. There is no option for the token: it would stay in the shell's history."""
    from usdm_sft.dataset_folder.push import push

    print(push(dataset_dir, repo_id, **options))
    if not options["create_pr"]:
        print(f"load_dataset({repo_id!r}) opens it")


def make_parser() -> Parser:
    parser = Parser(prog="dailytalk-usdm", description="DailyTalk as training data for spoken-dialog language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subcommands(dest="command", required=True)

    command = Parser(description="Make a dataset folder of examples with units, input_ids and labels.")
    command.add_argument("--config", action="config", help="YAML file with any of the options below.")
    command.add_function_arguments(prepare, skip={"overwrite", "merge_speaker_turns"})
    command.add_argument(
        "--merge_speaker_turns",
        action="store_true",
        help="Make one turn of neighbouring ones of a speaker; by default such dialogs are left out whole.",
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="Write into an output folder that holds something else; what has the name of ours is replaced.",
    )
    command.add_argument("--quiet", **QUIET)
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

    command = Parser(description="Print examples with what bears loss set apart, or write them to an HTML page.")
    command.add_argument("dataset_dir", type=str, help="A folder that prepare made.")
    command.add_function_arguments(show, skip={"dataset_dir", "ids"})
    command.add_argument("--ids", action="store_true", help="Print the ids as well (the page always has them).")
    commands.add_subcommand("show", command, help="examples, and where the loss falls")

    command = Parser(description="Print what a dataset folder holds in numbers, and draw the pictures of its card.")
    command.add_function_arguments(stats, as_positional=True)
    commands.add_subcommand("stats", command, help="numbers and pictures of a dataset folder")

    command = Parser(
        description="Check a dataset folder: files, schema, counts, labels, every row against the template."
    )
    command.add_argument("dataset_dir", type=str, help="A folder that prepare made, or a copy of it.")
    command.add_function_arguments(verify, skip={"dataset_dir"})
    commands.add_subcommand("verify", command, help="is a dataset folder what it says?")

    command = Parser(description="Verify a dataset folder and upload it to the Hub in one commit.")
    command.add_argument("dataset_dir", type=str, help="A folder that prepare made.")
    command.add_argument(
        "repo_id", type=str, help="The dataset repository, USER/NAME; created where it does not exist."
    )
    private = command.add_mutually_exclusive_group()  # neither: as the settings of its owner say
    private.add_argument(
        "--private", action="store_true", default=None, help="Create it private; if it exists, it must be private."
    )
    private.add_argument("--public", dest="private", action="store_false", default=None, help="Create it public.")
    command.add_argument(
        "--revision", type=str, help="Branch, created where there is none; the main branch by default."
    )
    command.add_argument("--commit_message", type=str, help="By default it names the config and the key of the folder.")
    command.add_argument(
        "--create_pr", action="store_true", help="Open a pull request to the branch, which must exist."
    )
    command.add_argument("--quiet", **QUIET)
    commands.add_subcommand("push", command, help="dataset folder -> Hub")
    return parser


def run(command: str, options: dict) -> None:
    if command == "prepare":
        try:
            counts = prepare(**options | {"template": Template(**options.get("template", {}))})
        except Submitted as submitted:
            print(submitted)
            return
        for split, its in counts["splits"].items():
            print(f"{split}: {_summary(its)}")
        output = options["output_path"]
        print(
            f"{os.path.join(output, 'counts.json')} lists what was left out or cut, and holds all numbers and digests"
        )
        print(f"load_dataset({output!r}) opens it")
    elif command == "convert":
        print(f"{convert(**options)} is a unit model folder")
    elif command == "export":
        for split, num_lines in export_text(**options).items():
            print(f"{split}.txt: {num_lines:,} lines")
    else:
        {"units": units, "show": show, "stats": stats, "verify": verify, "push": push}[command](**options)


def _summary(split: dict) -> str:
    """Say in one line what a split of counts.json holds, and what was left out of it."""
    bad_audio, dialogs = split["pairs_with_bad_audio"], split["dialogs_left_out"]
    left_out = [f"{_count(len(split['pairs_left_out']) - bad_audio, 'row')} too long"]
    if bad_audio:
        left_out.append(f"{_count(bad_audio, 'pair')} with bad audio")
    reasons = ", ".join(f"{dialog}: {reason}" for dialog, reason in dialogs.items())
    left_out.append(_count(len(dialogs), "dialog") + (f" ({reasons})" if reasons else ""))
    cut = f"; cut: {_count(len(split['rows_cut']), 'row')} too long" if split["rows_cut"] else ""
    return (
        f"{_count(split['rows'], 'row')} from {_count(split['dialogs'], 'dialog')} ({split['hours']:.2f} h), "
        f"{_count(split['tokens'], 'token')}, {split['labelled_tokens']:,} labelled; left out: {', '.join(left_out)}{cut}"
    )


def _count(number: int, noun: str) -> str:
    """Such as "1 row" and "2,000 rows"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _find_full_disk(error: BaseException | None) -> OSError | None:
    """What a full disk leads to may hide it."""
    while error is not None:
        if isinstance(error, OSError) and os.strerror(errno.ENOSPC) in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _check_names(options: dict, refused: str) -> None:
    """What no file name may hold; bytes that are not UTF-8, which come as surrogates, no Arrow file and no JSON can take."""
    for name, value in options.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and re.search(f"[{refused}]", text):
                raise ValueError(f"{name} {text!r} holds a NUL, or bytes that are not UTF-8: rename the file or folder")


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script."""
    parser = make_parser()
    try:
        options = parser.parse_args(args)
    except (
        ValueError,
        OverflowError,
    ) as error:  # a YAML file that is not UTF-8, a NUL in its name, 1e400 as an integer
        parser.error(str(error))
    command = options.pop("command")
    options = options.pop(command).as_dict()
    options.pop("config", None)
    options = {name: value for name, value in options.items() if value is not None}  # null in YAML: the default
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("usdm_sft").setLevel(logging.INFO)
    try:
        if options.pop("quiet", False):
            from usdm_sft.utils.progress import disable_progress_bars

            disable_progress_bars()
        _check_names(options, "\0\ud800-\udfff" if command == "prepare" else "\0")
        run(command, options)
    except KeyboardInterrupt:
        print(f"dailytalk-usdm {command}: interrupted; start it again, finished work is kept", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, IndexError, ImportError, MemoryError, RuntimeError) as error:
        if (full := _find_full_disk(error)) is not None:
            error = f"{full}: make room and start it again, finished work is kept"
        from usdm_sft.utils.texts import printable

        print(printable(f"dailytalk-usdm {command}: {error}"), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
