"""Keys of cached work, and the folder of the cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import constants


def cache_key(*parts: Any) -> str:
    """Return the sha256, in hex, of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return this package's cache: `cache_dir`, or by default the folder `dailytalk_usdm` in huggingface_hub's HF_HOME.

    A parameter `cache_dir` names this cache everywhere in the package, and `model_cache_dir` that of downloaded models. Only the builder has
    a `cache_dir` of datasets, beside its `digest_cache_dir`, which is this cache.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(constants.HF_HOME) / "dailytalk_usdm"
