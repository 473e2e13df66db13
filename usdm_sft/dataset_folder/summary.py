"""A split of counts.json in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from usdm_sft.utils.texts import count_noun


def summarize_split(split: Mapping[str, Any]) -> str:
    """One line on a split of counts.json: what it holds, and what was left out."""
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
