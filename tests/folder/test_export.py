"""Exports for other trainers hold the ids and labels of the folder, in the form that each trainer reads."""

import itertools
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.folder.test_verify import FILE, relabel
from tests.helpers import content, edit_counts, edit_rows, record_states
from usdm_sft.cli.main import main
from usdm_sft.folder.export import export
from usdm_sft.utils.files import replace_path

ARROW = {"input_ids": "int32", "labels": "int32", "attention_mask": "int8"}


def load_rows(folder, split):
    paths = sorted((folder / "single_turn").glob(f"{split}-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_unknown_format(dataset_folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="format 'csv' is unknown: choose one of usdm, arrow, megatron"):
        export(dataset_folder, tmp_path, format="csv")
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(dataset_folder), str(tmp_path), "--format", "csv"])
    assert "format" in capsys.readouterr().err


def test_reference_format_is_the_default(dataset_folder, tmp_path, mini):
    assert export(dataset_folder, tmp_path / "a") == {"train": 10, "test": 3}
    export(dataset_folder, tmp_path / "b", format="usdm")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    for split in ("train", "test"):
        exported, expected = (folder / f"{split}.txt" for folder in (tmp_path / "a", mini / "expected"))
        assert sorted(exported.read_text().split("\n")) == sorted(expected.read_text().split("\n"))


def test_arrow_is_a_saved_dataset_dict_of_three_columns(dataset_folder, tmp_path, capsys):
    """LLaMA-Factory opens `tokenized_path` with `load_from_disk` and pads every column that it finds."""
    main(["export", str(dataset_folder), str(tmp_path / "arrow"), "--format", "arrow"])
    assert capsys.readouterr().out == "train: 10 rows\ntest: 3 rows\n"
    saved = datasets.load_from_disk(str(tmp_path / "arrow"))
    assert isinstance(saved, datasets.DatasetDict) and list(saved) == ["train", "test"]
    assert {path.name for path in (tmp_path / "arrow").iterdir()} == {"train", "test", "dataset_dict.json"}
    for split, rows in saved.items():
        assert {field.name: str(field.type.value_type) for field in rows.data.schema} == ARROW
        assert list(rows) == [{name: row[name] for name in ARROW} for row in load_rows(dataset_folder, split)]


def test_arrow_needs_an_empty_folder(dataset_folder, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path} is not empty: name another folder"):
        export(dataset_folder, tmp_path, format="arrow")
    assert content(tmp_path) == {"note.txt": b"mine"}


def test_arrow_after_an_interrupted_export(dataset_folder, tmp_path, monkeypatch):
    def fill_the_disk(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("usdm_sft.folder.export._describe_split", fill_the_disk)
        with pytest.raises(OSError, match="No space left"):
            export(dataset_folder, tmp_path / "arrow", format="arrow")
    assert list((tmp_path / "arrow").iterdir()) == []
    (tmp_path / "arrow" / ".unfinished").mkdir()  # a killed run leaves it
    assert export(dataset_folder, tmp_path / "arrow", format="arrow") == {"train": 10, "test": 3}
    assert not (tmp_path / "arrow" / ".unfinished").exists()


def read_packs(path):
    """Yield ids, labels and loss mask of each row as Megatron-Bridge's collate function makes them.

    It cuts a pack at `seq_start_id`, feeds all but the last token of each row, takes the next ids as labels, and counts the
    loss where `loss_mask` of the fed token is 1.
    """
    for pack in pq.read_table(path).to_pylist():
        bounds = [*pack["seq_start_id"], len(pack["input_ids"])]
        for start, stop in itertools.pairwise(bounds):
            ids, mask = pack["input_ids"][start:stop], pack["loss_mask"][start:stop]
            yield ids[:-1], ids[1:], mask[:-1]


@pytest.mark.parametrize("max_length", [8192, 1200])
def test_megatron_packs_give_the_targets_of_the_rows(folder_copy, tmp_path, max_length):
    edit_counts(folder_copy, lambda counts: counts["settings"].update(max_length=max_length))
    assert export(folder_copy, tmp_path / "packs", format="megatron") == {"train": 10, "test": 3}
    for split in ("train", "test"):
        path = tmp_path / "packs" / f"{split}.idx.parquet"
        assert pq.read_schema(path).equals(
            pa.schema({"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.int8()), "seq_start_id": pa.list_(pa.int32())})
        )  # fmt: skip
        rows = load_rows(folder_copy, split)
        expected = [(row["input_ids"][:-1], row["labels"][1:]) for row in rows]
        found = [
            (ids, [label if counted else -100 for label, counted in zip(labels, mask, strict=True)])
            for ids, labels, mask in read_packs(path)
        ]
        assert found == expected
        lengths = [len(ids) for ids in pq.read_table(path)["input_ids"].to_pylist()]
        assert max(lengths) <= max_length and sum(lengths) == sum(row["length"] for row in rows)
    first, second = lengths_of_first_packs(tmp_path / "packs" / "train.idx.parquet", load_rows(folder_copy, "train"))
    assert second is None or first + second > max_length  # a pack ends only where the next row does not fit


def lengths_of_first_packs(path, rows):
    """The length of the first pack, and of the row that opens the second one."""
    packs = pq.read_table(path).to_pylist()
    num_rows = len(packs[0]["seq_start_id"])
    return len(packs[0]["input_ids"]), rows[num_rows]["length"] if num_rows < len(rows) else None


def test_megatron_refuses_labels_that_it_cannot_express(folder_copy, tmp_path):
    edit_rows(folder_copy, FILE, lambda rows: relabel(rows[0], -3, 7))
    with pytest.raises(
        ValueError, match=rf"{FILE}: the labels of \S+ are not its input_ids or -100: run 'dailytalk-usdm"
    ):
        export(folder_copy, tmp_path / "packs", format="megatron")
    assert list((tmp_path / "packs").iterdir()) == []


def test_megatron_row_groups(folder_copy, tmp_path, monkeypatch):
    monkeypatch.setattr("usdm_sft.folder.export._ROW_GROUP", 1)
    edit_counts(folder_copy, lambda counts: counts["settings"].update(max_length=1200))
    export(folder_copy, tmp_path / "one", format="megatron")
    file = pq.ParquetFile(tmp_path / "one" / "train.idx.parquet")
    assert file.num_row_groups == file.metadata.num_rows > 1
    assert np.concatenate(file.read()["input_ids"].to_pylist()).tolist() == [
        token for row in load_rows(folder_copy, "train") for token in row["input_ids"]
    ]


NAMES = {
    "usdm": ("train.txt", "test.txt"),
    "arrow": ("train", "test", "dataset_dict.json"),
    "megatron": ("train.idx.parquet", "test.idx.parquet"),
}


@pytest.mark.parametrize("format", NAMES)
def test_killed_export_can_be_repeated(dataset_folder, tmp_path, format):
    """From the state before each rename and removal, that of the new files included."""
    with record_states(tmp_path / "out", tmp_path / "states"):
        export(dataset_folder, tmp_path / "out", format=format)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(NAMES[format])
    expected = {name: data for name, data in content(tmp_path / "out").items() if not name.endswith(".json")}
    states = {tuple(sorted(os.listdir(state))): state for state in sorted((tmp_path / "states").iterdir())}
    assert len(states) >= len(NAMES[format])
    for state in states.values():
        assert export(dataset_folder, state, format=format) == {"train": 10, "test": 3}
        found = content(state)
        assert {name: found[name] for name in expected} == expected
        assert sorted(os.listdir(state)) == sorted(NAMES[format])


def test_interrupted_move_leaves_an_empty_folder(dataset_folder, tmp_path, monkeypatch):
    def interrupt(unfinished, path):
        if path.name == "dataset_dict.json":
            raise KeyboardInterrupt
        replace_path(unfinished, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("usdm_sft.folder.export.replace_path", interrupt)
        export(dataset_folder, tmp_path / "arrow", format="arrow")
    assert list((tmp_path / "arrow").iterdir()) == []
    assert export(dataset_folder, tmp_path / "arrow", format="arrow") == {"train": 10, "test": 3}


def test_arrow_keeps_files_beside_those_of_a_killed_export(dataset_folder, tmp_path):
    (tmp_path / "arrow" / ".unfinished").mkdir(parents=True)
    (tmp_path / "arrow" / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: name another folder"):
        export(dataset_folder, tmp_path / "arrow", format="arrow")
    assert (tmp_path / "arrow" / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("format", NAMES)
def test_export_follows_no_link(dataset_folder, tmp_path, format):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    if format == "arrow":
        (tmp_path / "out" / ".unfinished").symlink_to(tmp_path / "precious")
    else:
        for name in (NAMES[format][0], f"{NAMES[format][1]}.unfinished"):
            (tmp_path / "out" / name).symlink_to(tmp_path / "precious" / "thesis.txt")
    export(dataset_folder, tmp_path / "out", format=format)
    assert content(tmp_path / "precious") == {"thesis.txt": b"mine"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
