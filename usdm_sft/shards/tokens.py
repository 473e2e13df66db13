"""Token shards: units and texts of a work shard as `input_ids` and `labels`, and the splits joined from them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_sft.shards.mapping import map_shard
from usdm_sft.shards.plan import Shard
from usdm_sft.utils.cache import ShardCache
from usdm_sft.utils.progress import progress_bar

if TYPE_CHECKING:
    from datasets import Dataset

    from usdm_sft.template.encoder import TemplateEncoder


OUTPUT_COLUMNS = (
    "id", "dialog_id", "turn",
    "user_speaker", "user_text", "user_emotion", "user_units", "user_seconds",
    "agent_speaker", "agent_text", "agent_emotion", "agent_units", "agent_seconds",
    "input_ids", "labels",
)  # fmt: skip


def make_tokens(
    rows: dict[str, Dataset], shards: Sequence[Shard], encoder: TemplateEncoder, units: dict[str, Path], cache: Path
) -> dict[str, Path]:
    """Fill the cache's second level: for each work shard a file of units, seconds, `input_ids` and `labels`, by its key."""
    from datasets import concatenate_datasets

    level = ShardCache(cache / "tokens")
    files = {shard.tokens_key: level.find(shard.tokens_key) for shard in shards}
    missing = [shard for shard in shards if files[shard.tokens_key] is None]
    texts = ["id", "user_text", "agent_text"]
    with progress_bar(len(missing), "template", "shard", disable=not missing) as bar:
        for shard in missing:
            its_texts = rows[shard.split].select_columns(texts).select(range(shard.start, shard.stop))
            its_units = unit_columns(shard, units[shard.units_key])
            batch = concatenate_datasets([its_texts, its_units], axis=1).with_format("numpy")
            key = shard.tokens_key

            def write(path: str, batch: Dataset = batch, key: str = key) -> None:
                map_shard(batch, encoder, path, key, remove_columns=texts)

            files[key] = level.make(key, write)
            bar.update()
    return files


def unit_columns(shard: Shard, file: Path) -> Dataset:
    """The units and seconds of a work shard's utterances, in its rows: `user_units`, `user_seconds`, `agent_units`, ..."""
    import pyarrow as pa
    from datasets import Dataset

    utterances = Dataset.from_file(str(file)).data.table
    offsets = pa.array(list(accumulate(map(len, shard.rows), initial=0)), pa.int32())
    columns = {}
    for side, role in enumerate(("user", "agent")):
        places = pa.array([exchange[side] for row in shard.rows for exchange in row], pa.int64())
        for name in ("units", "seconds"):
            values = utterances[name].combine_chunks().take(places)
            columns[f"{role}_{name}"] = pa.ListArray.from_arrays(offsets, values) if shard.lists else values
    return Dataset.from_dict(columns)


def join_shards(rows: Dataset, tokens: Sequence[Path]) -> Dataset:
    """All columns of a split but the audio, memory-mapped."""
    from datasets import Dataset, concatenate_datasets

    laid_out = concatenate_datasets([Dataset.from_file(str(file)) for file in tokens])
    parts = [rows.remove_columns(["user_audio", "agent_audio"]), laid_out]
    return concatenate_datasets(parts, axis=1).select_columns(list(OUTPUT_COLUMNS))
