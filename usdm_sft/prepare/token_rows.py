"""The rows of a split after `max_length` was applied, as output files take them from the cache, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from usdm_sft.corpus.features import TRAINER_COLUMNS, are_collapsed, folder_features
from usdm_sft.prepare.counts import ShardCounts
from usdm_sft.prepare.overflow import Cuts, take_rows
from usdm_sft.prepare.plan import Shard
from usdm_sft.utils.shard_cache import read_shard

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from usdm_sft.template.encoder import TemplateEncoder


class TokenShard(NamedTuple):
    """A finished token shard.

    Attributes:
        path: Its file, one row per example with units, seconds, `input_ids` and `labels`.
        cuts: Its rows that `max_length` cuts or drops.
        counts: The counts of what is left.
        fp32_fallback: Ids of the utterances that overflowed in the chosen precision and therefore have the units of fp32.
    """

    path: Path
    cuts: Cuts
    counts: ShardCounts
    fp32_fallback: list[str]


class Piece(NamedTuple):
    """Rows of one work shard.

    Attributes:
        shard: The work shard.
        path: The file of its token shard.
        runs: As in `Cuts`.
        chosen: Positions among the rows that are left of the shard, in order.
    """

    shard: Shard
    path: Path
    runs: dict[int, list[tuple[int, int]]]
    chosen: range | NDArray[np.int64]


class Part(NamedTuple):
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

    def __call__(self, part: Part) -> pa.Table:
        """Load the rows of a part, with all columns of a dataset folder but `TRAINER_COLUMNS`."""
        tables = [
            take_rows(join_columns(self._rows, piece.shard, piece.path), piece.runs, self._encoder, piece.chosen)
            for piece in part.pieces
        ]
        rows = pa.concat_tables(tables)
        return rows if part.order is None else rows.take(part.order)


class FittedSplit:
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

    def part(self, start: int, stop: int) -> Part:
        """Describe rows `start` to `stop`, for `loader`."""
        if self._order is None:
            return Part(self._find_pieces(np.arange(start, stop)), None)
        rows = self._order[start:stop]
        order = np.argsort(rows)
        return Part(self._find_pieces(rows[order]), np.argsort(order))

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
