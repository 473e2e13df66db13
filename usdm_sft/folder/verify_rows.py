"""Check every row of a dataset folder, in ranges that processes share out. What is found does not depend on their number.

A batch of rows is encoded again and compared as a whole. Only the rows of a batch with a problem are checked one by one, to say
what is wrong with each. What rows have in common, ids and turns, is compared at the end, in tables of Arrow in the calling process:
about 100 bytes for each turn of a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.audio.frames import SAMPLE_RATE, count_units
from usdm_sft.corpus.examples import example_id, first_turn
from usdm_sft.corpus.features import ROLES, SPEECH, TEXTS, are_collapsed, further_columns
from usdm_sft.corpus.problems import MAX_PROBLEMS_SHOWN
from usdm_sft.corpus.streams import UnitStreams
from usdm_sft.folder.compare import describe_difference, first_difference
from usdm_sft.folder.parquet import count_bytes
from usdm_sft.folder.rows import (
    RowRange,
    count_exchanges,
    count_processes,
    divide_rows,
    find_row,
    name_row,
    open_rows,
)
from usdm_sft.folder.statistics import SplitStatistics
from usdm_sft.template.encoder import IGNORE_INDEX, TemplateEncoder
from usdm_sft.template.repetition import find_problem
from usdm_sft.utils.processes import ProcessPool, in_order

_BATCH = 512
LIMIT = MAX_PROBLEMS_SHOWN + 1  # one more tells that there are more

_IDS = pa.schema({"id": pa.large_string(), "row": pa.int64()})
# `content` is a digest of the texts and the speech of the turn; `exchange` is the position in the row, `side` is 0 for the user's turn and 1 for the agent's;
# `row` counts from the first row of the folder.
_TURNS = pa.schema(
    {
        "dialog": pa.large_string(), "turn": pa.int64(), "content": pa.int64(), "seconds": pa.float32(),
        "split": pa.int32(), "exchange": pa.int32(), "side": pa.int8(), "row": pa.int64(),
    }
)  # fmt: skip


class Check(NamedTuple):
    """What decides whether a row is correct."""

    encoder: TemplateEncoder  # has the tokenizer and the template of the folder
    max_length: int
    history: int
    normalization: str  # how the unit model normalizes waveforms
    streams: UnitStreams | None = None  # of units that the corpus had; None if a unit model made them


class CheckedRows(NamedTuple):
    """What the rows of a folder hold."""

    problems: list[str]  # up to `LIMIT` problems in the order of the rows, each with its place
    statistics: dict[str, SplitStatistics]  # of each split
    num_bytes: dict[str, int]  # size of each split in memory
    turns: pa.Table  # of all rows, with the columns of `_TURNS`; complete only if there are no problems
    ranges: list[RowRange]


class _Report(NamedTuple):
    """What a process found in a range of rows."""

    problems: list[tuple[int, str]]  # number of the row in the folder, and the problem
    statistics: SplitStatistics
    num_bytes: int
    ids: pa.Table
    turns: pa.Table


def check_rows(
    files: Mapping[str, Sequence[Path]], schema: pa.Schema, check: Check, *, num_proc: int | None
) -> CheckedRows:
    """Check the columns of every file, and every row.

    Args:
        files: The Parquet files of each split.
        schema: The columns that the files must have.
        check: What decides whether a row is correct.
        num_proc: Largest number of processes; None means one per core that this process may use.
    """
    problems: list[tuple[int, str]] = []  # a file that cannot be checked stands before the rows that follow it
    items: list[tuple[int, int, RowRange]] = []  # number of the first row in the folder, of the split, and the rows
    first = 0
    for number, (split, paths) in enumerate(files.items()):
        for path in paths:
            try:
                if problem := _find_file_problem(path, schema, check.encoder.unit_repetition):
                    problems.append((first, problem))
                    continue
                for rows in divide_rows(path, split):
                    items.append((first, number, rows))
                    first += rows.num_rows
            except ValueError as error:  # it is not a Parquet file of a dataset folder
                problems.append((first, str(error)))
    ranges = [rows for *_, rows in items]
    statistics = {split: SplitStatistics(check.encoder.layout) for split in files}
    num_bytes, ids, turns = dict.fromkeys(files, 0), [_IDS.empty_table()], [_TURNS.empty_table()]
    with ProcessPool(count_processes(ranges, num_proc)) as pool:
        for index, report in in_order(pool.map(partial(_check_range, check), items, name="rows")):
            problems += report.problems
            statistics[ranges[index].split].merge(report.statistics)
            num_bytes[ranges[index].split] += report.num_bytes
            ids.append(report.ids)
            turns.append(report.turns)
            if len(problems) >= LIMIT:
                break
    for row, before in _find_repeated(pa.concat_tables(ids)):
        problems.append((row, f"{name_row(ranges, row)}: the same id is at {name_row(ranges, before)}"))
    found = [problem for _, problem in sorted(problems, key=lambda problem: problem[0])]
    return CheckedRows(found[:LIMIT], statistics, num_bytes, pa.concat_tables(turns), ranges)


def _find_file_problem(path: Path, schema: pa.Schema, unit_repetition: str) -> str | None:
    """Compare the columns of a file with those that the card names, and with the setting for repeated units."""
    found = open_rows(path).schema_arrow.remove_metadata()
    if not found.equals(schema):
        if different := sorted({*found.names} ^ {*schema.names}):
            difference = ", ".join(different)
        else:
            types = [f"{field.name} is {field.type}" for field in found if not field.equals(schema.field(field.name))]
            difference = ", ".join(types) or f"their order is {', '.join(found.names)}"
        return f"{path} has other columns than the README.md beside it says: {difference}"
    if are_collapsed(found.names) != (unit_repetition == "collapse"):
        has = "no durations" if unit_repetition == "collapse" else "durations"
        return f"{path}: it has {has}, but counts.json says unit_repetition {unit_repetition}"
    return None


def _check_range(check: Check, item: tuple[int, int, RowRange]) -> _Report:
    first, split, rows = item
    statistics, num_bytes = SplitStatistics(check.encoder.layout), 0
    problems: list[tuple[int, str]] = []
    ids, turns = [_IDS.empty_table()], [_TURNS.empty_table()]
    start = first
    try:
        for batch in filter(len, rows.read(batch_size=_BATCH)):
            numbers = np.arange(start, start + len(batch))
            start += len(batch)
            ids.append(pa.table([batch["id"], pa.array(numbers)], _IDS.names).cast(_IDS))
            if not any(_find_problems(batch, check)):
                statistics.add(batch)
                num_bytes += sum(map(count_bytes, batch.columns))
                turns.append(_list_turns(batch, numbers, split, check.history))
                continue
            for position, number in enumerate(numbers.tolist()):
                row = batch.slice(position, 1)
                place = _place(rows, number - first, row["id"][0].as_py())
                problems += [(number, f"{place}: {problem}") for problem in _find_problems(row, check)]
            if len(problems) >= LIMIT:
                break
    except ValueError as error:  # the file is damaged; the problems before the damage count as well
        problems.append((start, str(error)))
    return _Report(problems[:LIMIT], statistics, num_bytes, pa.concat_tables(ids), pa.concat_tables(turns))


def _place(rows: RowRange, position: int, row_id: str) -> str:
    return f"{rows.path}: row {rows.start + position} ({row_id})"


def _find_problems(rows: pa.RecordBatch, check: Check) -> Iterator[str]:
    """Check ids and labels, and compare them with those of the other columns.

    Yields:
        The problems of one row. For several rows, one text or more if one of them has a problem.
    """
    lengths, num_labels = (np.asarray(pc.list_value_length(rows[name])) for name in ("input_ids", "labels"))
    ids, labels, ones = (np.asarray(pc.list_flatten(rows[name])) for name in ("input_ids", "labels", "attention_mask"))
    if not np.array_equal(lengths, num_labels):
        yield f"{lengths[0]} input_ids, but {num_labels[0]} labels"
        return
    if lengths.max() > check.max_length:
        yield f"{lengths[0]} tokens, more than max_length {check.max_length}"
    if not np.array_equal(pc.list_value_length(rows["attention_mask"]), lengths) or (ones != 1).any():
        yield f"attention_mask is not {lengths[0]} ones, one per token"
    if not np.array_equal(rows["length"], lengths):
        yield f"length is {rows['length'][0]}, but the row has {lengths[0]} tokens"
    row_ids = list(map(example_id, rows["dialog_id"].to_pylist(), rows["turn"].to_pylist()))
    if rows["id"].to_pylist() != row_ids:
        yield f"the id of dialog_id and turn is {row_ids[0]}"
    if pa.types.is_list(rows["user_text"].type):
        numbers = {name: pc.list_value_length(rows[name]) for name in rows.schema.names if name.startswith(ROLES)}
        if not all(number.equals(numbers["user_text"]) for number in numbers.values()):
            found = ", ".join(f"{name} {number[0]}" for name, number in numbers.items())
            yield f"the columns have different numbers of exchanges ({found})"
            return
    if min(first_turns := _first_turns(rows, check.history)) < 0:
        yield f"its first turn is {first_turns[0]}"
    if (wrong := np.flatnonzero((labels != ids) & (labels != IGNORE_INDEX))).size:
        yield f"label {labels[wrong[0]]} of token {wrong[0]} is neither {IGNORE_INDEX} nor the token's id {ids[wrong[0]]}"
        return
    yield from find_length_problems(rows, check.normalization, check.streams)
    try:
        encoded = check.encoder(
            {name: rows[name].to_numpy(zero_copy_only=False) for name in ("id", *check.encoder.template.parts)}
        )
    except ValueError as error:
        yield str(error)
        return
    for name, flat in (("input_ids", ids), ("labels", labels)):
        expected = np.concatenate(encoded[name])
        if (at := first_difference(flat, expected)) is not None:
            yield f"{name} differ from the encoded columns: {describe_difference(flat, expected, at)}"
            return
    if [*map(len, encoded["input_ids"])] != lengths.tolist():
        yield "the ids are those of the encoded columns, but one row ends where another one should"


def _turns_of(rows: pa.RecordBatch, role: str) -> dict[str, pa.Array]:
    """Return the columns of the user or the agent with one value for each turn: `TEXTS`, further texts, `SPEECH`, and the durations of
    collapsed units.
    """
    fields = (*TEXTS, *further_columns(rows.schema.names), *SPEECH, "durations")
    columns = {name: rows[f"{role}_{name}"] for name in fields if f"{role}_{name}" in rows.schema.names}
    if pa.types.is_list(rows["user_text"].type):
        columns = {name: pc.list_flatten(column) for name, column in columns.items()}
    return columns


def find_length_problems(rows: pa.RecordBatch, normalization: str, streams: UnitStreams | None = None) -> Iterator[str]:
    """Yield what is wrong with the numbers of units: that of a recording is known from its length, up to its rounding.

    Args:
        rows: Rows whose columns have equal numbers of exchanges.
        normalization: How the unit model normalizes waveforms.
        streams: Of units that the corpus had: their number gives the length exactly.
    """
    for role in ROLES:
        turns = _turns_of(rows, role)
        units, *durations = (
            turns[name].to_numpy(zero_copy_only=False) for name in ("units", "durations") if name in turns
        )
        for seconds, each, *frames in zip(turns["seconds"].to_pylist(), units, *durations, strict=True):
            if frames and (problem := find_problem(each, *frames)):
                yield f"{role}_units: {problem}"
                continue
            number = int(frames[0].sum()) if frames else len(each)
            if streams is not None:
                if problem := find_given_problem(streams, each, number, seconds):
                    yield f"{role}_units: {problem}"
            elif not _may_last(number, seconds, normalization):
                found = f"{role}_durations add up to" if frames else f"{role}_units are of"
                yield f"{found} {number} frames, which is not the length of a recording of {seconds:g} s"


def find_given_problem(streams: UnitStreams, units: npt.ArrayLike, number: int, seconds: float) -> str | None:
    """Return what is wrong with units that the corpus had, or None.

    Args:
        streams: The streams of the folder.
        units: The units of a turn.
        number: Their number, before they were collapsed.
        seconds: The length in the row.
    """
    if problem := streams.find_problem(units):
        return problem
    expected = np.float32(streams.count_seconds(number))
    if number and expected == np.float32(seconds):
        return None
    return f"{number} units ({streams.describe()}) last {expected:g} s, not {seconds:g} s"


def _may_last(frames: int, seconds: float, normalization: str) -> bool:
    """True if a recording of `seconds`, a length that was rounded to float32, can have that many frames.

    The samples are known up to 17 minutes (2^24 samples); beyond, some more or fewer are possible.
    """
    if not math.isfinite(seconds):
        return False
    rounding = float(np.spacing(np.float32(seconds))) / 2
    fewest, most = math.ceil(SAMPLE_RATE * (seconds - rounding)), math.floor(SAMPLE_RATE * (seconds + rounding))
    return count_units(fewest, normalization) <= frames <= count_units(most, normalization)


def _first_turns(rows: pa.RecordBatch, history: int) -> list[int]:
    """Return the first turn of each row."""
    turns, exchanges = rows["turn"].to_pylist(), count_exchanges(rows).tolist()
    return [first_turn(turn, count, history) for turn, count in zip(turns, exchanges, strict=True)]


def _list_turns(rows: pa.RecordBatch, numbers: npt.NDArray[np.int64], split: int, history: int) -> pa.Table:
    """Return the turns of correct rows with the columns of `_TURNS`."""
    exchanges = count_exchanges(rows)
    row = np.repeat(np.arange(len(rows)), exchanges)
    exchange = np.arange(len(row)) - np.repeat(np.cumsum(exchanges) - exchanges, exchanges)
    tables = []
    for side, role in enumerate(ROLES):
        turns = _turns_of(rows, role)
        values = [column.to_numpy(zero_copy_only=False) for column in turns.values()]
        num_texts = list(turns).index("units")
        columns = {
            "dialog": rows["dialog_id"].take(pa.array(row)),
            "turn": np.array(_first_turns(rows, history), np.int64)[row] + 2 * exchange + side,
            "content": digest_turns(zip(*values, strict=True), num_texts),
            "seconds": turns["seconds"],
            "split": np.full(len(row), split, np.int32),
            "exchange": exchange,
            "side": np.full(len(row), side, np.int8),
            "row": numbers[row],
        }
        tables.append(pa.table(columns).cast(_TURNS))
    return pa.concat_tables(tables)


def digest_turns(turns: Iterable[Sequence[Any]], num_texts: int) -> npt.NDArray[np.int64]:
    """Return a digest for each turn, of its texts, which come first, of `SPEECH` and the durations of collapsed units, if there are any."""
    digests = []
    for turn in turns:
        digest = hashlib.blake2b(repr((*turn[:num_texts],)).encode(), digest_size=8)
        units, seconds, *durations = turn[num_texts:]
        for numbers, kind in ((units, np.uint16), (seconds, np.float32), *((each, np.uint16) for each in durations)):
            digest.update(np.asarray(numbers, kind).tobytes())
        digests.append(int.from_bytes(digest.digest(), "little", signed=True))
    return np.array(digests, np.int64)


def _find_repeated(ids: pa.Table) -> list[tuple[int, int]]:
    """Find the first rows whose id an earlier row has, in order, each with the nearest earlier row of the same id."""
    codes = ids["id"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")  # equal ids stay in the order of the rows
    again = np.flatnonzero(codes[order][1:] == codes[order][:-1])
    numbers = ids["row"].to_numpy()
    found = zip(numbers[order[again + 1]].tolist(), numbers[order[again]].tolist(), strict=True)
    return sorted(found)[:LIMIT]


def check_turns(checked: CheckedRows) -> Iterator[str]:
    """Check what rows have in common: a dialog is in one split only, and a turn is the same in each row that has it.

    Args:
        checked: Rows without problems.

    Yields:
        The problems in the order of the rows, each with its place.
    """
    turns, splits = checked.turns, list(checked.statistics)
    dialogs = turns.group_by("dialog", use_threads=False).aggregate([("split", "min"), ("split", "max")])
    for found in dialogs.filter(pc.not_equal(dialogs["split_min"], dialogs["split_max"])).to_pylist():
        dialog, first_split = found["dialog"], found["split_min"]
        elsewhere = pc.and_(pc.equal(turns["dialog"], dialog), pc.not_equal(turns["split"], first_split))
        row = name_row(checked.ranges, pc.min(turns["row"].filter(elsewhere)).as_py())
        yield f"{row}: dialog {dialog} is in {splits[first_split]} as well: a dialog belongs to one split"
    groups = turns.group_by(["dialog", "turn"], use_threads=False).aggregate([("content", "min"), ("content", "max")])
    different = groups.filter(pc.not_equal(groups["content_min"], groups["content_max"])).select(["dialog", "turn"])
    if not len(different):
        return
    places = turns.drop_columns(["seconds", "split"]).join(different, ["dialog", "turn"], join_type="inner")
    firsts: dict[tuple[str, int], dict[str, Any]] = {}
    for place in places.sort_by([("row", "ascending"), ("side", "ascending")]).to_pylist():
        first = firsts.setdefault((place["dialog"], place["turn"]), place)
        if place["content"] != first["content"]:
            one, other = (_read_turn(checked, each) for each in (place, first))
            names = ", ".join(name for name in one if one[name] != other[name])
            row, before = (name_row(checked.ranges, each["row"]) for each in (place, first))
            yield f"{row}: turn {place['turn']} has another {names} than in {before}"


def _read_turn(checked: CheckedRows, place: Mapping[str, Any]) -> dict[str, Any]:
    """Read a turn of a row again, by the name of its fields."""
    rows, position = find_row(checked.ranges, place["row"])
    row, role = rows.read_row(position), f"{ROLES[place['side']]}_"
    turn = {name.removeprefix(role): value for name, value in row.items() if name.startswith(role)}
    if not isinstance(row["user_text"], list):
        return turn
    return {name: value[place["exchange"]] for name, value in turn.items()}
