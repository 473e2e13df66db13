"""Check every row of a dataset folder, in ranges that processes share out. What is found does not depend on their number.

A batch of rows is encoded again and compared as a whole. Only the rows of a batch that differs are looked at one by one, to say
what is wrong. What rows have in common, ids and turns, is compared at the end, in tables of Arrow in the calling process:
about 100 bytes for each turn of a row.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.audio.frames import SAMPLE_RATE, count_units
from usdm_sft.corpus.examples import example_id, first_turn
from usdm_sft.corpus.features import ROLES, SPEECH, TEXTS, are_collapsed
from usdm_sft.corpus.problems import MAX_PROBLEMS_SHOWN
from usdm_sft.folder.compare import describe_difference, first_difference
from usdm_sft.folder.parquet import count_bytes
from usdm_sft.folder.rows import RowRange, count_processes, divide_rows, open_rows
from usdm_sft.folder.statistics import SplitStatistics
from usdm_sft.template.encoder import IGNORE_INDEX, TemplateEncoder
from usdm_sft.template.repetition import find_problem
from usdm_sft.utils.processes import ProcessPool, in_order

_BATCH = 512
LIMIT = MAX_PROBLEMS_SHOWN + 1  # one more tells that there are more
FIELDS = (*TEXTS, *SPEECH)  # of an utterance; a row repeats them for each of its turns

_IDS = pa.schema({"id": pa.large_string(), "row": pa.int64()})
# `content` is a digest of `FIELDS`; `exchange` is the position in the row, `side` is 0 for the user's turn and 1 for the agent's;
# `row` counts from the first row of the folder.
_TURNS = pa.schema(
    {
        "dialog": pa.large_string(), "turn": pa.int64(), "content": pa.int64(), "seconds": pa.float32(),
        "split": pa.int32(), "exchange": pa.int32(), "side": pa.int8(), "row": pa.int64(),
    }
)  # fmt: skip


class Check(NamedTuple):
    """What decides whether a row is correct.

    Attributes:
        encoder: Has the tokenizer and the template of the folder.
        max_length: Largest number of tokens in a row.
        history: Number of earlier exchanges in a row.
        normalization: How the unit model normalizes waveforms.
    """

    encoder: TemplateEncoder
    max_length: int
    history: int
    normalization: str


class CheckedRows(NamedTuple):
    """What the rows of a folder hold.

    Attributes:
        problems: Up to `LIMIT` problems in the order of the rows, each with its place.
        statistics: Of each split.
        num_bytes: Size of each split in memory.
        turns: The turns of all rows, with the columns of `_TURNS`. Complete only if there are no problems.
        ranges: The ranges of rows, in order.
    """

    problems: list[str]
    statistics: dict[str, SplitStatistics]
    num_bytes: dict[str, int]
    turns: pa.Table
    ranges: list[RowRange]

    def find(self, number: int) -> tuple[RowRange, int]:
        """Return the range of a row of the folder, and the number of the row in it."""
        starts = [0, *accumulate(rows.num_rows for rows in self.ranges)]
        index = bisect_right(starts, number) - 1
        return self.ranges[index], number - starts[index]

    def describe(self, number: int) -> str:
        """Name a row of the folder, whose id is read again."""
        rows, position = self.find(number)
        return _place(rows, position, rows.read_row(position, ["id"])["id"])


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
    statistics = {split: SplitStatistics(layout=check.encoder.layout) for split in files}
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
    checked = CheckedRows([], statistics, num_bytes, pa.concat_tables(turns), ranges)
    for row, before in _find_repeated(pa.concat_tables(ids)):
        problems.append((row, f"{checked.describe(row)}: the same id is at {checked.describe(before)}"))
    checked.problems.extend(problem for _, problem in sorted(problems, key=lambda found: found[0])[:LIMIT])
    return checked


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
    statistics, num_bytes = SplitStatistics(layout=check.encoder.layout), 0
    problems: list[tuple[int, str]] = []
    ids, turns = [_IDS.empty_table()], [_TURNS.empty_table()]
    start = first
    try:
        for batch in filter(len, rows.read(batch_size=_BATCH)):
            numbers = np.arange(start, start + len(batch))
            start += len(batch)
            ids.append(pa.table([batch["id"], pa.array(numbers)], _IDS.names).cast(_IDS))
            if _is_correct(batch, check):
                statistics.add(batch)
                num_bytes += sum(map(count_bytes, batch.columns))
                turns.append(_list_turns(batch, numbers, split, check.history))
                continue
            for number, row in zip(numbers.tolist(), batch.to_pylist(), strict=True):
                place = _place(rows, number - first, row["id"])
                problems += [(number, f"{place}: {problem}") for problem in _find_problems(row, check)]
            if len(problems) >= LIMIT:
                break
    except ValueError as error:  # the file is damaged; the problems before the damage count as well
        problems.append((start, str(error)))
    return _Report(problems[:LIMIT], statistics, num_bytes, pa.concat_tables(ids), pa.concat_tables(turns))


def _place(rows: RowRange, position: int, row_id: str) -> str:
    return f"{rows.path}: row {rows.start + position} ({row_id})"


def _is_correct(batch: pa.RecordBatch, check: Check) -> bool:
    """True if `_find_problems` has nothing to say of any row of a batch."""
    names = ("id", *check.encoder.template.parts)
    try:
        encoded = check.encoder({name: batch[name].to_numpy(zero_copy_only=False) for name in names})
    except ValueError:  # of one row, or of several
        return False
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    row_ids = pc.binary_join_element_wise(batch["dialog_id"], batch["turn"].cast(pa.string()), "_")
    return (
        all(
            np.array_equal(pc.list_value_length(batch[name]), lengths)
            and np.array_equal(pc.list_flatten(batch[name]), np.concatenate(values))
            for name, values in (*encoded.items(), ("attention_mask", [np.ones(lengths.sum(), np.int8)]))
        )
        and np.array_equal(batch["length"], lengths)
        and bool(lengths.max(initial=0) <= check.max_length)
        and batch["id"].equals(row_ids)
        and min(_first_turns(batch, check.history)) >= 0
        and _have_equal_lists(batch)
        and _last_as_long(batch, check.normalization)
    )


def _have_equal_lists(batch: pa.RecordBatch) -> bool:
    """True if all columns of a turn have the same number of exchanges in each row."""
    if not pa.types.is_list(batch["user_text"].type):
        return True
    lengths = pc.list_value_length(batch["user_text"])
    columns = [name for name in batch.schema.names if name.startswith(ROLES)]
    return all(pc.list_value_length(batch[name]).equals(lengths) for name in columns)


def _last_as_long(batch: pa.RecordBatch, normalization: str) -> bool:
    """True if all units of a batch are those of recordings of their lengths."""
    if are_collapsed(batch.schema.names):
        columns = [f"{role}_{name}" for role in ROLES for name in ("units", "durations", "seconds")]
        return not any(any(find_length_problems(row, normalization)) for row in batch.select(columns).to_pylist())
    for role in ROLES:
        units, seconds = (batch[f"{role}_{name}"] for name in SPEECH)
        if pa.types.is_list(seconds.type):
            units, seconds = pc.list_flatten(units), pc.list_flatten(seconds)
        lengths = pc.list_value_length(units).to_pylist()
        if not all(map(partial(_may_last, normalization=normalization), lengths, seconds.to_pylist())):
            return False
    return True


def _find_problems(row: Mapping[str, Any], check: Check) -> Iterator[str]:
    """Check ids and labels of one row, and compare them with those of its other columns."""
    ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
    if len(ids) != len(labels):
        yield f"{len(ids)} input_ids, but {len(labels)} labels"
        return
    if len(ids) > check.max_length:
        yield f"{len(ids)} tokens, more than max_length {check.max_length}"
    if row["attention_mask"] != [1] * len(ids):
        yield f"attention_mask is not {len(ids)} ones, one per token"
    if row["length"] != len(ids):
        yield f"length is {row['length']}, but the row has {len(ids)} tokens"
    if row["id"] != (expected_id := example_id(row["dialog_id"], row["turn"])):
        yield f"the id of dialog_id and turn is {expected_id}"
    is_list = isinstance(row["user_text"], list)
    exchanges = {name: len(row[name]) if is_list else 1 for name in row if name.startswith(ROLES)}
    if len({*exchanges.values()}) != 1:
        yield f"the columns have different numbers of exchanges ({', '.join(f'{name} {n}' for name, n in exchanges.items())})"
        return
    if (turn := first_turn(row["turn"], exchanges["user_text"], check.history)) < 0:
        yield f"its first turn is {turn}"
    if (wrong := np.flatnonzero((labels != ids) & (labels != IGNORE_INDEX))).size:
        yield f"label {labels[wrong[0]]} of token {wrong[0]} is neither {IGNORE_INDEX} nor the token's id {ids[wrong[0]]}"
        return
    yield from find_length_problems(row, check.normalization)
    try:
        encoded = check.encoder({column: [value] for column, value in row.items()})
    except ValueError as error:
        yield str(error)
        return
    for name, found in (("input_ids", ids), ("labels", labels)):
        [expected] = encoded[name]
        if (at := first_difference(found, expected)) is not None:
            yield f"{name} differ from the encoded columns: {describe_difference(found, expected, at)}"
            return


def find_length_problems(row: Mapping[str, Any], normalization: str) -> Iterator[str]:
    """Yield what is wrong with the number of units of a row: that of a recording is known from its length, up to its rounding.

    Args:
        row: A row; its columns have equal numbers of exchanges.
        normalization: How the unit model normalizes waveforms.
    """
    for role in ROLES:
        names = [name for name in ("seconds", "units", "durations") if f"{role}_{name}" in row]
        columns = [row[f"{role}_{name}"] for name in names]
        if not isinstance(columns[0], list):
            columns = [[value] for value in columns]
        for seconds, units, *durations in zip(*columns, strict=False):
            if durations and (problem := find_problem(units, *durations)):
                yield f"{role}_units: {problem}"
            elif not _may_last(frames := sum(*durations) if durations else len(units), seconds, normalization):
                found = f"{role}_durations add up to" if durations else f"{role}_units are of"
                yield f"{found} {frames} frames, which is not the length of a recording of {seconds:g} s"


def _may_last(frames: int, seconds: float, normalization: str) -> bool:
    """True if a recording of `seconds`, a length that was rounded to float32, can have that many frames.

    The samples are known up to 17 minutes (2^24 samples); beyond, some more or fewer are possible.
    """
    if not math.isfinite(seconds):
        return False
    rounding = float(np.spacing(np.float32(seconds))) / 2
    fewest, most = math.ceil(SAMPLE_RATE * (seconds - rounding)), math.floor(SAMPLE_RATE * (seconds + rounding))
    return count_units(fewest, normalization) <= frames <= count_units(most, normalization)


def _first_turns(batch: pa.RecordBatch, history: int) -> list[int]:
    """Return the first turn of each row."""
    texts = batch["user_text"]
    exchanges = pc.list_value_length(texts).to_pylist() if pa.types.is_list(texts.type) else [1] * len(batch)
    return [first_turn(turn, count, history) for turn, count in zip(batch["turn"].to_pylist(), exchanges, strict=True)]


def _list_turns(batch: pa.RecordBatch, numbers: npt.NDArray[np.int64], split: int, history: int) -> pa.Table:
    """Return the turns of a correct batch with the columns of `_TURNS`."""
    is_list = pa.types.is_list(batch["user_text"].type)
    exchanges = np.asarray(pc.list_value_length(batch["user_text"])) if is_list else np.ones(len(batch), np.int64)
    row = np.repeat(np.arange(len(batch)), exchanges)
    firsts = np.array(_first_turns(batch, history), np.int64)
    place = np.arange(len(row)) - np.repeat(np.cumsum(exchanges) - exchanges, exchanges)
    tables = []
    for side, role in enumerate(ROLES):
        names = [name for name in (*FIELDS, "durations") if f"{role}_{name}" in batch.schema.names]
        columns = {name: batch[f"{role}_{name}"] for name in names}
        if is_list:
            columns = {name: pc.list_flatten(column) for name, column in columns.items()}
        values = [column.to_numpy(zero_copy_only=False) for column in columns.values()]
        tables.append(
            {
                "dialog": batch["dialog_id"].take(pa.array(row)),
                "turn": firsts[row] + 2 * place + side,
                "content": digest_turns(zip(*values, strict=True)),
                "seconds": columns["seconds"],
                "split": np.full(len(row), split, np.int32),
                "exchange": place,
                "side": np.full(len(row), side, np.int8),
                "row": numbers[row],
            }
        )
    return pa.concat_tables([pa.table(each).cast(_TURNS) for each in tables])


def digest_turns(turns: Iterable[Sequence[Any]]) -> npt.NDArray[np.int64]:
    """Return a digest for each turn, of `FIELDS` and the durations of collapsed units, if there are any."""
    digests = []
    for speaker, text, emotion, units, seconds, *durations in turns:
        digest = hashlib.blake2b(repr((speaker, text, emotion)).encode(), digest_size=8)
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
    yield from _find_dialogs_in_two_splits(checked)
    groups = checked.turns.group_by(["dialog", "turn"], use_threads=False)
    found = groups.aggregate([("content", "min"), ("content", "max")])
    different = found.filter(pc.not_equal(found["content_min"], found["content_max"])).select(["dialog", "turn"])
    if not len(different):
        return
    places = checked.turns.join(different, ["dialog", "turn"], join_type="inner").sort_by(
        [("row", "ascending"), ("side", "ascending")]
    )
    firsts: dict[tuple[str, int], dict[str, Any]] = {}
    for place in places.drop_columns(["seconds", "split"]).to_pylist():
        first = firsts.setdefault((place["dialog"], place["turn"]), place)
        if place["content"] != first["content"]:
            one, other = (_read_turn(checked, each) for each in (place, first))
            names = ", ".join(name for name in one if one[name] != other[name])
            yield (
                f"{checked.describe(place['row'])}: turn {place['turn']} has another {names} than in "
                f"{checked.describe(first['row'])}"
            )


def _find_dialogs_in_two_splits(checked: CheckedRows) -> Iterator[str]:
    splits = list(checked.statistics)
    dialogs = checked.turns.group_by("dialog", use_threads=False).aggregate([("split", "min"), ("split", "max")])
    several = dialogs.filter(pc.not_equal(dialogs["split_min"], dialogs["split_max"]))
    for dialog, first in zip(several["dialog"].to_pylist(), several["split_min"].to_pylist(), strict=True):
        elsewhere = pc.and_(pc.equal(checked.turns["dialog"], dialog), pc.not_equal(checked.turns["split"], first))
        row = pc.min(checked.turns["row"].filter(elsewhere)).as_py()
        yield f"{checked.describe(row)}: dialog {dialog} is in {splits[first]} as well: a dialog belongs to one split"


def _read_turn(checked: CheckedRows, place: Mapping[str, Any]) -> dict[str, Any]:
    """Read a turn of a row again, by the name of its fields."""
    rows, position = checked.find(place["row"])
    row, role = rows.read_row(position), ROLES[place["side"]]
    names = [name for name in (*FIELDS, "durations") if f"{role}_{name}" in row]
    if not isinstance(row["user_text"], list):
        return {name: row[f"{role}_{name}"] for name in names}
    return {name: row[f"{role}_{name}"][place["exchange"]] for name in names}
