"""The share of units that a faster setting leaves equal to fp32 and soxr, measured on a sample of the corpus."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.files import replace_text
from usdm_sft.utils.locks import path_lock

if TYPE_CHECKING:
    from usdm_sft.audio.digests import AudioDigest
    from usdm_sft.units.tokenizer import UnitTokenizer


def pick_sample(audio: Mapping[str, AudioDigest], num_utterances: int) -> dict[str, AudioDigest]:
    """Pick files that are spread evenly over the corpus; all files if there are no more than `num_utterances`."""
    num = len(audio)
    picked = set(np.linspace(0, num - 1, min(num_utterances, num)).round().astype(int).tolist())
    return {path: audio[path] for position, path in enumerate(audio) if position in picked}


def agreement_file(unit_tokenizer: UnitTokenizer, sample: Mapping[str, AudioDigest], cache: Path) -> Path | None:
    """Return the cache file for the agreement on these files; None if the settings are fp32 and soxr themselves."""
    reference = _reference(unit_tokenizer)
    if reference.settings == unit_tokenizer.settings:
        return None
    key = cache_key("agreement", *reference.key, *unit_tokenizer.key, [digest.sha256 for digest in sample.values()])
    return cache / "agreement" / f"{key}.json"


def _reference(unit_tokenizer: UnitTokenizer) -> UnitTokenizer:
    return unit_tokenizer.with_settings(precision="fp32", resampler="soxr")


def measure_agreement(
    unit_tokenizer: UnitTokenizer, sample: Mapping[str, AudioDigest], cache: Path
) -> dict[str, Any] | None:
    """Compare units with those of fp32 and soxr on the same device.

    Args:
        unit_tokenizer: The tokenizer to measure.
        sample: The utterances, as `pick_sample` returns them.
        cache: Folder of the cache, which keeps the result.

    Returns:
        `utterances`, `units`, `equal_units` and `share`; None if the settings are fp32 and soxr themselves.
    """
    file = agreement_file(unit_tokenizer, sample, cache)
    if file is None:
        return None
    reference = _reference(unit_tokenizer)
    paths = list(sample)
    with path_lock(file, cache):
        if (known := _read(file)) is not None:
            return known
        expected, _ = reference.tokenize_files(paths)
        reference.release()
        found, _ = unit_tokenizer.tokenize_files(paths)
        num_units = sum(map(len, expected))
        equal = sum(int((a == b).sum()) for a, b in zip(expected, found, strict=True))
        share = round(equal / num_units, 6)
        result = {"utterances": len(paths), "units": num_units, "equal_units": equal, "share": share}
        replace_text(file, json.dumps([result, cache_key(result)]))
        return result


def _read(file: Path) -> dict[str, Any] | None:
    """Return an earlier result; None if there is none or the file is damaged."""
    try:
        result, digest = json.loads(file.read_text())
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return dict(result) if cache_key(result) == digest else None
