"""Tables of segments: NeMo manifests, and tables of other tools whose columns have other names than those of a manifest.

    {"audio_filepath": "calls/7.wav", "offset": 1.2, "duration": 0.9, "text": "hello", "speaker": "A", "conversation": "7"}

`usdm_sft.corpus.tables.FIELDS` has the names of the columns. A row without a start is a whole recording. Without a dialog, the name of the recording is
the dialog; without a speaker, the channel is.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from usdm_sft.corpus.dialogs import DEFAULT, CorpusName, FilePath, Recipe, RowOptions, Turns
from usdm_sft.corpus.segments import find_end, read_segments
from usdm_sft.corpus.tables import FIELDS, Rows, find_field, find_tables, kind_of_table, place_of, read_rows
from usdm_sft.utils.texts import quote

_NAMES = frozenset(chain.from_iterable(FIELDS.values()))


def _make_rows(path: Path) -> Rows:
    place = place_of(path)
    recordings: dict[str, str] = {}  # dialog that is named after its recording -> the recording
    for number, row in read_rows(path, _NAMES.__contains__):
        made = row if isinstance(row, str) else _make_row(row, recordings)
        if isinstance(made, str) and isinstance(row, dict):
            made = f"{place(number)}: {made}"
        yield number, made


def _make_row(row: dict[str, Any], recordings: dict[str, str]) -> dict[str, Any] | str:
    """Return the row of a manifest, or what is wrong with the row."""
    columns = _find_columns(tuple(row))
    made = {field: None if column is None else row[column] for field, column in columns.items()}
    made = {field: None if value == "" else value for field, value in made.items()}
    start, duration = made["start"], made.pop("duration")
    if start is None:
        made["end"] = None  # the whole recording, whose duration it may be
    elif made["end"] is None:
        end = find_end(start, duration)
        if isinstance(end, str):
            return end
        made["end"] = end
    if isinstance(channel := made["channel"], list) and len(channel) == 1:
        made["channel"] = channel[0]
    elif channel == "average":  # of NeMo's channel_selector
        made["channel"] = None
    if made["speaker"] is None and made["channel"] is not None:
        made["speaker"] = str(made["channel"])
    if made["dialog"] is None and isinstance(audio := made["audio"], str):
        made["dialog"] = name = PurePath(audio).stem
        if recordings.setdefault(name, audio) != audio:
            return (
                f"{quote(audio)} and {quote(recordings[name])} have one name, and there is no column of dialogs: add one, such as "
                "'conversation'"
            )
    others = {name: value for name, value in row.items() if name not in columns.values() and name not in made}
    return others | {field: value for field, value in made.items() if value is not None}


@lru_cache(100)
def _find_columns(names: tuple[str, ...]) -> dict[str, str | None]:
    """Return the column of each field, or None."""
    return {field: find_field(names, field) for field in FIELDS}


def _read(path: Path, problems: list[str], data_dir: FilePath | None, options: RowOptions = DEFAULT) -> Turns:
    return read_segments(path, _make_rows, problems, data_dir, options)


def _recipe(name: CorpusName, kind: str, looks_for: str) -> Recipe:
    reads: Callable[[Path], bool] = lambda path: kind_of_table(path) == name  # noqa: E731
    return Recipe(
        name,
        kind,
        looks_for,
        reads=reads,
        find=lambda data_dir, cache_dir, may_download, with_units: find_tables(Path(data_dir), reads),
        read=_read,
        takes_options=True,
        max_speakers=2,
    )


NEMO = _recipe("nemo", "NeMo manifest", "a JSON file with audio_filepath in each row")
RECIPE = _recipe(
    "segments",
    "table of segments",
    "a table with columns such as file, start, end or duration, speaker or channel, and transcript",
)
