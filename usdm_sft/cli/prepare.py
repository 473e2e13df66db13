"""The command `prepare`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.template.config import Template
from usdm_sft.utils.errors import find_full_disk

_SHOWN = 20  # rows of a dry run that are left out or shortened
_DOCTOR = "'dailytalk-usdm doctor' with the same options checks the whole set-up"


def make_config(options: Mapping[str, Any]) -> PrepareConfig:
    """Make the config from the options of the command line."""
    return PrepareConfig(**{**options, "template": Template(**options.get("template", {}))})


def prepare(**options: Any) -> None:
    """Make a dataset folder of examples with units, input_ids and labels.

    It takes data_dir, the corpus, and output_path, the folder to make. All other options have the values of the reference. An interrupted run goes on when
    the same command is given again. Options may be written with - or with _.

    Examples:
        dailytalk-usdm prepare --data_dir DailyTalk --output_path dailytalk-usdm-data
        dailytalk-usdm prepare --data_dir DailyTalk --output_path dailytalk-usdm-data --dry_run
        dailytalk-usdm prepare --config multi_turn --data_dir DailyTalk --output_path conversations
        dailytalk-usdm prepare --data_dir hub:USER/NAME --agent B --output_path calls --keep_audio
    """
    from usdm_sft.folder.statistics import load_call, summarize_split
    from usdm_sft.prepare.prepare import Submission, prepare

    is_dry_run = options.pop("dry_run", False)
    config = make_config(options)
    try:
        if is_dry_run:
            _dry_run(config)
            return
        counts = prepare(config)
    except (OSError, ImportError) as error:
        if isinstance(error, FileExistsError) or find_full_disk(error) is not None:
            raise
        raise OSError(f"{error} ({_DOCTOR})") from error
    if isinstance(counts, Submission):
        print(counts)
        return
    for split, split_counts in counts["splits"].items():
        print(f"{split}: {summarize_split(split_counts)}")
    output = os.fspath(config.output_path)
    print(
        f"{os.path.join(output, 'counts.json')} lists every row that was left out or shortened, with numbers and digests"
    )
    print(f"{load_call(output, counts)} opens it")


def _dry_run(config: PrepareConfig) -> None:
    from usdm_sft.folder.statistics import summarize_split
    from usdm_sft.prepare.dry_run import describe_dry_run, dry_run

    found = dry_run(config)
    for split, split_counts in found.splits.items():
        print(f"{split}: {summarize_split(split_counts)}")
        for reasons in ("pairs_left_out", "rows_cut"):
            for name, reason in list(split_counts[reasons].items())[:_SHOWN]:
                print(f"  {name}: {reason}")
            if (more := len(split_counts[reasons]) - _SHOWN) > 0:
                print(f"  {more:,} more: counts.json will list them all")
    for line in describe_dry_run(found, config):
        print(line)
