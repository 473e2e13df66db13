"""The command `prepare`."""

from __future__ import annotations

import os
from typing import Any

from usdm_sft.config.prepare_config import PrepareConfig
from usdm_sft.template.config import Template


def prepare(**options: Any) -> None:
    """Make a dataset folder of examples with units, input_ids and labels."""
    from usdm_sft.dataset_folder.summary import summarize_split
    from usdm_sft.prepare import Submitted, prepare

    config = PrepareConfig(**options | {"template": Template(**options.get("template", {}))})
    try:
        counts = prepare(config)
    except Submitted as submitted:
        print(submitted)
        return
    for split, split_counts in counts["splits"].items():
        print(f"{split}: {summarize_split(split_counts)}")
    output = os.fspath(config.output_path)
    print(
        f"{os.path.join(output, 'counts.json')} lists every row that was left out or shortened, with numbers and digests"
    )
    print(f"load_dataset({output!r}) opens it")
