"""Compare a dataset folder with the reference's train.txt and test.txt, as multisets of lines.

Both sides become digests in sorted files, so that memory does not grow with the number of rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from usdm_sft.dataset_folder.ranges import RowRange, count_processes, divide_rows
from usdm_sft.dataset_folder.sorted_digests import create_array, digest_texts, iter_stretches, write_digests
from usdm_sft.dataset_folder.text_lines import format_lines, parse_line
from usdm_sft.template.tokens import naming_errors
from usdm_sft.utils.processes import ProcessPool

_LINES_PER_FILE = 1_000_000  # 16 bytes each while they are read


class _Difference(NamedTuple):
    """The first differences of a split.

    Attributes:
        line: Number of the first line that is no row, from 1, or None.
        row: The row that is no line and whose first equal comes first, or None.
    """

    line: int | None
    row: int | None


def first_difference(found: npt.ArrayLike, expected: npt.ArrayLike) -> int | None:
    """The first position at which two sequences of ids differ, or None if they are equal."""
    found, expected = np.asarray(found), np.asarray(expected)
    length = min(len(found), len(expected))
    different = np.flatnonzero(found[:length] != expected[:length])
    if different.size:
        return int(different[0])
    return None if len(found) == len(expected) else length


def describe_difference(
    found: npt.ArrayLike, expected: npt.ArrayLike, at: int, tokenizer: Tokenizer | None = None
) -> str:
    """Describe a difference, such as "token 57 is 5081 ('▁yes'), not 708 ('▁no')"."""

    def name(ids: npt.ArrayLike) -> str:
        ids = np.asarray(ids)
        if at >= len(ids):
            return "missing"
        token = tokenizer.id_to_token(int(ids[at])) if tokenizer is not None and ids[at] >= 0 else None
        return f"{ids[at]}" if token is None else f"{ids[at]} ({token!r})"

    return f"token {at} is {name(found)}, not {name(expected)}"


def compare_with_text(
    files: Mapping[str, Sequence[Path]], text_dir: Path, tokenizer_dir: Path, *, num_proc: int | None = 1
) -> Iterator[str]:
    """Compare each split with `<split>.txt` and yield the first difference of each split.

    Args:
        files: The Parquet files of each split.
        text_dir: Folder of the text files, in the format of `text_lines`.
        tokenizer_dir: Folder of the tokenizer that names the tokens that differ.
        num_proc: Largest number of processes that read rows; None means one per core that this process may use.

    Raises:
        FileNotFoundError: A text file is missing.
    """
    with naming_errors(str(tokenizer_dir)):
        tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    ranges = {split: [each for path in paths for each in divide_rows(path, split)] for split, paths in files.items()}
    with ProcessPool(count_processes([each for split in ranges.values() for each in split], num_proc)) as pool:
        for split, rows in ranges.items():
            path = text_dir / f"{split}.txt"
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is not a file: name the folder with the reference's train.txt and test.txt"
                )
            yield from _first_difference_of_split(split, path, rows, tokenizer, pool)


def _first_difference_of_split(
    split: str, path: Path, ranges: Sequence[RowRange], tokenizer: Tokenizer, pool: ProcessPool
) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        starts = np.cumsum([0, *(each.num_rows for each in ranges)]).tolist()
        row_files = [Path(folder, f"rows-{index}.npy") for index in range(len(ranges))]
        tasks = list(zip(row_files, starts, ranges, strict=False))
        for _ in pool.map(_write_row_digests, tasks, name="lines of rows"):
            pass
        missing = create_array(Path(folder, "missing.npy"), np.bool_, (starts[-1],))
        difference = _find_difference(row_files, _write_line_digests(path, folder), missing)
        if difference.line is not None:
            with open(path, encoding="utf-8", newline="\n") as text:
                line = next(islice(text, difference.line - 1, None)).removesuffix("\n")
            nearest = _describe_nearest(line, ranges, missing, tokenizer)
            yield f"{path}:{difference.line} is not a row of {split}{nearest}"
        elif difference.row is not None:
            index = int(np.searchsorted(starts, difference.row, side="right")) - 1
            yield f"{_describe_row(ranges[index], difference.row - starts[index])} is not a line of {path}"


def _write_row_digests(task: tuple[Path, int, RowRange]) -> None:
    """Write the digests of the lines of a range, whose first row has a number in its split."""
    file, start, rows = task
    digests = [digest_texts(format_lines(batch)) for batch in rows.read(columns=["input_ids", "labels"])]
    write_digests(file, b"".join(digests), first=start)


def _write_line_digests(path: Path, folder: str) -> list[Path]:
    """Write the digests of the lines of a text file, which are numbered from 1."""
    files: list[Path] = []
    start = 1
    with open(path, encoding="utf-8", newline="\n") as text:
        lines = (line.removesuffix("\n").encode() for line in text)
        while digests := digest_texts(islice(lines, _LINES_PER_FILE)):
            files.append(Path(folder, f"lines-{len(files)}.npy"))
            write_digests(files[-1], digests, first=start)
            start += len(digests) // 16
    return files


def _find_difference(
    row_files: Sequence[Path], line_files: Sequence[Path], missing: npt.NDArray[np.bool_]
) -> _Difference:
    """Compare digests. Of equal rows, the first ones are taken for the lines; `missing` then marks the next one."""
    line: int | None = None
    row: tuple[int, int] | None = None  # the first of equal rows, and the one that is missing
    for parts in iter_stretches([*row_files, *line_files]):
        digests = np.concatenate(parts)
        if not len(digests):
            continue
        is_line = np.arange(len(digests)) >= sum(map(len, parts[: len(row_files)]))
        order = np.lexsort((digests["low"], digests["high"]))  # stable: equal rows in order, then equal lines in order
        high, low, numbers = (digests[name][order] for name in ("high", "low", "row"))
        first = np.flatnonzero(np.append(True, (high[1:] != high[:-1]) | (low[1:] != low[:-1])))
        num_lines = np.add.reduceat(is_line[order].astype(np.int64), first)
        num_rows = np.diff(first, append=len(order)) - num_lines
        if (extra := numbers[(first + 2 * num_rows)[num_lines > num_rows]]).size:
            line = min(int(extra.min()), line or int(extra.min()))
        lacking = first[num_rows > num_lines]
        places = numbers[(first + num_lines)[num_rows > num_lines]]
        missing[places] = True
        if places.size:
            at = numbers[lacking].argmin()
            found = int(numbers[lacking][at]), int(places[at])
            row = min(found, row or found)
    return _Difference(line, row[1] if row else None)


def _describe_row(rows: RowRange, row: int) -> str:
    """Name a row of a range, whose id is read again."""
    ids = (row_id for batch in rows.read(columns=["id"]) for row_id in batch["id"].to_pylist())
    return f"{rows.path}: row {rows.start + row} ({next(islice(ids, row, None))})"


def _describe_nearest(
    line: str, ranges: Sequence[RowRange], missing: npt.NDArray[np.bool_], tokenizer: Tokenizer
) -> str:
    """Describe the first difference from the missing row that shares the longest beginning with the line."""
    try:
        halves = parse_line(line)
    except (ValueError, OverflowError):
        return ": it is not input_ids, '|' and labels"
    best: tuple[int, str] = (-1, "")
    start = 0
    for batch in (batch for each in ranges for batch in each.read(columns=["id", "input_ids", "labels"])):
        for position in np.flatnonzero(missing[start : start + len(batch)]).tolist():
            row_id, *expected = (batch[name][position].as_py() for name in ("id", "input_ids", "labels"))
            for prefix, found, ids in zip(("", "of the labels, "), halves, expected, strict=True):
                at = first_difference(found, ids)
                if at is None:
                    continue
                if at > best[0]:
                    difference = describe_difference(found, ids, at, tokenizer)
                    best = at, f": the nearest row is {row_id}; {prefix}{difference}"
                break
        start += len(batch)
    return best[1]
