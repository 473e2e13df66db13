"""Compare a dataset folder with the reference's train.txt and test.txt, as multisets of lines."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from usdm_sft.dataset_folder.rows import iter_rows
from usdm_sft.dataset_folder.text_lines import format_line, parse_line


class _Place(NamedTuple):
    path: Path
    row: int
    id: str


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


def compare_with_text(files: Mapping[str, Sequence[Path]], text_dir: Path, tokenizer_dir: Path) -> Iterator[str]:
    """Compare each split with `<split>.txt` and yield the first difference of each split.

    Args:
        files: The Parquet files of each split.
        text_dir: Folder of the text files, in the format of `text_lines`.
        tokenizer_dir: Folder of the tokenizer that names the tokens that differ.

    Raises:
        FileNotFoundError: A text file is missing.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    for split, paths in files.items():
        path = text_dir / f"{split}.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not a file: name the folder with the reference's train.txt and test.txt"
            )
        places: dict[bytes, list[_Place]] = {}
        for place, line in _lines(paths):
            places.setdefault(_digest(line), []).append(place)
        yield from _first_difference_of_split(split, path, places, paths, tokenizer)


def _first_difference_of_split(
    split: str, path: Path, places: dict[bytes, list[_Place]], paths: Sequence[Path], tokenizer: Tokenizer
) -> Iterator[str]:
    extra: tuple[int, str] | None = None
    seen: Counter[bytes] = Counter()
    with open(path, encoding="utf-8", newline="\n") as text:
        for number, line in enumerate(text, start=1):
            line = line.removesuffix("\n")
            digest = _digest(line)
            seen[digest] += 1
            if extra is None and seen[digest] > len(places.get(digest, ())):
                extra = number, line
    missing = [found[seen[digest]] for digest, found in places.items() if seen[digest] < len(found)]
    if extra is not None:
        number, line = extra
        nearest = _describe_nearest(line, paths, {(place.path, place.row) for place in missing}, tokenizer)
        yield f"{path}:{number} is not a row of {split}{nearest}"
    elif missing:
        yield f"{missing[0].path}: row {missing[0].row} ({missing[0].id}) is not a line of {path}"


def _describe_nearest(line: str, paths: Sequence[Path], rows: set[tuple[Path, int]], tokenizer: Tokenizer) -> str:
    """Describe the first difference from the row of `rows` that shares the longest beginning with the line."""
    try:
        halves = parse_line(line)
    except (ValueError, OverflowError):
        return ": it is not input_ids, '|' and labels"
    best: tuple[int, str] = (-1, "")
    for place, row_line in _lines(paths):
        if (place.path, place.row) not in rows:
            continue
        for prefix, found, expected in zip(("", "of the labels, "), halves, parse_line(row_line), strict=True):
            at = first_difference(found, expected)
            if at is None:
                continue
            if at > best[0]:
                difference = describe_difference(found, expected, at, tokenizer)
                best = at, f": the nearest row is {place.id}; {prefix}{difference}"
            break
    return best[1]


def _lines(paths: Sequence[Path]) -> Iterator[tuple[_Place, str]]:
    for path in paths:
        number = 0
        for batch in iter_rows(path, columns=["id", "input_ids", "labels"]):
            for row in batch.to_pylist():
                yield _Place(path, number, row["id"]), format_line(row["input_ids"], row["labels"])
                number += 1


def _digest(line: str) -> bytes:
    return hashlib.blake2b(line.encode(), digest_size=16).digest()
