"""Tables in JSON lines, JSON, CSV and TSV, also with gzip: their rows, the kind of corpus that their columns tell, and their split.

Parquet is read by `usdm_sft.corpus.manifest`.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from usdm_sft.corpus.dialogs import CorpusName
from usdm_sft.corpus.problems import add_problem
from usdm_sft.utils.texts import DAMAGED_GZIP, LineError, first_line, open_text, quote, read_limited_lines

SUFFIXES = (".jsonl", ".csv", ".parquet", ".json", ".tsv")
SPLITS = ("train", "test", "validation")  # the order of the splits of a corpus
# Words in the name of a file or folder that tell its split, as datasets reads them.
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "test": {"test", "testing", "eval", "evaluation"},
    "validation": {"validation", "valid", "val", "dev", "development"},
}
MAX_JSON = 200_000_000  # characters of a JSON array, which is read at once

Rows = Iterator[tuple[int, dict[str, Any] | str]]  # number of the line or row, and the row or what is wrong with it

# The names of a field in the tables of other tools; of several in one table, the first counts.
FIELDS = {
    "audio": ("audio", "audio_filepath", "audio_path", "audio_file", "path", "file", "file_name", "filename", "wav", "recording"),
    "start": ("start", "offset", "start_time", "begin"),
    "end": ("end", "end_time", "stop"),
    "duration": ("duration", "dur"),
    "channel": ("channel", "channel_selector", "channel_id"),
    "speaker": ("speaker", "speaker_id", "speaker_name", "spk"),
    "text": ("text", "transcript", "transcription", "sentence"),
    "dialog": (
        "dialog", "dialog_id", "dialogue", "dialogue_id", "conversation", "conversation_id", "call", "call_id", "session", "session_id",
    ),
    "turn": ("turn", "turn_id"),
    "emotion": ("emotion",),
}  # fmt: skip


def never(name: str) -> bool:
    """Return False: a column of any name may occur twice."""
    return False


def suffix_of(path: Path) -> str:
    """Return the suffix of a table in lower case, without that of gzip: ".jsonl" for "cuts.JSONL.gz"."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def stem_of(path: Path) -> str:
    """Return the name of a table without its suffixes: "cuts" for "cuts.jsonl.gz"."""
    return Path(path.name[:-3] if path.name.lower().endswith(".gz") else path.name).stem


def find_field(names: Container[str], field: str) -> str | None:
    """Return the column of a table that holds a field of `FIELDS`, or None."""
    return next((name for name in FIELDS[field] if name in names), None)


def kind_of_table(path: Path) -> CorpusName | None:
    """Return the kind of corpus that the columns of a table tell, or None where they tell none."""
    names = list_columns(path)
    if {"dialog", "speaker"} <= names and names & {"audio", "units"}:
        return "manifest"
    if suffix_of(path) == ".parquet":
        return None
    is_supervision = {"id", "recording_id", "start", "duration"} <= names
    if is_supervision or "tracks" in names or {"supervisions", "duration"} <= names or {"id", "sources"} <= names:
        return "lhotse"
    if "audio_filepath" in names:
        return "nemo"
    if {"path", "duration"} <= names and not find_field(names, "text") and not find_field(names, "start"):
        return "alignments"
    fields = {field for field in FIELDS if find_field(names, field)}
    is_segments = {"audio", "start"} <= fields and fields & {"end", "duration"} and fields & {"speaker", "channel"}
    return "segments" if is_segments else None


def list_lacking(path: Path) -> list[str]:
    """Return the fields of `FIELDS` that a table of segments must have and this table lacks; none for what is no table."""
    names = list_columns(path)
    found = {field for field in FIELDS if find_field(names, field)}
    found |= {"speaker"} if "channel" in found else set()
    found |= {"end"} if "duration" in found else set()
    return [field for field in ("audio", "start", "end", "speaker") if field not in found] if names else []


def list_columns(path: Path) -> frozenset[str]:
    """Return the columns of the first row of a table, none if it cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return frozenset()
    return _list_columns(path, status.st_size, status.st_mtime_ns)


@lru_cache(1000)
def _list_columns(path: Path, size: int, mtime_ns: int) -> frozenset[str]:
    try:
        if suffix_of(path) == ".parquet":
            import pyarrow.parquet as pq  # slow to import

            return frozenset(pq.read_schema(path).names)
        if suffix_of(path) not in SUFFIXES or not path.is_file():
            return frozenset()
        columns: list[str] = []  # of CSV and TSV
        row = next(read_rows(path, never, columns.extend), (0, ""))[1]  # type: ignore[arg-type]  # returns None: nothing is wrong
    except (OSError, ValueError):  # pyarrow.ArrowInvalid is a ValueError
        return frozenset()
    return frozenset(row if isinstance(row, dict) else columns)


def find_tables(data_dir: Path, is_wanted: Callable[[Path], bool]) -> dict[str, Path] | None:
    """Find tables in a folder, or take `data_dir` for one; by split as in `share_out`."""
    if data_dir.is_file():
        return {split_of(stem_of(data_dir)) or "train": data_dir} if is_wanted(data_dir) else None
    files = [path for path in sorted(data_dir.iterdir()) if path.is_file() and suffix_of(path) in SUFFIXES]
    files.sort(key=lambda path: SUFFIXES.index(suffix_of(path)))
    return share_out(list(filter(is_wanted, files)), stem_of)


def share_out(files: Iterable[Path], name: Callable[[Path], str]) -> dict[str, Path] | None:
    """Share files out to splits by the words in their names.

    Names that are those of a split, such as "test", go before those with such a word, such as "calls-dev". Without either, a single file is
    the train split.

    Returns:
        The file of each split; None if none is found.

    Raises:
        ValueError: A split has two files.
    """
    files = list(files)
    exact = [path for path in files if name(path) in SPLITS]
    found: dict[str, Path] = {}
    for path in exact or [path for path in files if split_of(name(path))] or files:
        first = found.setdefault(split_of(name(path)) or "train", path)
        if first != path:
            beside = first.name if first.parent == path.parent else first
            raise ValueError(f"{path} stands beside {beside}: keep one, or name the one to use")
    return {split: found[split] for split in SPLITS if split in found} or None


def split_of(name: str) -> str | None:
    """Return the split that the words of a name tell, or None if they tell none or several."""
    words = set(re.findall(r"[a-z]+", name.lower()))
    found = [split for split, names in _SPLIT_WORDS.items() if words & names]
    return found[0] if len(found) == 1 else None


def place_of(path: Path) -> Callable[[int], str]:
    """Return the function from the number of a row to its place: its line, or its number in Parquet and in a JSON array."""
    in_rows = suffix_of(path) == ".parquet" or (suffix_of(path) == ".json" and _is_array(path))
    return partial("{}{}{}".format, path, ": row " if in_rows else ":")


def read_rows(
    path: Path, is_once: Callable[[str], bool], check: Callable[[list[str]], str | None] | None = None
) -> Rows:
    """Yield the rows of a table in JSON lines, JSON, CSV or TSV.

    Args:
        path: The table.
        is_once: Returns True for a column that may not occur twice, because one of the two would be lost.
        check: Returns what is wrong with the column names of CSV and TSV, or None.
    """
    if suffix_of(path) in (".csv", ".tsv"):
        return _read_csv(path, is_once, check)
    is_array = suffix_of(path) == ".json" and _is_array(path)
    return (_read_json_array if is_array else _read_json_lines)(path, is_once)


def _doubled(names: Iterable[str], is_once: Callable[[str], bool]) -> list[str]:
    """Return the columns that occur twice and may not."""
    return [name for name, count in Counter(names).items() if count > 1 and is_once(name)]


def doubled_problem(names: Iterable[str], is_once: Callable[[str], bool]) -> str | None:
    """Return which columns of a table occur twice and may not, or None."""
    found = _doubled(names, is_once)
    return f"column {', '.join(found)} named twice: rename or delete one of the two" if found else None


class _DoubledKeyError(ValueError):
    """A column is given twice in one JSON object."""


def _make_object(pairs: list[tuple[str, Any]], is_once: Callable[[str], bool]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs) and (found := _doubled((key for key, _ in pairs), is_once)):
        raise _DoubledKeyError(f"{', '.join(found)} given twice in one object: delete one of the two")
    return row


def _read_json_lines(path: Path, is_once: Callable[[str], bool]) -> Rows:
    decode = json.JSONDecoder(object_pairs_hook=partial(_make_object, is_once=is_once)).decode
    try:
        for number, line in read_limited_lines(path, newline="\n"):
            try:
                row = decode(line)
            except _DoubledKeyError as error:
                yield number, f"{path}:{number}: {error}"
                continue
            except (ValueError, RecursionError):
                problem = (
                    "blank line: delete it"
                    if not line.strip()
                    else f"{quote(line)} is not JSON: write one object per line"
                )
                yield number, f"{path}:{number}: {problem}"
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                yield number, f"{path}:{number}: {quote(line)} is not a JSON object: write one object per line"
    except LineError as error:
        yield 0, str(error)


def _is_array(path: Path) -> bool:
    """Return True if a JSON file holds an array, and not one object in each line, as NeMo writes it."""
    try:
        with open_text(path) as file:
            return file.read(1000).lstrip().startswith("[")
    except (OSError, ValueError):
        return False


def _read_json_array(path: Path, is_once: Callable[[str], bool]) -> Rows:
    try:
        with open_text(path) as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            yield 0, f"{path}: an array of more than {MAX_JSON:,} characters: write it as JSON lines (.jsonl)"
            return
        rows = json.loads(text, object_pairs_hook=partial(_make_object, is_once=is_once))
    except _DoubledKeyError as error:
        yield 0, f"{path}: {error}"
        return
    except (*DAMAGED_GZIP, ValueError, RecursionError) as error:
        yield 0, f"{path}: not JSON ({first_line(error)}): correct the file"
        return
    for number, row in enumerate(rows):
        is_object = isinstance(row, dict)
        yield (
            number,
            row
            if is_object
            else f"{path}: row {number}: {quote(str(row))} is not a JSON object: write one object per row",
        )


def read_fields(path: Path, problems: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the words of each line of a text that has some. A line that cannot be read is added to the problems."""
    try:
        for number, line in read_limited_lines(path):
            if fields := line.split():
                yield number, fields
    except LineError as error:
        add_problem(problems, str(error))


def _read_csv(path: Path, is_once: Callable[[str], bool], check: Callable[[list[str]], str | None] | None) -> Rows:
    lines = (line for _, line in read_limited_lines(path, newline="\n"))
    table = csv.reader(lines, delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
    try:
        names = next(table, [])
        if problem := (check or partial(doubled_problem, is_once=is_once))(names):
            yield 1, f"{path}:1: {problem}"
            return
        for fields in filter(None, table):  # csv gives an empty list for a blank line
            if len(fields) == len(names):
                yield table.line_num, dict(zip(names, fields, strict=True))
                continue
            yield (
                table.line_num,
                f"{path}:{table.line_num}: {len(fields)} fields instead of {len(names)} in {quote(','.join(fields))}: "
                "put a text that holds a comma in quotation marks, or complete the row",
            )
    except csv.Error as error:
        yield 0, f"{path}:{table.line_num}: not CSV ({error}): correct the line"
    except LineError as error:
        yield 0, str(error)
