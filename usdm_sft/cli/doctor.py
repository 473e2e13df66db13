"""The command `doctor`."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from usdm_sft.cli.prepare import make_config
from usdm_sft.utils.texts import count_noun, printable


def doctor(**options: Any) -> None:
    """Check the set-up before a run: packages, devices, Hub, tokenizer, unit model, corpus and disk.

    It takes the options of prepare, and none of them is required: the corpus is checked if data_dir is given. Nothing is
    downloaded. Each line says ok, warning or error; the exit status is 1 if there is an error.

    Examples:
        dailytalk-usdm doctor
        dailytalk-usdm doctor --data_dir DailyTalk --output_path dailytalk-usdm-data
    """
    from usdm_sft.cli.doctor_checks import examine

    config = make_config({"data_dir": ".", "output_path": "."} | options)
    levels: Counter[str] = Counter()
    for finding in examine(config, has_corpus="data_dir" in options, has_output="output_path" in options):
        levels[finding.level] += 1
        print(printable(str(finding)), flush=True)  # names and values from untrusted files may be in it
    print(f"{count_noun(levels['error'], 'error')}, {count_noun(levels['warning'], 'warning')}")
    if levels["error"]:
        sys.exit(1)
