"""Read a manifest: any corpus as a table of turns, in JSON lines, CSV or Parquet.

    {"dialog": "fe_03_00001", "turn": 0, "speaker": "A", "text": "hello", "audio": "fe_03_00001.wav", "start": 1.2, "end": 2.5, "channel": 0}

`dialog`, `turn`, `speaker`, `text` and `audio` are required. `start` and `end` (seconds) and `channel` (from 0) cut the turn out of
a longer recording, such as a stereo telephone call. `emotion` is optional; other columns are ignored. Dialogs keep the order
of the manifest, and turns are numbered without a gap.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from usdm_sft.audio.addresses import absolute_file, format_address
from usdm_sft.corpus.dialogs import Turns, Utterance
from usdm_sft.corpus.problems import add_problem
from usdm_sft.utils.texts import CONTROL, LineError, first_line, quote, read_limited_lines, text_problem

SUFFIXES = (".jsonl", ".csv", ".parquet")
REQUIRED = ("dialog", "turn", "speaker", "text", "audio")
OPTIONAL = ("start", "end", "channel", "emotion")
UTTERANCES = "utterances"  # the config of a dataset folder with these columns, and audio in them (--keep_audio)
MAX_TURN = 2**31 - 1
MAX_NAME = 200  # characters of a dialog or speaker

_Rows = Iterator[tuple[int, dict[str, Any]]]  # (number of the line or row, and row)


def is_manifest(path: str | Path) -> bool:
    """Return True if the path names a manifest, False if it names a split list of DailyTalk."""
    return Path(path).suffix.lower() in SUFFIXES


def read_manifest(path: Path, problems: list[str], folder: Path) -> Turns:
    """Read the turns of a manifest, whose dialogs keep its order.

    Args:
        path: The manifest.
        problems: Problems are appended to this list.
        folder: Relative paths of recordings and archives (`zip://member::archive`) start here.

    Returns:
        The turns, each with its line, or its row in a Parquet file.
    """
    suffix = path.suffix.lower()
    read = {".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}[suffix]
    turns = Turns(
        (lambda number: f"{path}: row {number}") if suffix == ".parquet" else lambda number: f"{path}:{number}"
    )
    try:
        for number, row in read(path, problems):
            if wrong := list(_row_problems(row)):
                for problem in wrong:
                    add_problem(problems, f"{turns.place(number)}: {problem}")
                continue
            utterance = _make_utterance(row, folder)
            if (first := turns.find(utterance.dialog_id, utterance.turn)) is not None:
                add_problem(
                    problems,
                    f"{turns.place(number)}: turn {utterance.turn} of {quote(utterance.dialog_id)} stands already at "
                    f"{turns.place(first)}: delete one of the two",
                )
                continue
            turns.add(utterance, number)
    except LineError as error:
        add_problem(problems, str(error))
    return turns


def _make_utterance(row: dict[str, Any], folder: Path) -> Utterance:
    """Make the utterance of a row without problems."""
    dialog, turn = str(row["dialog"]), int(float(row["turn"]))
    start, end = (None if _is_missing(row, name) else float(row[name]) for name in ("start", "end"))
    channel = None if _is_missing(row, "channel") else int(float(row["channel"]))
    emotion = "" if _is_missing(row, "emotion") else str(row["emotion"])
    audio = format_address(absolute_file(row["audio"], folder), start, end, channel)
    return Utterance(f"{dialog}_{turn}", dialog, turn, str(row["speaker"]), row["text"], emotion, audio)


def _row_problems(row: dict[str, Any]) -> Iterator[str]:
    """Yield each problem of a row with its remedy."""
    missing = [name for name in REQUIRED if _is_missing(row, name)]
    if missing:
        yield f"{', '.join(missing)} missing: complete the row (a row has {', '.join(REQUIRED)})"
        return
    for name in ("dialog", "speaker"):
        value = row[name]
        if not isinstance(value, str | int) or isinstance(value, bool) or CONTROL.search(str(value)):
            yield f"{name} {quote(str(value))} is not a name: give plain text or a whole number"
        elif len(str(value)) > MAX_NAME:
            yield f"{name} {quote(str(value))} has {len(str(value)):,} characters: give {MAX_NAME} or fewer"
    turn, channel = _whole_number(row["turn"]), _whole_number(row.get("channel"))
    if turn is None or not 0 <= turn <= MAX_TURN:
        yield f"turn {quote(str(row['turn']))} is not a whole number from 0 to {MAX_TURN:,}: number the turns of the dialog"
    if not isinstance(row["text"], str):
        yield f"text {quote(str(row['text']))} is not a text: correct it"
    elif problem := text_problem(row["text"]):
        yield f"text {quote(row['text'])} {problem}: correct the text"
    if not isinstance(row["audio"], str) or CONTROL.search(row["audio"]):
        yield f"audio {quote(str(row['audio']))} is not a path: give the path of the recording"
    if _is_missing(row, "start") != _is_missing(row, "end"):
        yield "start and end go together: give both or neither"
    elif not _is_missing(row, "start"):
        start, end = _number(row["start"]), _number(row["end"])
        if start is None or end is None or not 0 <= start < end:
            yield f"start {row['start']!r} and end {row['end']!r} are not a stretch: give seconds, the start before the end"
    if not _is_missing(row, "channel") and (channel is None or channel < 0):
        yield f"channel {row['channel']!r} is not a channel: give a whole number from 0 on"


def _is_missing(row: dict[str, Any], name: str) -> bool:
    return row.get(name) is None or row[name] == ""


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(value, bool) or not math.isfinite(number) else number


def _whole_number(value: Any) -> int | None:
    """Return a whole number in any spelling of a table, such as 1, "1" and "1.0", or None."""
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _doubled(names: Iterable[str]) -> list[str]:
    """Return the columns of a manifest that occur twice; only one of them would be read."""
    return [name for name, count in Counter(names).items() if count > 1 and name in (*REQUIRED, *OPTIONAL)]


class _DoubledKeyError(ValueError):
    """A column is given twice in one JSON object."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if doubled := _doubled(key for key, _ in pairs):
        raise _DoubledKeyError(f"{', '.join(doubled)} given twice in one object: delete one of the two")
    return dict(pairs)


def _read_json_lines(path: Path, problems: list[str]) -> _Rows:
    for number, line in read_limited_lines(path, newline="\n"):
        place = f"{path}:{number}"
        if not line.strip():
            add_problem(problems, f"{place}: blank line: delete it")
            continue
        try:
            row = json.loads(line, object_pairs_hook=_make_object)
        except _DoubledKeyError as error:
            add_problem(problems, f"{place}: {error}")
            continue
        except (ValueError, RecursionError):
            add_problem(problems, f"{place}: {quote(line)} is not JSON: write one object per line")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            add_problem(problems, f"{place}: {quote(line)} is not a JSON object: write one object per line")


def _read_csv(path: Path, problems: list[str]) -> _Rows:
    table = csv.reader((line for _, line in read_limited_lines(path, newline="\n")), strict=True)
    try:
        names = next(table, [])
        if problem := _column_problem(names):
            add_problem(problems, f"{path}:1: {problem}")
            return
        for fields in filter(None, table):  # csv gives an empty list for a blank line
            place = f"{path}:{table.line_num}"
            if len(fields) == len(names):
                yield table.line_num, dict(zip(names, fields, strict=True))
                continue
            add_problem(
                problems,
                f"{place}: {len(fields)} fields instead of {len(names)} in {quote(','.join(fields))}: "
                "put a text that holds a comma in quotation marks, or complete the row",
            )
    except csv.Error as error:
        add_problem(problems, f"{path}:{table.line_num}: not CSV ({error}): correct the line")


def _read_parquet(path: Path, problems: list[str]) -> _Rows:
    # Imported here because the command line and the configuration read this module, and pyarrow is slow to import.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        add_problem(problems, f"{path}: not a Parquet file ({first_line(error)}): name another manifest")
        return
    if problem := _column_problem(file.schema_arrow.names):
        add_problem(problems, f"{path}: {problem}")
        return
    columns = [name for name in file.schema_arrow.names if name in (*REQUIRED, *OPTIONAL)]
    yield from enumerate(row for batch in file.iter_batches(1024, columns=columns) for row in batch.to_pylist())


def _column_problem(names: list[str]) -> str | None:
    """Return what is wrong with the column names of a table, or None."""
    if missing := [name for name in REQUIRED if name not in names]:
        return f"no column {', '.join(missing)}: name the columns {', '.join(REQUIRED)}"
    if doubled := _doubled(names):
        return f"column {', '.join(doubled)} named twice: rename or delete one of the two"
    return None
