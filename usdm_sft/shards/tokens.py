"""Token shards: the second level of the cache, one row per example with units, `input_ids` and `labels`.

The key of a token shard covers the key of its unit shard, the texts, the utterances of each row, the tokenizer, the template
and the version of the code that encodes them. `max_length` does not enter it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from usdm_sft.cache.shard_cache import ShardCache
from usdm_sft.corpus.features import TRAINER_COLUMNS, are_collapsed, folder_features
from usdm_sft.shards.mapping import map_shard
from usdm_sft.shards.plan import Shard
from usdm_sft.template.repetition import collapse_units
from usdm_sft.utils.pool import Pool
from usdm_sft.utils.progress import progress_bar

if TYPE_CHECKING:
    from usdm_sft.template.encoder import TemplateEncoder

_TEXT_COLUMNS = ["id", "user_text", "agent_text"]  # columns of a row that the encoder needs beside the units


def make_tokens(
    rows: dict[str, Dataset],
    shards: Sequence[Shard],
    encoder: TemplateEncoder,
    units: dict[str, Path],
    cache: Path,
    pool: Pool,
) -> dict[str, Path]:
    """Make the token shards that the cache lacks.

    Args:
        rows: The builder's examples by split.
        shards: The work shards.
        encoder: Makes `input_ids` and `labels`.
        units: The file of each unit shard, by its key.
        cache: Folder of the cache.
        pool: Shares out the shards.

    Returns:
        The file of each token shard, by `tokens_key`: one row per example, with units, seconds, `input_ids` and `labels`.
    """
    level = ShardCache(cache / "tokens")
    files = level.find_all(shard.tokens_key for shard in shards)
    missing = [shard for shard in shards if shard.tokens_key not in files]
    texts = {split: split_rows.select_columns(_TEXT_COLUMNS) for split, split_rows in rows.items()}
    parts = [
        (shard, texts[shard.split].select(range(shard.start, shard.stop)), units[shard.units_key]) for shard in missing
    ]
    keys = [shard.tokens_key for shard in missing]
    made = pool.map(
        partial(_make_token_shard, encoder, level), parts, name="token shards", keys=keys, holds=Path.is_file
    )
    with progress_bar(len(missing), "tokens", "work shards", disable=not missing) as bar:
        for index, path in made:
            files[missing[index].tokens_key] = path
            bar.update()
    return files


def _make_token_shard(encoder: TemplateEncoder, level: ShardCache, part: tuple[Shard, Dataset, Path]) -> Path:
    """Make the token shard of a work shard, the texts of its rows, and the file of its unit shard."""
    shard, texts, units = part

    def write(path: str) -> None:
        collapse = encoder.unit_repetition == "collapse"
        batch = concatenate_datasets([texts, unit_columns(shard, units, collapse=collapse)], axis=1).with_format(
            "numpy"
        )
        map_shard(batch, encoder, path, shard.tokens_key, remove_columns=_TEXT_COLUMNS)

    return level.make(shard.tokens_key, write)


def unit_columns(shard: Shard, file: Path, *, collapse: bool = False) -> Dataset:
    """Arrange the units and seconds of a work shard's utterances by row: `user_units`, `user_seconds`, `agent_units`, ...

    Args:
        shard: The work shard.
        file: The file of its unit shard.
        collapse: Collapse runs of equal units, and add `user_durations` and `agent_durations`.

    Raises:
        ValueError: A run is too long for a duration; the message names the recording.
    """
    table = Dataset.from_file(str(file)).data.table
    utterances = {name: table[name].combine_chunks() for name in ("units", "seconds")}
    if collapse:
        utterances |= _collapse(utterances["units"], shard)
    offsets = pa.array(list(accumulate(map(len, shard.rows), initial=0)), pa.int32())
    columns = {}
    for side, role in enumerate(("user", "agent")):
        indices = pa.array([exchange[side] for row in shard.rows for exchange in row], pa.int64())
        for name, column in utterances.items():
            values = column.take(indices)
            columns[f"{role}_{name}"] = pa.ListArray.from_arrays(offsets, values) if shard.lists else values
    return Dataset.from_dict(columns)


def _collapse(units: pa.ListArray, shard: Shard) -> dict[str, pa.ListArray]:
    """The columns `units` and `durations` of collapsed utterances."""
    collapsed = []
    for recording, values in zip(shard.audio, units, strict=True):
        try:
            collapsed.append(collapse_units(values.values.to_numpy()))
        except ValueError as error:
            raise ValueError(f"{recording}: {error}") from error
    return {
        name: pa.array(list(values), units.type)
        for name, values in zip(("units", "durations"), zip(*collapsed, strict=True), strict=True)
    }


def join_shards(rows: Dataset, tokens: Sequence[Path]) -> Dataset:
    """Join the examples of a split with its token shards: all columns of a dataset folder but `TRAINER_COLUMNS`.

    Args:
        rows: The builder's examples of the split.
        tokens: The files of its token shards, in order; they are memory-mapped.
    """
    encoded = concatenate_datasets([Dataset.from_file(str(file)) for file in tokens])
    parts = [rows.remove_columns(["user_audio", "agent_audio"]), encoded]
    features = folder_features(lists=False, collapsed=are_collapsed(encoded.column_names))
    names = [name for name in features if name not in TRAINER_COLUMNS]
    return concatenate_datasets(parts, axis=1).select_columns(names)
