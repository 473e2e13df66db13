"""The builder's examples, checked against the corpus."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from usdm_sft.corpus.examples import Example, has_lists, make_examples
from usdm_sft.corpus.features import ROLES, TEXTS
from usdm_sft.utils.progress import quiet

if TYPE_CHECKING:
    from usdm_sft.corpus.builder import DailyTalkUSDM

logger = logging.getLogger(__name__)

_BATCH = 1000


def load_rows(builder: DailyTalkUSDM) -> dict[str, Dataset]:
    """Load the builder's examples by split. A damaged cache of the builder is made again, once.

    Raises:
        OSError: The examples differ from the corpus after they were made again, or cannot be read or written.
        pyarrow.ArrowInvalid: The new files are damaged too.
    """
    try:
        return _load(builder, "reuse_dataset_if_exists")
    except (pa.ArrowInvalid, OSError, DatasetGenerationError) as error:
        if isinstance(error, DatasetGenerationError) and not isinstance(error.__cause__, OSError):
            raise  # such as an error of the builder, which another try would repeat
        logger.warning("%s was damaged (%s): making it again", builder.cache_dir, error)
    return _load(builder, "force_redownload")


def _load(builder: DailyTalkUSDM, download_mode: str) -> dict[str, Dataset]:
    with quiet():
        builder.download_and_prepare(download_mode=download_mode)
        rows = {split: builder.as_dataset(split=split) for split in builder.corpus}
        for split, split_rows in rows.items():
            split_rows.data.validate(full=True)
            _check_rows(split_rows, builder, split)
    return rows


def _check_rows(rows: Dataset, builder: DailyTalkUSDM, split: str) -> None:
    """Compare every column but the audio with the corpus; this takes one second for DailyTalk.

    A flipped byte in a text leaves a valid Arrow file, which `validate` cannot find.

    Raises:
        OSError: A column or the number of rows differs.
    """
    name, history = builder.config.name, builder.config.history
    rows = rows.remove_columns([f"{role}_audio" for role in ROLES])
    examples = (example for dialog in builder.corpus[split].dialogs for example in make_examples(dialog, name, history))
    start = 0
    while batch := list(islice(examples, _BATCH)):
        found = rows[start : start + len(batch)]
        for column, values in _make_columns(batch, lists=has_lists(name, history)).items():
            if found[column] != values:
                raise OSError(f"column {column} of {split} differs from the corpus")
        start += len(batch)
    if start != len(rows):
        raise OSError(f"{split} has {len(rows):,} rows, but the corpus makes {start:,}")


def _make_columns(examples: Sequence[Example], *, lists: bool) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        column: [getattr(example, column) for example in examples] for column in ("id", "dialog_id", "turn")
    }
    for side, role in enumerate(ROLES):
        for field in TEXTS:
            values = [[getattr(exchange[side], field) for exchange in example.exchanges] for example in examples]
            columns[f"{role}_{field}"] = values if lists else [value for [value] in values]
    return columns
