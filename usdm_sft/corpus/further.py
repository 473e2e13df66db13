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


def nested_sizes(batch: Any) -> dict[str, int]:
    """Return how many characters and values further columns of lists and of structs have, whose texts are read as dictionaries."""
    import pyarrow as pa  # slow to import

    columns = zip(batch.schema.names, batch.columns, strict=True)
    return {name: _size_of(each) for name, each in columns if name not in RESERVED and pa.types.is_nested(each.type)}


def _size_of(column: Any) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        return pc.sum(pc.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    if not pa.types.is_nested(column.type):
        return len(column)
    if pa.types.is_struct(column.type):
        inner = column.flatten()
    elif pa.types.is_map(column.type):  # flatten has no maps
        first, last = column.offsets[0].as_py(), column.offsets[-1].as_py()
        inner = [each.slice(first, last - first) for each in (column.keys, column.items)]
    else:
        inner = [column.flatten()]
    return len(column) + sum(map(_size_of, inner))


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
