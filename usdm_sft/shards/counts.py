"""What is counted of the rows of a split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.shards.overflow import list_lengths
from usdm_sft.template.encoder import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset

    from dailytalk_usdm import DailyTalkUSDM
    from usdm_sft.shards.overflow import Fitted


def count_rows(rows: Dataset, fitted: Fitted, builder: DailyTalkUSDM, split: str, max_length: int) -> dict[str, Any]:
    """Numbers of a split, and what is not in it as it was.

    Args:
        rows: Before `max_length` was seen to.
        fitted: What it left.
        builder: What made the rows.
        split: Such as "train".
        max_length: The number of tokens that a row may have.

    Raises:
        ValueError: Nothing is left.
    """
    kept = fitted.rows
    if not len(kept):
        raise ValueError(
            f"max_length {max_length} leaves no row of {split}, whose shortest row has "
            f"{list_lengths(rows, 'input_ids').min()} tokens: raise it"
        )
    corpus = builder.corpus[split]
    with_rows = set(kept["dialog_id"][:])  # of some dialogs every row may be too long
    dialogs = [dialog for dialog in corpus.dialogs if dialog.id in with_rows]
    utterances = [utterance for dialog in dialogs for utterance in dialog.utterances]
    seconds = sum(builder.audio_digests[utterance.audio].seconds for utterance in utterances)
    return {
        "dialogs": len(with_rows),
        "utterances": len(utterances),
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


def count_values(rows: Dataset, column: str) -> int:
    """Number of values in a column of lists, or of lists of lists."""
    num_values = 0
    for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        values = batch[column]
        while pa.types.is_list(values.type):
            values = pc.list_flatten(values)
        num_values += len(values)
    return num_values


def count_labels(rows: Dataset) -> int:
    batches = rows.select_columns(["labels"]).with_format("arrow").iter(batch_size=1000)
    return sum(pc.sum(pc.not_equal(pc.list_flatten(b["labels"]), IGNORE_INDEX)).as_py() or 0 for b in batches)
