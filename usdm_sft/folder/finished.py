"""Find out whether an output folder is the finished result of a run, and if not, what differs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from usdm_sft.folder.card import describe_edits
from usdm_sft.folder.layout import COUNTS, ROW_PACKAGES, UNFINISHED, check_output, flatten, read_counts, shorten
from usdm_sft.folder.own_parts import CARD, OWN_PARTS, has_digest
from usdm_sft.utils.files import remove_path

logger = logging.getLogger(__name__)

_IDENTITY = ("settings", "config", "corpus", "unit_model", "tokenizer", "num_units", "digests")  # with them, the run
_SHOWN = 5  # settings that an error names


def find_finished(folder: Path, counts: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """Find what the same run made earlier. The caller holds `lock_output`.

    Args:
        folder: The output folder.
        counts: The counts of the run as far as they are known, with its key.
        overwrite: Allow other content.

    Returns:
        The counts of the finished folder, with every file unchanged. None if the run may write into the folder.

    Raises:
        FileExistsError: The error of `check_output`; a finished folder counts as other content.
        OSError: The folder cannot be written.
    """
    found = _read_known_counts(folder)
    if found.get("key") == counts["key"] and all(_is_unchanged(folder, name, found) for name in found["files"]):
        remove_path(folder / UNFINISHED)
        logger.info("%s is finished already, with the same settings and data: nothing was done", folder)
        return found
    describe: Callable[[], str] | None = partial(_describe, folder, found, counts) if found else None
    if not found and (folder / COUNTS).is_file() and not (folder / COUNTS).is_symlink():
        describe = partial(str, f"a {COUNTS} that cannot be read")
    check_output(folder, overwrite=overwrite, finished_too=True, describe=describe)
    return None


def _is_unchanged(folder: Path, name: str, counts: Mapping[str, Any]) -> bool:
    path = folder / name
    return path.is_file() and has_digest(path, counts["files"][name], counts.get("corpus", ""))


def _read_known_counts(folder: Path) -> dict[str, Any]:
    """Read counts.json of a folder of any content, {} if it is not a finished dataset folder."""
    try:
        return read_counts(folder)
    except (FileNotFoundError, ValueError):
        return {}


def _describe(folder: Path, found: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """Describe a finished folder that is not the result of the run with these counts."""
    if found["key"] == counts["key"]:
        name = next((name for name in found["files"] if not _is_unchanged(folder, name, found)), CARD)
        if name != CARD or not (folder / CARD).is_file():
            return f"the result of this run, but {name} was changed or is missing"
        return (
            f"the result of this run, but {CARD} was edited in {describe_edits(folder, found)} (undo it; {OWN_PARTS})"
        )
    old, new = found.get("versions") or {}, counts["versions"]
    versions = [f"{name} {old.get(name)} -> {new[name]}" for name in ROW_PACKAGES if old.get(name) != new[name]]
    known = json.loads(json.dumps({name: counts.get(name) for name in _IDENTITY}))  # with lists, as in counts.json
    was, now = (dict(flatten({name: each.get(name) for name in _IDENTITY})) for each in (found, known))
    settings = [
        f"{name.removeprefix('settings.')}: {shorten(was.get(name))} -> {shorten(now.get(name))}"
        for name in {**now, **was}
        if was.get(name) != now.get(name)
    ]
    if not (versions or settings):
        return "other rows of the same settings, as 'dailytalk-usdm edit' or another version of this package makes them"
    more = f", and {len(settings) - _SHOWN} more" * (len(settings) > _SHOWN)
    whose = f"other settings ({', '.join(settings[:_SHOWN])}{more})" if settings else "the same settings"
    return f"the result of {whose}" + f" with other versions ({', '.join(versions)})" * bool(versions)
