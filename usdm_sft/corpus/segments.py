"""The segments of other tools' files as the turns of a manifest: the rules that all of them share.

    rows of Lhotse, NeMo, Kaldi, RTTM, ...  ->  rows of a manifest  ->  turns

These files number no turns. Where each speaker of a dialog has one recording, or one channel, turns are in the order of `start`. Otherwise, such
as with one file for each turn, they are in the order of the lines.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from usdm_sft.corpus.dialogs import FilePath, RowOptions, Turns
from usdm_sft.corpus.manifest import read_turns, recordings_folder
from usdm_sft.corpus.tables import Rows, place_of
from usdm_sft.corpus.values import number_of
from usdm_sft.utils.texts import quote


def read_segments(
    path: Path,
    make_rows: Callable[[Path], Rows],
    problems: list[str],
    data_dir: FilePath | None,
    options: RowOptions,
    file: Path | None = None,
) -> Turns:
    """Read the turns of a split.

    Args:
        path: Its file.
        make_rows: Returns the rows, those of a manifest with `turn` missing. It is called twice.
        problems: Problems are appended to this list.
        data_dir: As in `usdm_sft.corpus.manifest.read_manifest`.
        options: How rows are read.
        file: The file whose lines the numbers of the rows are; by default `path`.
    """
    by_line = _find_order(row for _, row in make_rows(path) if isinstance(row, dict))
    turns = Turns(place_of(file or path))
    return read_turns(turns, _number(make_rows(path), by_line), recordings_folder(path, data_dir), problems, options)


def _find_order(rows: Iterable[dict[str, Any]]) -> set[str]:
    """Return the dialogs whose turns are in the order of the lines."""
    recordings: dict[tuple[str, str], Any] = {}  # dialog and speaker -> the recording
    by_line: set[str] = set()
    timed: set[str] = set()
    for row in rows:
        dialog = str(row.get("dialog"))
        recording = row.get("audio")
        if recordings.setdefault((dialog, str(row.get("speaker"))), recording) != recording:
            by_line.add(dialog)
        if (number_of(row.get("start")) or 0) > 0:
            timed.add(dialog)
    return by_line | {dialog for dialog, _ in recordings if dialog not in timed}


def _number(rows: Rows, by_line: set[str]) -> Rows:
    counts = Counter[str]()
    for number, row in rows:
        if isinstance(row, dict) and row.get("turn") is None and (dialog := str(row.get("dialog"))) in by_line:
            row["turn"] = counts[dialog]
            counts[dialog] += 1
        yield number, row


def find_end(start: Any, duration: Any) -> float | str:
    """Return the end of a segment in seconds, or why it has none."""
    first, length = number_of(start), number_of(duration)
    if first is None or length is None:
        return f"start {quote(str(start))} and duration {quote(str(duration))} are not a segment: give seconds"
    return round(first + length, 6)
