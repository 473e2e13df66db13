"""Unit shards: the first level of the cache, one row per utterance with its units and seconds.

The key of a unit shard covers the ids of its utterances, the sha256 of their audio, the unit model, its settings and the
version of the code that makes units. Rows, texts and the template do not enter it: another config, tokenizer or length
limit uses the same unit shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset

from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.cache.shard_cache import ShardCache
from usdm_sft.shards.plan import Shard
from usdm_sft.shards.workers import FP32_FALLBACK, UnitShard, make_unit_shards
from usdm_sft.utils.progress import AUDIO, progress_bar

if TYPE_CHECKING:
    from usdm_sft.corpus.dialogs import Split
    from usdm_sft.units.tokenizer import UnitTokenizer


def make_units(
    shards: Sequence[Shard], unit_tokenizer: UnitTokenizer, devices: Sequence[str], cache: Path
) -> dict[str, Path]:
    """Make the unit shards that the cache lacks.

    Args:
        shards: The work shards.
        unit_tokenizer: Tokenizes the audio.
        devices: Such as ["cuda:0", "cuda:1"]; with more than one, each gets a process of its own.
        cache: Folder of the cache.

    Returns:
        The file of each unit shard, by `units_key`: one row per utterance, with the columns `units` and `seconds`.
    """
    level = ShardCache(cache / "units")
    files = level.find_all(shard.units_key for shard in shards)
    missing = [shard for shard in shards if shard.units_key not in files]
    missing.sort(key=lambda shard: -max(shard.lengths))  # if memory runs out, it does so in the first shard
    to_make = [
        UnitShard(shard.units_key, shard.audio, dict(zip(shard.audio, shard.digests, strict=True))) for shard in missing
    ]
    made = make_unit_shards(to_make, unit_tokenizer, devices, level)
    seconds = {shard.units_key: sum(shard.lengths) / SAMPLE_RATE for shard in missing}
    bar = progress_bar(sum(seconds.values()), "units", AUDIO, disable=not to_make)
    with bar, closing(made):  # `closing` ends the processes at once if this loop is interrupted
        for shard, path in made:
            files[shard.key] = path
            bar.update(seconds[shard.key])
    return files


def find_fp32_fallback(shards: Sequence[Shard], units: dict[str, Path], split: Split) -> list[str]:
    """Find the utterances of a split that overflowed in the chosen precision and therefore have the units of fp32.

    Args:
        shards: All work shards of the split, in order.
        units: The file of each unit shard, by its key.
        split: The split of the corpus.

    Returns:
        The ids of these utterances, in order.
    """
    ids = (utterance.id for utterance in split.utterances())
    fallback: list[str] = []
    for shard in shards:
        rows = Dataset.from_file(str(units[shard.units_key]))
        marks = rows[FP32_FALLBACK][:] if FP32_FALLBACK in rows.column_names else [False] * len(rows)
        fallback += [utterance_id for utterance_id, mark in zip(islice(ids, len(rows)), marks, strict=True) if mark]
    return fallback
