"""The command `verify`."""

from __future__ import annotations

import os

from usdm_sft.utils.texts import count_noun


def verify(dataset_dir: str, against: str | None = None) -> None:
    """Check a dataset folder: files, schema, counts, labels, and every row against the template.

    Args:
        dataset_dir: A folder that prepare made, or a copy of it.
        against: A folder with the reference's train.txt and test.txt, whose lines must be the rows in any order.
    """
    from usdm_sft.dataset_folder.verify import verify

    for split, num_rows in verify(dataset_dir, against).items():
        compared = f" and identical to {os.path.join(against, f'{split}.txt')} (any order)" if against else ""
        print(f"{split}: {count_noun(num_rows, 'row')} {'is' if num_rows == 1 else 'are'} correct{compared}")
