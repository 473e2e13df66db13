"""Units of many audio files in order, as the command `units` prints them: neighbours share a call, and the next ones are read meanwhile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np

from usdm_sft.audio.addresses import file_problem, open_file, parse_address
from usdm_sft.audio.sound import AUDIO_ERRORS, open_sound
from usdm_sft.units.tokenizer import UnitTokenizer


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
    groups = group_by_seconds(sources, unit_tokenizer.settings["batch_seconds"])
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


def group_by_seconds(sources: Iterable[str], seconds: float) -> Iterator[list[str]]:
    """Yield groups of neighbouring sources with up to `seconds` of audio; a longer or unreadable source is alone."""
    group: list[str] = []
    total = 0.0
    for source in sources:
        length = audio_seconds(source)
        if group and total + length > seconds:
            yield group
            group, total = [], 0.0
        group.append(source)
        total += length
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
