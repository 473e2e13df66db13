"""Compare a dataset folder with the reference's train.txt and test.txt, as multisets of lines."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain, compress, count
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from usdm_sft.folder.export import format_lines, parse_line
from usdm_sft.folder.rows import RowRange, divide_files, map_ranges, name_row
from usdm_sft.template.special_tokens import naming_errors
from usdm_sft.utils.texts import count_noun


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
    """Compare the Parquet files of each split with `<split>.txt` in a folder, and yield the first difference of each split.

    Args:
        files: The Parquet files of each split.
        text_dir: Folder of the text files, whose lines are those of `format_lines`.
        tokenizer_dir: Folder of the tokenizer that names the tokens that differ.
        num_proc: Largest number of processes that read rows; None means one per core that this process may use.

    Raises:
        FileNotFoundError: A text file is missing.
    """
    with naming_errors(str(tokenizer_dir)):
        tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    for split, paths in files.items():
        path = text_dir / f"{split}.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not a file: name the folder with the reference's train.txt and test.txt"
            )
        ranges = divide_files({split: paths})
        digests = map_ranges(_digest_rows, ranges, name="lines of rows", num_proc=num_proc)
        yield from _first_difference_of_split(
            split, path, ranges, chain.from_iterable(each for _, each in digests), tokenizer
        )


def _first_difference_of_split(
    split: str, path: Path, ranges: Sequence[RowRange], digests: Iterable[bytes], tokenizer: Tokenizer
) -> Iterator[str]:
    rows: dict[bytes, list[int]] = {}  # digest of a line -> numbers of the rows that it belongs to
    for number, digest in enumerate(digests):
        rows.setdefault(digest, []).append(number)
    matched: Counter[bytes] = Counter()  # of equal rows, the first ones are taken for the lines
    extra: tuple[int, str] | None = None  # number and text of the first line that is not a row
    with open(path, encoding="utf-8", newline="\n") as text:
        for number, line in enumerate(text, start=1):
            line = line.removesuffix("\n")
            digest = _digest(line.encode())
            if matched[digest] < len(rows.get(digest, ())):
                matched[digest] += 1
            elif extra is None:
                extra = number, line
    missing = [number for digest, numbers in rows.items() for number in numbers[matched[digest] :]]
    if extra is not None:
        number, line = extra
        if num_equal := len(rows.get(_digest(line.encode()), ())):
            yield f"{path}:{number} stands more often in the file than in {split}, which has it {count_noun(num_equal, 'time')}"
        else:
            yield f"{path}:{number} is not a row of {split}{_describe_line(line, ranges, {*missing}, tokenizer)}"
    elif missing:
        yield f"{name_row(ranges, missing[0])} is not a line of {path}"


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=16).digest()  # tells any two lines apart


def _digest_rows(rows: RowRange) -> list[bytes]:
    batches = rows.read(columns=["input_ids", "labels"])
    return [_digest(line) for batch in batches for line in format_lines(batch)]


def _describe_line(line: str, ranges: Sequence[RowRange], missing: Container[int], tokenizer: Tokenizer) -> str:
    """Say how a line differs from the missing row that shares the longest beginning with it."""
    try:
        halves = parse_line(line)
    except (ValueError, OverflowError):
        return ": it is not input_ids, '|' and labels"
    best: tuple[int, str] = (-1, "")
    batches = (batch for rows in ranges for batch in rows.read(columns=["id", "input_ids", "labels"]))
    rows = (batch.slice(position, 1) for batch in batches for position in range(len(batch)))
    for row in compress(rows, map(missing.__contains__, count())):
        [row_id], *expected = (column.to_pylist() for column in row.columns)
        for prefix, found, [ids] in zip(("", "of the labels, "), halves, expected, strict=True):
            if (at := first_difference(found, ids)) is not None:
                if at > best[0]:
                    difference = describe_difference(found, ids, at, tokenizer)
                    best = at, f": the nearest row is {row_id}; {prefix}{difference}"
                break
        else:  # the numbers are equal
            is_crlf = line.endswith("\r")
            remedy = "it ends with CR and LF: convert the file to LF" if is_crlf else "separate by one space"
            return f": it differs from row {row_id} in white space only ({remedy})"
    return best[1]
