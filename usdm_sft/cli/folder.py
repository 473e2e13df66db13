"""The commands on a dataset folder: `show`, `edit`, `stats`, `export`, `verify` and `push`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

from usdm_sft.folder.own_parts import EMPTY_CARD, Card
from usdm_sft.utils.files import print_json
from usdm_sft.utils.texts import count_noun


def show(
    dataset_dir: str,
    split: str = "train",
    index: int = 0,
    num_examples: int | None = None,
    html: str | None = None,
    data_dir: str | None = None,
    ids: bool = False,
    expand: bool = False,
    serve: bool = False,
    port: int | None = None,
    space: str | None = None,
    repo_id: str | None = None,
) -> None:
    """Print examples with the labelled tokens marked, or show them on an HTML page: some of them, or the whole folder.

    Examples:
        dailytalk-usdm show dailytalk-usdm-data --split test --index 2
        dailytalk-usdm show dailytalk-usdm-data --html page.html --data_dir DailyTalk
        dailytalk-usdm show dailytalk-usdm-data --serve --data_dir DailyTalk
        dailytalk-usdm show dailytalk-usdm-data --space page-of-the-rows --repo_id USER/NAME

    Args:
        dataset_dir: A folder that prepare made.
        split: Split of the examples, or of the first page of --serve and --space.
        index: First row.
        num_examples: Number of rows. By default 1 in the terminal and 20 on a page.
        html: Write one self-contained HTML page to this file instead.
        data_dir: The corpus that the folder was made from: the page then plays both sides.
        ids: Print the ids as well. The page always shows them.
        expand: Print collapsed units as often as they were repeated. The turns of the page always have one unit per frame. Flattened
            streams are printed as they are.
        serve: Show all rows on a page at 127.0.0.1 until Ctrl-C. The page reads the Parquet files; rows can be flagged for edit --drop.
        port: Port of the page; 0 takes a free one. By default 8765. The browser keeps flags for each port.
        space: Write the page as files of a static Space into this folder. It reads the rows from --repo_id, which must be public.
        repo_id: The dataset repository that the folder was pushed to, USER/NAME.
    """
    if sum((html is not None, serve, space is not None)) > 1:
        raise ValueError("html, serve and space exclude each other: give one of them")
    if (port is not None and not serve) or (repo_id is None) != (space is None):
        raise ValueError("port is for --serve, and --repo_id goes with --space: add it, or leave the other out")
    if space is not None and data_dir is not None:
        raise ValueError("data_dir is not for a Space, whose sound is that of --keep_audio: leave it out")
    if serve or space is not None:
        if index or num_examples is not None or ids or expand:
            raise ValueError("index, num_examples, ids and expand are not for --serve and --space: leave them out")
        _show_folder(dataset_dir, split, data_dir, port, space, repo_id)
        return
    from usdm_sft.folder.layout import COUNTS, read_counts, read_layout
    from usdm_sft.folder.page import write_page
    from usdm_sft.folder.rows import expand_ids, read_rows
    from usdm_sft.template.streams import read_streams
    from usdm_sft.template.tokenizer import load_tokenizer
    from usdm_sft.template.view import format_example

    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples is {num_examples}: give a positive number")
    if html is not None:
        if expand:
            remedy = "leave out --html; the turns of a page always have one unit per frame"
            raise ValueError(f"expand is for the terminal: {remedy}")
        shown = write_page(
            dataset_dir, html, split=split, index=index, num_examples=num_examples or 20, data_dir=data_dir
        )
        print(f"{html} shows {count_noun(shown, 'example')}{_describe_silence(dataset_dir, data_dir)}")
        return
    if data_dir is not None:
        raise ValueError("data_dir is for the sound on a page: name the page with --html")
    rows = read_rows(dataset_dir, split, index, num_examples or 1)
    counts = read_counts(dataset_dir)
    streams = read_streams(counts)
    if expand and streams.streams != "flatten":  # flattened streams have every unit already
        layout = read_layout(Path(dataset_dir, COUNTS), counts)
        rows = [expand_ids(row, layout) for row in rows]
    if "unit_rate" in counts["settings"]:
        print(f"units: {streams.describe()}, {counts['num_units']:,} different ones\n")
    tokenizer = load_tokenizer(os.path.join(dataset_dir, "tokenizer")).backend_tokenizer
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n\n".join(format_example(row, tokenizer, color=color, ids=ids) for row in rows))


def _describe_silence(dataset_dir: str, data_dir: str | None, *, plays_folder: bool = False) -> str:
    """Say how a page gets sound; nothing if it has some, or if the corpus has units of its own and perhaps no recordings."""
    from usdm_sft.corpus.manifest import UTTERANCES
    from usdm_sft.folder.layout import read_counts

    counts = read_counts(dataset_dir)
    if data_dir is not None or counts.get("unit_model") is None or (plays_folder and UTTERANCES in counts):
        return ""
    return f" without sound: add --data_dir {dataset_dir if UTTERANCES in counts else 'and the corpus'}"


def _show_folder(
    dataset_dir: str, split: str, data_dir: str | None, port: int | None, space: str | None, repo_id: str | None
) -> None:
    from usdm_sft.folder.serve import PORT, FolderServer, write_space

    if space is not None and repo_id is not None:
        write_space(dataset_dir, space, repo_id, split)
        print(f"{space} has the files of a static Space: hf upload USER/SPACE {space} --repo-type space")
        return
    with FolderServer(dataset_dir, split, data_dir=data_dir, port=PORT if port is None else port) as server:
        silence = _describe_silence(dataset_dir, data_dir, plays_folder=True)
        print(f"{server.url} shows {dataset_dir}{silence}; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def edit(dataset_dir: str, output_path: str, *, drop: str, overwrite: bool = False) -> None:
    """Write a dataset folder without some of its rows. Its counts, card, pictures and digests are those of the rows that stay.

    Examples:
        dailytalk-usdm edit dailytalk-usdm-data without-flagged --drop flags.json

    Args:
        dataset_dir: A folder that prepare made. It is verified first, and not changed.
        output_path: The folder to write.
        drop: JSON file {"rows": ["d23_0", ...]} with the ids of the rows to drop, such as the page of show --serve saves it.
        overwrite: Replace another dataset folder at OUTPUT_PATH.
    """
    from usdm_sft.folder import edit as editing
    from usdm_sft.folder.statistics import summarize_split

    counts = editing.edit(dataset_dir, output_path, drop, overwrite=overwrite)
    for name, split in counts["splits"].items():
        print(f"{name}: {summarize_split(split)}")


def stats(dataset_dir: str, out: str | None = None, num_proc: int | None = None, json: bool = False) -> None:
    """Print the numbers of a dataset folder. Nothing is written without --out.

    Examples:
        dailytalk-usdm stats dailytalk-usdm-data
        dailytalk-usdm stats dailytalk-usdm-data --json
        dailytalk-usdm stats dailytalk-usdm-data --out pictures

    Args:
        dataset_dir: A folder that prepare made.
        out: Draw the plots of the card into this folder, with this version of matplotlib.
        num_proc: Largest number of processes. By default one per core that this process may use; a small folder needs none.
        json: Print one JSON object with the numbers, as counts.json has them.
    """
    from usdm_sft.corpus.manifest import UTTERANCES
    from usdm_sft.folder.layout import COUNTS, data_files, read_counts, read_layout
    from usdm_sft.folder.statistics import compute_statistics, format_histograms, format_table

    counts = read_counts(dataset_dir)
    layout = read_layout(Path(dataset_dir, COUNTS), counts)
    statistics = compute_statistics(data_files(dataset_dir, counts), layout, num_proc=num_proc)
    if out is not None:
        from usdm_sft.folder.pictures import draw_pictures

        draw_pictures(statistics, counts, Path(out).expanduser())
    summaries = {split: values.summary() for split, values in statistics.items()}
    utterances = counts.get(UTTERANCES)
    if json:
        found = {"num_units": counts["num_units"], "splits": summaries}
        print_json(found if utterances is None else found | {UTTERANCES: utterances})
        return
    print(format_table(summaries, counts["num_units"], utterances))
    print(f"\n{format_histograms(statistics)}")
    if out is not None:
        print(f"pictures: {out}")


def export(
    dataset_dir: str,
    output_dir: str,
    format: Literal["usdm", "arrow", "megatron"] = "usdm",
    num_proc: int | None = None,
) -> None:
    """Write the ids and labels of a dataset folder in the format of another trainer.

    Examples:
        dailytalk-usdm export dailytalk-usdm-data preprocessed

    Args:
        dataset_dir: A folder that prepare made.
        output_dir: Where the files go. usdm and megatron replace files of the same names; arrow needs an empty folder.
        format: usdm writes train.txt and test.txt as train_sft.py of naver-ai/usdm reads them; arrow a folder for tokenized_path of
            LLaMA-Factory; megatron packed Parquet files for Megatron-Bridge.
        num_proc: Largest number of processes. By default one per core that this process may use; a small folder needs none.
    """
    from usdm_sft.folder import export as exporting

    suffix, noun = (".txt", "line") if format == "usdm" else ("", "row")
    for split, num_rows in exporting.export(dataset_dir, output_dir, format=format, num_proc=num_proc).items():
        print(f"{split}{suffix}: {count_noun(num_rows, noun)}")


def verify(dataset_dir: str, against: str | None = None, num_proc: int | None = None, json: bool = False) -> None:
    """Check a dataset folder: files, schema, counts, labels, and every row against the template.

    The exit status is 1 if a check fails.

    Examples:
        dailytalk-usdm verify dailytalk-usdm-data
        dailytalk-usdm verify dailytalk-usdm-data --against preprocessed

    Args:
        dataset_dir: A folder that prepare made, or a copy of it.
        against: A folder with the reference's train.txt and test.txt, whose lines must be the rows in any order.
        num_proc: Largest number of processes. By default one per core that this process may use; a small folder needs none.
        json: Print one JSON object: whether the folder is correct, and the number of rows of each split or the problems.
    """
    from usdm_sft.folder.verify import VerificationError, verify

    try:
        rows = verify(dataset_dir, against, num_proc=num_proc)
    except VerificationError as error:
        if json:
            print_json({"correct": False, "problems": error.problems})
        raise
    if json:
        print_json({"correct": True, "rows": rows})
        return
    for split, num_rows in rows.items():
        compared = f" and identical to {os.path.join(against, f'{split}.txt')} (any order)" if against else ""
        print(f"{split}: {count_noun(num_rows, 'row')} {'is' if num_rows == 1 else 'are'} correct{compared}")


def push(
    dataset_dir: str,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    card: Card = EMPTY_CARD,
) -> None:
    """Verify a dataset folder and upload it to the Hub in one commit.

    It needs `hf auth login` or HF_TOKEN; a token on the command line would stay in the history of the shell.

    Examples:
        dailytalk-usdm push dailytalk-usdm-data USER/NAME --private
        dailytalk-usdm push dailytalk-usdm-data USER/NAME --create_pr
        dailytalk-usdm push dailytalk-usdm-data USER/NAME --card.title "Calls" --card.license cc-by-4.0 --card.language en

    Args:
        dataset_dir: A folder that prepare made.
        repo_id: The dataset repository, USER/NAME, or a bucket, buckets/USER/NAME or buckets/USER/NAME/FOLDER. It is created where it does
            not exist. A bucket has no commits, so that readers may see a part of a push.
        private: Create the repository private; an existing one must be private.
        revision: Branch, created where it does not exist. By default the main branch.
        commit_message: By default it names the config and the key of the folder.
        create_pr: Open a pull request to the branch, which must exist.
        card: What the publisher says in the card on the Hub.
    """
    from usdm_sft.folder.push import push

    url = push(
        dataset_dir,
        repo_id,
        private=private,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
        card=Card(**card) if isinstance(card, dict) else card,
    )
    print(url)
    if not create_pr:
        print(f"load_dataset({repo_id!r}) opens it")
