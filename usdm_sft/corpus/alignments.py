"""Word alignments in JSON, one file beside each recording, and a list of the recordings, as moshi-finetune and DailyTalkContiguous have them.

    train.jsonl    {"path": "calls/7.wav", "duration": 61.5}                                         one line for each dialog
    calls/7.json   {"alignments": [["hello", [1.25, 1.65], "SPEAKER_MAIN"], ["hi", [2.0, 2.2], "SPEAKER_1"], ...]}

The words of a speaker up to the next word of another one are a turn. In these stereo files, SPEAKER_MAIN is on the first channel and the other speaker on
the second one. Where no speaker is SPEAKER_MAIN, turns are cut out of the mean of all channels.
"""

import json
import os
from itertools import groupby
from pathlib import Path, PurePath

from usdm_sft.corpus.dialogs import DEFAULT, FilePath, Recipe, RowOptions, Turns
from usdm_sft.corpus.manifest import recordings_folder
from usdm_sft.corpus.segments import read_segments
from usdm_sft.corpus.tables import MAX_JSON, Rows, find_tables, kind_of_table, never, place_of, read_rows
from usdm_sft.utils.texts import first_line, quote

_MAIN = "SPEAKER_MAIN"


def _read(path: Path, problems: list[str], data_dir: FilePath | None, options: RowOptions = DEFAULT) -> Turns:
    folder = recordings_folder(path, data_dir)
    return read_segments(path, lambda path: _make_rows(path, folder), problems, data_dir, options)


def _files(path: Path, data_dir: FilePath | None) -> list[Path]:
    folder = recordings_folder(path, data_dir)
    recordings = [row.get("path") for _, row in read_rows(path, never) if isinstance(row, dict)]
    words = [_find_words(recording, folder) for recording in recordings if isinstance(recording, str)]
    return [path, *filter(Path.is_file, words)]


def _find_words(recording: str, folder: Path) -> Path:
    return Path(folder, f"{os.path.splitext(recording)[0]}.json")


def _make_rows(path: Path, folder: Path) -> Rows:
    place = place_of(path)
    recordings: dict[str, str] = {}
    for number, row in read_rows(path, never):
        if isinstance(row, str):
            yield number, row
            continue
        recording = row.get("path")
        if not isinstance(recording, str) or not recording:
            yield number, f"{place(number)}: path {quote(str(recording))} is not a path: give that of the recording"
            continue
        dialog = PurePath(recording).stem
        if recordings.setdefault(dialog, recording) != recording:
            names = f"{quote(recording)} and {quote(recordings[dialog])} have one name"
            yield number, f"{place(number)}: {names}, which is that of the dialog: rename one of the two"
            continue
        file = _find_words(recording, folder)
        words = _read_words(file)
        if isinstance(words, str):
            yield number, f"{place(number)}: {file} {words}"
            continue
        has_main = _MAIN in {speaker for _, _, _, speaker in words}
        for speaker, group in groupby(words, key=lambda word: word[3]):
            said = list(group)
            turn = {"dialog": dialog, "speaker": speaker, "text": " ".join(word for _, _, word, _ in said)}
            turn |= {"audio": recording, "start": said[0][0], "end": max(end for _, end, _, _ in said)}
            yield number, turn | ({"channel": int(speaker != _MAIN)} if has_main else {})


def _read_words(file: Path) -> list[tuple[float, float, str, str]] | str:
    """Return start, end, word and speaker of each word, by start, or what is wrong with the file."""
    try:
        if file.stat().st_size > MAX_JSON:
            return f"has more than {MAX_JSON:,} bytes: give the words of one dialog"
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "does not exist: put the words beside the recording"
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read ({first_line(error)}): correct the file"
    words = content.get("alignments") if isinstance(content, dict) else content
    if not isinstance(words, list) or not words:
        return 'has no words: give {"alignments": [[word, [start, end], speaker], ...]}'
    found = []
    for number, each in enumerate(words):
        match each:
            case [str(word), [int() | float() as start, int() | float() as end], str(speaker)]:
                found.append((start, end, word.strip(), speaker))
            case _:
                return f"has {quote(str(each))} as word {number}: give [word, [start, end], speaker]"
    return sorted(found, key=lambda word: word[:2])


RECIPE = Recipe(
    "alignments",
    "list of word alignments",
    "a JSON file with path and duration in each row, and a .json with the words beside each recording",
    reads=lambda path: kind_of_table(path) == "alignments",
    find=lambda data_dir, cache_dir, may_download, with_units: find_tables(
        Path(data_dir), lambda path: kind_of_table(path) == "alignments"
    ),
    read=_read,
    files=_files,
    takes_options=True,
    max_speakers=2,
)
