"""Check the config `utterances` of a dataset folder, in ranges that processes share out.

Memory does not grow with the number of utterances: their keys and contents become digests in sorted, memory-mapped files, in which
the turns of the rows are looked up. What is found does not depend on the number of processes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from usdm_sft.audio.frames import SAMPLE_RATE, count_units
from usdm_sft.audio.playable import count_samples
from usdm_sft.corpus.examples import first_turn
from usdm_sft.corpus.features import ROLES, SPEECH, TEXTS, are_collapsed
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.corpus.problems import MAX_PROBLEMS_SHOWN
from usdm_sft.folder.card import read_info
from usdm_sft.folder.durations import expand_rows
from usdm_sft.folder.layout import COUNTS, data_files, read_normalization
from usdm_sft.folder.ranges import RowRange, count_processes, divide_groups, divide_rows
from usdm_sft.folder.repeated_ids import find_repeated
from usdm_sft.folder.rows import open_rows
from usdm_sft.folder.sorted_digests import DigestTable, as_pairs, digest_texts, merge_digests, write_digests
from usdm_sft.folder.utterance_parquet import (
    Row,
    UtteranceCounts,
    iter_utterances,
    open_utterances,
    recording_size,
)
from usdm_sft.utils.processes import ProcessPool, in_order

_UTTERANCES_PER_RANGE = 500  # about 100 MB of recordings
_UTTERANCES_PER_PROCESS = (
    5_000  # a process takes a few seconds to start, in which this one checks about as many recordings
)
_LIMIT = MAX_PROBLEMS_SHOWN + 1  # one more tells that there are more
_FIELDS = (*TEXTS, *SPEECH)  # of an utterance, that its turn in a row repeats


class _Report(NamedTuple):
    """What a process found in a range of utterances.

    Attributes:
        problems: Number of a row in its range, and the problem with its place.
        error: Why the rest could not be read.
        sizes: Of each recording the bytes and seconds, or None.
    """

    problems: list[tuple[int, str]]
    error: ValueError | None
    sizes: list[tuple[int | None, float | None]]


def check_utterances(folder: Path, counts: Mapping[str, Any], *, num_proc: int | None = 1) -> Iterator[str]:
    """Check the recordings against their units, the rows of the folder against the utterances, and the counts.

    Args:
        folder: A dataset folder.
        counts: Its counts.json.
        num_proc: Largest number of processes; None means one per core that this process may use.

    Yields:
        Each problem with its place, up to one more of a split than are shown.

    Raises:
        ValueError: A file cannot be read.
    """
    files = data_files(folder, counts, UTTERANCES)
    info = read_info(folder, UTTERANCES)
    for split, row_files in data_files(folder, counts).items():
        numbers = UtteranceCounts()
        problems = _check_split(split, files[split], row_files, numbers, counts, num_proc)
        for number, problem in enumerate(problems, start=1):
            yield problem
            if number == _LIMIT:
                return
        if counts[UTTERANCES][split] != numbers.summary():
            yield f"{folder / COUNTS}: {UTTERANCES} of {split} are {numbers.summary()}, not {counts[UTTERANCES][split]}"
        if not info.splits or split not in info.splits or info.splits[split].num_examples != numbers.utterances:
            yield f"{folder / 'README.md'}: its YAML does not say that {split} has {numbers.utterances} {UTTERANCES}"


def _check_split(
    split: str,
    files: Sequence[Path],
    row_files: Sequence[Path],
    numbers: UtteranceCounts,
    counts: Mapping[str, Any],
    num_proc: int | None,
) -> Iterator[str]:
    """Check the utterances of a split, which are added to `numbers`, and then its rows."""
    ranges, error = _divide(files, split)
    rows = [each for path in row_files for each in divide_rows(path, split)]
    size = max(
        count_processes(ranges, num_proc, _UTTERANCES_PER_PROCESS),
        count_processes(rows, num_proc),
    )
    with tempfile.TemporaryDirectory(prefix="utterances-") as folder, ProcessPool(size) as pool:
        yield from _check_recordings(ranges, numbers, read_normalization(counts), folder, pool)
        if error is not None:
            raise error
        merge_digests([_digest_file(folder, index) for index in range(len(ranges))], folder)
        check = partial(_check_rows, folder, counts["settings"]["history"])
        for _, problems in in_order(pool.map(check, rows, name="rows")):
            yield from problems


def _divide(files: Sequence[Path], split: str) -> tuple[list[RowRange], ValueError | None]:
    """Divide the utterances of files, up to one that cannot be read, and return its error."""
    ranges: list[RowRange] = []
    for path in files:
        try:
            ranges += divide_groups(path, split, open_utterances(path).metadata, _UTTERANCES_PER_RANGE)
        except ValueError as error:
            return ranges, error
    return ranges, None


def _check_recordings(
    ranges: Sequence[RowRange], numbers: UtteranceCounts, normalization: str, folder: str, pool: ProcessPool
) -> Iterator[str]:
    """Yield the problems of the utterances in order, and leave their digests in files of `folder`."""
    reports: dict[int, list[tuple[int, int, str]]] = {}  # by range: row, order in the row, problem
    error = None
    check = partial(_check_range, normalization, folder)
    for index, report in in_order(pool.map(check, list(enumerate(ranges)), name=UTTERANCES)):
        reports[index] = [(row, 1, problem) for row, problem in report.problems]
        for size, seconds in report.sizes:
            numbers.add(size, seconds)
        error = report.error
        if error is not None or sum(map(len, reports.values())) >= _LIMIT:
            break
    for place, _ in find_repeated([_digest_file(folder, index) for index in reports], _LIMIT):
        reports[place.range].append((place.row, 0, f"{_describe(ranges[place.range], place.row)} is there twice"))
    for index in reports:
        yield from (problem for *_, problem in sorted(reports[index]))
    if error is not None:
        raise error


def _check_range(normalization: str, folder: str, numbered: tuple[int, RowRange]) -> _Report:
    """Check the recordings of a range, and leave the digests of keys and contents in a file of `folder`."""
    index, rows = numbered
    report = _Report([], None, [])
    keys: list[bytes] = []
    contents: list[bytes] = []
    try:
        for number, row in enumerate(iter_utterances(rows.path, rows.row_groups)):
            if row["audio"] is not None and (problem := _recording_problem(row, normalization)):
                report.problems.append((number, f"{_name(rows.path, row)}: {problem}"))
            keys.append(_encode(row["dialog"], row["turn"]))
            contents.append(_encode(*(row[name] for name in _FIELDS)))
            report.sizes.append((recording_size(row), row["seconds"]))
            if len(report.problems) == _LIMIT:
                break
    except ValueError as error:  # the file is damaged; the problems before it count as well
        report = report._replace(error=error)
    write_digests(_digest_file(folder, index), digest_texts(keys), contents=digest_texts(contents))
    return report


def _digest_file(folder: str, index: int) -> Path:
    return Path(folder, f"{index}.npy")


def _name(path: Path, row: Row) -> str:
    return f"{path}: {row['dialog']}_{row['turn']}"


def _describe(rows: RowRange, number: int) -> str:
    """Name an utterance of a range, whose key is read again."""
    return _name(rows.path, next(islice(iter_utterances(rows.path, rows.row_groups), number, None)))


def _recording_problem(row: Row, normalization: str) -> str | None:
    """Return what is wrong with the recording of a row, or None."""
    try:
        samples = count_samples(row["audio"]["bytes"])
    except ValueError as error:
        return str(error)
    if (num_units := count_units(samples, normalization)) != len(row["units"]):
        return f"the recording makes {num_units} units, not {len(row['units'])}"
    if np.float32(samples) / np.float32(SAMPLE_RATE) != np.float32(row["seconds"]):
        return f"the recording has {samples / SAMPLE_RATE} seconds, not {row['seconds']}"
    return None


def _check_rows(folder: str, history: int, rows: RowRange) -> list[str]:
    """Compare each turn of a range of rows with its utterance."""
    table = DigestTable.open(folder)
    collapsed = are_collapsed(open_rows(rows.path).schema_arrow.names)
    names = (*_FIELDS, "durations") if collapsed else _FIELDS
    columns = ["id", "dialog_id", "turn", *(f"{role}_{name}" for role in ROLES for name in names)]
    problems: list[str] = []
    for batch in rows.read(columns=columns):
        turns = [(row["id"], *turn) for row in batch.to_pylist() for turn in _turns(row, history, collapsed)]
        found, contents = table.find(digest_texts(_encode(dialog, turn) for _, dialog, turn, _ in turns))
        same = (contents == as_pairs(digest_texts(_encode(*values) for *_, values in turns))).all(axis=1)
        for index in np.flatnonzero(~(found & same)).tolist():
            row_id, dialog, turn, _ = turns[index]
            what = f"differs from the utterance {dialog}_{turn}" if found[index] else f"is not among the {UTTERANCES}"
            problems.append(f"{rows.path}: turn {turn} of row {row_id} {what}")
        if len(problems) >= _LIMIT:
            break
    return problems[:_LIMIT]


def _turns(row: Row, history: int, collapsed: bool) -> Iterator[tuple[str, int, list[Any]]]:
    """Yield dialog, number and `_FIELDS` of each turn of a row."""
    row = expand_rows(row) if collapsed else row
    sides = [[row[f"{role}_{name}"] for name in _FIELDS] for role in ROLES]
    if not isinstance(row["user_text"], list):
        sides = [[[value] for value in side] for side in sides]
    exchanges = len(sides[0][0])
    first = first_turn(row["turn"], exchanges, history)
    for offset in range(2 * exchanges):
        yield row["dialog_id"], first + offset, [column[offset // 2] for column in sides[offset % 2]]


def _encode(*values: Any) -> bytes:
    return json.dumps(values).encode()
