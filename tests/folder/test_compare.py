"""`verify --against` compares multisets of lines."""

import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from tests.folder.test_verify import FILE
from usdm_sft.folder import compare
from usdm_sft.folder import rows as folder_rows
from usdm_sft.folder.compare import compare_with_text
from usdm_sft.folder.layout import data_files, read_counts

KINDS = ("is not a row", "stands more often", "is not a line")


@pytest.fixture(scope="module")
def schema_and_row(dataset_folder):
    path = dataset_folder / FILE
    return pq.read_schema(path), pq.read_table(path).to_pylist()[0]


def write_rows(path, lines, schema, row):
    rows = [
        row | {"id": f"{path.stem}{number}", "input_ids": ids, "labels": labels}
        for number, (ids, labels) in enumerate(lines)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=2)


def as_text(line):
    return "|".join(" ".join(map(str, half)) for half in line)


def common(line, other):
    """Position of the first difference, and the half in which it is."""
    for half, (found, expected) in enumerate(zip(line, other, strict=True)):
        for at in range(max(len(found), len(expected))):
            if found[at : at + 1] != expected[at : at + 1]:
                return at, half
    raise AssertionError("the lines are equal")


def expected_problem(rows, lines, path):
    """Compare (file, number, line) rows with lines by lists of all of them."""
    places = {}
    for file, number, line in rows:
        places.setdefault(as_text(line), []).append((file, number, line))
    seen, extra = Counter(), []
    for number, line in enumerate(lines, start=1):
        seen[as_text(line)] += 1
        if seen[as_text(line)] > len(places.get(as_text(line), [])):
            extra.append((number, line))
    missing = [found[seen[text]] for text, found in places.items() if seen[text] < len(found)]
    if extra:
        number, line = extra[0]
        if as_text(line) in places:
            count = len(places[as_text(line)])
            return f"{path}:{number} stands more often in the file than in train, which has it {count} time{'s' * (count > 1)}"
        if not missing:
            return f"{path}:{number} is not a row of train"
        missing.sort(key=lambda place: (place[0], place[1]))
        file, row, nearest = max(missing, key=lambda place: common(line, place[2])[0])  # the first of several
        at, half = common(line, nearest)
        return f"{path}:{number} is not a row of train: the nearest row is {file.stem}{row}; " + (
            f"{'of the labels, ' * half}token {at} is"
        )
    if missing:
        file, row, _ = missing[0]
        return f"{file}: row {row} ({file.stem}{row}) is not a line of {path}"
    return None


@pytest.mark.parametrize("seed", [1, 5])
def test_first_difference_of_random_lines(dataset_folder, schema_and_row, tmp_path, monkeypatch, seed):
    loaded = Tokenizer.from_file(str(dataset_folder / "tokenizer" / "tokenizer.json"))
    monkeypatch.setattr(compare, "Tokenizer", SimpleNamespace(from_file=lambda path: loaded))  # it takes long
    monkeypatch.setattr(folder_rows, "ROWS_PER_RANGE", 2)
    rng = np.random.default_rng(seed)
    lines = [([a, b], [a, c]) for a in (5, 6) for b in (5, 6) for c in (-100, 5)]
    files, text = [tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "c.parquet"], tmp_path / "train.txt"
    kinds = Counter()
    for case in range(16):
        parts = [[lines[each] for each in rng.integers(len(lines), size=size)] for size in (3, case % 2, 4)]
        rows = [
            (file, number, line) for file, part in zip(files, parts, strict=True) for number, line in enumerate(part)
        ]
        for file, part in zip(files, parts, strict=True):
            write_rows(file, part, *schema_and_row)
        order = [rows[each][2] for each in rng.permutation(len(rows))]
        changed = [*order[case % 3 :], *([lines[case % len(lines)]] if case % 4 > 1 else [])]
        for at in rng.integers(len(changed), size=case % 5):  # several lines become extra, and several rows missing
            changed[at] = lines[rng.integers(len(lines))]
        text.write_text("\n".join(map(as_text, changed)))
        expected = expected_problem(rows, changed, text)
        found = list(compare_with_text({"train": files}, tmp_path, dataset_folder / "tokenizer"))
        assert len(found) == (expected is not None)
        assert expected is None or found[0].startswith(expected)
        kinds[expected and next(kind for kind in KINDS if kind in expected)] += 1
    assert all(kinds[kind] for kind in (None, *KINDS))


def compare_folder(folder, lines, text_dir, split="test"):
    """Compare a split of a dataset folder with lines of text; return what is found."""
    (text_dir / f"{split}.txt").write_text("\n".join(lines), newline="")
    files = data_files(folder, read_counts(folder))
    return list(compare_with_text({split: files[split]}, text_dir, folder / "tokenizer"))


def replace_id(line, half, at, new):
    halves = [each.split() for each in line.split("|")]
    halves[half][at] = new
    return "|".join(map(" ".join, halves))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda first, *rest: [replace_id(first, 0, -3, "13"), *rest], r"1 is not .*; token \d+ is 13 \('<0x0A>'\), not 28705 \('▁'\)$"),
        (lambda first, *rest: [replace_id(first, 1, -1, "2"), *rest], r"1 is not .* of the labels, token \d+ is 2 \('</s>'\), not -100$"),
        (lambda *lines: [*lines, "", ""], r"4 is not a row of test: it is not input_ids, '\|' and labels"),
        (lambda *lines: [*lines, "1 2|x"], "4 is not a row of test: it is not input_ids"),
        (lambda *lines: [*lines, f"{10**20}|1"], "4 is not a row of test: it is not input_ids"),
        (lambda first, *rest: [f"{first}\r", *rest],
         r"1 is not a row of test: it differs from row d\w+ in white space only \(it ends with CR and LF: convert the file to LF\)$"),
        (lambda first, *rest: [first.replace(" ", "  ", 1), *rest], r"1 .* in white space only \(separate by one space\)$"),
        (lambda first, *rest: [f"{first} ", *rest], r"1 .* in white space only \(separate by one space\)$"),
    ],
)  # fmt: skip
def test_line_that_is_not_a_row_is_described(dataset_folder, mini, tmp_path, edit, message):
    lines = (mini / "expected" / "test.txt").read_text().split("\n")
    [problem] = compare_folder(dataset_folder, edit(*lines), tmp_path)
    assert re.match(f"{re.escape(str(tmp_path / 'test.txt'))}:{message}", problem)


def test_missing_text_file_is_refused(dataset_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test\.txt is not a file: name the folder with the reference's"):
        list(compare_with_text({"test": []}, tmp_path, dataset_folder / "tokenizer"))


def test_split_without_rows_or_lines(dataset_folder, schema_and_row, tmp_path):
    write_rows(tmp_path / "a.parquet", [], *schema_and_row)
    (tmp_path / "train.txt").write_text("")
    tokenizer = dataset_folder / "tokenizer"
    assert list(compare_with_text({"train": [tmp_path / "a.parquet"]}, tmp_path, tokenizer)) == []
    assert list(compare_with_text({"train": []}, tmp_path, tokenizer)) == []
    (tmp_path / "train.txt").write_text("1|1")
    assert list(compare_with_text({"train": []}, tmp_path, tokenizer)) == [
        f"{tmp_path / 'train.txt'}:1 is not a row of train"
    ]


def test_comparison_in_two_processes(dataset_folder, mini, forked_processes, monkeypatch):
    monkeypatch.setattr(folder_rows, "ROWS_PER_PROCESS", 1)
    files = data_files(dataset_folder, read_counts(dataset_folder))
    files["train"] = files["test"]
    [problem] = compare_with_text(files, mini / "expected", dataset_folder / "tokenizer", num_proc=2)
    assert problem.startswith(f"{mini / 'expected' / 'train.txt'}:1 is not a row of train: the nearest row is d")
