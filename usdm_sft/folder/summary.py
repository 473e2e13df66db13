"""What a command says of a dataset folder: a split of counts.json in one line, and the call that loads the folder."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from usdm_sft.utils.texts import count_noun


def summarize_split(split: Mapping[str, Any]) -> str:
    """One line on a split of counts.json: its counts, and the number of rows and dialogs that were left out."""
    bad_audio, dialogs = split["pairs_with_bad_audio"], split["dialogs_left_out"]
    left_out = [f"{count_noun(len(split['pairs_left_out']) - bad_audio, 'row')} too long"]
    if bad_audio:
        left_out.append(f"{count_noun(bad_audio, 'pair')} with bad audio")
    reasons = ", ".join(f"{dialog}: {reason}" for dialog, reason in dialogs.items())
    left_out.append(count_noun(len(dialogs), "dialog") + (f" ({reasons})" if reasons else ""))
    cut = f"; shortened: {count_noun(len(split['rows_cut']), 'row')}" if split["rows_cut"] else ""
    return (
        f"{count_noun(split['rows'], 'row')} from {count_noun(split['dialogs'], 'dialog')} ({split['hours']:.2f} h), "
        f"{count_noun(split['tokens'], 'token')}, {split['labelled_tokens']:,} labelled; left out: {', '.join(left_out)}{cut}"
    )


def load_call(dataset_dir: str | Path, counts: Mapping[str, Any]) -> str:
    """Return the call of `datasets.load_dataset` that opens a dataset folder.

    datasets takes the folder's path for a part of a glob pattern, and finds nothing in a folder such as "runs[1]".

    Args:
        dataset_dir: The folder.
        counts: Its counts.json.
    """
    absolute = os.path.abspath(dataset_dir)
    if (escaped := glob.escape(absolute)) == absolute:
        return f"load_dataset({os.fspath(dataset_dir)!r})"
    files = {split: os.path.join(escaped, counts["config"], f"{split}-*.parquet") for split in counts["splits"]}
    return f"load_dataset('parquet', data_files={files!r})"
