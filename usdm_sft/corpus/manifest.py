"""Read a manifest: any corpus as a table of turns, in JSON lines, CSV or Parquet.

    {"dialog": "fe_03_00001", "turn": 0, "speaker": "A", "text": "hello", "audio": "fe_03_00001.wav", "start": 1.2, "end": 2.5, "channel": 0}

`dialog`, `turn`, `speaker`, `text` and `audio` are required. `start` and `end` (seconds) and `channel` (from 0) cut the turn out of
a longer recording, such as a stereo telephone call. `emotion` is optional; other columns are ignored or kept (`RowOptions`). Dialogs keep
the order of the manifest, and turns are numbered without a gap, or not at all where `start` orders them (`Turns.number_segments`).

    {"dialog": "fe_03_00001", "turn": 0, "speaker": "A", "text": "hello", "units": [[17, 902], [17, 3], [460, 11]]}

Where units are wanted, the column `units` is required, and `audio` is optional (`usdm_sft.corpus.unit_reader`). Otherwise it is one of
the columns that are ignored, such as that of the config `utterances`.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.audio.addresses import absolute_file, format_address, is_remote
from usdm_sft.corpus.dialogs import DEFAULT, BadRow, FilePath, Recipe, RowOptions, Turns, Utterance
from usdm_sft.corpus.further import is_read, list_further, nested_sizes, read_further
from usdm_sft.corpus.problems import add_problem
from usdm_sft.corpus.tables import (
    SPLITS,
    SUFFIXES,
    Rows,
    doubled_problem,
    find_tables,
    kind_of_table,
    place_of,
    read_rows,
    stem_of,
    suffix_of,
)
from usdm_sft.corpus.values import UNITS, is_missing, number_of, whole_number
from usdm_sft.utils.texts import CONTROL, MAX_LINE, count_noun, first_line, quote, text_problem

if TYPE_CHECKING:
    from usdm_sft.corpus.unit_reader import UnitReader

REQUIRED = ("dialog", "turn", "speaker", "text", "audio")
OPTIONAL = ("start", "end", "channel", "emotion")
_COLUMNS = (*REQUIRED, *OPTIONAL)
UTTERANCES = "utterances"  # the config of a dataset folder with these columns, and audio in them (--keep_audio)
MAX_TURN = 2**31 - 1
NO_TURN = -1  # of a turn that is numbered by its start
MAX_NAME = 200  # characters of a dialog or speaker
# Of a Parquet manifest: rows read at once, and decoded at once; bytes that a column of a row group may have, and on average a row.
_BATCH_ROWS = 16_384
_DECODED_ROWS = 64  # each may have a text of `MAX_LINE`
_CHUNK_BYTES = 16 << 20
_MEAN_BYTES = 4096
# Of the units of a Parquet manifest, each of up to 8 bytes: those of a row group, rows that are read at once, and the units of a row,
# above which rows are decoded one by one.
_GROUP_UNITS = 50_000_000
_UNIT_ROWS = 1024
_MANY_UNITS = 16_384
MAX_ROW_UNITS = 1_000_000

_RATE_REMEDY = ", or give --unit_rate, and its column units is read in place of audio"
_START_REMEDY = ", or give start and end, and turns are numbered by start"
_SKIP_REMEDY = ", or leave out such rows with --on_bad_rows skip"
_NO_TEXT, _NO_LENGTH = "no text", "zero or negative length"  # why rows are left out, as counts.json has it
_TEXT_REASONS = {"is empty": _NO_TEXT, "holds the control": "control character in the text"}
_SPECIAL_TOKEN = "special token in the text"


def find_manifests(data_dir: FilePath) -> dict[str, Path] | None:
    """Find the manifests in a folder, such as train.jsonl and test.csv, or take `data_dir` for one.

    Returns:
        The manifest of each split, or None if there is none.

    Raises:
        ValueError: A split has two manifests.
    """
    return find_tables(Path(data_dir).expanduser(), lambda path: _is_manifest(path, stem_of(path) in SPLITS))


def _is_manifest(path: Path, may_be_wrong: bool) -> bool:
    """Return True if a table is a manifest. One that may be wrong is one unless its columns tell another kind."""
    kind = kind_of_table(path)
    return kind == "manifest" or (may_be_wrong and kind is None and suffix_of(path) in SUFFIXES)


def read_manifest(
    path: Path,
    problems: list[str],
    data_dir: FilePath | None,
    units: "UnitReader | None" = None,
    *,
    options: RowOptions = DEFAULT,
) -> Turns:
    """Read the turns of a manifest, whose dialogs keep its order.

    Args:
        path: The manifest.
        problems: Problems are appended to this list.
        data_dir: The folder where relative paths of recordings and archives (`zip://member::archive`) start; None, or the manifest
            itself, for the manifest's own folder. Both may be remote.
        units: Reads the column `units`; None if it is ignored.
        options: How rows are read.

    Returns:
        The turns, each with its line, or its row in a Parquet file.
    """
    turns = Turns(place_of(path))
    with_units = units is not None
    if suffix_of(path) == ".parquet":
        rows = _read_parquet(path, with_units, options, turns.further)
    elif with_units and suffix_of(path) in (".csv", ".tsv"):
        problem = f"{path}: lists of units are not read from CSV: write the manifest as JSON lines or Parquet"
        rows = iter([(0, problem)])
    else:
        is_once = partial(_is_once, with_units=with_units, options=options)
        rows = read_rows(path, is_once, partial(_column_problem, with_units=with_units, options=options))
    folder = (
        _remote_folder(data_dir) if data_dir is not None and is_remote(data_dir) else recordings_folder(path, data_dir)
    )
    return read_turns(turns, rows, folder, problems, options, units)


def read_turns(
    turns: Turns,
    rows: Rows,
    folder: FilePath,
    problems: list[str],
    options: RowOptions,
    units: "UnitReader | None" = None,
) -> Turns:
    """Add the turns of rows of a manifest, whatever they were read from.

    Args:
        turns: Where they are added.
        rows: The rows.
        folder: The folder where relative paths of recordings start. Further arguments are those of `read_manifest`.

    Returns:
        `turns`, whose turns have numbers.
    """
    absolute = lru_cache(1)(lambda file: absolute_file(file, folder))  # the turns of a telephone call follow each other
    for number, row in rows:
        if isinstance(row, str):
            turns.mark_incomplete(None)
            add_problem(problems, row)
            continue
        turns.further.update(dict.fromkeys(list_further(row)))
        made = _make_utterance(row, number, absolute, units is not None, options)
        if isinstance(made, Utterance) and units is not None:
            made = _add_units(made, units.read(row[UNITS], turns.place(number)))
        if isinstance(made, Utterance):
            if made.turn == NO_TURN:
                what, first = "segment", turns.add_segment(made, number, float(row["start"]), float(row["end"]))
            else:
                what, first = f"turn {made.turn}", turns.add(made, number)
            if first is None:
                continue
            place = turns.place(first)
            made = [f"{what} of {quote(made.dialog_id)} stands already at {place}: delete one of the two"]
        turns.mark_incomplete(None if is_missing(row.get("dialog"), "dialog") else str(row["dialog"]))
        for problem in made:
            add_problem(problems, f"{turns.place(number)}: {problem}")
    turns.number_segments(problems)
    return turns


def _remote_folder(address: FilePath) -> str:
    """Return the folder of a remote folder or manifest."""
    url = str(address).partition("?")[0].rstrip("/")
    return url.rpartition("/")[0] if RECIPE.reads(Path(url)) else url


def recordings_folder(path: Path, data_dir: FilePath | None) -> Path:
    """Return the folder where relative paths of recordings start; arguments as in `read_manifest`."""
    folder = Path(path if data_dir is None else data_dir).expanduser()
    return folder.parent if folder.is_file() else folder


def list_required(with_units: bool) -> tuple[str, ...]:
    """Return the columns that a row must have. `turn` may be missing where `start` and `end` are there (`list_missing`)."""
    return (*(name for name in REQUIRED if name != "audio"), UNITS) if with_units else REQUIRED


def list_missing(names: Container[str], with_units: bool, *, needs_text: bool = True) -> list[str]:
    """Return the required columns that are not among the names."""
    optional = {"turn" if "start" in names else "", "" if needs_text else "text"}
    return [name for name in list_required(with_units) if name not in names and name not in optional]


def _find_remedy(missing: list[str], has_units: bool) -> str:
    if missing == ["audio"] and has_units:
        return _RATE_REMEDY
    return _START_REMEDY if "turn" in missing else ""


def _add_units(utterance: Utterance, units: Any) -> Utterance | list[str]:
    return [units] if isinstance(units, str) else replace(utterance, units=units)


def _make_utterance(
    row: dict[str, Any], number: int, absolute: Callable[[str], str], with_units: bool, options: RowOptions
) -> Utterance | list[str]:
    """Make the utterance of a row without its units, or return each problem of the row with its remedy."""
    required = list_required(with_units)
    names = dict.fromkeys((*required, *_COLUMNS))
    values: dict[str, Any] = {name: None if is_missing(row.get(name), name) else row[name] for name in names}
    present, bad = [name for name, value in values.items() if value is not None], list[tuple[BadRow, str]]()
    if missing := list_missing(present, with_units, needs_text=options.needs_text):
        found = f"{', '.join(missing)} missing"
        remedy = f"complete the row (a row has {', '.join(required)})"
        if missing != ["text"]:
            return [f"{found}: {remedy}{_find_remedy(missing, row.get(UNITS) is not None)}"]
        bad.append((BadRow(_NO_TEXT, found), "complete the row"))
    problems = []
    for name in ("dialog", "speaker"):
        value = values[name]
        if not isinstance(value, str | int) or isinstance(value, bool) or CONTROL.search(str(value)):
            problems.append(f"{name} {quote(str(value))} is not a name: give plain text or a whole number")
        elif len(str(value)) > MAX_NAME:
            length = len(str(value))
            problems.append(f"{name} {quote(str(value))} has {length:,} characters: give {MAX_NAME} or fewer")
    turn = NO_TURN if values["turn"] is None else whole_number(values["turn"])
    if values["turn"] is not None and (turn is None or not 0 <= turn <= MAX_TURN):
        wrong = quote(str(values["turn"]))
        problems.append(f"turn {wrong} is not a whole number from 0 to {MAX_TURN:,}: number the turns of the dialog")
    text, audio, emotion = values["text"], values["audio"], values["emotion"]
    if text is None or (not options.needs_text and str(text).isspace()):
        text = ""
    elif not isinstance(text, str):
        problems.append(f"text {quote(str(text))} is not a text: correct it")
    elif problem := text_problem(text):
        reason = next((each for head, each in _TEXT_REASONS.items() if problem.startswith(head)), _SPECIAL_TOKEN)
        bad.append((BadRow(reason, f"text {quote(text)} {problem}"), "correct the text"))
    if emotion is not None and CONTROL.search(str(emotion)):
        problems.append(f"emotion {quote(str(emotion))} holds a control character: correct it")
    start, end, channel = (values[name] for name in ("start", "end", "channel"))
    if audio is None and (channel is not None or (turn != NO_TURN and (start, end) != (None, None))):
        problems.append("start, end and channel are of a recording, but the row has no audio: leave them out")
    elif audio is not None and (not isinstance(audio, str) or CONTROL.search(audio)):
        problems.append(f"audio {quote(str(audio))} is not a path: give the path of the recording")
    if (start is None) != (end is None):
        problems.append("start and end go together: give both or neither")
    elif start is not None:
        first, last = number_of(start), number_of(end)
        problem, remedy = f"start {start!r} and end {end!r} are not a segment", "give seconds, the start before the end"
        if first is None or last is None or first < 0 or last < 0:
            problems.append(f"{problem}: {remedy}")
        elif last <= first:
            bad.append((BadRow(_NO_LENGTH, problem), remedy))
        start, end = first, last
    if channel is not None:
        whole = whole_number(channel)
        if whole is None or whole < 0:
            problems.append(f"channel {channel!r} is not a channel: give a whole number from 0 on")
        channel = whole
    more, unreadable = read_further(row, options)
    problems += unreadable + (
        [] if options.skips_bad else [f"{each.problem}: {remedy}{_SKIP_REMEDY}" for each, remedy in bad]
    )
    if problems or turn is None:
        return problems
    dialog, emotion = str(values["dialog"]), "" if emotion is None else str(emotion)
    utterance_id, speaker = f"{dialog}_{turn}", str(values["speaker"])
    if bad:
        return Utterance(utterance_id, dialog, turn, speaker, "", emotion, more=more, bad=bad[0][0], lines=(number,))
    address = "" if audio is None else format_address(absolute(audio), start, end, channel)
    return Utterance(utterance_id, dialog, turn, speaker, text, emotion, address, more=more, lines=(number,))


def _is_once(name: str, with_units: bool, options: RowOptions) -> bool:
    """Return True for a column that may not occur twice, because only one of the two would be read."""
    return name in _COLUMNS or (with_units and name == UNITS) or is_read(name, options)


def _read_parquet(path: Path, with_units: bool, options: RowOptions, further: dict[str, None]) -> Rows:
    # Imported here because the command line and the configuration read this module, and pyarrow is slow to import.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        yield 0, f"{path}: not a Parquet file ({first_line(error)}): name another manifest"
        return
    further.update(dict.fromkeys(list_further(schema.names)))
    fields = [field for field in schema if field.name in _COLUMNS or is_read(field.name, options)]
    problem = _column_problem(schema.names, with_units, options) or _find_unreadable(fields, file.metadata)
    if problem is None and with_units:
        problem = _find_unreadable_units(schema.field(UNITS), file.metadata)
    if problem is not None:
        yield 0, f"{path}: {problem}"
        return
    texts = [field.name for field in fields if _is_text(field.type)]
    nested = [f"{field.name}." for field in fields if pa.types.is_nested(field.type)]
    leaves = (file.schema.column(index) for index in range(len(file.schema)))
    texts += [
        leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.path.startswith(tuple(nested))
    ]
    names = [*(field.name for field in fields), *([UNITS] if with_units else [])]
    is_ignored = UNITS in schema.names and not with_units
    number = 0
    try:
        # As dictionaries, texts that repeat stay as small as they are in the file.
        file = pq.ParquetFile(path, read_dictionary=texts, metadata=file.metadata)
        size = _UNIT_ROWS if with_units else _BATCH_ROWS
        # pyarrow cannot join the dictionaries of texts in lists of several row groups.
        groups = (file.iter_batches(size, row_groups=[group], columns=names) for group in range(file.num_row_groups))
        for batch in chain.from_iterable(groups):
            has_long = _has_long_texts(batch) or _most_units(batch) > _MANY_UNITS
            for row in _decode_rows(batch, 1 if has_long else _DECODED_ROWS):
                if is_ignored and isinstance(row, dict):
                    row[UNITS] = is_ignored
                yield number, f"{path}: row {number}: {row}" if isinstance(row, str) else row
                number += 1
    except (pa.ArrowException, OSError) as error:
        yield 0, f"{path}: damaged after row {number} ({first_line(error)}): write it again"


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    types = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in types


def _find_unreadable(fields: Sequence[Any], metadata: Any) -> str | None:
    """Return which column cannot be read in a bounded amount of memory, or None. A few bytes of Parquet may hold any amount of text."""
    import pyarrow as pa

    for field in fields:
        if pa.types.is_fixed_size_binary(field.type) or (field.name in _COLUMNS and pa.types.is_nested(field.type)):
            return f"column {field.name} is of type {quote(str(field.type))}: give one text or number in each row"
        if field.name not in _COLUMNS and "binary" in str(field.type):
            return f"column {field.name} is of type {quote(str(field.type))}, not text: leave it out of --keep_columns"
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        most = max(_CHUNK_BYTES, _MEAN_BYTES * group.num_rows)
        for column in map(group.column, range(group.num_columns)):
            path = column.path_in_schema
            name = next((field.name for field in fields if f"{path}.".startswith(f"{field.name}.")), None)
            if name is not None and column.total_uncompressed_size > most:
                return (
                    f"column {name} of row group {index} has {column.total_uncompressed_size:,} bytes in "
                    f"{count_noun(group.num_rows, 'row')}: give texts of up to {MAX_LINE:,} characters"
                )
            if name is not None and column.num_values > max(_GROUP_UNITS, group.num_rows):
                return (
                    f"column {name} of row group {index} has {column.num_values:,} values in {count_noun(group.num_rows, 'row')}: "
                    f"give lists of up to {MAX_LINE:,} values"
                )
    return None


def _find_unreadable_units(field: Any, metadata: Any) -> str | None:
    """Return why the column `units` cannot be read in a bounded amount of memory, or None."""
    import pyarrow as pa

    kind, depth = field.type, 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    if depth not in (1, 2) or not pa.types.is_integer(kind):
        return f"column {UNITS} is of type {quote(str(field.type))}: give a list of whole numbers, or of lists of them, in each row"
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.split(".")[0] == UNITS and column.num_values > _GROUP_UNITS:
                return (
                    f"column {UNITS} of row group {index} has {column.num_values:,} units in {count_noun(group.num_rows, 'row')}: write row "
                    f"groups of up to {_GROUP_UNITS:,} units (row_group_size of pyarrow)"
                )
    return None


def _most_units(batch: Any) -> int:
    """Return the number of units of the row that has most of them, 0 if units are not read."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if UNITS not in batch.schema.names:
        return 0
    column = batch[UNITS]
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    if not pa.types.is_integer(column.type.value_type):
        in_frames = pc.fill_null(pc.list_value_length(pc.list_flatten(column)), 0)
        lengths = np.bincount(pc.list_parent_indices(column), in_frames, len(batch))
    return int(lengths.max(initial=0))


def _has_long_texts(batch: Any) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    dictionaries = [column.dictionary for column in batch.columns if pa.types.is_dictionary(column.type)]
    return any((pc.max(pc.binary_length(each)).as_py() or 0) > MAX_LINE for each in dictionaries)


def _decode_rows(batch: Any, step: int) -> Iterator[dict[str, Any] | str]:
    """Yield each row of a batch, or what is wrong with it; `step` rows are decoded at a time."""
    import pyarrow as pa

    for start in range(0, len(batch), step):
        columns = [
            each.dictionary_decode() if pa.types.is_dictionary(each.type) else each
            for each in batch.slice(start, step).columns
        ]
        part = pa.RecordBatch.from_arrays(columns, batch.schema.names)
        if step == 1 and (problem := _long_text(part)):
            yield problem
            continue
        if step > 1 and sum(nested_sizes(part).values()) > MAX_LINE:
            yield from _decode_rows(part, 1)
            continue
        rows: Iterable[dict[str, Any] | str]
        try:
            rows = _to_rows(part)
        except UnicodeDecodeError as error:
            if step == 1:
                rows = [f"not UTF-8 (byte 0x{error.object[error.start]:02X}): save the texts as UTF-8"]
            else:
                rows = _decode_rows(part, 1)
        yield from rows


def _to_rows(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a batch; their units as arrays of integers, which takes a fraction of the time of lists, where they have a shape."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if UNITS not in batch.schema.names:
        return list(batch.to_pylist())
    column = batch[UNITS]
    values, lengths = pc.list_flatten(column), pc.list_value_length(column)
    shape: tuple[int, ...] = (-1,)
    if not pa.types.is_integer(values.type):
        widths = np.unique(pc.fill_null(pc.list_value_length(values), 0))
        values, shape = pc.list_flatten(values), (-1, int(widths[0]) if len(widths) == 1 else 0)
    if column.null_count or values.null_count or 0 in shape or not len(values):
        return list(batch.to_pylist())  # one of them is wrong
    units = np.split(values.to_numpy().reshape(shape), np.cumsum(lengths.to_numpy())[:-1])
    rows = batch.drop_columns(UNITS).to_pylist()
    return [row | {UNITS: each} for row, each in zip(rows, units, strict=True)]


def _long_text(row: Any) -> str | None:
    """Return which text of a batch of one row is too long, or that it has too many units, or None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if (num_units := _most_units(row)) > MAX_ROW_UNITS:
        return f"{UNITS} has {num_units:,} units: give {MAX_ROW_UNITS:,} or fewer"
    for name, column in zip(row.schema.names, row.columns, strict=True):
        if _is_text(column.type):
            length = (pc.utf8_length if pa.types.is_string(column.type) else pc.binary_length)(column)[0].as_py() or 0
            if length > MAX_LINE:
                return f"{name} has {length:,} characters: give {MAX_LINE:,} or fewer"
    for name, size in nested_sizes(row).items():
        if size > MAX_LINE:
            return f"{name} has {size:,} characters and values: give {MAX_LINE:,} or fewer"
    return None


def _column_problem(names: list[str], with_units: bool, options: RowOptions) -> str | None:
    """Return what is wrong with the column names of a table, or None."""
    required = list_required(with_units)
    if missing := list_missing(names, with_units, needs_text=options.needs_text):
        found = f"no column {', '.join(missing)}: name the columns {', '.join(required)}"
        return found + _find_remedy(missing, UNITS in names)
    return doubled_problem(names, partial(_is_once, with_units=with_units, options=options))


RECIPE = Recipe(
    "manifest",
    "manifest",
    "train.jsonl, test.jsonl (.csv, .tsv, .json, .parquet), or one such file, with dialog, speaker, text and audio in each row",
    reads=lambda path: _is_manifest(path, may_be_wrong=True),
    find=lambda data_dir, cache_dir, may_download, with_units: find_manifests(data_dir),
    read=read_manifest,
    read_units=read_manifest,
    takes_options=True,
    max_speakers=2,
)
