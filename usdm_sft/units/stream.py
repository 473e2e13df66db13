"""Units of many audio files in order, as the command `units` prints them: neighbours share a call, and the next ones are read meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from usdm_sft.audio.addresses import file_problem, open_file, parse_address
from usdm_sft.audio.sound import AUDIO_ERRORS, open_sound
from usdm_sft.units.tokenizer import UnitTokenizer

T = TypeVar("T")


def stream_units(unit_tokenizer: UnitTokenizer, sources: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the units of each audio address, in order.

    Neighbouring files of up to `batch_seconds` in all are computed together, while the next group is read. Memory holds two
    such groups, or a longer file in place of one.

    Yields:
        (num_units,) uint16 units.

    Raises:
        FileNotFoundError: An audio file does not exist. The units of all files before it were yielded.
        ValueError: Audio cannot become units. The units of all files before it were yielded.
    """
    groups = group_up_to(unit_tokenizer.settings["batch_seconds"], sources, audio_seconds)
    group: list[str] = next(groups, [])
    following: list[str] = []
    try:
        unit_tokenizer.read_ahead(group)
        while group:
            following = next(groups, [])
            unit_tokenizer.read_ahead(following)
            try:
                units, _ = unit_tokenizer.tokenize_files(group)
            except (FileNotFoundError, ValueError):
                for source in group:  # one by one, to yield the units of the files before the bad one
                    yield unit_tokenizer.tokenize_files([source])[0][0]
            else:
                yield from units
            group = following
    finally:
        unit_tokenizer.forget(following)


def group_up_to(limit: float, items: Iterable[T], size_of: Callable[[T], float]) -> Iterator[list[T]]:
    """Yield groups of neighbouring items whose sizes make up to `limit` in all; a larger item is alone."""
    group: list[T] = []
    total = 0.0
    for item in items:
        size = size_of(item)
        if group and total + size > limit:
            yield group
            group, total = [], 0.0
        group.append(item)
        total += size
    if group:
        yield group


def audio_seconds(source: str) -> float:
    """Return the length of audio as its address or header gives it; infinity if the header does not, or cannot be read."""
    total = 0.0
    try:
        for segment in parse_address(source):
            if file_problem(segment.file):
                return math.inf
            if segment.start is not None and segment.end is not None:
                total += segment.end - segment.start
                continue
            with open_file(segment.file) as file, open_sound(file) as sound:
                total += math.inf if sound.frames is None else sound.frames / sound.rate
    except AUDIO_ERRORS:
        return math.inf
    return total
