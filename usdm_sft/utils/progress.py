"""Progress on stderr: bars in a terminal, and lines of the log at intervals elsewhere, such as in the output of a Slurm job.

Both are shown only while the progress bars of datasets are on. datasets and transformers are imported inside the functions:
modules that only import this one stay light.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

AUDIO = "s of audio"  # the unit of a bar that counts seconds of audio
LINE_SECONDS = 30.0  # between two lines of the log

_current: ContextVar[Stages | None] = ContextVar("stages", default=None)


class Stages:
    """The stages of a run, in order: the bars within this context name their stage, and a summary has the time of each.

        with Stages(("corpus", "units")) as stages:
            stages.start("corpus")
            ...
            stages.start("units")
            ...
        logger.info(stages.summary())

    Args:
        names: The names of all stages, in order.
    """

    def __init__(self, names: Sequence[str]):
        self._names = tuple(names)
        self._seconds: dict[str, float] = {}
        self._audio: dict[str, float] = defaultdict(float)
        self._name: str | None = None
        self._since = 0.0
        self._idle: tqdm | None = None  # the line of a stage without a bar
        self.shown = False

    def __enter__(self) -> Stages:
        self.shown = _are_bars_on()
        self._token = _current.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        _current.reset(self._token)

    def start(self, name: str) -> None:
        """End the current stage and begin the next one."""
        self._end()
        self._name, self._since = name, time.monotonic()
        if self.shown and sys.stderr.isatty():
            self._idle = tqdm(bar_format="{desc} ...", desc=self.make_title(name), leave=False)

    def _end(self) -> None:
        self._close_idle()
        if self._name is not None:
            self._seconds[self._name] = time.monotonic() - self._since
        self._name = None

    def _close_idle(self) -> None:
        if self._idle is not None:
            self._idle.close()
        self._idle = None

    def make_title(self, description: str) -> str:
        """Return the number and the name of the stage, and what a bar counts that takes the place of the stage's line."""
        self._close_idle()
        if self._name is None:
            return description
        title = f"[{self._names.index(self._name) + 1}/{len(self._names)}] {self._name}"
        return title if description == self._name else f"{title}, {description}"

    def add_audio(self, seconds: float) -> None:
        """Count audio that the current stage has dealt with."""
        if self._name is not None:
            self._audio[self._name] += seconds

    def summary(self) -> str:
        """Return the time of each stage, the rate where it counted audio, and the sum."""
        parts = []
        for name, seconds in self._seconds.items():
            rate = f" ({_format_rate(self._audio[name] / seconds, AUDIO)})" if self._audio[name] and seconds else ""
            parts.append(f"{name} {format_seconds(seconds)}{rate}")
        return f"{', '.join(parts)}: {format_seconds(sum(self._seconds.values()))} in all"


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A tqdm bar with its numbers in words. Its rate is that of the whole time, because finished work comes in large parts."""

    def __init__(self, **options: Any):
        self._counts_audio = options["unit"] == AUDIO  # tqdm forgets the unit of a hidden bar
        self._is_line = not sys.stderr.isatty()
        if self._is_line:
            options |= {"file": io.StringIO(), "mininterval": LINE_SECONDS, "miniters": 1}
        numbers = "{percentage:3.0f}%|{bar}| {words}" if options["total"] else "{words}"
        super().__init__(smoothing=0, leave=False, bar_format="{desc}: " + numbers, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().format_dict
        total, unit = values["total"], values["unit"]
        done, elapsed = values["n"] - values["initial"], values["elapsed"]
        words = [_format_amount(values["n"], total, unit)]
        if done > 0 and elapsed > 0:
            words.append(_format_rate(done / elapsed, unit))
            if total:
                words.append(f"{format_seconds(max(total - values['n'], 0) * elapsed / done)} left")
        return values | {"words": ", ".join(words)}

    def update(self, n: float = 1) -> bool | None:
        if self._counts_audio and (stages := _current.get()) is not None:
            stages.add_audio(n)
        shown: bool | None = super().update(n)
        return shown

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self._is_line:
            super().display(msg, pos)
            return
        values = self.format_dict
        if msg is None and values["n"] > values["initial"]:  # not when the bar opens, and not when it closes
            share = f"{100 * values['n'] / values['total']:.0f} %, " if values["total"] else ""
            logger.info("%s: %s%s", values["prefix"], share, values["words"])


def progress_bar(
    total: float | None, description: str, unit: str, *, initial: float = 0, disable: bool = False
) -> tqdm:
    """Make a bar in a terminal, and lines of the log at intervals of 30 seconds elsewhere.

    Nothing is shown after `datasets.disable_progress_bars()` or with HF_DATASETS_DISABLE_PROGRESS_BARS=1. Within `Stages` the
    bar names the stage, and what was set when the context was entered holds.

    Args:
        total: Number of steps, if known.
        description: What is counted, or done.
        unit: Name of the steps, in the plural; "B" for bytes, or `AUDIO`.
        initial: Number of steps that an earlier run has made.
        disable: Show nothing.
    """
    stages = _current.get()
    shown = not disable and (_are_bars_on() if stages is None else stages.shown)
    if stages is not None and shown:
        description = stages.make_title(description)
    return _Bar(total=total, desc=description, unit=unit, initial=initial, disable=not shown)


def _are_bars_on() -> bool:
    from datasets import are_progress_bars_disabled

    return not are_progress_bars_disabled()


def _format_amount(done: float, total: float | None, unit: str) -> str:
    """Format what was done, such as "9.0 of 20.0 h of audio", "1.2 of 3.9 GB" or "512 of 23,676 files"."""
    scale, digits, largest = 1.0, 0, total or done
    if unit == AUDIO and largest >= 3600:
        scale, digits, unit = 3600, 1, "h of audio"
    elif unit == "B":
        scale, digits, unit = (1e9, 1, "GB") if largest >= 1e9 else (1e6, 1, "MB")
    numbers = [f"{number / scale:,.{digits}f}" for number in (done, total) if number is not None]
    return f"{' of '.join(numbers)} {unit}"


def _format_rate(rate: float, unit: str) -> str:
    if unit == "B":
        rate, unit = rate / 1e6, "MB"
    number = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    return f"{number} {unit} per second"


def format_seconds(seconds: float) -> str:
    """Format a time for people, in its two largest units, such as "11 h 52 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60} min"


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
