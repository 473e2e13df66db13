"""The counts of a split, as counts.json and the card report them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from usdm_sft.shards.overflow import Fitted, iter_column, list_lengths
from usdm_sft.template.encoder import IGNORE_INDEX

if TYPE_CHECKING:
    from dailytalk_usdm import DailyTalkUSDM
    from usdm_sft.audio.digest_table import AudioDigests


def count_rows(rows: Dataset, fitted: Fitted, builder: DailyTalkUSDM, split: str, max_length: int) -> dict[str, Any]:
    """Count the rows of a split, and list the dialogs, pairs and rows that were left out or cut.

    Args:
        rows: All rows, before `max_length` was applied.
        fitted: The rows that fit.
        builder: Made the rows.
        split: Such as "train".
        max_length: Largest number of tokens in a row.

    Raises:
        ValueError: No row is left.
    """
    kept = fitted.rows
    if not len(kept):
        raise ValueError(
            f"max_length {max_length} leaves no row of {split}, whose shortest row has "
            f"{list_lengths(rows, 'input_ids').min()} tokens: raise it"
        )
    corpus = builder.corpus[split]
    dialog_ids = _distinct(kept, "dialog_id")  # a dialog may have lost all its rows to max_length
    utterances = (utterance for dialog in corpus.dialogs if dialog.id in dialog_ids for utterance in dialog.utterances)
    num_utterances, seconds = _measure((utterance.audio for utterance in utterances), builder.audio_digests)
    return {
        "dialogs": len(dialog_ids),
        "utterances": num_utterances,
        "hours": round(seconds / 3600, 6),
        "pairs": corpus.num_pairs + len(corpus.pairs_left_out),
        "pairs_with_bad_audio": len(corpus.pairs_left_out),
        "rows": len(kept),
        "units": count_values(kept, "user_units") + count_values(kept, "agent_units"),
        "tokens": count_values(kept, "input_ids"),
        "labelled_tokens": count_labels(kept),
        "dialogs_left_out": dict(corpus.left_out),
        "pairs_left_out": dict(corpus.pairs_left_out) | fitted.left_out,
        "rows_cut": fitted.cut,
    }


def _distinct(rows: Dataset, column: str) -> set[str]:
    return {value for values in iter_column(rows, column) for value in values.unique().to_pylist()}


def _measure(audio: Iterator[str], digests: AudioDigests) -> tuple[int, float]:
    """Return the number of utterances and the sum of their seconds."""
    num_utterances = 0

    def seconds() -> Iterator[float]:
        nonlocal num_utterances
        while batch := list(islice(audio, 1000)):
            num_utterances += len(batch)
            yield from (digest.seconds for digest in digests.find_all(batch))

    total = sum(seconds())
    return num_utterances, total


def count_values(rows: Dataset, column: str) -> int:
    """Count the values in a column of lists, or of lists of lists."""
    num_values = 0
    for values in iter_column(rows, column):
        while pa.types.is_list(values.type):
            values = pc.list_flatten(values)
        num_values += len(values)
    return num_values


def count_labels(rows: Dataset) -> int:
    """Count the labelled tokens."""
    labelled = (pc.not_equal(pc.list_flatten(labels), IGNORE_INDEX) for labels in iter_column(rows, "labels"))
    return sum(pc.sum(each).as_py() or 0 for each in labelled)
