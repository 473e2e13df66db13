"""The commands `prepare` and `doctor`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from usdm_sft.audio.addresses import is_remote
from usdm_sft.folder.own_parts import Card
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.template.config import Template
from usdm_sft.utils.errors import find_full_disk
from usdm_sft.utils.texts import count_noun, printable

if TYPE_CHECKING:
    from usdm_sft.prepare.checks import Finding

_DOCTOR = "'dailytalk-usdm doctor' with the same options checks the whole set-up"


def make_config(options: Mapping[str, Any]) -> PrepareConfig:
    """Make the config from the options of the command line."""
    groups = {"template": Template(**options.get("template", {})), "card": Card(**options.get("card", {}))}
    return PrepareConfig(**{**options, **groups})


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
    is_dry_run = options.pop("dry_run", False)
    config = make_config(options)
    try:
        if not any(map(is_remote, (config.data_dir, *(config.data_files or {}).values()))):
            config.check_kinds()  # before the imports, which take seconds
        from usdm_sft.folder.statistics import load_call, summarize_split
        from usdm_sft.prepare.prepare import Submission, prepare

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
    from usdm_sft.folder.statistics import SHOWN, summarize_split
    from usdm_sft.prepare.dry_run import check_dry_run, describe_dry_run, dry_run

    found = dry_run(config)
    for split, split_counts in found.splits.items():
        print(f"{split}: {summarize_split(split_counts)}")
        for listed in (split_counts.get(name, {}) for name in ("pairs_left_out", "rows_cut", "turns_clipped")):
            for name, reason in list(listed.items())[:SHOWN]:
                print(f"  {name}: {reason}")
            if more := list(listed)[SHOWN:]:
                print(f"  {len(more):,} more: counts.json will list them all")
    for line in describe_dry_run(found, config):
        print(line)
    levels = [_show(finding) for finding in check_dry_run(found, config)]
    print("nothing was written")
    if "error" in levels:
        sys.exit(1)


def doctor(**options: Any) -> None:
    """Check the set-up before a run: packages, devices, Hub, tokenizer, unit model, corpus and disk.

    It takes the options of prepare, and none of them is required: the corpus is checked if data_dir is given. Nothing is
    downloaded. Each line says ok, warning or error; the exit status is 1 if there is an error.

    Examples:
        dailytalk-usdm doctor
        dailytalk-usdm doctor --data_dir DailyTalk --output_path dailytalk-usdm-data
    """
    config = make_config({"data_dir": ".", "output_path": "."} | options)
    from usdm_sft.prepare.checks import SetUp  # takes seconds

    set_up = SetUp(config, has_corpus="data_dir" in options, has_output="output_path" in options)
    levels = [_show(finding) for finding in set_up.examine()]
    errors, warnings = levels.count("error"), levels.count("warning")
    print(f"{count_noun(errors, 'error')}, {count_noun(warnings, 'warning')}")
    if errors:
        sys.exit(1)


def _show(finding: Finding) -> str:
    print(printable(str(finding)), flush=True)  # names and values from untrusted files may be in it
    return finding.level
