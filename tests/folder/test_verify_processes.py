"""What `verify` and `stats` find does not depend on the number of processes, nor on how rows are divided."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.folder.test_verify import FILE, relabel
from tests.helpers import edit_rows, replace_file
from usdm_sft.cli.main import main
from usdm_sft.folder import ranges, sorted_digests, verify_rows
from usdm_sft.folder.layout import data_files, read_counts
from usdm_sft.folder.ranges import divide_rows
from usdm_sft.folder.repeated_ids import Place, find_repeated
from usdm_sft.folder.sorted_digests import digest_texts, write_digests
from usdm_sft.folder.statistics import Weighted, _distribution
from usdm_sft.folder.verify import VerificationError, _make_encoder, verify
from usdm_sft.utils.processes import in_order


@pytest.fixture
def in_processes(monkeypatch):
    """Small folders get processes as well."""
    monkeypatch.setattr(ranges, "ROWS_PER_PROCESS", 1)


def write_ids(folder, *ranges_of_ids):
    files = [folder / f"{number}.npy" for number in range(len(ranges_of_ids))]
    for file, ids in zip(files, ranges_of_ids, strict=True):
        write_digests(file, digest_texts(row_id.encode() for row_id in ids))
    return files


@pytest.mark.parametrize("in_memory", [1, 3, 1000])
def test_repeated_ids_are_found_in_order_with_the_nearest_row_before(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(sorted_digests, "_IN_MEMORY", in_memory)
    files = write_ids(tmp_path, "abc", "", "dbe", "axbb")
    expected = [
        (Place(2, 1), Place(0, 1)),  # b
        (Place(3, 0), Place(0, 0)),  # a
        (Place(3, 2), Place(2, 1)),  # b
        (Place(3, 3), Place(3, 2)),  # b
    ]
    for limit in (0, 1, 3, 4, 9):
        assert find_repeated(files, limit) == expected[:limit]
    assert find_repeated(write_ids(tmp_path, "abc", "def"), 9) == []
    assert find_repeated([], 9) == []


def test_repeated_ids_of_many_rows(tmp_path, monkeypatch):
    """Compared with a dict of all ids, as of one process that has them in memory."""
    monkeypatch.setattr(sorted_digests, "_IN_MEMORY", 100)
    rng = np.random.default_rng(0)
    ids = [[f"d{number}" for number in rng.integers(3_000, size=250)] for _ in range(4)]
    seen, expected = {}, []
    for number, each in enumerate(ids):
        for row, row_id in enumerate(each):
            if row_id in seen:
                expected.append((Place(number, row), seen[row_id]))
            seen[row_id] = Place(number, row)
    assert len(expected) > 21
    assert find_repeated(write_ids(tmp_path, *ids), 21) == expected[:21]


def test_rows_are_divided_at_row_groups(dataset_folder, tmp_path, monkeypatch):
    rows = pq.read_table(dataset_folder / "single_turn")
    pq.write_table(rows, tmp_path / "rows.parquet", row_group_size=3)  # 13 rows: groups of 3, 3, 3, 3 and 1
    monkeypatch.setattr(ranges, "ROWS_PER_RANGE", 6)
    found = divide_rows(tmp_path / "rows.parquet", "train")
    assert [(list(each.row_groups), each.start, each.num_rows) for each in found] == [
        ([0, 1], 0, 6), ([2, 3], 6, 6), ([4], 12, 1),
    ]  # fmt: skip
    ids = [row_id for each in found for batch in each.read(columns=["id"]) for row_id in batch["id"].to_pylist()]
    assert ids == rows["id"].to_pylist()


def test_results_in_order():
    assert list(in_order(iter([(2, "c"), (0, "a"), (1, "b"), (3, "d")]))) == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]


def test_problems_do_not_depend_on_the_number_of_processes(folder_copy, in_processes):
    edit_rows(folder_copy, FILE, lambda rows: (relabel(rows[0], 0, 1), rows[0].update(id="d3_0", length=7)))
    edit_rows(
        folder_copy,
        "single_turn/train-00005-of-00010.parquet",
        lambda rows: rows[0].update(id="d3_0", agent_text="other"),
    )
    edit_rows(folder_copy, "single_turn/test-00001-of-00003.parquet", lambda rows: rows[0].update(length=9))
    found = []
    for num_proc in (1, 2):
        with pytest.raises(VerificationError) as raised:
            verify(folder_copy, num_proc=num_proc)
        found.append(raised.value.problems)
    assert found[0] == found[1]
    third, fifth = (f"{folder_copy / 'single_turn'}/train-0000{n}-of-00010.parquet: row 0 (d3_0)" for n in (3, 5))
    assert [problem.partition(", but")[0].partition(": token")[0] for problem in found[0]] == [
        f"{third}: the same id is at {folder_copy / 'single_turn'}/train-00000-of-00010.parquet: row 0 (d3_0)",
        f"{third}: length is 7",
        f"{third}: labels differ from the encoded columns",
        f"{fifth}: the same id is at {third}",
        f"{fifth}: input_ids differ from the encoded columns",
        next(problem.partition(", but")[0] for problem in found[0] if "length is 9" in problem),
    ]


def test_damaged_file_ends_the_check_in_its_place(folder_copy, in_processes):
    content = (folder_copy / FILE).read_bytes()
    replace_file(folder_copy, FILE, content[:200] + bytes(300) + content[500:])
    with pytest.raises(ValueError, match=f"{FILE} is damaged"):
        verify(folder_copy, num_proc=2)


def test_check_stops_after_the_problems_that_are_shown(folder_copy, monkeypatch):
    """A damaged file after them is not read any more, as before."""
    monkeypatch.setattr(verify_rows, "_LIMIT", 2)
    for number in (0, 1):
        edit_rows(
            folder_copy, f"single_turn/train-0000{number}-of-00010.parquet", lambda rows: rows[0].update(length=7)
        )
    content = (folder_copy / FILE).read_bytes()
    replace_file(folder_copy, FILE, content[:200] + bytes(300) + content[500:])
    counts, schema = read_counts(folder_copy), pq.read_schema(folder_copy / "single_turn/train-00000-of-00010.parquet")
    problems = verify_rows.check_rows(
        data_files(folder_copy, counts),
        schema.remove_metadata(),
        _make_encoder(folder_copy, counts),
        counts["settings"],
        {},
        normalization="fairseq",
        num_proc=1,
    )
    assert ["length is 7" in next(problems) for _ in range(2)] == [True, True]


def test_correct_folder_in_processes(dataset_folder, in_processes):
    assert verify(dataset_folder, num_proc=2) == {"train": 10, "test": 3}


def test_statistics_do_not_depend_on_the_number_of_processes(folder_copy, in_processes, capsys):
    counts = (folder_copy / "counts.json").read_text()
    for num_proc in ("1", "2"):
        main(["stats", str(folder_copy), "--num_proc", num_proc, "--json"])
        assert json.loads(capsys.readouterr().out)["splits"] == json.loads(counts)["statistics"]
        assert (folder_copy / "counts.json").read_text() == counts


@pytest.mark.parametrize("command", ["verify", "stats", "export"])
def test_number_of_processes_is_checked(dataset_folder, tmp_path, capsys, command):
    output = [str(tmp_path / "out")] if command == "export" else []
    with pytest.raises(SystemExit, match="1"):
        main([command, str(dataset_folder), *output, "--num_proc", "0"])
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err == f"dailytalk-usdm {command}: num_proc is 0: give a positive number\n"


def test_mean_and_quantiles_of_counted_values_are_those_of_the_values():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 999):
        values = rng.integers(30, size=size).astype(np.float64) / 8
        found = _distribution(Weighted(*np.unique(values, return_counts=True)))
        quantiles = np.quantile(values, [0, 0.5, 0.95, 1])
        expected = [values.mean(), *quantiles]
        assert list(found.values()) == [round(float(each), 4) for each in expected]
