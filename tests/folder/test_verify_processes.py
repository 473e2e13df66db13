"""What `verify` and `stats` find does not depend on the number of processes, nor on how rows are divided."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.folder.test_verify import FILE, relabel
from tests.helpers import edit_rows, find_problems, replace_file
from usdm_sft.cli.main import main
from usdm_sft.folder import rows, verify_rows
from usdm_sft.folder.rows import divide_rows
from usdm_sft.folder.statistics import Weighted, _distribution
from usdm_sft.utils.processes import in_order


@pytest.fixture
def in_processes(monkeypatch, forked_processes):
    """Small folders get processes as well."""
    monkeypatch.setattr(rows, "ROWS_PER_PROCESS", 1)


def test_repeated_ids_come_with_the_nearest_row_before():
    """Compared with a dict of all ids."""
    numbers = np.random.default_rng(0).integers(3_000, size=1_000).tolist()
    ids, seen, expected = [f"d{number}" for number in numbers], {}, []
    for row, row_id in enumerate(ids):
        if row_id in seen:
            expected.append((row, seen[row_id]))
        seen[row_id] = row
    assert len(expected) > 21
    table = pa.table([pa.chunked_array([ids[:300], ids[300:]]), np.arange(1_000)], ["id", "row"])
    assert verify_rows._find_repeated(table) == expected[:21]
    assert verify_rows._find_repeated(table.slice(0, 0)) == []


def test_rows_are_divided_at_row_groups(dataset_folder, tmp_path, monkeypatch):
    table = pq.read_table(dataset_folder / "single_turn")
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=3)  # 13 rows: groups of 3, 3, 3, 3 and 1
    monkeypatch.setattr(rows, "ROWS_PER_RANGE", 6)
    found = divide_rows(tmp_path / "rows.parquet", "train")
    assert [(list(each.row_groups), each.start, each.num_rows) for each in found] == [
        ([0, 1], 0, 6), ([2, 3], 6, 6), ([4], 12, 1),
    ]  # fmt: skip
    ids = [row_id for each in found for batch in each.read(columns=["id"]) for row_id in batch["id"].to_pylist()]
    assert ids == table["id"].to_pylist()
    assert found[1].read_row(4, ["id"]) == {"id": ids[10]}


def test_results_in_order():
    assert list(in_order(iter([(2, "c"), (0, "a"), (1, "b"), (3, "d")]))) == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]


def find_in_processes(folder):
    """The problems of a folder, which one process and two find alike."""
    found, in_two = (find_problems(folder, num_proc=num_proc) for num_proc in (1, 2))
    assert found == in_two
    return found


def test_problems_do_not_depend_on_the_number_of_processes(folder_copy, in_processes):
    names = [f"single_turn/train-0000{number}-of-00010.parquet" for number in (3, 5, 7, 8)]
    edit_rows(folder_copy, names[0], lambda rows: (relabel(rows[0], 0, 1), rows[0].update(id="d3_0", length=7)))
    edit_rows(folder_copy, names[1], lambda rows: rows[0].update(id="d3_0", agent_text="other"))
    edit_rows(folder_copy, "single_turn/test-00001-of-00003.parquet", lambda rows: rows[0].update(length=9))
    content = (folder_copy / names[2]).read_bytes()
    replace_file(folder_copy, names[2], content[:200] + bytes(300) + content[500:])
    replace_file(folder_copy, names[3], b"PAR1")
    third, fifth = (f"{folder_copy / name}: row 0 (d3_0)" for name in names[:2])
    expected = [
        f"{third}: length is 7, but",
        f"{third}: the id of dialog_id and turn is d8_0",
        f"{third}: labels differ from the encoded columns: token 0",
        f"{third}: the same id is at {folder_copy / 'single_turn'}/train-00000-of-00010.parquet: row 0 (d3_0)",
        f"{fifth}: the id of dialog_id and turn is d8_2",
        f"{fifth}: input_ids differ from the encoded columns: token",
        f"{fifth}: the same id is at {third}",
        f"{folder_copy / names[2]} is damaged (",
        f"{folder_copy / names[3]} is not a Parquet file (",
        f"{folder_copy / 'single_turn'}/test-00001-of-00003.parquet: row 0 (d105_1): length is 9",
    ]
    found = find_in_processes(folder_copy)
    assert [problem[: len(text)] for problem, text in zip(found, expected, strict=True)] == expected


def test_turns_do_not_depend_on_the_number_of_processes(folder_copy, in_processes):
    edit_rows(folder_copy, FILE, lambda rows: rows[0].update(agent_speaker="9"))
    [problem] = find_in_processes(folder_copy)
    fourth = FILE.replace("3-of", "4-of")
    assert problem == (
        f"{folder_copy / fourth}: row 0 (d8_1): turn 1 has another speaker than in {folder_copy / FILE}: row 0 (d8_0)"
    )


def test_check_stops_after_the_problems_that_are_shown(folder_copy, monkeypatch):
    monkeypatch.setattr(verify_rows, "LIMIT", 2)
    read, check_range = [], verify_rows._check_range
    monkeypatch.setattr(verify_rows, "_check_range", lambda *args: read.append(1) or check_range(*args))
    for number in (0, 1, 2):
        edit_rows(folder_copy, FILE.replace("3-of", f"{number}-of"), lambda rows: rows[0].update(length=7))
    problems = find_problems(folder_copy, num_proc=1)
    assert ["length is 7" in problem for problem in problems] == [True, True] and len(read) == 2


def test_statistics_do_not_depend_on_the_number_of_processes(folder_copy, in_processes, capsys):
    counts = (folder_copy / "counts.json").read_text()
    for num_proc in ("1", "2"):
        main(["stats", str(folder_copy), "--num_proc", num_proc, "--json"])
        assert json.loads(capsys.readouterr().out)["splits"] == json.loads(counts)["statistics"]
        assert (folder_copy / "counts.json").read_text() == counts


@pytest.mark.parametrize("command", ["verify", "stats", "export"])
def test_number_of_processes_is_checked(dataset_folder, tmp_path, refused, command):
    output = [tmp_path / "out"] if command == "export" else []
    error = refused(command, dataset_folder, *output, "--num_proc", 0)
    assert error == f"dailytalk-usdm {command}: num_proc is 0: give a positive number"
    assert not (tmp_path / "out").exists()


def test_mean_and_quantiles_of_counted_values():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 999):
        values = rng.integers(30, size=size).astype(np.float64) / 8
        found = _distribution(Weighted(*np.unique(values, return_counts=True)))
        quantiles = np.quantile(values, [0, 0.5, 0.95, 1])
        expected = [values.mean(), *quantiles]
        assert list(found.values()) == [round(float(each), 4) for each in expected]
