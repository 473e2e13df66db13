"""Which rows go into the dataset folder, and what is counted of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from usdm_sft.template import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset

    from dailytalk_usdm import DailyTalkUSDM


def select_rows(
    rows: Dataset, builder: DailyTalkUSDM, split: str, max_length: int, shuffle_seed: int | None
) -> tuple[Dataset, dict[str, Any]]:
    """Leave out what is too long, shuffle, and count."""
    lengths = list_lengths(rows, "input_ids")
    too_long = np.flatnonzero(lengths > max_length)
    ids = rows["id"]
    kept = rows.select(np.flatnonzero(lengths <= max_length))
    if not len(kept):
        raise ValueError(
            f"max_length {max_length} leaves no row of {split}, whose shortest pair has {lengths.min()} tokens: raise it"
        )
    corpus = builder.corpus[split]
    utterances = {utterance.id for dialog in corpus.dialogs for utterance in dialog.utterances}
    seconds = sum(found.seconds for path, found in builder.audio_digests.items() if Path(path).stem in utterances)
    counts = {
        "dialogs": len({dialog.id for dialog in corpus.dialogs}),
        "utterances": len(utterances),
        "hours": round(seconds / 3600, 6),
        "pairs": len(rows) + len(corpus.pairs_left_out),
        "pairs_with_bad_audio": len(corpus.pairs_left_out),
        "rows": len(kept),
        "units": int(list_lengths(kept, "user_units").sum() + list_lengths(kept, "agent_units").sum()),
        "tokens": int(list_lengths(kept, "input_ids").sum()),
        "labelled_tokens": count_labels(kept),
        "dialogs_left_out": dict(corpus.left_out),
        "pairs_left_out": dict(corpus.pairs_left_out)
        | {ids[int(i)]: f"{int(lengths[i])} tokens, more than max_length {max_length}" for i in too_long},
    }
    return kept if shuffle_seed is None else kept.shuffle(seed=shuffle_seed), counts


def list_lengths(rows: Dataset, column: str) -> np.ndarray:
    batches = rows.select_columns([column]).with_format("arrow").iter(batch_size=1000)
    return np.concatenate([np.zeros(0, np.int64)] + [pc.list_value_length(b[column]).to_numpy() for b in batches])


def count_labels(rows: Dataset) -> int:
    batches = rows.select_columns(["labels"]).with_format("arrow").iter(batch_size=1000)
    return sum(pc.sum(pc.not_equal(pc.list_flatten(b["labels"]), IGNORE_INDEX)).as_py() or 0 for b in batches)
