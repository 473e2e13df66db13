"""Check every row of a dataset folder, in ranges that processes share out. What is found does not depend on their number."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.corpus.problems import MAX_PROBLEMS_SHOWN
from usdm_sft.folder.compare import describe_difference, first_difference
from usdm_sft.folder.durations import describe_missing, duration_problems
from usdm_sft.folder.ranges import RowRange, count_processes, divide_rows
from usdm_sft.folder.repeated_ids import Place, find_repeated
from usdm_sft.folder.row_check import find_doubtful_rows, render, stand_for
from usdm_sft.folder.rows import open_rows
from usdm_sft.folder.sorted_digests import digest_texts, write_digests
from usdm_sft.folder.statistics import SplitStatistics
from usdm_sft.template.encoder import IGNORE_INDEX, TemplateEncoder
from usdm_sft.utils.processes import ProcessPool, in_order

_BATCH = 512
_LIMIT = MAX_PROBLEMS_SHOWN + 1  # one more tells that there are more


class _Report(NamedTuple):
    """What a process found in a range: problems by row, why the rest could not be read, and the counts."""

    problems: list[tuple[int, str]]  # number of the row in its range, and the problem with its place
    error: ValueError | None
    statistics: SplitStatistics


def check_rows(
    files: Mapping[str, Sequence[Path]],
    schema: pa.Schema,
    encoder: TemplateEncoder,
    settings: Mapping[str, Any],
    statistics: dict[str, SplitStatistics],
    *,
    normalization: str,
    num_proc: int | None,
) -> Iterator[str]:
    """Check the columns of every file, and every row.

    Args:
        files: The Parquet files of each split.
        schema: The columns that the files must have.
        encoder: Has the tokenizer and the template of the folder.
        settings: Those of counts.json.
        statistics: Gets the statistics of each split.
        normalization: How the unit model normalizes waveforms.
        num_proc: Largest number of processes; None means one per core that this process may use.

    Yields:
        The problems in the order of the rows, each with its place, up to one more than are shown.

    Raises:
        ValueError: A file cannot be read.
    """
    plan = list(_plan(files, schema, encoder.unit_repetition))
    ranges = [each for each in plan if isinstance(each, RowRange)]
    statistics.update({split: SplitStatistics(layout=encoder.layout) for split in files})
    problems: dict[int, list[tuple[int, int, str]]] = defaultdict(list)  # by range: row, order in the row, problem
    errors: dict[int, ValueError] = {}
    with (
        tempfile.TemporaryDirectory(prefix="verify-") as folder,
        ProcessPool(count_processes(ranges, num_proc)) as pool,
    ):
        check = partial(_check_range, encoder, settings, normalization, folder)
        for index, report in in_order(pool.map(check, list(enumerate(ranges)), name="rows")):
            statistics[ranges[index].split].merge(report.statistics)
            problems[index] += [(row, 1, problem) for row, problem in report.problems]
            if report.error is not None:
                errors[index] = report.error
            if errors or sum(map(len, problems.values())) >= _LIMIT:
                break
        for place, before in find_repeated([_digest_file(folder, i) for i in problems], _LIMIT):
            text = f"{_describe(place, ranges)}: the same id is at {_describe(before, ranges)}"
            problems[place.range].append((place.row, 0, text))
    yield from _in_order(plan, problems, errors)


def _plan(
    files: Mapping[str, Sequence[Path]], schema: pa.Schema, unit_repetition: str
) -> Iterator[RowRange | str | ValueError]:
    """Yield ranges of rows, and in their places the files that cannot be checked: a problem, or at the end an error."""
    for split, paths in files.items():
        for path in paths:
            try:
                found = open_rows(path).schema_arrow.remove_metadata()
                if not found.equals(schema):
                    difference = _describe_columns(found, schema)
                    yield f"{path} has other columns than the README.md beside it says: {difference}"
                elif problem := describe_missing(found, unit_repetition):
                    yield f"{path}: {problem}"
                else:
                    yield from divide_rows(path, split)
            except ValueError as error:
                yield error
                return


def _in_order(
    plan: Sequence[RowRange | str | ValueError],
    problems: Mapping[int, list[tuple[int, int, str]]],
    errors: Mapping[int, ValueError],
) -> Iterator[str]:
    index = 0
    for each in plan:
        if isinstance(each, ValueError):
            raise each
        if isinstance(each, str):
            yield each
            continue
        yield from (problem for *_, problem in sorted(problems.get(index, []), key=lambda found: found[:2]))
        if index in errors:
            raise errors[index]
        index += 1


def _check_range(
    encoder: TemplateEncoder,
    settings: Mapping[str, Any],
    normalization: str,
    folder: str,
    numbered: tuple[int, RowRange],
) -> _Report:
    """Check the rows of a range, and leave the digests of their ids in a file of `folder`."""
    index, rows = numbered
    statistics = SplitStatistics(layout=encoder.layout)
    problems: list[tuple[int, str]] = []
    digests: list[bytes] = []
    error = None
    number = 0
    try:
        for batch in rows.read(batch_size=_BATCH):
            ids = batch["id"].to_pylist()
            digests.append(digest_texts(row_id.encode() for row_id in ids))
            for position in sorted(find_doubtful_rows(batch, encoder, settings["max_length"], normalization)):
                [row] = batch.slice(position, 1).to_pylist()
                place = _place(rows, number + position, ids[position])
                found = _check_row(row, encoder, settings, normalization)
                problems += [(number + position, f"{place}: {problem}") for problem in found]
            if pc.list_value_length(batch["labels"]).equals(pc.list_value_length(batch["input_ids"])):
                statistics.add(batch)  # otherwise a row was reported
            number += len(batch)
            if len(problems) >= _LIMIT:
                break
    except ValueError as damage:  # of the file; the problems before it count as well
        error = damage
    write_digests(_digest_file(folder, index), b"".join(digests))
    return _Report(problems[:_LIMIT], error, statistics)


def _digest_file(folder: str, index: int) -> Path:
    return Path(folder, f"{index}.npy")


def _place(rows: RowRange, row: int, row_id: str) -> str:
    return f"{rows.path}: row {rows.start + row} ({row_id})"


def _describe(place: Place, ranges: Sequence[RowRange]) -> str:
    """Name a row, whose id is read again."""
    rows = ranges[place.range]
    ids = (row_id for batch in rows.read(columns=["id"]) for row_id in batch["id"].to_pylist())
    return _place(rows, place.row, next(islice(ids, place.row, None)))


def _describe_columns(found: pa.Schema, expected: pa.Schema) -> str:
    """The differences of two schemas."""
    if different := sorted({*found.names} ^ {*expected.names}):
        return ", ".join(different)
    types = [f"{field.name} is {field.type}" for field in found if not field.equals(expected.field(field.name))]
    return ", ".join(types) or f"their order is {', '.join(found.names)}"


def _check_row(
    row: Mapping[str, Any], encoder: TemplateEncoder, settings: Mapping[str, Any], normalization: str
) -> Iterator[str]:
    """Check ids and labels of one row, and compare them with those of its other columns."""
    ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
    if len(ids) != len(labels):
        yield f"{len(ids)} input_ids, but {len(labels)} labels"
        return
    if len(ids) > settings["max_length"]:
        yield f"{len(ids)} tokens, more than max_length {settings['max_length']}"
    if row["attention_mask"] != [1] * len(ids):
        yield f"attention_mask is not {len(ids)} ones, one per token"
    if row["length"] != len(ids):
        yield f"length is {row['length']}, but the row has {len(ids)} tokens"
    if (wrong := np.flatnonzero((labels != ids) & (labels != IGNORE_INDEX))).size:
        yield f"label {labels[wrong[0]]} of token {wrong[0]} is neither {IGNORE_INDEX} nor the token's id {ids[wrong[0]]}"
        return
    if encoder.unit_repetition == "collapse":
        yield from duration_problems(row, normalization)
    try:
        encoded = encoder({column: [value] for column, value in row.items()})
    except ValueError as error:
        yield str(error)
        return
    for name, found in (("input_ids", ids), ("labels", labels)):
        [expected] = encoded[name]
        if (at := first_difference(found, expected)) is not None:
            yield f"{name} differ from the encoded columns: {describe_difference(found, expected, at)}"
            return
    if not stand_for([ids.tolist()], [text := render(row, encoder)], encoder)[0]:
        yield f"input_ids do not decode to the template: {encoder.decode(ids)!r}, not {text!r}"
