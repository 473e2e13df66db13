"""Audio columns of a batch, and the distinct recordings in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def audio_source(value: Any) -> str | bytes:
    """What an audio column holds -> path or file content.

    Args:
        value: A path, the bytes of a file, or a `{"bytes", "path"}` dict as `Audio(decode=False)` gives.

    Raises:
        TypeError: Anything else, such as decoded audio.
    """
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise TypeError(
        f"audio is a {type(value).__name__}, not a path or bytes: load or cast the column with Audio(decode=False)"
    )


def distinct_audio(batch: Mapping[str, Sequence]) -> tuple[list[str | bytes], dict[str, list]]:
    """-> the distinct audio of a batch, and for each audio column which of them every row has (or list of exchanges)."""
    names = [name for name in batch if name == "audio" or name.endswith("_audio")]
    if not names:
        raise ValueError(
            f"there is no audio column among {', '.join(batch) or 'no columns'}: name it audio, or let it end in _audio"
        )
    order: dict[str | bytes, int] = {}

    def number(value: Any) -> int | list[int]:
        if isinstance(value, list | tuple):
            return [number(each) for each in value]
        return order.setdefault(audio_source(value), len(order))

    columns = {name: [number(value) for value in batch[name]] for name in names}
    return list(order), columns
