"""How many units a faster setting changes: measured on a sample of the corpus against fp32 and soxr, on the same device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from usdm_sft.utils.atomic import replace_text
from usdm_sft.utils.cache import cache_key, path_lock

if TYPE_CHECKING:
    from usdm_sft.audio.digests import AudioDigest
    from usdm_sft.units.tokenizer import UnitTokenizer

NUM_UTTERANCES = 64


def pick_sample(audio: Mapping[str, AudioDigest], num_utterances: int = NUM_UTTERANCES) -> dict[str, AudioDigest]:
    """Files spread evenly over the corpus; all of them where there are no more."""
    paths = list(audio)
    picked = np.unique(np.linspace(0, len(paths) - 1, min(num_utterances, len(paths))).round().astype(int))
    return {paths[i]: audio[paths[i]] for i in picked}


def agreement_file(unit_tokenizer: UnitTokenizer, sample: Mapping[str, AudioDigest], cache: Path) -> Path | None:
    """Where the agreement on these files is kept once it is measured; None where the setting is fp32 and soxr itself."""
    reference = _reference(unit_tokenizer)
    if reference.settings == unit_tokenizer.settings:
        return None
    key = cache_key("agreement", *reference.key, *unit_tokenizer.key, [digest.sha256 for digest in sample.values()])
    return cache / "agreement" / f"{key}.json"


def _reference(unit_tokenizer: UnitTokenizer) -> UnitTokenizer:
    return unit_tokenizer.with_settings(precision="fp32", resampler="soxr")


def measure_agreement(
    unit_tokenizer: UnitTokenizer, audio: Mapping[str, AudioDigest], cache: Path, num_utterances: int = NUM_UTTERANCES
) -> dict[str, Any] | None:
    """Share of units that are those of fp32 and soxr, on utterances spread evenly over the corpus.

    Args:
        unit_tokenizer: What is measured.
        audio: Every file of the corpus, in order.
        cache: Where the result is kept; the same question is computed once.
        num_utterances: Size of the sample.

    Returns:
        `utterances`, `units`, `equal_units` and `share`; None where the setting is fp32 and soxr itself.
    """
    sample = pick_sample(audio, num_utterances)
    file = agreement_file(unit_tokenizer, sample, cache)
    if file is None:
        return None
    reference = _reference(unit_tokenizer)
    sample = list(sample)
    with path_lock(file, cache):
        if (known := _read(file)) is not None:
            return known
        expected, _ = reference.tokenize_files(sample)
        reference.release()
        found, _ = unit_tokenizer.tokenize_files(sample)
        num_units = sum(map(len, expected))
        equal = sum(int((a == b).sum()) for a, b in zip(expected, found, strict=True))
        share = round(equal / num_units, 6)
        result = {"utterances": len(sample), "units": num_units, "equal_units": equal, "share": share}
        replace_text(file, json.dumps([result, cache_key(result)]))
        return result


def _read(file: Path) -> dict[str, Any] | None:
    """What was measured before; None where there is nothing, or it was damaged."""
    try:
        result, digest = json.loads(file.read_text())
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return result if cache_key(result) == digest else None
