"""Unit shards: the first level of the cache, one row per utterance with its units and seconds.

The key of a unit shard covers the ids of its utterances, the sha256 of their audio, the unit model, its settings and the
version of the code that makes units. Rows, texts and the template do not enter it: another config, tokenizer or length
limit uses the same unit shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.prepare.plan import Content, Plan, Shard
from usdm_sft.prepare.workers import UnitShard, make_unit_shards
from usdm_sft.utils.progress import AUDIO, progress_bar
from usdm_sft.utils.shard_cache import ShardCache

if TYPE_CHECKING:
    from usdm_sft.units.tokenizer import UnitTokenizer


def make_units(plan: Plan, unit_tokenizer: UnitTokenizer, devices: Sequence[str], cache: Path) -> dict[str, Path]:
    """Make the unit shards that the cache lacks.

    Args:
        plan: The work shards.
        unit_tokenizer: Tokenizes the audio.
        devices: Such as ["cuda:0", "cuda:1"]; with more than one, each gets a process of its own.
        cache: Folder of the cache.

    Returns:
        The file of each unit shard, by `units_key`: one row per utterance, with the columns `units` and `seconds`.
    """
    level = ShardCache(cache / "units")
    files = level.find_all(shard.units_key for shard in plan)
    missing = [shard for shard in plan if shard.units_key not in files]
    missing.sort(key=lambda shard: -shard.longest)  # if memory runs out, it does so in the first shard

    made = make_unit_shards(
        [_describe(shard, plan.content(shard)) for shard in missing], unit_tokenizer, devices, level
    )
    seconds = {shard.units_key: shard.num_samples / SAMPLE_RATE for shard in missing}
    bar = progress_bar(sum(seconds.values()), "units", AUDIO, disable=not missing)
    with bar, closing(made):  # `closing` ends the processes at once if this loop is interrupted
        for key, path in made:
            files[key] = path
            bar.update(seconds[key])
    return files


def _describe(shard: Shard, content: Content) -> UnitShard:
    return UnitShard(shard.units_key, content.audio, dict(zip(content.audio, content.digests, strict=True)))
