"""The command `dailytalk-usdm`: one function per subcommand, each a thin layer over a function of the package.

Exit status 0: done; 1: bad input or a failed check (one line on stderr, no traceback); 2: wrong usage; 130: interrupted.
The functions import what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from usdm_sft import __version__
from usdm_sft.config.parser import ConfigAction, Parser, add_config_arguments, add_function_arguments
from usdm_sft.config.prepare_config import PrepareConfig
from usdm_sft.template.config import Template
from usdm_sft.units.settings import PrecisionName
from usdm_sft.utils.errors import find_full_disk
from usdm_sft.utils.texts import count_noun, printable

_QUIET = "Show no progress bars. They are also off where stderr is not a terminal."


def prepare(**options: Any) -> None:
    """Make a dataset folder of examples with units, input_ids and labels."""
    from usdm_sft.dataset_folder.summary import summarize_split
    from usdm_sft.prepare import Submitted, prepare

    config = PrepareConfig(**options | {"template": Template(**options.get("template", {}))})
    try:
        counts = prepare(config)
    except Submitted as submitted:
        print(submitted)
        return
    for split, split_counts in counts["splits"].items():
        print(f"{split}: {summarize_split(split_counts)}")
    output = os.fspath(config.output_path)
    print(
        f"{os.path.join(output, 'counts.json')} lists every row that was left out or shortened, with numbers and digests"
    )
    print(f"load_dataset({output!r}) opens it")


def convert(
    checkpoint: str,
    kmeans: str,
    unit_model_dir: str,
    model_config: str | None = None,
    layer: int = 35,
    final_norm: bool = False,
) -> None:
    """Make a unit model folder from a wav2vec 2.0 or HuBERT checkpoint and k-means centroids.

    Args:
        checkpoint: A folder that transformers saved, or a .pt file of fairseq or fairseq2.
        kmeans: A .npy file of float32 centroids, one per row, at most 65,536.
        unit_model_dir: The folder to make.
        model_config: The transformers config (JSON) of a .pt file. By default that of XLS-R 1B.
        layer: The layer, counted from 1, whose output becomes units: hidden_states[layer] of transformers.
        final_norm: Apply the norm that follows the last layer of a model with pre-norm layers (for a k-means that was fit on
            last_hidden_state, or on hidden_states[-1] of transformers before mid-2026).
    """
    from usdm_sft.convert.convert import convert

    folder = convert(checkpoint, kmeans, unit_model_dir, model_config=model_config, layer=layer, final_norm=final_norm)
    print(f"{folder} is a unit model folder")


def units(unit_model_dir: str, file: list[str], device: str | None = None, precision: PrecisionName = "fp32") -> None:
    """Print the units of audio files, one JSON line per file.

    Args:
        unit_model_dir: A unit model folder.
        file: Audio files.
        device: Where to compute. By default CUDA where there is a GPU, else the CPU.
        precision: fp32 (as the reference), tf32, fp16, bf16, fp16x3 or bf16x3.
    """
    from usdm_sft.units.stream import stream_units
    from usdm_sft.units.tokenizer import UnitTokenizer

    tokenizer = UnitTokenizer.from_pretrained(unit_model_dir, device=device, precision=precision)
    for name, file_units in zip(file, stream_units(tokenizer, file), strict=True):
        print(json.dumps({"file": name, "units": file_units.tolist()}), flush=True)


def export(dataset_dir: str, text_dir: str) -> None:
    """Write train.txt and test.txt as train_sft.py of naver-ai/usdm reads them.

    Args:
        dataset_dir: A folder that prepare made.
        text_dir: Where the text files go. Files of the same names are replaced.
    """
    from usdm_sft.dataset_folder.export import export_text

    for split, num_lines in export_text(dataset_dir, text_dir).items():
        print(f"{split}.txt: {count_noun(num_lines, 'line')}")


def show(
    dataset_dir: str,
    split: str = "train",
    index: int = 0,
    num_examples: int | None = None,
    html: str | None = None,
    data_dir: str | None = None,
    ids: bool = False,
) -> None:
    """Print examples with the labelled tokens marked, or write them to an HTML page.

    Args:
        dataset_dir: A folder that prepare made.
        split: Split of the examples.
        index: First row.
        num_examples: Number of rows. By default 1 in the terminal and 20 on a page.
        html: Write one self-contained HTML page to this file instead.
        data_dir: The corpus that the folder was made from: the page then plays both sides.
        ids: Print the ids as well. The page always shows them.
    """
    from usdm_sft.dataset_folder.page import write_page
    from usdm_sft.dataset_folder.rows import read_rows
    from usdm_sft.template.tokenizer import load_tokenizer
    from usdm_sft.template.view import format_example

    if html is not None:
        shown = write_page(
            dataset_dir, html, split=split, index=index, num_examples=num_examples or 20, data_dir=data_dir
        )
        print(f"{html} shows {count_noun(shown, 'example')}")
        return
    if data_dir is not None:
        raise ValueError("data_dir is for the sound on a page: name the page with --html")
    rows = read_rows(dataset_dir, split, index, num_examples or 1)
    tokenizer = load_tokenizer(os.path.join(dataset_dir, "tokenizer")).backend_tokenizer
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n\n".join(format_example(row, tokenizer, color=color, ids=ids) for row in rows))


def stats(dataset_dir: str) -> None:
    """Print the numbers of a dataset folder, and draw the pictures of its card.

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
        print(f"{split}: {count_noun(num_rows, 'row')} {'is' if num_rows == 1 else 'are'} correct{compared}")


def push(
    dataset_dir: str,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> None:
    """Verify a dataset folder and upload it to the Hub in one commit.

    It needs `hf auth login` or HF_TOKEN; a token on the command line would stay in the history of the shell.

    Args:
        dataset_dir: A folder that prepare made.
        repo_id: The dataset repository, USER/NAME. It is created where it does not exist.
        private: Create the repository private; an existing one must be private.
        revision: Branch, created where it does not exist. By default the main branch.
        commit_message: By default it names the config and the key of the folder.
        create_pr: Open a pull request to the branch, which must exist.
    """
    from usdm_sft.dataset_folder.push import push

    url = push(
        dataset_dir,
        repo_id,
        private=private,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    print(url)
    if not create_pr:
        print(f"load_dataset({repo_id!r}) opens it")


_COMMANDS: dict[Callable[..., None], str] = {
    prepare: "corpus folder -> dataset folder",
    convert: "checkpoint -> unit model folder",
    units: "audio files -> units",
    export: "dataset folder -> the reference's text files",
    show: "examples, with the labelled tokens marked",
    stats: "numbers and pictures of a dataset folder",
    verify: "check a dataset folder",
    push: "dataset folder -> Hub",
}


def make_parser() -> Parser:
    parser = Parser(prog="dailytalk-usdm", description="DailyTalk as training data for spoken-dialog language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subcommands(dest="command", required=True)
    for function, summary in _COMMANDS.items():
        command = Parser(description=(function.__doc__ or "").split("\n\n    Args:")[0])
        if function is prepare:
            command.add_argument(
                "--config",
                action=ConfigAction,
                help="YAML file with any of the options below, or the name of one that the package ships: single_turn, "
                "multi_turn.",
            )
            add_config_arguments(command, PrepareConfig)
        else:
            add_function_arguments(command, function, skip={"private"})
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
        if function in (prepare, push):
            command.add_argument("--quiet", action="store_true", help=_QUIET)
        commands.add_subcommand(function.__name__, command, help=summary)
    return parser


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script."""
    parser = make_parser()
    try:
        namespace = parser.parse_args(args)
    except (
        ValueError,
        OverflowError,
    ) as error:  # a YAML file that is not UTF-8, a NUL in its name, 1e400 as an integer
        parser.error(str(error))
    command = namespace.pop("command")
    options = namespace.pop(command).clone(with_meta=False).as_dict()
    options.pop("config", None)
    options = {name: value for name, value in options.items() if value is not None}  # null in YAML means the default
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("usdm_sft").setLevel(logging.INFO)
    try:
        if options.pop("quiet", False) is True:
            from usdm_sft.utils.progress import disable_progress_bars

            disable_progress_bars()
        _check_names(options, "\0\ud800-\udfff" if command == "prepare" else "\0")
        {function.__name__: function for function in _COMMANDS}[command](**options)
    except KeyboardInterrupt:
        print(f"dailytalk-usdm {command}: interrupted; start it again, finished work is kept", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, IndexError, ImportError, MemoryError, RuntimeError) as error:
        full = find_full_disk(error)
        message = error if full is None else f"{full}: make room and start it again, finished work is kept"
        # Names and values from untrusted files may be in the message.
        print(printable(f"dailytalk-usdm {command}: {message}"), file=sys.stderr)
        sys.exit(1)


def _check_names(options: Mapping[str, Any], refused: str) -> None:
    """Refuse characters that no file name can hold.

    Bytes that are not UTF-8 arrive as surrogates, which Arrow and JSON files cannot store.
    """
    for name, value in options.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and re.search(f"[{refused}]", text):
                raise ValueError(f"{name} {text!r} holds a NUL, or bytes that are not UTF-8: rename the file or folder")


if __name__ == "__main__":
    main()
