"""Progress bars on stderr, shown only in a terminal and only while those of datasets are on.

datasets and transformers are imported inside the functions: modules that only import this one stay light.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def progress_bar(total: int | None, description: str, unit: str, *, disable: bool = False, **options: Any) -> tqdm:
    """Make a tqdm bar.

    The bar is hidden where stderr is not a terminal, and after `datasets.disable_progress_bars()` or with
    HF_DATASETS_DISABLE_PROGRESS_BARS=1.

    Args:
        total: Number of steps, if known.
        description: Text before the bar.
        unit: Name of one step.
        disable: Hide the bar.
        options: Further options of tqdm.
    """
    from datasets import are_progress_bars_disabled

    hidden = disable or are_progress_bars_disabled()
    # With disable=None tqdm shows the bar only in a terminal.
    return tqdm(total=total, desc=description, unit=unit, disable=hidden or None, **options)


def disable_progress_bars() -> None:
    """Turn off the bars of this package and of the libraries that prepare and push call."""
    import datasets
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # public, but not in __all__
    from transformers.utils import logging

    datasets.disable_progress_bars()
    disable_progress_bars()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of datasets within the block; our own bars count the whole run."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
