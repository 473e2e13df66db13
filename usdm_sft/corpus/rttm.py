"""RTTM with CTM: who speaks when, and the words with their times.

    SPEAKER call7 1 1.20 0.90 <NA> <NA> A <NA> <NA>     file, channel from 1, start and duration in seconds, speaker: one turn
    call7 1 1.25 0.40 hello                             in the .ctm beside it: file, channel, start, duration, word

A word belongs to the turn of its file and channel with which it shares most time. Without a .ctm, turns have no text. The recording is the file of this
name, in the folder or below it. The channel counts where the RTTM names several channels for a file.
"""

import os
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Container, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from usdm_sft.corpus.dialogs import DEFAULT, FilePath, Recipe, RowOptions, Turns
from usdm_sft.corpus.manifest import recordings_folder
from usdm_sft.corpus.problems import add_problem
from usdm_sft.corpus.segments import find_end, read_segments
from usdm_sft.corpus.tables import Rows, read_fields, share_out
from usdm_sft.corpus.values import number_of
from usdm_sft.utils.texts import quote

_NO_SOUND = frozenset(
    [
        ".rttm",
        ".ctm",
        ".stm",
        ".uem",
        ".txt",
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".lab",
        ".textgrid",
        ".trs",
        ".md",
        ".gz",
    ]
)
_SPEAKER_FORM = "SPEAKER file channel start duration <NA> <NA> speaker"
_WORD_FORM = "file channel start duration word"


class _Segment(NamedTuple):
    """A line of RTTM; `words` are those of the .ctm."""

    number: int
    channel: str
    start: float
    end: float
    speaker: str
    words: list[str]


def _find(data_dir: Path) -> dict[str, Path] | None:
    if data_dir.is_file():
        return share_out([data_dir], lambda path: path.stem) if _is_rttm(data_dir) else None
    files = sorted(filter(_is_rttm, data_dir.iterdir()))
    try:
        return share_out(files, lambda path: path.stem)
    except ValueError as error:
        remedy = "join the files of a split, such as with cat *.rttm > train.rttm, and the .ctm files likewise"
        raise ValueError(f"{error}; {remedy}") from error


def _is_rttm(path: Path) -> bool:
    return path.suffix.lower() == ".rttm"


def _files(path: Path, data_dir: FilePath | None = None) -> list[Path]:
    words = path.with_suffix(".ctm")
    return [path, words] if words.is_file() else [path]


def _read(path: Path, problems: list[str], data_dir: FilePath | None, options: RowOptions = DEFAULT) -> Turns:
    segments: dict[str, list[_Segment]] = defaultdict(list)
    for number, fields in read_fields(path, problems):
        if fields[0] != "SPEAKER":
            continue  # a comment, or a type of line that has no turn
        if times := _read_times(path, number, fields, 3, 8, _SPEAKER_FORM, problems):
            segments[fields[1]].append(_Segment(number, fields[2], *times, fields[7], []))
    has_words = len(_files(path)) > 1
    if has_words:
        _add_words(path.with_suffix(".ctm"), segments, problems)
    recordings = _find_recordings(recordings_folder(path, data_dir), segments.keys())
    make_rows = partial(_make_rows, segments=segments, recordings=recordings, has_words=has_words)
    return read_segments(path, make_rows, problems, data_dir, options)


def _read_times(
    path: Path, number: int, fields: list[str], first: int, least: int, form: str, problems: list[str]
) -> tuple[float, float] | None:
    """Return start and end of a line whose start is field `first`, or None if it does not have the form, of `least` fields."""
    start = number_of(fields[first]) if len(fields) >= least else None
    end = None if start is None else find_end(start, fields[first + 1])
    if start is not None and isinstance(end, float):
        return start, end
    add_problem(problems, f"{path}:{number}: {quote(' '.join(fields))} is not '{form}': correct the line")
    return None


def _add_words(path: Path, segments: Mapping[str, list[_Segment]], problems: list[str]) -> None:
    """Add each word of a .ctm to the segment with which it shares most time."""
    words = []
    for number, fields in read_fields(path, problems):
        if fields[0].startswith(";;"):
            continue
        if times := _read_times(path, number, fields, 2, 5, _WORD_FORM, problems):
            words.append((fields[0], *times, fields[1], fields[4], number))
    for file, group in groupby(sorted(words), key=lambda word: word[0]):
        turns = sorted(segments.get(file, []), key=_start_of)
        channels = {turn.channel for turn in turns}
        longest = max((turn.end - turn.start for turn in turns), default=0.0)
        for _, start, end, channel, word, number in group:
            near = turns[bisect_left(turns, start - longest, key=_start_of) : bisect_right(turns, end, key=_start_of)]
            near = [turn for turn in near if turn.end >= start and channel in (turn.channel, *({channel} - channels))]
            if near:
                max(near, key=lambda turn: min(end, turn.end) - max(start, turn.start)).words.append(word)
            else:
                where = f"{quote(word)} at {start:g} s of {quote(file)} is in no turn of the RTTM"
                add_problem(problems, f"{path}:{number}: {where}: add the turn, or delete the word")


def _start_of(segment: _Segment) -> float:
    return segment.start


def _find_recordings(folder: Path, names: Container[str]) -> dict[str, list[str]]:
    """Return the files in a folder and below it that have one of the names, relative to the folder."""
    found: dict[str, list[str]] = defaultdict(list)
    for parent, _, files in os.walk(folder):
        for file in files:
            stem, suffix = os.path.splitext(file)
            if stem in names and suffix.lower() not in _NO_SOUND:
                found[stem].append(os.path.relpath(os.path.join(parent, file), folder))
    return found


def _make_rows(
    path: Path, segments: Mapping[str, list[_Segment]], recordings: Mapping[str, list[str]], has_words: bool
) -> Rows:
    for file, turns in segments.items():
        found = sorted(recordings.get(file, []))
        if len(found) != 1:
            what = f"several recordings of this name ({', '.join(found[:2])})" if found else "no recording of this name"
            place = f"{path}:{turns[0].number}"
            yield 0, f"{place}: {quote(file)} has {what} in the folder: give data_dir the folder with one"
            continue
        has_channels = len({turn.channel for turn in turns}) > 1
        for turn in turns:
            row = {"dialog": file, "speaker": turn.speaker, "audio": found[0], "start": turn.start, "end": turn.end}
            if has_words:
                row["text"] = " ".join(turn.words)
            if has_channels:
                channel = number_of(turn.channel)
                row["channel"] = turn.channel if channel is None else channel - 1
            yield turn.number, row


RECIPE = Recipe(
    "rttm",
    "RTTM",
    "a .rttm file, the .ctm with its words beside it, and recordings with the names in them",
    reads=_is_rttm,
    find=lambda data_dir, cache_dir, may_download, with_units: _find(Path(data_dir)),
    read=_read,
    files=_files,
    takes_options=True,
    max_speakers=2,
)
