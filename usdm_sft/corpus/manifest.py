"""A corpus of any origin as a manifest: a table of turns, in JSON lines, CSV or Parquet.

    {"dialog": "fe_03_00001", "turn": 0, "speaker": "A", "text": "hello", "audio": "fe_03_00001.wav", "start": 1.2, "end": 2.5, "channel": 0}

`dialog`, `turn`, `speaker`, `text` and `audio` must be there. `start` and `end` (seconds) and `channel` (from 0) cut the turn out of
a longer recording, such as a stereo telephone call; `emotion` may be there; other columns are passed over. Dialogs keep the
order of the manifest, turns are numbered without a gap.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from usdm_sft.audio.addresses import absolute_file, format_address
from usdm_sft.corpus.dialogs import Utterance
from usdm_sft.corpus.problems import note
from usdm_sft.utils.texts import CONTROL, quote, text_problem

SUFFIXES = (".jsonl", ".csv", ".parquet")
SPLITS = ("train", "test", "validation")
REQUIRED = ("dialog", "turn", "speaker", "text", "audio")
OPTIONAL = ("start", "end", "channel", "emotion")
MAX_TURN = 2**31 - 1
MAX_NAME = 200  # characters of a dialog or speaker
MAX_LINE = 1_000_000  # characters


def is_manifest(path: str | Path) -> bool:
    """Whether a path names a manifest, and no split list of DailyTalk."""
    return Path(path).suffix.lower() in SUFFIXES


def find_manifests(folder: Path) -> dict[str, Path] | None:
    """The manifests in a folder, such as train.jsonl and test.csv, or None.

    Raises:
        ValueError: A split has two of them.
    """
    found: dict[str, Path] = {}
    for path in (folder / f"{split}{suffix}" for split in SPLITS for suffix in SUFFIXES):
        if path.is_file() and found.setdefault(path.stem, path) != path:
            raise ValueError(f"{path} stands beside {found[path.stem].name}: keep one, or name the one to use")
    return found or None


def read_manifest(path: Path, problems: list[str], folder: Path) -> dict[str, dict[Utterance, str]]:
    """Dialogs of a manifest, in its order.

    Args:
        path: The manifest.
        problems: What is wrong is added.
        folder: Where the recordings, and archives of `zip://member::archive`, are named from.

    Returns:
        Dialog id -> {utterance: its place, as file:line, or the row of a Parquet file}.
    """
    read = {".jsonl": _read_json_lines, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix.lower()]
    dialogs: dict[str, dict[Utterance, str]] = {}
    seen: dict[str, str] = {}
    for place, row in read(path, problems):
        wrong = list(_row_problems(row))
        for problem in wrong:
            note(problems, f"{place}: {problem}")
        if wrong:
            continue
        dialog, speaker, turn = str(row["dialog"]), str(row["speaker"]), _whole(row["turn"])
        numbers = [None if _is_missing(row, name) else float(row[name]) for name in ("start", "end")]
        channel = None if _is_missing(row, "channel") else _whole(row["channel"])
        emotion = "" if _is_missing(row, "emotion") else str(row["emotion"])
        audio = format_address(absolute_file(row["audio"], folder), *numbers, channel)
        utterance = Utterance(f"{dialog}_{turn}", dialog, turn, speaker, row["text"], emotion, audio)
        if (first := seen.setdefault(utterance.id, place)) != place:
            note(problems, f"{place}: turn {turn} of {quote(dialog)} stands already at {first}: delete one of the two")
            continue
        dialogs.setdefault(dialog, {})[utterance] = place
    return dialogs


def _row_problems(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a row, each with its remedy."""
    missing = [name for name in REQUIRED if _is_missing(row, name)]
    if missing:
        yield f"{', '.join(missing)} missing: complete the row (a row has {', '.join(REQUIRED)})"
        return
    for name in ("dialog", "speaker"):
        value = row[name]
        if not isinstance(value, str | int) or isinstance(value, bool) or CONTROL.search(str(value)):
            yield f"{name} {quote(str(value))} is no name: give plain text or a whole number"
        elif len(str(value)) > MAX_NAME:
            yield f"{name} {quote(str(value))} has {len(str(value)):,} characters: give {MAX_NAME} or fewer"
    if not 0 <= (_whole(row["turn"]) or 0) <= MAX_TURN or _whole(row["turn"]) is None:
        yield f"turn {quote(str(row['turn']))} is no whole number from 0 on: number the turns of the dialog"
    if not isinstance(row["text"], str):
        yield f"text {quote(str(row['text']))} is no text: correct it"
    elif problem := text_problem(row["text"]):
        yield f"text {quote(row['text'])} {problem}: correct the text"
    if not isinstance(row["audio"], str) or CONTROL.search(row["audio"]):
        yield f"audio {quote(str(row['audio']))} is no path: give the path of the recording"
    if _is_missing(row, "start") != _is_missing(row, "end"):
        yield "start and end go together: give both or neither"
    elif not _is_missing(row, "start"):
        start, end = _number(row["start"]), _number(row["end"])
        if start is None or end is None or not 0 <= start < end:
            yield f"start {row['start']!r} and end {row['end']!r} are no stretch: give seconds, the start before the end"
    if not _is_missing(row, "channel") and (_whole(row["channel"]) is None or _whole(row["channel"]) < 0):
        yield f"channel {row['channel']!r} is no channel: give a whole number from 0 on"


def _is_missing(row: dict[str, Any], name: str) -> bool:
    return row.get(name) is None or row[name] == ""


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(value, bool) or not math.isfinite(number) else number


def _whole(value: Any) -> int | None:
    """A whole number, however the format of the table spells it."""
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _doubled(names: Iterable[str]) -> list[str]:
    """The columns of a manifest that are named more than once; of a doubled column only one would be read."""
    return [name for name, count in Counter(names).items() if count > 1 and name in (*REQUIRED, *OPTIONAL)]


class _DoubledKeyError(ValueError):
    pass


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if doubled := _doubled(key for key, _ in pairs):
        raise _DoubledKeyError(f"{', '.join(doubled)} given twice in one object: delete one of the two")
    return dict(pairs)


def _read_json_lines(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _lines(path, problems):
        if not line.strip():
            note(problems, f"{place}: blank line: delete it")
            continue
        try:
            row = json.loads(line, object_pairs_hook=_make_object)
        except _DoubledKeyError as error:
            note(problems, f"{place}: {error}")
            continue
        except (ValueError, RecursionError):
            note(problems, f"{place}: {quote(line)} is no JSON: write one object a line")
            continue
        if isinstance(row, dict):
            yield place, row
        else:
            note(problems, f"{place}: {quote(line)} is no JSON object: write one object a line")


def _read_csv(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    table = csv.reader((line for _, line in _lines(path, problems)), strict=True)
    try:
        names = next(table, [])
        if missing := [name for name in REQUIRED if name not in names]:
            note(problems, f"{path}:1: no column {', '.join(missing)}: the first line names the columns")
            return
        if doubled := _doubled(names):
            note(problems, f"{path}:1: column {', '.join(doubled)} named twice: rename or delete one of the two")
            return
        for fields in filter(None, table):  # csv gives an empty list for a blank line
            place = f"{path}:{table.line_num}"
            if len(fields) == len(names):
                yield place, dict(zip(names, fields, strict=True))
                continue
            note(
                problems,
                f"{place}: {len(fields)} fields instead of {len(names)} in {quote(','.join(fields))}: "
                "put a text that holds a comma in quotation marks, or complete the row",
            )
    except csv.Error as error:
        note(problems, f"{path}:{table.line_num}: no CSV ({error}): correct the line")


def _read_parquet(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        note(problems, f"{path}: no Parquet file ({error}): name another manifest")
        return
    if missing := [name for name in REQUIRED if name not in file.schema_arrow.names]:
        note(problems, f"{path}: no column {', '.join(missing)}: a manifest has {', '.join(REQUIRED)}")
        return
    if doubled := _doubled(file.schema_arrow.names):
        note(problems, f"{path}: column {', '.join(doubled)} named twice: rename or delete one of the two")
        return
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            yield f"{path}: row {number}", row
            number += 1


def _lines(path: Path, problems: list[str]) -> Iterator[tuple[str, str]]:
    """Lines with their ends, up to one that is not of a text file in UTF-8."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number in range(1, 2**63):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            place = f"{path}:{number}"
            if len(line) > MAX_LINE:
                note(problems, f"{place}: line of more than {MAX_LINE:,} characters, {quote(line)}: name a manifest")
                return
            if any("\udc80" <= character <= "\udcff" for character in line) or "\0" in line:
                note(problems, f"{place}: not UTF-8: save the manifest as UTF-8")
                return
            yield place, line
