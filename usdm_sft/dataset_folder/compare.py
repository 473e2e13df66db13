"""The rows of a dataset folder against the reference's train.txt and test.txt, as sets of lines: the first difference in words."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from usdm_sft.dataset_folder.rows import iter_rows


class _Place(NamedTuple):
    path: Path
    row: int
    id: str


def first_difference(found: Sequence[int], expected: Sequence[int]) -> int | None:
    """Where two sequences of ids first differ, or None."""
    length = min(len(found), len(expected))
    different = np.flatnonzero(np.asarray(found[:length]) != np.asarray(expected[:length]))
    if different.size:
        return int(different[0])
    return None if len(found) == len(expected) else length


def describe_difference(
    found: Sequence[int], expected: Sequence[int], at: int, tokenizer: Tokenizer | None = None
) -> str:
    """Such as "token 57 is 5081 ('▁yes'), not 708 ('▁no')"."""

    def name(ids: Sequence[int]) -> str:
        if at >= len(ids):
            return "missing"
        token = tokenizer.id_to_token(int(ids[at])) if tokenizer is not None and ids[at] >= 0 else None
        return f"{ids[at]}" if token is None else f"{ids[at]} ({token!r})"

    return f"token {at} is {name(found)}, not {name(expected)}"


def compare_with_text(files: Mapping[str, Sequence[Path]], text_dir: Path, tokenizer_dir: Path) -> Iterator[str]:
    """Compare each split with `<split>.txt`; yields the first difference of each split.

    Args:
        files: The Parquet files of each split.
        text_dir: Where the text files lie, one example a line: ids, `|`, labels.
        tokenizer_dir: Of the tokenizer that names the tokens that differ.

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
        ours: dict[bytes, list[_Place]] = {}
        for place, line in _lines(paths):
            ours.setdefault(_digest(line), []).append(place)
        yield from _first_difference_of_split(split, path, ours, paths, tokenizer)


def _first_difference_of_split(
    split: str, path: Path, ours: dict[bytes, list[_Place]], paths: Sequence[Path], tokenizer: Tokenizer
) -> Iterator[str]:
    extra: tuple[int, str] | None = None
    seen: Counter[bytes] = Counter()
    with open(path, encoding="utf-8", newline="\n") as text:
        for number, line in enumerate(text, start=1):
            line = line.removesuffix("\n")
            digest = _digest(line)
            seen[digest] += 1
            if extra is None and seen[digest] > len(ours.get(digest, ())):
                extra = number, line
    missing = [places[seen[digest]] for digest, places in ours.items() if seen[digest] < len(places)]
    if extra is not None:
        number, line = extra
        nearest = _nearest(line, paths, {(place.path, place.row) for place in missing}, tokenizer)
        yield f"{path}:{number} is no row of {split}{nearest}"
    elif missing:
        yield f"{missing[0].path}: row {missing[0].row} ({missing[0].id}) is no line of {path}"


def _nearest(line: str, paths: Sequence[Path], rows: set[tuple[Path, int]], tokenizer: Tokenizer) -> str:
    """The row that goes along with the line for longest, among those that are no line of the file."""
    try:
        theirs = [np.array(list(map(int, half.split())), dtype=np.int64) for half in line.split("|")]
    except ValueError:
        theirs = []
    if len(theirs) != 2:
        return ": it is not ids, '|' and labels"
    best: tuple[int, str] = (-1, "")
    for place, ours in _lines(paths):
        if (place.path, place.row) not in rows:
            continue
        halves = [np.array(half.split(), dtype=np.int64) for half in ours.split("|")]
        for what, found, expected in zip(("", "of the labels, "), theirs, halves, strict=True):
            at = first_difference(found, expected)
            if at is None:
                continue
            if at > best[0]:
                best = at, f": the nearest is {place.id}; {what}{describe_difference(found, expected, at, tokenizer)}"
            break
    return best[1]


def _lines(paths: Sequence[Path]) -> Iterator[tuple[_Place, str]]:
    for path in paths:
        number = 0
        for batch in iter_rows(path, columns=["id", "input_ids", "labels"]):
            for row in batch.to_pylist():
                ids, labels = (" ".join(map(str, row[name])) for name in ("input_ids", "labels"))
                yield _Place(path, number, row["id"]), f"{ids}|{labels}"
                number += 1


def _digest(line: str) -> bytes:
    return hashlib.blake2b(line.encode(), digest_size=16).digest()
