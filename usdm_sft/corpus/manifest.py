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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from usdm_sft.audio.addresses import absolute_file, format_address
from usdm_sft.corpus.dialogs import Turns, Utterance
from usdm_sft.corpus.problems import add_problem
from usdm_sft.utils.texts import (
    CONTROL,
    MAX_LINE,
    LineError,
    count_noun,
    first_line,
    quote,
    read_limited_lines,
    text_problem,
)

SUFFIXES = (".jsonl", ".csv", ".parquet")
REQUIRED = ("dialog", "turn", "speaker", "text", "audio")
OPTIONAL = ("start", "end", "channel", "emotion")
_NUMBERS = ("turn", "start", "end", "channel")
UTTERANCES = "utterances"  # the config of a dataset folder with these columns, and audio in them (--keep_audio)
MAX_TURN = 2**31 - 1
MAX_NAME = 200  # characters of a dialog or speaker
# Of a Parquet manifest: rows read at once; characters decoded at once; bytes that a column of a row group may have, and on average a row.
_BATCH_ROWS = 16_384
_DECODED = 16 * MAX_LINE
_CHUNK_BYTES = 16 << 20
_MEAN_BYTES = 4096

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
    if not _is_missing(row, "emotion") and CONTROL.search(str(row["emotion"])):
        yield f"emotion {quote(str(row['emotion']))} holds a control character: correct it"
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
    """Return True for no value, an empty one, and NaN, which is how pandas writes a missing value."""
    value = row.get(name)
    if name in _NUMBERS and isinstance(value, str):
        return value.lower() in ("", "nan")
    return value is None or value == "" or value != value


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
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        add_problem(problems, f"{path}: not a Parquet file ({first_line(error)}): name another manifest")
        return
    fields = [field for field in schema if field.name in (*REQUIRED, *OPTIONAL)]
    if problem := _column_problem(schema.names) or _find_unreadable(fields, file.metadata):
        add_problem(problems, f"{path}: {problem}")
        return
    texts = [field.name for field in fields if _is_text(field.type)]
    number = 0
    try:
        # As dictionaries, texts that repeat stay as small as they are in the file.
        file = pq.ParquetFile(path, read_dictionary=texts, metadata=file.metadata)
        for batch in file.iter_batches(_BATCH_ROWS, columns=[field.name for field in fields]):
            for row in _decode_rows(batch):
                if isinstance(row, str):
                    add_problem(problems, f"{path}: row {number}: {row}")
                else:
                    yield number, row
                number += 1
    except (pa.ArrowException, OSError) as error:
        add_problem(problems, f"{path}: damaged after row {number} ({first_line(error)}): write it again")


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    types = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in types


def _find_unreadable(fields: Sequence[Any], metadata: Any) -> str | None:
    """Return which column cannot be read in a bounded amount of memory, or None. A few bytes of Parquet may hold any amount of text."""
    import pyarrow as pa

    for field in fields:
        if pa.types.is_nested(field.type) or pa.types.is_fixed_size_binary(field.type):
            return f"column {field.name} is of type {quote(str(field.type))}: give one text or number in each row"
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        most = max(_CHUNK_BYTES, _MEAN_BYTES * group.num_rows)
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in (*REQUIRED, *OPTIONAL) and column.total_uncompressed_size > most:
                return (
                    f"column {column.path_in_schema} of row group {index} has {column.total_uncompressed_size:,} bytes in "
                    f"{count_noun(group.num_rows, 'row')}: give texts of up to {MAX_LINE:,} characters"
                )
    return None


def _decode_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield each row of a batch, or what is wrong with it. Only a few long texts are decoded at a time."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_dictionary(column.type):
            used = column.indices.dictionary_encode()  # the dictionary is that of the whole row group
            values = column.dictionary.take(used.dictionary)
            of_values = (pc.utf8_length if pa.types.is_string(values.type) else pc.binary_length)(values)
            lengths[name] = of_values.take(used.indices).fill_null(0).to_numpy(zero_copy_only=False)
    longest = np.max([np.zeros(len(batch), np.int64), *lengths.values()], axis=0)
    step = max(1, min(len(batch), _DECODED // max(int(longest.max(initial=0)), 1)))
    for start in range(0, len(batch), step):
        whole = longest[start : start + step].max() <= MAX_LINE
        try:
            rows = _decode(batch.slice(start, step)) if whole else None
        except UnicodeDecodeError:
            rows = None
        if rows is not None:
            yield from rows
            continue
        for number in range(start, min(start + step, len(batch))):
            name = max(lengths, key=lambda name: lengths[name][number])
            if longest[number] > MAX_LINE:
                yield f"{name} has {longest[number]:,} characters: give {MAX_LINE:,} or fewer"
                continue
            try:
                yield from _decode(batch.slice(number, 1))
            except UnicodeDecodeError as error:
                yield f"not UTF-8 (byte 0x{error.object[error.start]:02X}): save the texts as UTF-8"


def _decode(batch: Any) -> list[dict[str, Any]]:
    import pyarrow as pa

    columns = [each.dictionary_decode() if pa.types.is_dictionary(each.type) else each for each in batch.columns]
    rows: list[dict[str, Any]] = pa.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()
    return rows


def _column_problem(names: list[str]) -> str | None:
    """Return what is wrong with the column names of a table, or None."""
    if missing := [name for name in REQUIRED if name not in names]:
        return f"no column {', '.join(missing)}: name the columns {', '.join(REQUIRED)}"
    if doubled := _doubled(names):
        return f"column {', '.join(doubled)} named twice: rename or delete one of the two"
    return None
