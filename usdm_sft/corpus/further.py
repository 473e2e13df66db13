"""Further columns of a manifest, such as a topic or the times of words, which `--keep_columns` puts into the dataset as texts."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from usdm_sft.corpus.dialogs import RowOptions
from usdm_sft.utils.texts import quote

# The columns of a manifest, and those that a dataset folder makes from the recording: no further column has their name.
RESERVED = (
    "dialog", "turn", "speaker", "text", "audio", "start", "end", "channel", "emotion", "units", "seconds", "durations",
)  # fmt: skip


def list_further(names: Iterable[str]) -> list[str]:
    """Return the names of further columns; a spreadsheet writes empty columns without a name."""
    return [name for name in names if name and name not in RESERVED]


def is_read(name: str, options: RowOptions) -> bool:
    """Return True for a further column that is read."""
    return name not in RESERVED and (options.columns is None or name in options.columns)


def read_further(row: Mapping[str, Any], options: RowOptions) -> tuple[dict[str, str] | None, list[str]]:
    """Return the further columns of a row as texts, other values than texts as JSON; and what is wrong with them."""
    if options.columns == ():
        return None, []
    more: dict[str, str] = {}
    problems = []
    for name in (name for name in list_further(row) if is_read(name, options)):
        value = row[name]
        if value is None or value != value:  # NaN, which is how pandas writes a missing value
            continue
        more[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if any("\ud800" <= character <= "\udfff" for character in more[name]):
            problems.append(f"column {name} {quote(more[name])} holds an unpaired surrogate: correct it")
    return more, problems


def join_further(before: Mapping[str, str] | None, after: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Return the further columns of a turn that was joined of two: lists, such as the times of words, follow each other; of other
    values the first is kept.
    """
    if not before or not after:
        return before or after
    return {**after, **{name: _join_lists(value, after.get(name, "")) for name, value in before.items()}}


def _join_lists(before: str, after: str) -> str:
    if not (before.startswith("[") and after.startswith("[")):
        return before
    try:
        return json.dumps([*json.loads(before), *json.loads(after)], ensure_ascii=False)
    except (ValueError, RecursionError):
        return before
