"""Write a dataset folder without some of its rows, such as those that were flagged on the page of `show --serve`.

Nothing is computed again: the rows that stay are those of the folder, and counts, card, pictures and digests follow from them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from usdm_sft.corpus.examples import example_id
from usdm_sft.corpus.features import SPEECH, TRAINER_COLUMNS
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.folder.finished import find_finished
from usdm_sft.folder.layout import (
    COUNTS,
    ROW_PACKAGES,
    data_files,
    lock_output,
    read_counts,
    read_layout,
)
from usdm_sft.folder.own_parts import CARD, read_card
from usdm_sft.folder.parquet import Utterance
from usdm_sft.folder.rows import count_processes, divide_files, iter_utterances
from usdm_sft.folder.statistics import DROPPED, SplitStatistics
from usdm_sft.folder.verify import COUNTED, verify
from usdm_sft.folder.verify_rows import list_turns
from usdm_sft.folder.writer import write_folder
from usdm_sft.template.parts import RowLayout
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.files import read_json
from usdm_sft.utils.processes import ProcessPool

_Rows = tuple[Path, npt.NDArray[np.int64]]  # some rows of a Parquet file, by their numbers in it
_Turns = set[tuple[str, int]]  # dialog and turn


class RowsLeft:
    """The rows of a split that stay, as `usdm_sft.folder.parquet.SplitRows`."""

    def __init__(self, files: Sequence[_Rows], num_tokens: int):
        self._files, self.num_tokens = files, num_tokens
        self.num_rows = sum(len(rows) for _, rows in files)
        self.loader = _load_rows

    def part(self, start: int, stop: int) -> list[_Rows]:
        """Describe rows `start` to `stop`, for `loader`."""
        firsts = accumulate((len(rows) for _, rows in self._files), initial=0)
        parts = zip(self._files, firsts, strict=False)
        return [(path, rows[max(0, start - first) : max(0, stop - first)]) for (path, rows), first in parts]


def _load_rows(part: Sequence[_Rows]) -> pa.Table:
    tables = [pq.read_table(path).take(rows) for path, rows in part if len(rows)]
    return pa.concat_tables(tables).drop_columns([*TRAINER_COLUMNS])


class UtterancesLeft:
    """The utterances of the dialogs that stay in a split, as `usdm_sft.folder.parquet.SplitUtterances`.

    As where bad audio was left out, a turn that is in no row any more keeps its text, so that the turns of a dialog have no gap, and
    loses its recording and units.
    """

    def __init__(self, files: Sequence[Path], left: _Turns, gone: _Turns):
        dialogs = {dialog for dialog, _ in left}
        names = [pq.read_table(path, columns=["dialog"])["dialog"].to_pylist() for path in files]
        self._files = [path for path, found in zip(files, names, strict=True) if not dialogs.isdisjoint(found)]
        self.loader = partial(_iter_left, dialogs, gone)

    def __len__(self) -> int:
        return len(self._files)

    def part(self, index: int) -> Path:
        """Describe a file, for `loader`."""
        return self._files[index]


def _iter_left(dialogs: set[str], gone: _Turns, path: Path) -> Iterator[Utterance]:
    for row in iter_utterances(path, range(pq.read_metadata(path).num_row_groups)):
        if row["dialog"] in dialogs:
            yield row | (dict.fromkeys(("audio", *SPEECH)) if (row["dialog"], row["turn"]) in gone else {})


def edit(
    dataset_dir: str | Path, output_path: str | Path, drop: str | Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write a dataset folder without some of its rows.

    Args:
        dataset_dir: A folder that `prepare` made. It is verified first, and not changed.
        output_path: The folder to write.
        drop: A JSON file {"rows": ["d23_0", ...]} with the ids of rows. The page of `show --serve` adds the `key` of their folder.
        overwrite: Replace another dataset folder at `output_path`.

    Returns:
        The counts, as in counts.json. `pairs_left_out` names the pairs that were dropped.

    Raises:
        FileNotFoundError: `dataset_dir` is not a finished dataset folder, or `drop` is missing.
        FileExistsError: `output_path` holds something else, and `overwrite` is false.
        ValueError: `dataset_dir` does not pass `verify` or is `output_path`; or `drop` is of another folder, names rows that the folder
            does not have, or all rows of a split.
    """
    folder, output = Path(dataset_dir).expanduser(), Path(output_path).expanduser()
    if folder.resolve() == output.resolve():
        raise ValueError(f"{output} is the folder itself: name another output_path")
    counts = read_counts(folder)
    dropped = _read_ids(drop, counts["key"])
    verify(folder)
    layout, tokenizer = read_layout(folder / COUNTS, counts), load_tokenizer(folder / "tokenizer")
    files, settings = data_files(folder, counts), counts["settings"]
    key = cache_key(counts["key"], sorted(dropped))
    others = {name: importlib.metadata.version(name) for name in counts["versions"] if name not in ROW_PACKAGES}
    edited = counts | {"key": key, "splits": {}, "versions": counts["versions"] | others}
    rows, turns, missing = {}, {}, set(dropped)
    for split, paths in files.items():
        found = _divide(paths, dropped, settings["history"], layout)
        if not found.statistics.numbers:
            raise ValueError(f"{drop} names all rows of {split}: keep one")
        edited["splits"][split] = _count(counts["splits"][split], found, settings)
        rows[split] = RowsLeft(found.files, edited["splits"][split]["tokens"])
        turns[split] = ({*found.left}, found.gone)
        missing -= found.dropped
    if missing:
        number = f"{len(missing)} of {len(dropped)} rows"
        raise ValueError(f"{drop} names {number} that {folder} does not have, such as {min(missing)}: remove them")
    audio = data_files(folder, counts, UTTERANCES) if UTTERANCES in counts else {}
    utterances = {split: UtterancesLeft(paths, *turns[split]) for split, paths in audio.items()}
    with lock_output(output), ProcessPool(count_processes(divide_files(files), None)) as pool:
        if (finished := find_finished(output, edited, overwrite=overwrite)) is not None:
            return finished
        shards, config = settings.get("num_output_shards"), counts["config"]
        more: dict[str, Any] = {"key": key, "num_output_shards": shards, "utterances": utterances or None}
        return write_folder(output, config, rows, tokenizer, edited, pool, cards=[read_card(folder / CARD)], **more)


def _read_ids(drop: str | Path, key: str) -> set[str]:
    """Read the ids of the rows to drop.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not such a file, names no row, or was saved for another folder.
    """
    remedy = 'write {"rows": ["d23_0", "d23_1"]} with ids of rows, or flag rows on the page of show --serve'
    flags = read_json(drop, remedy)
    ids = flags.get("rows")
    if not isinstance(ids, list) or not ids or not all(isinstance(row_id, str) for row_id in ids):
        raise ValueError(f"{drop} names no rows: {remedy}")
    if flags.get("key", key) != key:
        raise ValueError(f"{drop} flags rows of another folder: name the folder whose page saved it")
    return set(ids)


class _Split(NamedTuple):
    """The rows of a split that stay, and what is dropped."""

    files: list[_Rows]
    statistics: SplitStatistics
    left: dict[tuple[str, int], float]  # dialog and turn of the turns of these rows, with their seconds
    gone: _Turns  # turns that are in dropped rows only
    dropped: set[str]
    pairs: list[str]  # of the dropped rows


def _divide(paths: Sequence[Path], dropped: set[str], history: int, layout: RowLayout) -> _Split:
    """Read the rows of a split."""
    split = _Split([], SplitStatistics(layout), {}, set(), set(), [])
    for path in paths:
        stays: list[bool] = []
        for batch in (batch for rows in divide_files({"": [path]}) for batch in rows.read()):
            ids = batch["id"].to_pylist()
            stay = [row_id not in dropped for row_id in ids]
            stays += stay
            split.dropped.update(dropped.intersection(ids))
            if any(stay):
                split.statistics.add(batch.filter(pa.array(stay)))
            for turn in list_turns(batch, np.arange(len(batch)), 0, history).to_pylist():
                place = turn["dialog"], turn["turn"]
                if stay[turn["row"]]:
                    split.left[place] = turn["seconds"]
                    continue
                split.gone.add(place)
                if turn["side"] == 0 and (not history or example_id(*place) == ids[turn["row"]]):  # the labelled pair
                    split.pairs.append(example_id(*place))
        split.files.append((path, np.flatnonzero(stays)))
    split.gone.difference_update(split.left)
    return split


def _count(counts: Mapping[str, Any], split: _Split, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts of a split without its dropped pairs. Its utterances and hours are then those of the rows."""
    if not split.pairs:
        return dict(counts)
    summary, names = split.statistics.summary(), {example_id(*turn) for turn in split.left}
    clipped = {name: reason for name, reason in counts.get("turns_clipped", {}).items() if name in names}
    is_split = settings["overflow"] == "split"  # the other parts of a row stay
    return {name: each for name, each in counts.items() if name != "turns_clipped"} | {
        **{name: summary[name] for name in COUNTED},
        "utterances": len(split.left),
        "hours": round(sum(split.left.values()) / 3600, 6),
        "pairs_left_out": counts["pairs_left_out"] | dict.fromkeys(split.pairs, DROPPED),
        "rows_cut": {name: cut for name, cut in counts["rows_cut"].items() if is_split or name not in split.dropped},
        "fp32_fallback": [name for name in counts["fp32_fallback"] if name in names],
        **({"turns_clipped": clipped} if clipped else {}),
    }
