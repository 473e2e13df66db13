"""What `export` writes does not depend on the number of processes, nor on how rows are divided."""

import multiprocessing
import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.folder.test_export import load_rows
from tests.folder.test_verify import FILE
from tests.helpers import LastFirst, content, edit_counts
from usdm_sft.folder import export as exporting
from usdm_sft.folder import rows as folder_rows
from usdm_sft.folder.export import export

MAX_LENGTH, PACKS_PER_GROUP = 50, 4


@pytest.fixture
def many_rows(folder_copy, forked_processes, monkeypatch):
    """A folder with 312 short rows in several row groups and ranges, of which 304 are in one file; another file is empty."""
    monkeypatch.setattr(folder_rows, "ROWS_PER_RANGE", 20)
    monkeypatch.setattr(exporting, "_ROW_GROUP", PACKS_PER_GROUP)
    path, rng = folder_copy / FILE, np.random.default_rng(0)
    [row] = pq.read_table(path).to_pylist()
    rows = []
    for number in range(304):
        ids = rng.integers(42_000, size=rng.integers(1, 30)).tolist()
        labels = [each if rng.random() < 0.5 else -100 for each in ids]
        ones = {"attention_mask": [1] * len(ids), "length": len(ids)}
        rows.append(row | {"id": f"d{number}", "input_ids": ids, "labels": labels} | ones)
    table = pa.Table.from_pylist(rows, schema=pq.read_schema(path))
    pq.write_table(table, path, row_group_size=7)
    pq.write_table(table.slice(0, 0), path.with_name("train-00006-of-00010.parquet"))
    edit_counts(folder_copy, lambda counts: counts["settings"].update(max_length=MAX_LENGTH))
    return folder_copy


def pack_by_hand(rows):
    packed = []
    for row in rows:
        if not packed or len(packed[-1]["input_ids"]) + len(row["input_ids"]) > MAX_LENGTH:
            packed.append({"input_ids": [], "loss_mask": [], "seq_start_id": []})
        packed[-1]["seq_start_id"].append(len(packed[-1]["input_ids"]))
        packed[-1]["input_ids"] += row["input_ids"]
        packed[-1]["loss_mask"] += [int(label != -100) for label in row["labels"][1:]] + [0]
    return packed


def check_text(folder, split, rows):
    lines = [f"{' '.join(map(str, row['input_ids']))}|{' '.join(map(str, row['labels']))}" for row in rows]
    assert (folder / f"{split}.txt").read_bytes() == "\n".join(lines).encode()


def check_packs(folder, split, rows):
    file = pq.ParquetFile(folder / f"{split}.idx.parquet")
    expected = pack_by_hand(rows)
    assert file.read().to_pylist() == expected
    groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    full, rest = divmod(len(expected), PACKS_PER_GROUP)
    assert groups == [PACKS_PER_GROUP] * full + [rest] * bool(rest)


@pytest.mark.parametrize(("format", "check"), [("usdm", check_text), ("megatron", check_packs)])
def test_rows_in_order_whichever_range_is_finished_first(many_rows, tmp_path, monkeypatch, format, check):
    assert export(many_rows, tmp_path / "one", format=format) == {"train": 312, "test": 3}
    monkeypatch.setattr(folder_rows, "ProcessPool", LastFirst)
    assert export(many_rows, tmp_path / "two", format=format) == {"train": 312, "test": 3}
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(content(tmp_path / "one")) == 2
    for split in ("train", "test"):
        check(tmp_path / "two", split, load_rows(many_rows, split))


def test_arrow_rows_in_order_whichever_range_is_finished_first(many_rows, tmp_path, monkeypatch):
    export(many_rows, tmp_path / "one", format="arrow")
    monkeypatch.setattr(folder_rows, "ProcessPool", LastFirst)
    assert export(many_rows, tmp_path / "two", format="arrow") == {"train": 312, "test": 3}
    name = "train/data-00000-of-00001.arrow"
    assert content(tmp_path / "one")[name] == content(tmp_path / "two")[name]
    with pa.ipc.open_stream(tmp_path / "two" / name) as stream:
        found = stream.read_all().to_pylist()
    names = ("input_ids", "labels", "attention_mask")
    assert found == [{name: row[name] for name in names} for row in load_rows(many_rows, "train")]


def test_two_processes_write_the_same_bytes(many_rows, tmp_path, monkeypatch):
    export(many_rows, tmp_path / "one", format="megatron", num_proc=1)
    monkeypatch.setattr(exporting, "_ROWS_PER_PROCESS", 1)
    export(many_rows, tmp_path / "two", format="megatron", num_proc=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_small_folder_starts_no_process(dataset_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("usdm_sft.utils.processes.start_process", None)
    assert export(dataset_folder, tmp_path, num_proc=8) == {"train": 10, "test": 3}


def die_in_another_process(rows):
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return make_masks(rows)


make_masks = exporting._make_masks


def test_killed_process_leaves_the_files_of_an_earlier_export(many_rows, tmp_path, monkeypatch):
    output = tmp_path / "packs"
    output.mkdir()
    (output / "train.idx.parquet").write_bytes(b"earlier")
    monkeypatch.setattr(exporting, "_ROWS_PER_PROCESS", 1)
    monkeypatch.setattr(exporting, "_make_masks", die_in_another_process)
    with pytest.raises(RuntimeError, match=r"a process died \(rows, process 1, exit code -9\): start the run again"):
        export(many_rows, output, format="megatron", num_proc=2)
    assert content(output) == {"train.idx.parquet": b"earlier"}
    assert [path.name for path in output.iterdir()] == ["train.idx.parquet"]


@pytest.mark.parametrize("format", ["usdm", "arrow", "megatron"])
def test_no_split_is_exported_if_one_cannot_be_read(folder_copy, tmp_path, format):
    path = folder_copy / "single_turn" / "test-00002-of-00003.parquet"
    table = pq.read_table(path)
    labels = pa.array([None], table.schema.field("labels").type)
    pq.write_table(table.set_column(table.schema.get_field_index("labels"), "labels", labels), path)
    with pytest.raises(ValueError, match=r"test-00002-of-00003\.parquet: a value of column labels is missing"):
        export(folder_copy, tmp_path / "out", format=format)
    assert list((tmp_path / "out").iterdir()) == []
