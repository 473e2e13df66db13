"""The rows of each split, made from token shards and fitted to `max_length`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from usdm_sft.corpus.features import ROLES
from usdm_sft.prepare.counts import count_split
from usdm_sft.prepare.open_run import Run
from usdm_sft.prepare.token_rows import FittedSplit, TokenShard
from usdm_sft.prepare.token_shards import TokenMaker, make_tokens
from usdm_sft.utils.pool import Pool
from usdm_sft.utils.shard_cache import ShardCache


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
