"""The command `demo`."""

from __future__ import annotations

import os
import sys


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
    from usdm_sft.cli.make_demo import run_demo
    from usdm_sft.cli.show import show
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
    if open:
        _open_in_browser(page.resolve().as_uri())


def _open_in_browser(address: str) -> None:
    import webbrowser

    if not webbrowser.open(address):
        print(f"no browser was found: open {address} yourself", file=sys.stderr)
