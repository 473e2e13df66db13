"""The rows of each split, joined from token shards and fitted to `max_length`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from usdm_sft.shards.counts import count_rows
from usdm_sft.shards.overflow import fit_rows
from usdm_sft.shards.plan import Shard
from usdm_sft.shards.tokens import join_shards
from usdm_sft.shards.units import find_fp32_fallback
from usdm_sft.stages.run import Run


def fit_splits(
    run: Run, rows: Mapping[str, Dataset], units: dict[str, Path], tokens: Mapping[str, Path]
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Join the token shards of each split, apply `max_length`, and count the rows."""
    config = run.config
    splits, counts = {}, {}
    for split, split_rows in rows.items():
        shards: Sequence[Shard] = [shard for shard in run.plan if shard.split == split]
        joined = join_shards(split_rows, [tokens[shard.tokens_key] for shard in shards])
        fitted = fit_rows(joined, run.encoder, config.max_length, run.overflow)
        counts[split] = count_rows(joined, fitted, run.builder, split, config.max_length)
        counts[split]["fp32_fallback"] = find_fp32_fallback(shards, units, run.builder.corpus[split])
        shuffle = config.shuffle_seed is not None
        splits[split] = fitted.rows.shuffle(seed=config.shuffle_seed) if shuffle else fitted.rows
    return splits, counts
