"""Check the config `utterances` of a dataset folder: each recording against its units, and the rows against the utterances.

Processes share out ranges of utterances. What is found does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.audio.frames import SAMPLE_RATE, count_units
from usdm_sft.audio.playable import count_samples
from usdm_sft.corpus.features import SPEECH
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.corpus.streams import UnitStreams, read_streams
from usdm_sft.folder.card import read_info
from usdm_sft.folder.layout import COUNTS, data_files, read_normalization
from usdm_sft.folder.parquet import Utterance, UtteranceCounts
from usdm_sft.folder.rows import RowRange, divide_groups, iter_utterances, map_ranges, name_row, open_utterances
from usdm_sft.folder.verify_rows import LIMIT, CheckedRows, digest_turns, find_given_problem
from usdm_sft.template.repetition import collapse_units

_UTTERANCES_PER_RANGE = 500  # about 100 MB of recordings
# A process takes a few seconds to start, in which this one checks about as many recordings.
_UTTERANCES_PER_PROCESS = 5_000
_KEYS = ["dialog", "turn"]
_NO_TEXTS = (*_KEYS, "audio", *SPEECH)  # the other columns are texts
# `kept` is a digest of the utterance, `path` the file that has it.
_CONTENTS = pa.schema({"dialog": pa.large_string(), "turn": pa.int64(), "kept": pa.int64(), "path": pa.string()})


class _Report(NamedTuple):
    """What a process found in a range of utterances."""

    problems: list[str]
    counts: UtteranceCounts
    contents: pa.Table  # with the columns of `_CONTENTS`


def check_utterances(
    folder: Path, counts: Mapping[str, Any], checked: CheckedRows, *, num_proc: int | None
) -> Iterator[str]:
    """Check the recordings against their units, the rows of the folder against the utterances, and the counts.

    Args:
        folder: A dataset folder.
        counts: Its counts.json.
        checked: The rows of the folder, without problems.
        num_proc: Largest number of processes; None means one per core that this process may use.

    Yields:
        The problems split by split, each with its place, up to one more of a split than are shown.
    """
    info = read_info(folder, UTTERANCES)
    collapse = counts["settings"].get("unit_repetition") == "collapse"
    check = partial(_check_range, read_normalization(counts), read_streams(counts["settings"]), collapse)
    for number, (split, files) in enumerate(data_files(folder, counts, UTTERANCES).items()):
        ranges: list[RowRange] = []
        for path in files:
            try:
                ranges += divide_groups(path, split, open_utterances(path).metadata, _UTTERANCES_PER_RANGE)
            except ValueError as error:  # it is not a Parquet file of the config
                yield str(error)
        total, contents, num_problems = UtteranceCounts(), [_CONTENTS.empty_table()], 0
        reports = map_ranges(
            check, ranges, name=UTTERANCES, num_proc=num_proc, rows_per_process=_UTTERANCES_PER_PROCESS
        )
        with closing(reports):
            for _, report in reports:
                yield from report.problems
                num_problems += len(report.problems)
                if num_problems >= LIMIT:
                    return
                total.merge(report.counts)
                contents.append(report.contents)
        turns = checked.turns.filter(pc.equal(checked.turns["split"], number))
        yield from _compare(turns, pa.concat_tables(contents), checked)
        if counts[UTTERANCES][split] != total.summary():
            yield f"{folder / COUNTS}: {UTTERANCES} of {split} are {total.summary()}, not {counts[UTTERANCES][split]}"
        if not info.splits or split not in info.splits or info.splits[split].num_examples != total.utterances:
            yield f"{folder / 'README.md'}: its YAML does not say that {split} has {total.utterances} {UTTERANCES}"


def _check_range(normalization: str, streams: UnitStreams | None, collapse: bool, rows: RowRange) -> _Report:
    """Check the recordings of a range of utterances."""
    problems: list[str] = []
    counts = UtteranceCounts()
    contents: dict[str, list[Any]] = {"dialog": [], "turn": []}
    values: list[Sequence[Any]] = []
    texts: list[str] = []
    try:
        for row in iter_utterances(rows.path, rows.row_groups):
            counts.add(row)
            if row["audio"] is not None and (problem := _recording_problem(row, normalization, streams)):
                problems.append(f"{rows.path}: {row['dialog']}_{row['turn']}: {problem}")
            units, *durations = collapse_units(row["units"] or []) if collapse else (row["units"] or [],)
            for name, column in contents.items():
                column.append(row[name])
            texts = [row[name] for name in row if name not in _NO_TEXTS]
            values.append((*texts, units, row["seconds"], *durations))
            if len(problems) == LIMIT:
                break
    except ValueError as error:  # the file is damaged; the problems before the damage count as well
        problems.append(str(error))
    columns = contents | {"kept": digest_turns(values, len(texts)), "path": [str(rows.path)] * len(values)}
    return _Report(problems, counts, pa.table(columns, _CONTENTS))


def _recording_problem(row: Utterance, normalization: str, streams: UnitStreams | None) -> str | None:
    """Return what is wrong with the recording of a row, or None."""
    try:
        samples = count_samples(row["audio"]["bytes"])
    except ValueError as error:
        return str(error)
    if streams is not None:  # its units were not made from it
        return find_given_problem(streams, row["units"], len(row["units"]), row["seconds"])
    if (num_units := count_units(samples, normalization)) != len(row["units"]):
        return f"the recording makes {num_units} units, not {len(row['units'])}"
    if np.float32(samples) / np.float32(SAMPLE_RATE) != np.float32(row["seconds"]):
        return f"the recording has {samples / SAMPLE_RATE} seconds, not {row['seconds']}"
    return None


def _compare(turns: pa.Table, contents: pa.Table, checked: CheckedRows) -> Iterator[str]:
    """Find utterances that are there twice, and turns of rows that differ from their utterance or have none."""
    groups = contents.group_by(_KEYS, use_threads=False)
    found = groups.aggregate([("kept", "last"), ("kept", "count"), ("path", "last")])
    for twice in found.filter(pc.greater(found["kept_count"], 1)).to_pylist():
        yield f"{twice['path_last']}: {twice['dialog']}_{twice['turn']} is there twice"
    both = turns.join(found, _KEYS).sort_by([("row", "ascending"), ("exchange", "ascending"), ("side", "ascending")])
    same = pc.fill_null(pc.equal(both["content"], both["kept_last"]), False)
    for place in both.filter(pc.invert(same)).to_pylist():
        utterance, missing = f"{place['dialog']}_{place['turn']}", place["kept_last"] is None
        problem = f"is not among the {UTTERANCES}" if missing else f"differs from the utterance {utterance}"
        yield f"{name_row(checked.ranges, place['row'])}: turn {place['turn']} {problem}"
