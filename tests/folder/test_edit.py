"""`edit`: a folder without some rows, whose counts, card, recordings and digests are those of the rows that stay."""

import json
import re

import pytest
from datasets import load_dataset

from tests.helpers import content, edit_rows, options, reuse_units
from usdm_sft.cli.main import main
from usdm_sft.folder import writer
from usdm_sft.folder.edit import edit
from usdm_sft.folder.layout import COUNTS, read_counts
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.prepare import prepare

DROPPED = "dropped by dailytalk-usdm edit"
SHAPE = re.escape('write {"rows": ["d23_0", "d23_1"]} with ids of rows, or flag rows on the page of show --serve') + "$"


def flags(folder, *rows, **more):
    """Write a file of flags beside a folder."""
    path = folder / "flags.json"
    path.write_text(json.dumps({"rows": rows} | more))
    return path


def load(folder, config=None, split="train"):
    return load_dataset(
        "parquet", data_files=str(folder / (config or "*_turn") / f"{split}-*"), split="train"
    ).to_list()


@pytest.fixture(scope="module")
def kept(mini, unit_model, finished, tmp_path_factory):
    """The mini corpus with its recordings, as conversations of collapsed units, and as pairs with one earlier exchange."""
    root = tmp_path_factory.mktemp("kept")
    reuse_units(finished, root)
    forms = {"talk": {"config_name": "multi_turn", "unit_repetition": "collapse"}, "history": {"history": 1}}
    for name, more in forms.items():
        prepare(**options(mini, unit_model, root, output_path=root / name, keep_audio=True, **more))
    return root


def test_rows_that_stay_are_unchanged_and_counts_are_theirs(dataset_folder, tmp_path, capsys):
    before, counts = content(dataset_folder), read_counts(dataset_folder)
    drop = flags(tmp_path, "d3_0", "d20_0", key=counts["key"])
    main(["edit", str(dataset_folder), str(tmp_path / "out"), "--drop", str(drop)])
    assert (
        "train: 8 rows from 3 dialogs" in (out := capsys.readouterr().out) and "2 pairs dropped, 2 dialogs (d11" in out
    )
    assert verify(tmp_path / "out") == {"train": 8, "test": 3}
    rows = load(dataset_folder)
    left = [row for row in rows if row["id"] not in ("d3_0", "d20_0")]
    assert load(tmp_path / "out") == left
    assert load(tmp_path / "out", split="test") == load(dataset_folder, split="test")
    edited = read_counts(tmp_path / "out")
    train, was = edited["splits"]["train"], counts["splits"]["train"]
    seconds = {
        (row["dialog_id"], row["turn"] + i): row[f"{role}_seconds"]
        for row in left
        for i, role in enumerate(("user", "agent"))
    }
    assert train == was | {
        "rows": 8,
        "dialogs": 3,
        "utterances": 11,  # d3 has lost turn 0, d20 both
        "hours": round(sum(seconds.values()) / 3600, 6),
        "tokens": sum(row["length"] for row in left),
        "labelled_tokens": sum(label != -100 for row in left for label in row["labels"]),
        "units": sum(len(row["user_units"]) + len(row["agent_units"]) for row in left),
        "pairs_left_out": {"d3_0": DROPPED, "d20_0": DROPPED},
    }
    assert edited["splits"]["test"] == counts["splits"]["test"] and edited["key"] != counts["key"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "Of the pairs, 0 had bad audio and 0 did not fit into `max_length` tokens. `dailytalk-usdm edit` dropped 2"
        in card
    )
    assert f"- d20_0: {DROPPED}\n" in card
    assert content(dataset_folder) == before


@pytest.mark.slow
def test_recordings_of_dropped_conversations_are_gone(kept, tmp_path):
    """Of d3, rows d3_0 (turns 0 to 3) and d3_1 (1 and 2); of d77, d77_0 (0 and 1) and d77_1 (1 and 2); d20_0 is all of d20."""
    edit(kept / "talk", tmp_path / "out", flags(tmp_path, "d3_0", "d77_0", "d20_0"))
    assert verify(tmp_path / "out")["train"] == len(load(kept / "talk")) - 3
    counts = read_counts(tmp_path / "out")
    assert [*counts["splits"]["train"]["pairs_left_out"]] == ["d3_0", "d3_2", "d20_0", "d77_0"]
    found = {(row["dialog"], row["turn"]): row for row in load(tmp_path / "out", "utterances")}
    expected = {
        (row["dialog"], row["turn"]): row for row in load(kept / "talk", "utterances") if row["dialog"] != "d20"
    }
    silent = [("d3", 0), ("d3", 3), ("d77", 0)]
    for turn in silent:
        assert expected[turn]["audio"] is not None
        expected[turn] |= {"audio": None, "units": None, "seconds": None}
    assert found == expected
    assert counts["utterances"]["train"]["recordings"] == len(expected) - 3


@pytest.mark.slow
def test_row_with_history_is_one_pair(kept, tmp_path):
    edit(kept / "history", tmp_path / "out", flags(tmp_path, "d3_2"))  # with turns 0 and 1 before it
    assert verify(tmp_path / "out") == {"train": 9, "test": 3}
    counts = read_counts(tmp_path / "out")["splits"]["train"]
    assert counts["pairs_left_out"] == {"d3_2": DROPPED}
    assert (counts["pairs"], counts["utterances"]) == (10, 13)  # turn 3 of d3 is in no row


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], {}, rf"flags.json names no rows: {SHAPE}"),
        ([3], {}, r"flags.json names no rows"),
        (["d3_0"], {"key": "0" * 64}, r"flags.json flags rows of another folder: name the folder whose page saved it"),
        (["d3_0", "d3_9", "d4_0"], {}, r"flags.json names 2 of 3 rows that .* does not have, such as d3_9"),
        (["d105_0", "d105_1", "d2001_0"], {}, r"flags.json names all rows of test: keep one"),
    ],
)
def test_wrong_flags_are_refused(dataset_folder, tmp_path, rows, more, message):
    with pytest.raises(ValueError, match=message):
        edit(dataset_folder, tmp_path / "out", flags(tmp_path, *rows, **more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["d3_0"]', "is not a JSON object but a list"),
        ('{"train": ["d3_0"]}', "names no rows"),
        ('{"rows": [{"id": "d3_0"}]}', "names no rows"),
        ("d3_0\n", r"is not JSON \(.*\)"),
        ("<html>", "is HTML and not JSON, such as a page to log in or of an error"),
    ],
)
def test_file_of_another_shape_is_told_the_shape(dataset_folder, tmp_path, content, message):
    (tmp_path / "flags.json").write_text(content)
    with pytest.raises(ValueError, match=rf"flags\.json {message}: {SHAPE}"):
        edit(dataset_folder, tmp_path / "out", tmp_path / "flags.json")


@pytest.mark.slow
def test_wrong_folders_are_refused(dataset_folder, folder_copy, tmp_path):
    drop = flags(tmp_path, "d3_0")
    with pytest.raises(ValueError, match="is the folder itself: name another output_path"):
        edit(folder_copy, folder_copy.parent / "." / folder_copy.name, drop)
    with pytest.raises(
        FileExistsError,
        match=r"holds other rows of the same settings, .*: name another output_path, or pass --overwrite",
    ):
        edit(dataset_folder, folder_copy, drop)
    with pytest.raises(FileNotFoundError, match="is not a file: name a JSON file"):
        edit(dataset_folder, tmp_path / "out", tmp_path / "none.json")
    edit(dataset_folder, folder_copy, drop, overwrite=True)
    assert verify(folder_copy)["train"] == 9
    edit(folder_copy, tmp_path / "again", flags(tmp_path, "d8_0"))
    assert [*read_counts(tmp_path / "again")["splits"]["train"]["pairs_left_out"]] == ["d3_0", "d8_0"]
    edit_rows(folder_copy, "single_turn/test-00000-of-00003.parquet", lambda rows: rows[0].update(length=1))
    with pytest.raises(ValueError, match="length is 1, but the row has"):
        edit(folder_copy, tmp_path / "out", flags(tmp_path, "d8_0"))
    assert not (tmp_path / "out").exists()


def test_interrupted_edit_is_completed_by_the_next(dataset_folder, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    drop = flags(tmp_path, "d3_0")
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_move_into_place", interrupt)
        with pytest.raises(KeyboardInterrupt):
            edit(dataset_folder, tmp_path / "out", drop)
    assert not (tmp_path / "out" / COUNTS).exists()
    counts = edit(dataset_folder, tmp_path / "out", drop)
    assert verify(tmp_path / "out")["train"] == 9
    assert edit(dataset_folder, tmp_path / "out", drop) == counts  # finished already
