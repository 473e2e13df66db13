"""The command `verify`."""

from __future__ import annotations

import os

from usdm_sft.utils.files import print_json
from usdm_sft.utils.texts import count_noun


def verify(dataset_dir: str, against: str | None = None, num_proc: int | None = None, json: bool = False) -> None:
    """Check a dataset folder: files, schema, counts, labels, and every row against the template.

    The exit status is 1 if a check fails.

    Examples:
        dailytalk-usdm verify dailytalk-usdm-data
        dailytalk-usdm verify dailytalk-usdm-data --against preprocessed

    Args:
        dataset_dir: A folder that prepare made, or a copy of it.
        against: A folder with the reference's train.txt and test.txt, whose lines must be the rows in any order.
        num_proc: Largest number of processes. By default one per core that this process may use; a small folder needs none.
        json: Print one JSON object: whether the folder is correct, and the number of rows of each split or the problems.
    """
    from usdm_sft.folder.verify import VerificationError, verify

    try:
        rows = verify(dataset_dir, against, num_proc=num_proc)
    except VerificationError as error:
        if json:
            print_json({"correct": False, "problems": error.problems})
        raise
    if json:
        print_json({"correct": True, "rows": rows})
        return
    for split, num_rows in rows.items():
        compared = f" and identical to {os.path.join(against, f'{split}.txt')} (any order)" if against else ""
        print(f"{split}: {count_noun(num_rows, 'row')} {'is' if num_rows == 1 else 'are'} correct{compared}")
