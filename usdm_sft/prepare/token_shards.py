"""Token shards: the second level of the cache, one row per example with units, `input_ids` and `labels`.

The key of a token shard covers the key of its unit shard, the texts, the utterances of each row, the tokenizer, the template
and the version of the code that encodes them. `max_length` does not enter it: `fit_splits` applies it to the finished shards and counts
what is left. Output files take their rows from the cache, part by part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.table import InMemoryTable

from usdm_sft.corpus.features import ROLES, SPEECH, TRAINER_COLUMNS, are_collapsed, folder_features
from usdm_sft.prepare.open_run import Run
from usdm_sft.prepare.overflow import Overflowed, find_cuts, list_lengths, take_rows
from usdm_sft.prepare.plan import Plan, Shard, ShardContents
from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.template.repetition import collapse_units
from usdm_sft.units.columns import FP32_FALLBACK
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.pool import Pool
from usdm_sft.utils.progress import progress_bar
from usdm_sft.utils.shard_cache import ShardCache, read_shard, write_shard

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from usdm_sft.corpus.dialogs import Split
    from usdm_sft.template.encoder import TemplateEncoder

_TEXT_COLUMNS = ["id", "user_text", "agent_text"]  # columns of a row that the encoder needs beside the units


class ShardCounts(NamedTuple):
    """The counts of a work shard after `max_length` was applied."""

    rows: int
    dialogs: int
    utterances: int  # in these dialogs
    pairs: int  # before max_length was applied
    seconds: float
    units: int
    tokens: int
    labelled_tokens: int
    shortest: int  # tokens of its shortest row before `max_length` was applied


class TokenShard(NamedTuple):
    """A finished token shard.

    Attributes:
        path: Its file, one row per example with units, seconds, `input_ids` and `labels`.
        cuts: Its rows that `max_length` cuts or drops.
        counts: The counts of what is left.
        fp32_fallback: Ids of the utterances that overflowed in the chosen precision and therefore have the units of fp32.
    """

    path: Path
    cuts: Overflowed
    counts: ShardCounts
    fp32_fallback: list[str]


@dataclass(frozen=True)
class TokenMaker:
    """Makes the token shards that the cache lacks, and applies `max_length`. It is pickled into processes and tasks.

    Attributes:
        rows: The builder's examples by split.
        encoder: Makes `input_ids` and `labels`.
        level: The cache level of token shards.
        max_length: Largest number of tokens in a row.
        overflow: One of `OVERFLOWS`, for longer rows (`usdm_sft.prepare.overflow`).
    """

    rows: Mapping[str, Dataset]
    encoder: TemplateEncoder
    level: ShardCache
    max_length: int
    overflow: str

    def __call__(self, part: tuple[Shard, ShardContents, Path]) -> TokenShard:
        """Make the token shard of a work shard, given its content and the file of its unit shard."""
        shard, content, units = part
        rows = self.rows[shard.split]
        path = self.level.make(shard.tokens_key, lambda path: self._write(path, *part))
        table = join_columns(rows, shard, path)
        cuts = find_cuts(table, self.encoder, self.max_length, self.overflow)
        counts = count_shard(table, take_rows(table, cuts.runs, self.encoder), content)
        return TokenShard(path, cuts, counts, _find_fp32_fallback(content, units))

    def _write(self, path: str, shard: Shard, content: ShardContents, units: Path) -> None:
        texts = slice_examples(self.rows[shard.split], shard).select(_TEXT_COLUMNS)
        columns = columns_by_row(content, units, collapse=self.encoder.unit_repetition == "collapse")
        batch = Dataset(InMemoryTable(pa.table(dict(zip(_TEXT_COLUMNS, texts.columns, strict=True)) | columns)))
        write_shard({**columns, **self.encoder(batch.with_format("numpy")[:])}, path)


def make_tokens(plan: Plan, maker: TokenMaker, units: Mapping[str, Path], pool: Pool) -> list[TokenShard]:
    """Make the token shards that the cache lacks, and apply `max_length` to all of them.

    Args:
        plan: The work shards.
        maker: Makes one of them.
        units: The file of each unit shard, by its key.
        pool: Shares out the shards.

    Returns:
        The token shard of each work shard, in order.
    """
    parts = [(shard, plan.content(shard), units[shard.units_key]) for shard in plan]
    keys = [cache_key(shard.tokens_key, maker.max_length, maker.overflow) for shard in plan]
    made: dict[int, TokenShard] = {}
    with progress_bar(len(plan), "tokens", "work shards") as bar:
        for index, shard in pool.map(maker, parts, name="token shards", keys=keys, is_valid=_is_there):
            made[index] = shard
            bar.update()
    return [made[index] for index in range(len(plan))]


def _is_there(shard: TokenShard) -> bool:
    return shard.path.is_file()


def columns_by_row(content: ShardContents, file: Path, *, collapse: bool = False) -> dict[str, pa.Array]:
    """Arrange the units and seconds of a work shard's utterances by row: `user_units`, `user_seconds`, `agent_units`, ...

    Args:
        content: The utterances and rows of the work shard.
        file: The file of its unit shard.
        collapse: Collapse runs of equal units, and add `user_durations` and `agent_durations`.

    Raises:
        ValueError: A run is too long for a duration; the message names the recording.
    """
    table = read_shard(file)
    utterances = {name: table[name].combine_chunks() for name in SPEECH}
    if collapse:
        utterances |= _collapse(utterances["units"], content)
    offsets = pa.array(list(accumulate(map(len, content.rows), initial=0)), pa.int32())
    columns: dict[str, pa.Array] = {}
    for side, role in enumerate(ROLES):
        indices = pa.array([exchange[side] for row in content.rows for exchange in row], pa.int64())
        for name, column in utterances.items():
            values = column.take(indices)
            columns[f"{role}_{name}"] = pa.ListArray.from_arrays(offsets, values) if content.lists else values
    return columns


def _collapse(units: pa.ListArray, content: ShardContents) -> dict[str, pa.ListArray]:
    """The columns `units` and `durations` of collapsed utterances."""
    collapsed = []
    for recording, values in zip(content.audio, units, strict=True):
        try:
            collapsed.append(collapse_units(values.values.to_numpy()))
        except ValueError as error:
            raise ValueError(f"{recording}: {error}") from error
    return {
        name: pa.array(list(values), units.type)
        for name, values in zip(("units", "durations"), zip(*collapsed, strict=True), strict=True)
    }


def _find_fp32_fallback(content: ShardContents, units: Path) -> list[str]:
    """Return the ids of the utterances that overflowed in the chosen precision."""
    table = read_shard(units)
    if FP32_FALLBACK not in table.column_names:
        return []
    marks = table[FP32_FALLBACK].to_pylist()
    return [utterance_id for utterance_id, mark in zip(content.ids, marks, strict=True) if mark]


def count_shard(rows: pa.Table, kept: pa.Table, content: ShardContents) -> ShardCounts:
    """Count the rows of a work shard.

    Args:
        rows: All rows, before `max_length` was applied.
        kept: The rows that fit.
        content: The utterances of the shard.
    """
    dialog_ids = set(kept["dialog_id"].unique().to_pylist())  # a dialog may have lost all its rows to max_length
    num_utterances, position, seconds = 0, 0, []
    for dialog_id, num in content.dialogs:
        if dialog_id in dialog_ids:
            num_utterances += num
            seconds += content.seconds[position : position + num]
        position += num
    return ShardCounts(
        rows=len(kept),
        dialogs=len(dialog_ids),
        utterances=num_utterances,
        pairs=content.num_pairs,
        seconds=math.fsum(seconds),
        units=count_values(kept, "user_units") + count_values(kept, "agent_units"),
        tokens=count_values(kept, "input_ids"),
        labelled_tokens=pc.sum(pc.not_equal(pc.list_flatten(kept["labels"]), IGNORE_INDEX)).as_py() or 0,
        shortest=int(list_lengths(rows, "input_ids").min()),
    )


def count_values(rows: pa.Table, column: str) -> int:
    """Count the values in a column of lists, or of lists of lists."""
    values = rows[column]
    while pa.types.is_list(values.type):
        values = pc.list_flatten(values)
    return len(values)


def count_split(
    shards: Sequence[ShardCounts], cuts: Sequence[Overflowed], corpus: Split, max_length: int
) -> dict[str, Any]:
    """Add up the counts of a split, and list the dialogs, pairs and rows that were left out or cut.

    Args:
        shards: The counts of its work shards, in order.
        cuts: The rows of each shard that `max_length` cut or dropped.
        corpus: The split.
        max_length: Largest number of tokens in a row.

    Raises:
        ValueError: No row is left.
    """
    num_rows = sum(shard.rows for shard in shards)
    if not num_rows:
        raise ValueError(
            f"max_length {max_length} leaves no row of {corpus.name}, whose shortest row has "
            f"{min(shard.shortest for shard in shards)} tokens: raise it"
        )
    left_out = dict(corpus.pairs_left_out)
    cut: dict[str, str] = {}
    for found in cuts:
        left_out |= found.left_out
        cut |= found.cut
    return {
        "dialogs": sum(shard.dialogs for shard in shards),
        "utterances": sum(shard.utterances for shard in shards),
        "hours": round(math.fsum(shard.seconds for shard in shards) / 3600, 6),
        "pairs": sum(shard.pairs for shard in shards) + len(corpus.pairs_left_out),
        "pairs_with_bad_audio": len(corpus.pairs_left_out),
        "rows": num_rows,
        "units": sum(shard.units for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "labelled_tokens": sum(shard.labelled_tokens for shard in shards),
        "dialogs_left_out": dict(corpus.left_out),
        "pairs_left_out": left_out,
        "rows_cut": cut,
    }


class Piece(NamedTuple):
    """Rows of one work shard.

    Attributes:
        shard: The work shard.
        path: The file of its token shard.
        runs: As in `Overflowed`.
        chosen: Positions among the rows that are left of the shard, in order.
    """

    shard: Shard
    path: Path
    runs: dict[int, list[tuple[int, int]]]
    chosen: range | NDArray[np.int64]


class FileRows(NamedTuple):
    """The rows of one output file: some of several work shards.

    Attributes:
        pieces: The rows, in the order of the corpus.
        order: Position of each row of the file among those of the pieces; None where it is the same.
    """

    pieces: list[Piece]
    order: NDArray[np.int64] | None


class RowLoader:
    """Loads parts of a split. It is pickled into the processes that write output files.

    Args:
        rows: The builder's examples of the split.
        encoder: Encodes rows that were cut; None if there are none, because a process takes half a second to unpickle it.
    """

    def __init__(self, rows: Dataset, encoder: TemplateEncoder | None):
        self._rows, self._encoder = rows, encoder

    def __call__(self, part: FileRows) -> pa.Table:
        """Load the rows of a part, with all columns of a dataset folder but `TRAINER_COLUMNS`."""
        tables = [
            take_rows(join_columns(self._rows, piece.shard, piece.path), piece.runs, self._encoder, piece.chosen)
            for piece in part.pieces
        ]
        rows = pa.concat_tables(tables)
        return rows if part.order is None else rows.take(part.order)


class KeptRows:
    """The rows of a split.

    Args:
        rows: The builder's examples of the split.
        shards: Its work shards, in order.
        tokens: The token shard of each.
        encoder: The encoder that made them.
        shuffle_seed: Shuffle the rows, as `Dataset.shuffle` with this seed; None leaves them in order.
    """

    def __init__(
        self,
        rows: Dataset,
        shards: Sequence[Shard],
        tokens: Sequence[TokenShard],
        encoder: TemplateEncoder,
        shuffle_seed: int | None,
    ):
        are_cut = any(runs for shard in tokens for runs in shard.cuts.runs.values())
        self.loader = RowLoader(rows, encoder if are_cut else None)
        self._shards, self._tokens = shards, tokens
        self._ends = np.array(list(accumulate((shard.counts.rows for shard in tokens), initial=0)))
        self.num_rows = int(self._ends[-1])
        self.num_tokens = sum(shard.counts.tokens for shard in tokens)
        self._order: NDArray[np.int64] | None = None
        if shuffle_seed is not None:
            self._order = np.random.default_rng(shuffle_seed).permutation(self.num_rows)

    def part(self, start: int, stop: int) -> FileRows:
        """Describe rows `start` to `stop`, for `loader`."""
        if self._order is None:
            return FileRows(self._find_pieces(np.arange(start, stop)), None)
        rows = self._order[start:stop]
        order = np.argsort(rows)
        return FileRows(self._find_pieces(rows[order]), np.argsort(order))

    def _find_pieces(self, rows: NDArray[np.int64]) -> list[Piece]:
        """Divide rows, in ascending order, at the ends of work shards."""
        numbers = np.searchsorted(self._ends, rows, side="right") - 1
        found, firsts = np.unique(numbers, return_index=True)
        pieces = []
        for number, chosen in zip(found.tolist(), np.split(rows, firsts[1:]), strict=True):
            token_shard, chosen = self._tokens[number], chosen - self._ends[number]
            is_range = chosen[-1] - chosen[0] + 1 == len(chosen)
            pieces.append(
                Piece(
                    self._shards[number],
                    token_shard.path,
                    token_shard.cuts.runs,
                    range(int(chosen[0]), int(chosen[-1]) + 1) if is_range else chosen,
                )
            )
        return pieces


def slice_examples(rows: Dataset, shard: Shard) -> pa.Table:
    """Return the examples of a work shard.

    `Dataset.select` and `select_columns` copy a description of each batch of the file, so that their time grows with the corpus.
    """
    return rows.data.fast_slice(shard.start, shard.stop - shard.start)


def join_columns(rows: Dataset, shard: Shard, tokens: Path) -> pa.Table:
    """Join the examples of a work shard with its token shard: all columns of a dataset folder but `TRAINER_COLUMNS`.

    Args:
        rows: The builder's examples of the split.
        shard: The work shard.
        tokens: The file of its token shard; it is memory-mapped.
    """
    examples = slice_examples(rows, shard)
    encoded = read_shard(tokens)
    features = folder_features(lists=False, collapsed=are_collapsed(encoded.column_names))
    names = [name for name in features if name not in TRAINER_COLUMNS]
    columns = [(encoded if name in encoded.column_names else examples)[name] for name in names]
    return pa.table(columns, names)


def fit_splits(
    run: Run, rows: Mapping[str, Dataset], units: Mapping[str, Path], pool: Pool
) -> tuple[dict[str, KeptRows], dict[str, Any], list[TokenShard]]:
    """Make the token shards, apply `max_length`, and count the rows.

    Returns:
        The rows and the counts by split, and all token shards.
    """
    config = run.config
    rows = {split: each.remove_columns([f"{role}_audio" for role in ROLES]) for split, each in rows.items()}
    maker = TokenMaker(rows, run.encoder, ShardCache(run.cache / "tokens"), config.max_length, run.overflow)
    tokens = make_tokens(run.plan, maker, units, pool)
    splits, counts = {}, {}
    for split, split_rows in rows.items():
        shards = run.plan.of_split(split)
        split_tokens = [tokens[shard.number] for shard in shards]
        counts[split] = count_split(
            [shard.counts for shard in split_tokens],
            [shard.cuts for shard in split_tokens],
            run.builder.corpus[split],
            config.max_length,
        )
        counts[split]["fp32_fallback"] = [each for shard in split_tokens for each in shard.fp32_fallback]
        splits[split] = KeptRows(split_rows, shards, split_tokens, run.encoder, config.shuffle_seed)
    return splits, counts, tokens
