"""Work shards: planned, run through the two `.map` callables, kept in the two levels of the cache, joined again.

A unit shard has one row an utterance, whatever rows are made of them; a token shard has one row a row of the dataset. Key of a
unit shard: utterance ids and audio digests in order, unit model, settings, version of the units code. Key of a token
shard: the unit shard's key, the texts, which utterances each row holds, the tokenizer, the template, version of its code.
Nothing else starts another shard.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from usdm_sft.corpus.examples import has_lists, make_examples
from usdm_sft.shards.workers import FP32_FALLBACK, Task, map_shard, quiet, tokenize_shards
from usdm_sft.utils.cache import ShardCache, cache_key
from usdm_sft.utils.progress import progress_bar

if TYPE_CHECKING:
    from datasets import Dataset

    from dailytalk_usdm import DailyTalkUSDM
    from usdm_sft.corpus.read import Split
    from usdm_sft.template.encoder import TemplateEncoder
    from usdm_sft.units.tokenizer import UnitTokenizer

logger = logging.getLogger(__name__)

OUTPUT_COLUMNS = (
    "id", "dialog_id", "turn",
    "user_speaker", "user_text", "user_emotion", "user_units", "user_seconds",
    "agent_speaker", "agent_text", "agent_emotion", "agent_units", "agent_seconds",
    "input_ids", "labels",
)  # fmt: skip


class Shard(NamedTuple):
    """A work shard: rows `start` to `stop` of a split, the utterances in them, and the keys of its two files."""

    split: str
    start: int
    stop: int
    audio: list[str]  # path of each utterance's recording, in order
    lengths: list[int]  # samples at 16 kHz of each utterance
    digests: list[str]  # sha256 of each recording
    rows: list[list[tuple[int, int]]]  # of each row its exchanges: the user's and the agent's utterance
    lists: bool  # the user and agent columns hold lists, one entry an exchange
    units_key: str
    tokens_key: str


def plan_shards(
    builder: DailyTalkUSDM, unit_tokenizer: UnitTokenizer, encoder: TemplateEncoder, shard_dialogs: int
) -> list[Shard]:
    """Whole dialogs in order, `shard_dialogs` at a time; those left out for bad audio are counted, lest all shards shift."""
    name, history = builder.config.name, builder.config.history
    lists = has_lists(name, history)
    shards = []
    for split in builder.corpus.values():
        start = 0
        numbers = {dialog_id: number for number, dialog_id in enumerate(split.dialog_ids)}
        for _, group in groupby(split.dialogs, key=lambda dialog, numbers=numbers: numbers[dialog.id] // shard_dialogs):
            dialogs = list(group)
            utterances = [utterance for dialog in dialogs for utterance in dialog.utterances]
            audio = [utterance.audio for utterance in utterances]
            digests = [builder.audio_digests[address].sha256 for address in audio]
            lengths = [builder.audio_digests[address].num_samples for address in audio]
            ids = [utterance.id for utterance in utterances]
            units_key = cache_key("utterances", *unit_tokenizer.key, ids, digests)
            places = {utterance: place for place, utterance in enumerate(ids)}
            examples = [example for dialog in dialogs for example in make_examples(dialog, name, history)]
            its_rows = [
                [(places[user.id], places[agent.id]) for user, agent in example.exchanges] for example in examples
            ]
            texts = [utterance.text for utterance in utterances]
            tokens_key = cache_key("rows", *encoder.key, units_key, texts, its_rows, lists)
            stop = start + len(its_rows)
            shards.append(
                Shard(split.name, start, stop, audio, lengths, digests, its_rows, lists, units_key, tokens_key)
            )
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
                for split, its in rows.items():
                    _check_rows(its, builder, split)
                return rows
            except (pyarrow.ArrowInvalid, OSError) as error:
                damage = error
        logger.warning("%s was damaged (%s): it is made anew", builder.cache_dir, damage)
    raise damage


def _check_rows(rows: Dataset, builder: DailyTalkUSDM, split: str) -> None:
    """Against the corpus, as a flipped byte in a text leaves a valid Arrow file. A second for DailyTalk.

    Raises:
        OSError: A row is not what the corpus says.
    """
    name, history = builder.config.name, builder.config.history
    dialogs = builder.corpus[split].dialogs
    examples = [example for dialog in dialogs for example in make_examples(dialog, name, history)]
    expected: dict[str, list] = {
        column: [getattr(example, column) for example in examples] for column in ("id", "dialog_id", "turn")
    }
    for side, role in enumerate(("user", "agent")):
        for field in ("speaker", "text", "emotion"):
            values = [[getattr(exchange[side], field) for exchange in each.exchanges] for each in examples]
            expected[f"{role}_{field}"] = values if has_lists(name, history) else [value for [value] in values]
    for column, values in expected.items():
        if rows[column][:] != values:
            raise OSError(f"column {column} of {split} is not that of the corpus")


def make_units(
    shards: Sequence[Shard], unit_tokenizer: UnitTokenizer, devices: Sequence[str], cache: Path
) -> dict[str, Path]:
    """Fill the cache's first level: for each work shard a file of `units` and `seconds` of its utterances, by its key."""
    from datasets import Dataset

    level = ShardCache(cache / "units")
    files = {shard.units_key: level.find(shard.units_key) for shard in shards}
    missing = [shard for shard in shards if files[shard.units_key] is None]
    missing.sort(key=lambda shard: -max(shard.lengths))  # so that an out-of-memory shows at once
    tasks = [
        Task(
            shard.units_key,
            Dataset.from_dict({"audio": shard.audio}),
            dict(zip(shard.audio, shard.digests, strict=True)),
        )
        for shard in missing
    ]
    made = tokenize_shards(tasks, unit_tokenizer, devices, level)
    bar = progress_bar(sum(len(task.rows) for task in tasks), "units", "utterance", disable=not tasks)
    with bar, closing(made):  # closing ends the processes at once where this loop is interrupted
        for task, path in made:
            files[task.key] = path
            bar.update(len(task.rows))
    return files


def find_fp32_fallback(shards: Sequence[Shard], units: dict[str, Path], split: Split) -> list[str]:
    """Ids of the utterances of a split that overflowed in the precision, so that their units are those of fp32.

    Args:
        shards: All work shards of the split, in order.
        units: The file of each unit shard, by its key.
        split: The split of the corpus.
    """
    from datasets import Dataset

    ids = (utterance.id for dialog in split.dialogs for utterance in dialog.utterances)
    fallback = []
    for shard in shards:
        rows = Dataset.from_file(str(units[shard.units_key]))
        marks = rows[FP32_FALLBACK][:] if FP32_FALLBACK in rows.column_names else [False] * len(rows)
        fallback += [utterance_id for utterance_id, mark in zip(islice(ids, len(rows)), marks, strict=True) if mark]
    return fallback


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
