"""Kaldi data directories: wav.scp, text and utt2spk, with segments and reco2file_and_channel where they are there.

    wav.scp                 call7-A calls/7.wav            recording and file
    segments                call7-A-01 call7-A 1.2 2.1     utterance, recording, start and end in seconds; without it, each recording is an utterance
    text                    call7-A-01 hello
    utt2spk                 call7-A-01 A
    reco2file_and_channel   call7-A 7 A                    recording, dialog, and side; without it, each recording is a dialog

A side (A or 1, B or 2) is the channel of a file that wav.scp names for two recordings or more; a file of one recording is read whole.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from usdm_sft.corpus.dialogs import DEFAULT, FilePath, Recipe, RowOptions, Turns
from usdm_sft.corpus.problems import add_problem
from usdm_sft.corpus.segments import read_segments
from usdm_sft.corpus.tables import Rows, read_fields, share_out
from usdm_sft.utils.texts import quote

_MAIN = "wav.scp"
_SIDES_FILE = "reco2file_and_channel"
_FILES = (_MAIN, "segments", "text", "utt2spk", _SIDES_FILE)
_SIDES = {"A": 0, "1": 0, "B": 1, "2": 1}
_Lines = dict[str, tuple[int, str]]  # first word of a line -> its number, and the rest of it


def _find(data_dir: Path) -> dict[str, Path] | None:
    if data_dir.is_file():
        data_dir = data_dir.parent if data_dir.name == _MAIN else data_dir
    if (data_dir / _MAIN).is_file():  # in a folder of any name, of which "test" is a split and "my-test" is not
        return share_out([data_dir / _MAIN], lambda path: _name(path) if _name(path).isalpha() else "")
    return share_out(sorted(data_dir.glob(f"*/{_MAIN}")), _name) if data_dir.is_dir() else None


def _name(path: Path) -> str:
    return path.absolute().parent.name


def _files(path: Path, data_dir: FilePath | None = None) -> list[Path]:
    return [each for each in map(path.with_name, _FILES) if each.is_file()]


def _read(path: Path, problems: list[str], data_dir: FilePath | None, options: RowOptions = DEFAULT) -> Turns:
    lines = {file.name: _read_lines(file, problems) for file in _files(path)}
    main = path.with_name("segments" if "segments" in lines else _MAIN)
    return read_segments(path, partial(_make_rows, lines=lines), problems, data_dir, options, main)


def _read_lines(file: Path, problems: list[str]) -> _Lines:
    found: _Lines = {}
    for number, (first, *rest) in read_fields(file, problems):
        if (before := found.setdefault(first, (number, " ".join(rest)))[0]) != number:
            problem = f"{quote(first)} stands already at line {before}: delete one of the two lines"
            add_problem(problems, f"{file}:{number}: {problem}")
    return found


def _make_rows(path: Path, lines: Mapping[str, _Lines]) -> Rows:
    recordings, texts = lines[_MAIN], lines.get("text", {})
    if "utt2spk" not in lines:
        yield 0, f"{path.with_name('utt2spk')} does not exist: write it, with an utterance and its speaker in each line"
        return
    utterances, main = (lines["segments"], path.with_name("segments")) if "segments" in lines else (recordings, path)
    for name, (number, file) in recordings.items():
        if problem := _recording_problem(file):
            yield 0, f"{path}:{number}: recording {quote(name)} {problem}"
    for name, (number, _) in texts.items():
        if name not in utterances:
            place = f"{path.with_name('text')}:{number}"
            yield 0, f"{place}: {quote(name)} is not in {main.name}: add it there, or delete the line"
    num_sides = Counter(file for _, file in recordings.values())
    for name, (number, rest) in utterances.items():
        made = _make_row(name, rest.split() if "segments" in lines else [name], lines, num_sides)
        if made is not None:
            yield number, f"{main}:{number}: {made}" if isinstance(made, str) else made


def _make_row(
    name: str, segment: list[str], lines: Mapping[str, _Lines], num_sides: Mapping[str, int]
) -> dict[str, Any] | str | None:
    """Return the row of an utterance, or what is wrong with it; None if its recording is wrong, of which is told elsewhere.

    Args:
        name: The utterance.
        segment: Its recording, and start and end in a line of segments.
        lines: The files.
        num_sides: Number of recordings that are in each file.
    """
    if len(segment) not in (1, 3) or (len(segment) == 1 and "segments" in lines):
        return f"{quote(' '.join([name, *segment]))} is not utterance, recording, start and end: correct the line"
    recording, *times = segment
    if recording not in lines[_MAIN]:
        return f"{quote(recording)} is not a recording of {_MAIN}: add it there, or delete the line"
    if "utt2spk" in lines and name not in lines["utt2spk"]:
        return f"{quote(name)} has no speaker in utt2spk: add its line"
    file = lines[_MAIN][recording][1]
    if _recording_problem(file):
        return None
    dialog, *side = _rest(lines, _SIDES_FILE, recording).split() or [recording]
    row: dict[str, Any] = {"dialog": dialog, "audio": file}
    row |= {"speaker": _rest(lines, "utt2spk", name), "text": _rest(lines, "text", name)}
    if num_sides[file] > 1:
        if not side or side[0].upper() not in _SIDES:
            what = f"{quote(recording)} is one of {num_sides[file]} recordings of {quote(file)}"
            return f"{what}, and {_SIDES_FILE} has no side A or B for it: add its line"
        row["channel"] = _SIDES[side[0].upper()]
    return row | dict(zip(("start", "end"), times, strict=False))


def _rest(lines: Mapping[str, _Lines], file: str, name: str) -> str:
    return lines.get(file, {}).get(name, (0, ""))[1]


def _recording_problem(file: str) -> str | None:
    """Return why what wav.scp gives for a recording is not a file, or None."""
    if "|" in (file[:1], file[-1:]):
        return f"is the output of a command, {quote(file)}, and commands are never run: write its output to a file, and give the path"
    if re.search(r"\.ark:[0-9]+$", file):
        return f"lies in an archive of Kaldi, {quote(file)}: copy it to a file (wav-copy), and give the path"
    return None if file else "has no file: give its path"


RECIPE = Recipe(
    "kaldi",
    "Kaldi directory",
    "wav.scp, with text, utt2spk, segments and reco2file_and_channel beside it, here or in train/, test/",
    reads=lambda path: path.name == _MAIN,
    find=lambda data_dir, cache_dir, may_download, with_units: _find(Path(data_dir)),
    read=_read,
    files=_files,
    takes_options=True,
    max_speakers=2,
)
