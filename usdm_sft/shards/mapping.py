"""One work shard through a `.map` callable into an Arrow file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from usdm_sft.utils.progress import quiet

if TYPE_CHECKING:
    from datasets import Dataset


def map_shard(
    batch: Dataset, function: Any, path: str, fingerprint: str, *, remove_columns: Sequence[str] | None = None
) -> Dataset:
    """Map a work shard as one batch into an Arrow file; it holds the new columns, and of the old what is not removed.

    All old columns are removed where `remove_columns` is None.
    """
    with quiet():
        return batch.map(
            function,
            batched=True,
            batch_size=None,
            remove_columns=batch.column_names if remove_columns is None else list(remove_columns),
            load_from_cache_file=False,  # only our own cache decides
            cache_file_name=path,
            new_fingerprint=fingerprint[:16],
        )
