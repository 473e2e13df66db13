"""Let datasets store the audio at any address, where `save_to_disk` and `push_to_hub` know paths of files alone.

They look up features by their names in the Arrow file, so that `StoredAudio` is an `Audio` to them. Two functions are wrapped instead:
the one that reads the files of an `Audio` column, and the one that asks for their sizes beforehand. Values other than addresses
of local recordings go to the functions of datasets unchanged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import datasets
import datasets.arrow_dataset
import pyarrow as pa

from usdm_sft.audio.addresses import Segment, disk_file, format_address, open_file, parse_address
from usdm_sft.utils.once import once_per_key

_BYTES_PER_SECOND = 32_000  # 16 bits at 16 kHz: a guess, from which datasets derives the number of files

_embed_storage = datasets.Audio.embed_storage
_get_size = datasets.arrow_dataset.xgetsize


def _find_segments(address: str | None) -> list[Segment]:
    """Return the segments of an address, or none if datasets can read it itself."""
    segments = parse_address(address) if address else []
    files = [segment.file for segment in segments]
    if files == [address] == list(map(disk_file, files)) or not all(os.path.exists(disk_file(file)) for file in files):
        return []
    return segments


def _embed(self: Any, storage: pa.StructArray, *args: Any, **options: Any) -> pa.StructArray:
    """Embed the recordings at addresses, as `prepare --keep_audio` stores them, and the files of all other paths."""
    read = once_per_key(_read, maxsize=1)  # the turns of a telephone call follow each other
    values = storage.to_pylist()
    for value in values:
        if value is not None and value["bytes"] is None and (segments := _find_segments(value["path"])):
            value |= _store(value["path"], segments, read)
    return _embed_storage(self, pa.array(values, storage.type), *args, **options)


def _store(address: str, segments: list[Segment], read: Callable[[str], bytes]) -> dict[str, Any]:
    from usdm_sft.audio.playable import make_playable  # the rows of a corpus are read without its imports

    file = segments[0].file
    first = segments[0]._replace(file=os.path.basename(file.split("::")[0]))
    name = re.sub(r"[^\w.-]", "_", format_address(*first))
    if len(segments) == 1 and segments[0].is_whole:  # a member of an archive stays as it is, like a file
        return {"bytes": read(file), "path": name}
    recording = make_playable(address, {segment.file: read(segment.file) for segment in segments})
    return {"bytes": recording.content, "path": name + recording.suffix}


def _read(file: str) -> bytes:
    with open_file(file) as opened:
        return opened.read()


def _estimate_size(path: str, *args: Any, **options: Any) -> int:
    """Return about the number of bytes that `_embed` stores for an address, or the size of a file."""
    segments = _find_segments(path)
    if not segments:
        return int(_get_size(path, *args, **options))
    return sum(
        _get_size(file) if start is None or end is None else round((end - start) * _BYTES_PER_SECOND)
        for file, start, end, _ in segments
    )


datasets.Audio.embed_storage = _embed
datasets.arrow_dataset.xgetsize = _estimate_size
