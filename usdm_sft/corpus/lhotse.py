"""Lhotse manifests: cuts, or recordings and supervisions, in JSON lines or JSON, also with gzip. lhotse itself is not needed.

    {"id": "c1", "start": 30.0, "duration": 9.0, "channel": [0, 1], "type": "MultiCut", "supervisions": [
        {"id": "s1", "recording_id": "r1", "start": 1.2, "duration": 0.9, "channel": 0, "speaker": "A", "text": "hello"}, ...],
     "recording": {"id": "r1", "sources": [{"type": "file", "channels": [0, 1], "source": "r1.wav"}], "duration": 600.0, ...}}

Each supervision is a turn. In a cut, its start counts from that of the cut. The turn is cut out of the recording, also where it reaches beyond the cut.
The dialog is the recording, or the field `dialog` (or `conversation`, ..., `usdm_sft.corpus.tables.FIELDS`) of `custom`. Supervisions that are not in cuts
need the recordings in a file beside theirs, with "recordings" in place of "supervisions" in its name.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from usdm_sft.audio.addresses import END_TOLERANCE
from usdm_sft.corpus.dialogs import DEFAULT, FilePath, Recipe, RowOptions, Turns
from usdm_sft.corpus.problems import add_problem
from usdm_sft.corpus.segments import find_end, read_segments
from usdm_sft.corpus.tables import (
    Rows,
    find_field,
    find_tables,
    kind_of_table,
    list_columns,
    never,
    place_of,
    read_rows,
)
from usdm_sft.corpus.values import number_of
from usdm_sft.utils.texts import quote

_SOURCES = ("file", "url")  # Lhotse runs commands and unpacks memory; neither is a recording that lasts


def _find(data_dir: Path) -> dict[str, Path] | None:
    """Find cuts, or else supervisions."""

    def has(*names: str) -> Callable[[Path], bool]:
        return lambda path: kind_of_table(path) == "lhotse" and not {*names}.isdisjoint(list_columns(path))

    return (
        find_tables(data_dir, has("supervisions", "tracks"))
        or find_tables(data_dir, has("recording_id"))
        or find_tables(data_dir, has("sources"))
    )


def _find_recordings(path: Path) -> Path | None:
    """Return the file of the recordings beside that of supervisions, or None."""
    name = path.name.replace("supervisions", "recordings")
    stem = name.removesuffix(".gz").rpartition(".")[0]
    names = (name, *(f"{stem}{suffix}" for suffix in (".jsonl.gz", ".jsonl", ".json", ".json.gz")))
    files = [path.with_name(each) for each in names if each != path.name]
    return next(filter(Path.is_file, files), None)


def _files(path: Path, data_dir: FilePath | None) -> list[Path]:
    recordings = _find_recordings(path) if "recording_id" in list_columns(path) else None
    return [path] if recordings is None else [path, recordings]


def _read(path: Path, problems: list[str], data_dir: FilePath | None, options: RowOptions = DEFAULT) -> Turns:
    recordings: dict[str, Any] = {}
    if "recording_id" in list_columns(path) and (file := _find_recordings(path)) is not None:
        for _, row in read_rows(file, never):
            if isinstance(row, str):
                add_problem(problems, row)
            elif row.get("id") is not None:
                recordings[str(row["id"])] = row
    return read_segments(path, partial(_make_rows, recordings=recordings), problems, data_dir, options)


def _make_rows(path: Path, recordings: Mapping[str, Any]) -> Rows:
    place = place_of(path)
    for number, value in read_rows(path, never):
        if isinstance(value, str):
            yield number, value
            continue
        for made in _read_entry(value, recordings, path):
            yield number, f"{place(number)}: {made}" if isinstance(made, str) else made


def _read_entry(entry: dict[str, Any], recordings: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any] | str]:
    """Yield the row of each supervision of a cut, or of a supervision itself, or what is wrong with it. A cut without supervisions has no turn."""
    name = quote(str(entry.get("id")))
    if "tracks" in entry:
        yield f"cut {name} is a mix of several recordings: give the cuts before they were mixed"
        return
    if "sources" in entry:
        yield f"{path.name} holds recordings alone: name the file of their supervisions, or of cuts"
        return
    if "recording_id" in entry:
        cut: dict[str, Any] = {"start": 0.0, "supervisions": [entry]}
        recording = recordings.get(str(entry["recording_id"]))
    else:
        cut, recording = entry, entry.get("recording")
    start, supervisions = number_of(cut.get("start")), cut.get("supervisions")
    if not isinstance(recording, dict):
        yield _describe_missing(entry, path)
    elif problem := _recording_problem(recording):
        yield f"recording {quote(str(recording.get('id')))} {problem}"
    elif start is None or not isinstance(supervisions, list):
        yield f"cut {name} has start {quote(str(cut.get('start')))} and supervisions {quote(str(supervisions))}: give seconds and a list"
    else:
        wrong = f"cut {name} has a supervision that is not an object: correct it"
        for each in supervisions:
            yield _make_row(each, recording, start, cut) if isinstance(each, dict) else wrong


def _describe_missing(entry: dict[str, Any], path: Path) -> str:
    name = quote(str(entry.get("id")))
    if "recording_id" not in entry:
        return f"cut {name} has no recording, only features: give cuts with recordings"
    where = "no file beside it has the recordings (recordings.jsonl.gz)"
    if (file := _find_recordings(path)) is not None:
        where = f"{file.name} has no such recording"
    recording = quote(str(entry["recording_id"]))
    return f"supervision {name} is of recording {recording}, but {where}: complete the recordings, or give cuts"


def _recording_problem(recording: dict[str, Any]) -> str | None:
    """Return why a recording cannot be read from its files, or None."""
    if [each for each in _objects(recording.get("transforms")) if each.get("name") != "Resample"]:
        return "is to be transformed when it is read: save it transformed, and give that manifest"
    sources = _objects(recording.get("sources"))
    kinds = [source.get("type") for source in sources if source.get("type") not in _SOURCES]
    if kinds:
        return f"is of type {quote(str(kinds[0]))}, and only files are read: save it as a file"
    return None if sources else "has no sources: give the file of its sound"


def _make_row(
    supervision: dict[str, Any], recording: dict[str, Any], offset: float, cut: dict[str, Any]
) -> dict[str, Any] | str:
    """Return the row of a supervision, or what is wrong with it.

    Args:
        supervision: The supervision.
        recording: Its recording.
        offset: Start of the cut in the recording, in seconds; 0 without a cut.
        cut: The cut, or nothing.
    """
    channel = supervision.get("channel", cut.get("channel"))
    found = _find_source(recording, channel)
    if isinstance(found, str):
        return found
    start, end = number_of(supervision.get("start")), find_end(supervision.get("start"), supervision.get("duration"))
    if start is None or isinstance(end, str):
        return f"supervision {quote(str(supervision.get('id')))}: {end}"
    start, end = round(offset + start, 6), round(offset + end, 6)
    if -END_TOLERANCE <= start < 0:
        start = 0.0
    custom = {**_custom(cut), **_custom(supervision)}
    dialog = find_field(custom, "dialog")
    row = {
        **{name: supervision.get(name) for name in ("language", "gender")},
        **custom,
        "dialog": recording.get("id") if dialog is None else custom[dialog],
        "speaker": str(channel) if supervision.get("speaker") is None else supervision["speaker"],
        "text": supervision.get("text"),
        "audio": found[0],
        "start": start,
        "end": end,
        "channel": found[1],
    }
    return {name: value for name, value in row.items() if value is not None}


def _custom(entry: dict[str, Any]) -> dict[str, Any]:
    found = entry.get("custom")
    return found if isinstance(found, dict) else {}


def _find_source(recording: dict[str, Any], channel: Any) -> tuple[Any, int | None] | str:
    """Return the file of a channel of a recording and the channel in this file, or what is wrong with the channel.

    The channel in the file is None for all channels of a file, one or several.
    """
    sources = _objects(recording["sources"])
    if channel is None and len(sources) == 1:
        return sources[0].get("source"), None
    wanted = channel if isinstance(channel, list) else [channel]
    for source in sources:
        channels = source.get("channels")
        if channels == wanted:
            return source.get("source"), None
        if isinstance(channels, list) and len(wanted) == 1 and wanted[0] in channels:
            return source.get("source"), channels.index(wanted[0])
    return f"channel {quote(str(channel))} is not one file or channel of recording {quote(str(recording.get('id')))}: correct it"


def _objects(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


RECIPE = Recipe(
    "lhotse",
    "Lhotse manifest",
    "cuts, or supervisions with recordings beside them (.jsonl, .jsonl.gz, .json)",
    reads=lambda path: kind_of_table(path) == "lhotse",
    find=lambda data_dir, cache_dir, may_download, with_units: _find(Path(data_dir)),
    read=_read,
    files=_files,
    takes_options=True,
    max_speakers=2,
)
