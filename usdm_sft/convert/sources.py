"""What is known of the corpus, the unit model and the tokenizer of a run. A published source is recognized by its sha256."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from usdm_sft.convert.convert import XLSR_LAYER, read_description
from usdm_sft.convert.model_config import read_json
from usdm_sft.convert.published import KNOWN_DIGESTS, PUBLISHED, PUBLISHED_FILES
from usdm_sft.corpus.manifest import is_manifest
from usdm_sft.template.tokenizer import OFFLINE
from usdm_sft.utils.download import are_published_lists

DAILYTALK = "DailyTalk"


def describe_corpus(lists: Mapping[str, Path], digests: Mapping[str, str]) -> str:
    """The kind of corpus that the lists describe.

    Args:
        lists: Split list or manifest of each split.
        digests: Their sha256.

    Returns:
        "DailyTalk" for the lists that DailyTalk publishes; otherwise "split list", "manifest", or "manifest and split list".
    """
    if are_published_lists(digests):
        return DAILYTALK
    return " and ".join(sorted({list_kind(path) for path in lists.values()}))


def list_kind(path: Path) -> str:
    """ "manifest" or "split list"."""
    return "manifest" if is_manifest(path) else "split list"


def describe_unit_model(folder: Path) -> dict[str, Any]:
    """How a unit model folder was made.

    Args:
        folder: What `find_unit_model` returned.

    Returns:
        JSON values: `name`, "xlsr2_1b_v2" if the folder was made from the published files and None otherwise; `layer`,
        counted from 1; `normalization` and `final_norm`, if set; and the sha256 of the `sources`.
    """
    description = read_description(folder)
    settings = {key: description[key] for key in ("normalization", "final_norm") if key in description}
    is_published = (
        not settings
        and description["layer"] == XLSR_LAYER
        and any(description["sources"] == known for known in _published_sources(folder))
    )
    name = PUBLISHED if is_published else None
    return {"name": name, "layer": description["layer"], **settings, "sources": description["sources"]}


def describe_tokenizer(name_or_path: str, num_units: int) -> dict[str, Any]:
    """Where the tokenizer came from.

    Args:
        name_or_path: As given to `load_tokenizer`.
        num_units: Units in its vocabulary.

    Returns:
        JSON values: `name`, None for a folder, since paths stay private; and `num_units`.
    """
    is_folder = str(name_or_path) != OFFLINE and Path(name_or_path).is_dir()
    return {"name": None if is_folder else str(name_or_path), "num_units": num_units}


def _published_sources(folder: Path) -> list[dict[str, str]]:
    """sha256 of the published checkpoint and k-means: the known ones, and those that a download recorded beside the folder."""
    record = folder.with_name(f"{PUBLISHED}.sha256.json")
    found = [KNOWN_DIGESTS, read_json(record) if record.is_file() else {}]
    checkpoint, kmeans = PUBLISHED_FILES
    return [
        {"checkpoint": digests[checkpoint], "kmeans": digests[kmeans]}
        for digests in found
        if checkpoint in digests and kmeans in digests
    ]
