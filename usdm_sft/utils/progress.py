"""Progress bars on stderr: shown in a terminal only, and switched off together with those of datasets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    pass


def progress_bar(total: int | None, description: str, unit: str, *, disable: bool = False, **options: Any) -> tqdm:
    """Make a bar of tqdm.

    There is none where stderr is not a terminal, or after `datasets.disable_progress_bars()` (or with
    HF_DATASETS_DISABLE_PROGRESS_BARS=1).

    Args:
        total: Number of steps, where it is known.
        description: What is done, before the bar.
        unit: What is counted.
        disable: Whether to show no bar anyway.
        options: Further options of tqdm.
    """
    from datasets import are_progress_bars_disabled

    hidden = disable or are_progress_bars_disabled()
    return tqdm(
        total=total, desc=description, unit=unit, disable=hidden or None, **options
    )  # None: asks for a terminal


def disable_progress_bars() -> None:
    """Switch off our bars and those of the libraries that prepare and push call."""
    import datasets
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    datasets.disable_progress_bars()
    disable_progress_bars()
    logging.disable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of datasets: ours count the whole run."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
