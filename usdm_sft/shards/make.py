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
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_sft.corpus.examples import has_lists, make_examples
from usdm_sft.shards.plan import Shard
from usdm_sft.shards.workers import FP32_FALLBACK, Task, tokenize_shards
from usdm_sft.utils.cache import ShardCache
from usdm_sft.utils.progress import progress_bar, quiet

if TYPE_CHECKING:
    from datasets import Dataset

    from dailytalk_usdm import DailyTalkUSDM
    from usdm_sft.corpus.dialogs import Split
    from usdm_sft.units.tokenizer import UnitTokenizer

logger = logging.getLogger(__name__)


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
