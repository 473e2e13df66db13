"""The command `demo`: the whole pipeline on the small spoken corpus that the package ships, offline, on the CPU, in seconds.

The folder of the demo:

    DEMO/corpus        eight spoken dialogs in DailyTalk's layout
    DEMO/expected      the output of the reference for them
    DEMO/unit_model    a toy unit model, converted
    DEMO/dataset       the dataset folder
    DEMO/page.html     its training examples with their sound
    DEMO/cache         finished work
"""

from __future__ import annotations

import os
import shutil
import sys
import webbrowser
from pathlib import Path
from typing import Any, NamedTuple

from usdm_sft.cli.folder import show
from usdm_sft.template.config import OFFLINE
from usdm_sft.utils.files import SUFFIX, remove_path, replace_path

FILES = Path(__file__).with_name("demo_files")


def demo(demo_dir: str = "dailytalk-usdm-demo", open: bool = False) -> None:
    """Prepare a small spoken corpus with a toy unit model, offline on the CPU, and show the result.

    The package ships both. It needs the extra demo, which brings the tokenizer.

    Examples:
        dailytalk-usdm demo
        dailytalk-usdm demo my-demo --open

    Args:
        demo_dir: The folder to make.
        open: Open the page of examples in the browser.
    """
    from usdm_sft.folder.statistics import load_call

    dataset, page, counts = run_demo(demo_dir)
    folder, splits = os.fspath(dataset), counts["splits"]
    rows = " and ".join(f"{split['rows']} {name}" for name, split in splits.items())
    used = sum(split["dialogs"] for split in splits.values())
    dialogs = used + sum(len(split["dialogs_left_out"]) for split in splits.values())
    if sys.stdout.isatty():
        show(folder)
        print()
    print(f"made: {folder}, {rows} examples with units, input_ids and labels, from {used} of {dialogs} spoken dialogs")
    print(f"load: from datasets import load_dataset; {load_call(folder, counts)}")
    print(f"look: open {page} in a browser, or run: dailytalk-usdm show {folder}")
    if open and not webbrowser.open(address := page.resolve().as_uri()):
        print(f"no browser was found: open {address} yourself", file=sys.stderr)


class Demo(NamedTuple):
    """What the demo made."""

    dataset: Path
    page: Path
    counts: dict[str, Any]  # as in counts.json


def run_demo(demo_dir: str | Path) -> Demo:
    """Prepare the corpus of the demo and write a page of its examples. A second run in the same folder changes nothing.

    Args:
        demo_dir: The folder to work in; it is made if it does not exist.

    Raises:
        FileExistsError: The folder holds files of the same names with other content, or links.
        ImportError: The extra demo is not installed.
    """
    from usdm_sft.folder.page import write_page
    from usdm_sft.prepare.prepare import prepare
    from usdm_sft.units.convert import convert

    folder = Path(demo_dir).expanduser()
    for name in ("corpus", "expected", "unit_model", "dataset", "cache"):
        if (folder / name).is_symlink():
            raise FileExistsError(f"{folder / name} is a link, which the demo does not follow: name another folder")
    for name in ("corpus", "expected"):
        _copy(FILES / name, folder / name)
    source = FILES / "unit_model"
    unit_model = convert(
        source / "checkpoint.pt", source / "kmeans.npy", folder / "unit_model", model_config=source / "config.json"
    )
    counts = prepare(
        data_dir=folder / "corpus",
        unit_model=unit_model,
        pretrained_model_name_or_path=OFFLINE,
        num_gpus=0,
        cache_dir=folder / "cache",
        output_path=folder / "dataset",
    )
    assert isinstance(counts, dict)  # there is no executor
    write_page(folder / "dataset", folder / "page.html", data_dir=folder / "corpus")
    return Demo(folder / "dataset", folder / "page.html", counts)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder of the package, unless `target` is a copy of it already.

    Raises:
        FileExistsError: `target` is something else.
    """
    if not os.path.lexists(target):
        unfinished = target.with_name(target.name + SUFFIX)
        remove_path(unfinished)
        shutil.copytree(source, unfinished)
        replace_path(unfinished, target)
        return
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = target / file.relative_to(source)
        if not copy.is_file() or copy.read_bytes() != file.read_bytes():
            raise FileExistsError(
                f"{copy} is not the file of the demo: name another folder, or prepare {target} with 'dailytalk-usdm prepare'"
            )
