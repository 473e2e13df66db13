"""Audio columns of a batch, the distinct recordings in them, and the unit columns made from these."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FP32_FALLBACK = (
    "fp32_fallback"  # bool column of a unit shard: the utterance overflowed, and its units are those of fp32
)

Index = int | list[int]  # position of a row's recording among the distinct ones; a list has one for each exchange


def audio_source(value: Any) -> str | bytes:
    """Return the path or the file content that an entry of an audio column holds.

    Args:
        value: A path, the bytes of a file, or a `{"bytes", "path"}` dict as `Audio(decode=False)` gives.

    Raises:
        TypeError: The value is something else, such as decoded audio.
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


def distinct_audio(batch: Mapping[str, Sequence[Any]]) -> tuple[list[str | bytes], dict[str, list[Index]]]:
    """Find the audio columns of a batch, `audio` and those that end in `_audio`.

    Returns:
        The distinct recordings in order of appearance, and for each audio column the index of each row's recording.

    Raises:
        ValueError: There is no audio column.
    """
    names = [name for name in batch if name == "audio" or name.endswith("_audio")]
    if not names:
        raise ValueError(
            f"there is no audio column among {', '.join(batch) or 'no columns'}: name it audio, or let it end in _audio"
        )
    order: dict[str | bytes, int] = {}

    def number(value: Any) -> int:
        return order.setdefault(audio_source(value), len(order))

    def number_row(value: Any) -> Index:
        return [number(each) for each in value] if isinstance(value, list | tuple) else number(value)

    columns = {name: [number_row(value) for value in batch[name]] for name in names}
    return list(order), columns


def columns_by_audio(
    columns: Mapping[str, Sequence[Index]], units: Sequence[Any], seconds: Sequence[Any] | np.ndarray
) -> dict[str, list[Any]]:
    """Return `*units` and `*seconds` for each audio column of `distinct_audio`.

    Args:
        columns: Indices of each row's recordings, by audio column.
        units: Units of each distinct recording.
        seconds: Length of each distinct recording.
    """

    def pick(values: Sequence[Any] | np.ndarray, index: Index) -> Any:
        return [values[i] for i in index] if isinstance(index, list) else values[index]

    out: dict[str, list[Any]] = {}
    for name, indices in columns.items():
        prefix = name.removesuffix("audio")
        out[f"{prefix}units"] = [pick(units, index) for index in indices]
        out[f"{prefix}seconds"] = [pick(seconds, index) for index in indices]
    return out
