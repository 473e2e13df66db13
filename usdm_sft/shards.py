"""Work shards: planned, run through the two `.map` callables, kept in the two levels of the cache, joined again.

Key of a unit shard: utterance ids and audio digests in order, unit model, settings, version of the units code. Key of a token
shard: the unit shard's key, the texts, the tokenizer, version of the template code. Nothing else starts another shard.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from usdm_sft import template
from usdm_sft.cache import ShardCache, cache_key
from usdm_sft.workers import Task, map_shard, quiet, tokenize_shards

if TYPE_CHECKING:
    from datasets import Dataset

    from dailytalk_usdm import DailyTalkUSDM
    from usdm_sft.template import TemplateEncoder
    from usdm_sft.units import UnitTokenizer

logger = logging.getLogger(__name__)

OUTPUT_COLUMNS = (
    "id", "dialog_id", "turn",
    "user_speaker", "user_text", "user_emotion", "user_units", "user_seconds",
    "agent_speaker", "agent_text", "agent_emotion", "agent_units", "agent_seconds",
    "input_ids", "labels",
)  # fmt: skip


class Shard(NamedTuple):
    """A work shard: rows `start` to `stop` of a split, the lengths of its audio, and the keys of its two files."""

    split: str
    start: int
    stop: int
    lengths: list[int]  # samples at 16 kHz of each utterance
    audio: dict[str, str]  # path of each utterance's recording and its sha256
    units_key: str
    tokens_key: str


def plan_shards(
    builder: DailyTalkUSDM, unit_tokenizer: UnitTokenizer, encoder: TemplateEncoder, shard_dialogs: int
) -> list[Shard]:
    """Whole dialogs in order, `shard_dialogs` at a time; those left out for bad audio are counted, lest all shards shift."""
    digests = {Path(path).stem: found for path, found in builder.audio_digests.items()}
    paths = {Path(path).stem: path for path in builder.audio_digests}
    shards = []
    for split in builder.corpus.values():
        start = 0
        places = {dialog_id: place for place, dialog_id in enumerate(split.dialog_ids)}
        for _, group in groupby(split.dialogs, key=lambda dialog, places=places: places[dialog.id] // shard_dialogs):
            dialogs = list(group)
            utterances = [utterance for dialog in dialogs for utterance in dialog.utterances]
            audio = [(utterance.id, digests[utterance.id].sha256) for utterance in utterances]
            lengths = [digests[utterance.id].num_samples for utterance in utterances]
            units_key = cache_key("units", *unit_tokenizer.key, audio)
            texts = [utterance.text for utterance in utterances]
            tokens_key = cache_key("tokens", template.VERSION, encoder.tokenizer_digest, units_key, texts)
            stop = start + sum(len(dialog.utterances) - 1 for dialog in dialogs)
            files = {paths[utterance_id]: sha256 for utterance_id, sha256 in audio}
            shards.append(Shard(split.name, start, stop, lengths, files, units_key, tokens_key))
            start = stop
    return shards


def load_rows(builder: DailyTalkUSDM) -> dict[str, Dataset]:
    """The builder's examples by split; a damaged cache of them is made anew."""
    import pyarrow

    for mode in ("reuse_dataset_if_exists", "force_redownload"):
        with quiet():
            try:
                builder.download_and_prepare(download_mode=mode)
                rows = {split: builder.as_dataset(split=split) for split in builder.corpus}
                for split in rows.values():
                    split.data.validate(full=True)
                return rows
            except (pyarrow.ArrowInvalid, OSError) as error:
                damage = error
        logger.warning("%s was damaged (%s): it is made anew", builder.cache_dir, damage)
    raise damage


def make_units(
    rows: dict[str, Dataset],
    shards: Sequence[Shard],
    unit_tokenizer: UnitTokenizer,
    devices: Sequence[str],
    cache: Path,
) -> dict[str, Path]:
    """Fill the cache's first level: for each work shard a file of `user_units`, `agent_units` and seconds, by its key."""
    from tqdm import tqdm

    level = ShardCache(cache / "units")
    files = {shard.units_key: level.find(shard.units_key) for shard in shards}
    missing = [shard for shard in shards if files[shard.units_key] is None]
    missing.sort(key=lambda shard: -max(shard.lengths))  # so that an out-of-memory shows at once
    tasks = [
        Task(shard.units_key, rows[shard.split].select(range(shard.start, shard.stop)), shard.audio)
        for shard in missing
    ]
    with tqdm(total=sum(len(task.rows) for task in tasks), desc="units", unit="pair", disable=not tasks) as bar:
        for task, path in tokenize_shards(tasks, unit_tokenizer, devices, level):
            files[task.key] = path
            bar.update(len(task.rows))
    return files


def make_tokens(
    rows: dict[str, Dataset], shards: Sequence[Shard], encoder: TemplateEncoder, units: dict[str, Path], cache: Path
) -> dict[str, Path]:
    """Fill the cache's second level: for each work shard a file of `input_ids` and `labels`, by its key."""
    from datasets import Dataset, concatenate_datasets
    from tqdm import tqdm

    level = ShardCache(cache / "tokens")
    files = {shard.tokens_key: level.find(shard.tokens_key) for shard in shards}
    missing = [shard for shard in shards if files[shard.tokens_key] is None]
    for shard in tqdm(missing, desc="template", unit="shard", disable=not missing):
        texts = (
            rows[shard.split].select_columns(["id", "user_text", "agent_text"]).select(range(shard.start, shard.stop))
        )
        its_units = Dataset.from_file(str(units[shard.units_key])).select_columns(["user_units", "agent_units"])
        batch = concatenate_datasets([texts, its_units], axis=1).with_format("numpy")
        key = shard.tokens_key
        files[key] = level.make(key, lambda path, batch=batch, key=key: map_shard(batch, encoder, path, key))
    return files


def join_shards(rows: Dataset, units: Sequence[Path], tokens: Sequence[Path]) -> Dataset:
    """All columns of a split but the audio, memory-mapped."""
    from datasets import Dataset, concatenate_datasets

    parts = [rows.remove_columns(["user_audio", "agent_audio"])]
    parts += [concatenate_datasets([Dataset.from_file(str(file)) for file in files]) for files in (units, tokens)]
    return concatenate_datasets(parts, axis=1).select_columns(list(OUTPUT_COLUMNS))
