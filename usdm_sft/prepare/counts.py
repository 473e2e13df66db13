"""The counts of a split, as counts.json and the card report them, added up from those of its work shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.prepare.overflow import Cuts, list_lengths
from usdm_sft.prepare.plan import Content
from usdm_sft.template.encoder import IGNORE_INDEX

if TYPE_CHECKING:
    from usdm_sft.corpus.dialogs import Split


class ShardCounts(NamedTuple):
    """The counts of a work shard after `max_length` was applied."""

    rows: int
    dialogs: int
    utterances: int  # in these dialogs
    pairs: int  # before max_length was applied
    seconds: float
    units: int
    tokens: int
    labelled_tokens: int
    shortest: int  # tokens of its shortest row before `max_length` was applied


def count_shard(rows: pa.Table, kept: pa.Table, content: Content) -> ShardCounts:
    """Count the rows of a work shard.

    Args:
        rows: All rows, before `max_length` was applied.
        kept: The rows that fit.
        content: The utterances of the shard.
    """
    dialog_ids = set(kept["dialog_id"].unique().to_pylist())  # a dialog may have lost all its rows to max_length
    num_utterances, position, seconds = 0, 0, []
    for dialog_id, num in content.dialogs:
        if dialog_id in dialog_ids:
            num_utterances += num
            seconds += content.seconds[position : position + num]
        position += num
    return ShardCounts(
        rows=len(kept),
        dialogs=len(dialog_ids),
        utterances=num_utterances,
        pairs=content.num_pairs,
        seconds=math.fsum(seconds),
        units=count_values(kept, "user_units") + count_values(kept, "agent_units"),
        tokens=count_values(kept, "input_ids"),
        labelled_tokens=pc.sum(pc.not_equal(pc.list_flatten(kept["labels"]), IGNORE_INDEX)).as_py() or 0,
        shortest=int(list_lengths(rows, "input_ids").min()),
    )


def count_values(rows: pa.Table, column: str) -> int:
    """Count the values in a column of lists, or of lists of lists."""
    values = rows[column]
    while pa.types.is_list(values.type):
        values = pc.list_flatten(values)
    return len(values)


def count_split(shards: Sequence[ShardCounts], cuts: Sequence[Cuts], corpus: Split, max_length: int) -> dict[str, Any]:
    """Add up the counts of a split, and list the dialogs, pairs and rows that were left out or cut.

    Args:
        shards: The counts of its work shards, in order.
        cuts: The rows of each shard that `max_length` cut or dropped.
        corpus: The split.
        max_length: Largest number of tokens in a row.

    Raises:
        ValueError: No row is left.
    """
    num_rows = sum(shard.rows for shard in shards)
    if not num_rows:
        raise ValueError(
            f"max_length {max_length} leaves no row of {corpus.name}, whose shortest row has "
            f"{min(shard.shortest for shard in shards)} tokens: raise it"
        )
    left_out = dict(corpus.pairs_left_out)
    cut: dict[str, str] = {}
    for found in cuts:
        left_out |= found.left_out
        cut |= found.cut
    return {
        "dialogs": sum(shard.dialogs for shard in shards),
        "utterances": sum(shard.utterances for shard in shards),
        "hours": round(math.fsum(shard.seconds for shard in shards) / 3600, 6),
        "pairs": sum(shard.pairs for shard in shards) + len(corpus.pairs_left_out),
        "pairs_with_bad_audio": len(corpus.pairs_left_out),
        "rows": num_rows,
        "units": sum(shard.units for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "labelled_tokens": sum(shard.labelled_tokens for shard in shards),
        "dialogs_left_out": dict(corpus.left_out),
        "pairs_left_out": left_out,
        "rows_cut": cut,
    }
