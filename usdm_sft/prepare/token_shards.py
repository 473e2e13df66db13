"""Token shards: the second level of the cache, one row per example with units, `input_ids` and `labels`.

The key of a token shard covers the key of its unit shard, the texts, the utterances of each row, the tokenizer, the template
and the version of the code that encodes them. `max_length` does not enter it: `fit_splits` applies it to the finished shards and counts
what is left. Output files take their rows from the cache, part by part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.table import InMemoryTable

from usdm_sft.corpus.features import ROLES, SPEECH, TRAINER_COLUMNS, are_collapsed, folder_features, further_columns
from usdm_sft.prepare.open_run import Run, text_columns
from usdm_sft.prepare.overflow import Overflowed, find_cuts, take_rows
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
    """A finished token shard."""

    path: Path  # one row per example with units, seconds, `input_ids` and `labels`
    cuts: Overflowed  # what `max_length` leaves of its rows
    counts: ShardCounts  # of what is left
    fp32_fallback: list[str]  # utterances that overflowed in the chosen precision and therefore have the units of fp32


@dataclass(frozen=True)
class TokenMaker:
    """Makes the token shards that the cache lacks, and applies `max_length`. It is pickled into processes and tasks."""

    rows: Mapping[str, Dataset]  # the builder's examples by split
    encoder: TemplateEncoder  # makes `input_ids` and `labels`
    level: ShardCache  # the cache level of token shards
    max_length: int  # largest number of tokens in a row
    overflow: str  # one of `OVERFLOWS`, for longer rows

    def __call__(self, part: tuple[Shard, ShardContents, Path]) -> TokenShard:
        """Make the token shard of a work shard, given its content and the file of its unit shard."""
        shard, content, units_file = part
        units = read_shard(units_file)
        path = self.level.make(shard.tokens_key, lambda path: self._write(path, shard, content, units))
        table = join_columns(self.rows[shard.split], shard, path)
        cuts = find_cuts(table, self.encoder, self.max_length, self.overflow)
        counts = _count_shard(table, take_rows(table, cuts.kept, self.encoder), content)
        marks = units[FP32_FALLBACK].to_pylist() if FP32_FALLBACK in units.column_names else [False] * len(content.ids)
        return TokenShard(path, cuts, counts, [name for name, mark in zip(content.ids, marks, strict=True) if mark])

    def _write(self, path: str, shard: Shard, content: ShardContents, units: pa.Table) -> None:
        texts = _slice_examples(self.rows[shard.split], shard).select(_TEXT_COLUMNS)
        columns = _columns_by_row(content, units, collapse=self.encoder.unit_repetition == "collapse")
        batch = Dataset(InMemoryTable(pa.table(dict(zip(_TEXT_COLUMNS, texts.columns, strict=True)) | columns)))
        write_shard({**columns, **self.encoder(batch.with_format("numpy")[:])}, path)


def make_tokens(plan: Plan, maker: TokenMaker, units: Mapping[str, Path], pool: Pool) -> list[TokenShard]:
    """Make the token shards that the cache lacks, and apply `max_length` to all of them.

    Returns:
        The token shard of each work shard, in order.
    """
    parts = [(shard, plan.content(shard), units[shard.units_key]) for shard in plan]
    keys = [cache_key(shard.tokens_key, maker.max_length, maker.overflow) for shard in plan]
    made: dict[int, TokenShard] = {}
    with progress_bar(len(plan), "tokens", "work shards") as bar:
        for index, shard in pool.map(
            maker, parts, name="token shards", keys=keys, is_valid=lambda shard: shard.path.is_file()
        ):
            made[index] = shard
            bar.update()
    return [made[index] for index in range(len(plan))]


def _columns_by_row(content: ShardContents, units: pa.Table, *, collapse: bool) -> dict[str, pa.Array]:
    """Arrange the units and seconds of a work shard's utterances by row: `user_units`, `user_seconds`, `agent_units`, ...

    Collapsed runs of equal units have further columns, `user_durations` and `agent_durations`.

    Raises:
        ValueError: A run is too long for a duration; the message names the recording.
    """
    utterances = {name: units[name].combine_chunks() for name in SPEECH}
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
    for recording, utterance_id, values in zip(content.audio, content.ids, units, strict=True):
        try:
            collapsed.append(collapse_units(values.values.to_numpy()))
        except ValueError as error:
            raise ValueError(f"{recording or utterance_id}: {error}") from error
    columns = zip(*collapsed, strict=True)
    return {name: pa.array(list(next(columns)), units.type) for name in ("units", "durations")}


def _count_shard(rows: pa.Table, kept: pa.Table, content: ShardContents) -> ShardCounts:
    """Count the rows of a work shard before and after `max_length` was applied."""
    dialog_ids = set(kept["dialog_id"].unique().to_pylist())  # a dialog may have lost all its rows to max_length
    dialogs = [dialog_id for dialog_id, num_utterances in content.dialogs for _ in range(num_utterances)]
    seconds = [each for dialog_id, each in zip(dialogs, content.seconds, strict=True) if dialog_id in dialog_ids]
    return ShardCounts(
        rows=len(kept),
        dialogs=len(dialog_ids),
        utterances=len(seconds),
        pairs=content.num_pairs,
        seconds=math.fsum(seconds),
        units=sum(len(pc.list_flatten(kept[f"{role}_units"], recursive=True)) for role in ROLES),
        tokens=len(pc.list_flatten(kept["input_ids"])),
        labelled_tokens=pc.sum(pc.not_equal(pc.list_flatten(kept["labels"]), IGNORE_INDEX)).as_py() or 0,
        shortest=pc.min(pc.list_value_length(rows["input_ids"])).as_py(),
    )


def _count_split(shards: Sequence[TokenShard], corpus: Split, max_length: int) -> dict[str, Any]:
    """Add up the counts of a split, and list the dialogs, pairs and rows that were left out or cut.

    Raises:
        ValueError: No row is left.
    """
    counts = [shard.counts for shard in shards]
    num_rows = sum(each.rows for each in counts)
    if not num_rows:
        raise ValueError(
            f"max_length {max_length} leaves no row of {corpus.name}, whose shortest row has "
            f"{min(each.shortest for each in counts)} tokens: raise it"
        )
    left_out = dict(corpus.pairs_left_out)
    cut: dict[str, str] = {}
    for shard in shards:
        left_out |= shard.cuts.left_out
        cut |= shard.cuts.cut
    return {
        "dialogs": sum(each.dialogs for each in counts),
        "utterances": sum(each.utterances for each in counts),
        "hours": round(math.fsum(each.seconds for each in counts) / 3600, 6),
        "pairs": sum(each.pairs for each in counts) + len(corpus.pairs_left_out),
        "pairs_with_bad_audio": len(corpus.pairs_left_out) - corpus.pairs_with_bad_rows,
        **({"pairs_with_bad_rows": corpus.pairs_with_bad_rows} if corpus.turns_left_out else {}),
        **({"turns_left_out": dict(corpus.turns_left_out)} if corpus.turns_left_out else {}),
        "rows": num_rows,
        "units": sum(each.units for each in counts),
        "tokens": sum(each.tokens for each in counts),
        "labelled_tokens": sum(each.labelled_tokens for each in counts),
        "dialogs_left_out": dict(corpus.left_out),
        "pairs_left_out": left_out,
        "rows_cut": cut,
        **({"turns_clipped": dict(corpus.turns_clipped)} if corpus.turns_clipped else {}),
        "fp32_fallback": [name for shard in shards for name in shard.fp32_fallback],
    }


class Piece(NamedTuple):
    """Rows of one work shard."""

    shard: Shard
    path: Path  # of its token shard
    kept: range | NDArray[np.int32]  # some of `Overflowed.kept`, in order


class FileRows(NamedTuple):
    """The rows of one output file: some of several work shards."""

    pieces: list[Piece]  # in the order of the corpus
    order: (
        NDArray[np.int64] | None
    )  # position of each row of the file among those of the pieces; None if it is the same


class KeptRows:
    """The rows of a split, as `usdm_sft.folder.parquet.SplitRows`.

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
        # A process takes half a second to unpickle the encoder, which encodes only the rows that lost exchanges.
        self.loader = partial(_load_rows, rows, encoder if any(shard.cuts.cut for shard in tokens) else None)
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
            kept, first, stop = token_shard.cuts.kept, int(chosen[0]), int(chosen[-1]) + 1
            if stop - first == len(chosen):
                kept = kept[first:stop]
            else:
                kept = (np.array([(row, 0, 0) for row in kept], np.int32) if isinstance(kept, range) else kept)[chosen]
            pieces.append(Piece(self._shards[number], token_shard.path, kept))
        return pieces


def _load_rows(rows: Dataset, encoder: TemplateEncoder | None, part: FileRows) -> pa.Table:
    """Load the rows of an output file, with all columns of a dataset folder but `TRAINER_COLUMNS`."""
    loaded = pa.concat_tables(
        [take_rows(join_columns(rows, piece.shard, piece.path), piece.kept, encoder) for piece in part.pieces]
    )
    return loaded if part.order is None else loaded.take(part.order)


def _slice_examples(rows: Dataset, shard: Shard) -> pa.Table:
    """Return the examples of a work shard.

    `Dataset.select` and `select_columns` copy a description of each batch of the file, so that their time grows with the corpus.
    """
    return rows.data.fast_slice(shard.start, shard.stop - shard.start)


def join_columns(rows: Dataset, shard: Shard, tokens: Path) -> pa.Table:
    """Join the examples of a work shard with its token shard, a file that is memory-mapped.

    Returns:
        All columns of a dataset folder but `TRAINER_COLUMNS`.
    """
    examples = _slice_examples(rows, shard)
    encoded = read_shard(tokens)
    columns = further_columns(rows.column_names)
    features = folder_features(lists=False, collapsed=are_collapsed(encoded.column_names), columns=columns)
    names = [name for name in features if name not in TRAINER_COLUMNS]
    return pa.table([(encoded if name in encoded.column_names else examples)[name] for name in names], names)


def fit_splits(
    run: Run, rows: Mapping[str, Dataset], units: Mapping[str, Path], pool: Pool
) -> tuple[dict[str, KeptRows], dict[str, Any], list[TokenShard]]:
    """Make the token shards, apply `max_length`, and count the rows.

    Returns:
        The rows and the counts by split, and all token shards.
    """
    config = run.config
    rows = {split: each.select_columns(text_columns(each.column_names)) for split, each in rows.items()}
    maker = TokenMaker(rows, run.encoder, ShardCache(run.cache / "tokens"), config.max_length, run.overflow)
    tokens = make_tokens(run.plan, maker, units, pool)
    splits, counts = {}, {}
    for split, split_rows in rows.items():
        shards = run.plan.of_split(split)
        split_tokens = [tokens[shard.number] for shard in shards]
        counts[split] = _count_split(split_tokens, run.builder.corpus[split], config.max_length)
        splits[split] = KeptRows(split_rows, shards, split_tokens, run.encoder, config.shuffle_seed)
    return splits, counts, tokens
