"""The commands on a dataset folder: `show`, `stats`, `export`, `verify` and `push`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

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
) -> None:
    """Print examples with the labelled tokens marked, or write them to an HTML page.

    Examples:
        dailytalk-usdm show dailytalk-usdm-data --split test --index 7
        dailytalk-usdm show dailytalk-usdm-data --html page.html --data_dir DailyTalk

    Args:
        dataset_dir: A folder that prepare made.
        split: Split of the examples.
        index: First row.
        num_examples: Number of rows. By default 1 in the terminal and 20 on a page.
        html: Write one self-contained HTML page to this file instead.
        data_dir: The corpus that the folder was made from: the page then plays both sides.
        ids: Print the ids as well. The page always shows them.
        expand: Print collapsed units as often as they were repeated. The turns of the page always have one unit per frame. Flattened
            streams are printed as they are.
    """
    from usdm_sft.corpus.streams import read_streams
    from usdm_sft.folder.layout import COUNTS, read_counts, read_layout
    from usdm_sft.folder.page import write_page
    from usdm_sft.folder.rows import expand_ids, read_rows
    from usdm_sft.template.tokenizer import load_tokenizer
    from usdm_sft.template.view import format_example

    if html is not None:
        if expand:
            remedy = "leave out --html; the turns of a page always have one unit per frame"
            raise ValueError(f"expand is for the terminal: {remedy}")
        shown = write_page(
            dataset_dir, html, split=split, index=index, num_examples=num_examples or 20, data_dir=data_dir
        )
        print(f"{html} shows {count_noun(shown, 'example')}")
        return
    if data_dir is not None:
        raise ValueError("data_dir is for the sound on a page: name the page with --html")
    rows = read_rows(dataset_dir, split, index, num_examples or 1)
    counts = read_counts(dataset_dir)
    streams = read_streams(counts["settings"])
    if expand and (streams is None or streams.streams != "flatten"):  # flattened streams have every unit already
        layout = read_layout(Path(dataset_dir, COUNTS), counts)
        rows = [expand_ids(row, layout) for row in rows]
    if streams is not None:
        print(f"units: {streams.describe()}, {counts['num_units']:,} different ones\n")
    tokenizer = load_tokenizer(os.path.join(dataset_dir, "tokenizer")).backend_tokenizer
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n\n".join(format_example(row, tokenizer, color=color, ids=ids) for row in rows))


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
    from usdm_sft.corpus.streams import read_streams
    from usdm_sft.folder.layout import COUNTS, data_files, read_counts, read_layout
    from usdm_sft.folder.statistics import compute_statistics, format_histograms, format_table

    counts = read_counts(dataset_dir)
    layout = read_layout(Path(dataset_dir, COUNTS), counts)
    statistics = compute_statistics(data_files(dataset_dir, counts), layout, num_proc=num_proc)
    if out is not None:
        from usdm_sft.folder.pictures import draw_pictures

        draw_pictures(statistics, counts["num_units"], Path(out).expanduser(), read_streams(counts["settings"]))
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
) -> None:
    """Verify a dataset folder and upload it to the Hub in one commit.

    It needs `hf auth login` or HF_TOKEN; a token on the command line would stay in the history of the shell.

    Examples:
        dailytalk-usdm push dailytalk-usdm-data USER/NAME --private
        dailytalk-usdm push dailytalk-usdm-data USER/NAME --create_pr

    Args:
        dataset_dir: A folder that prepare made.
        repo_id: The dataset repository, USER/NAME, or a bucket, buckets/USER/NAME or buckets/USER/NAME/FOLDER. It is created where it does
            not exist. A bucket has no commits, so that readers may see a part of a push.
        private: Create the repository private; an existing one must be private.
        revision: Branch, created where it does not exist. By default the main branch.
        commit_message: By default it names the config and the key of the folder.
        create_pr: Open a pull request to the branch, which must exist.
    """
    from usdm_sft.folder.push import push

    url = push(
        dataset_dir, repo_id, private=private, revision=revision, commit_message=commit_message, create_pr=create_pr
    )
    print(url)
    if not create_pr:
        print(f"load_dataset({repo_id!r}) opens it")
