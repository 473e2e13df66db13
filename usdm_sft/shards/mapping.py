"""A work shard that goes through a `.map` callable into an Arrow file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from usdm_sft.utils.progress import quiet


def map_shard(
    batch: Dataset, function: Any, path: str, fingerprint: str, *, remove_columns: Sequence[str] | None = None
) -> Dataset:
    """Map a work shard, as one batch, into an Arrow file.

    Args:
        batch: The rows of the shard.
        function: Takes and returns a dict of columns.
        path: The Arrow file to write: the columns that `function` returns, and the old ones that are not removed.
        fingerprint: Key of the shard, which becomes the fingerprint of the dataset.
        remove_columns: Old columns to remove; by default all of them.

    Raises:
        OSError: The file cannot be written, such as on a full disk.
    """
    try:
        with quiet():
            return batch.map(
                function,
                batched=True,
                batch_size=None,
                remove_columns=batch.column_names if remove_columns is None else list(remove_columns),
                load_from_cache_file=False,  # `ShardCache` decides what is made
                cache_file_name=path,
                new_fingerprint=fingerprint[:16],
            )
    except ValueError as error:
        # After an error of the disk, datasets closes the file again, and reports that it is closed.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
