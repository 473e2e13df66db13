"""Token shards: the second level of the cache, one row per example with units, `input_ids` and `labels`.

The key of a token shard covers the key of its unit shard, the texts, the utterances of each row, the tokenizer, the template
and the version of the code that encodes them. `max_length` does not enter it: `fit_splits` applies it to the finished shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from usdm_sft.corpus.features import ROLES, SPEECH
from usdm_sft.prepare.counts import count_shard, count_split
from usdm_sft.prepare.open_run import Run
from usdm_sft.prepare.overflow import find_cuts, take_rows
from usdm_sft.prepare.plan import Content, Plan, Shard
from usdm_sft.prepare.token_rows import FittedSplit, TokenShard, join_columns, slice_examples
from usdm_sft.template.repetition import collapse_units
from usdm_sft.units.columns import FP32_FALLBACK
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.pool import Pool
from usdm_sft.utils.progress import progress_bar
from usdm_sft.utils.shard_cache import ShardCache, read_shard, write_shard

if TYPE_CHECKING:
    from usdm_sft.template.encoder import TemplateEncoder


_TEXT_COLUMNS = ["id", "user_text", "agent_text"]  # columns of a row that the encoder needs beside the units


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

    def __call__(self, part: tuple[Shard, Content, Path]) -> TokenShard:
        """Make the token shard of a work shard, given its content and the file of its unit shard."""
        shard, content, units = part
        rows = self.rows[shard.split]
        path = self.level.make(shard.tokens_key, lambda path: self._write(path, *part))
        table = join_columns(rows, shard, path)
        cuts = find_cuts(table, self.encoder, self.max_length, self.overflow)
        counts = count_shard(table, take_rows(table, cuts.runs, self.encoder), content)
        return TokenShard(path, cuts, counts, _find_fp32_fallback(content, units))

    def _write(self, path: str, shard: Shard, content: Content, units: Path) -> None:
        texts = slice_examples(self.rows[shard.split], shard).select(_TEXT_COLUMNS)
        columns = unit_columns(content, units, collapse=self.encoder.unit_repetition == "collapse")
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
        for index, shard in pool.map(maker, parts, name="token shards", keys=keys, holds=_is_there):
            made[index] = shard
            bar.update()
    return [made[index] for index in range(len(plan))]


def _is_there(shard: TokenShard) -> bool:
    return shard.path.is_file()


def unit_columns(content: Content, file: Path, *, collapse: bool = False) -> dict[str, pa.Array]:
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


def _collapse(units: pa.ListArray, content: Content) -> dict[str, pa.ListArray]:
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


def _find_fp32_fallback(content: Content, units: Path) -> list[str]:
    """Return the ids of the utterances that overflowed in the chosen precision."""
    table = read_shard(units)
    if FP32_FALLBACK not in table.column_names:
        return []
    marks = table[FP32_FALLBACK].to_pylist()
    return [utterance_id for utterance_id, mark in zip(content.ids, marks, strict=True) if mark]


def fit_splits(
    run: Run, rows: Mapping[str, Dataset], units: Mapping[str, Path], pool: Pool
) -> tuple[dict[str, FittedSplit], dict[str, Any], list[TokenShard]]:
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
        splits[split] = FittedSplit(split_rows, shards, split_tokens, run.encoder, config.shuffle_seed)
    return splits, counts, tokens
