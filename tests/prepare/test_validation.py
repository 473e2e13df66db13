"""`--val_dialogs`: a split of whole dialogs, taken from train."""

import hashlib
import re

import datasets
import pytest

from dailytalk_usdm import load_dataset
from tests.helpers import content, options, page_data, reuse_units
from usdm_sft.cli.main import make_parser
from usdm_sft.corpus.dialogs import Dialog, Split
from usdm_sft.corpus.read import take_validation
from usdm_sft.folder.layout import read_counts
from usdm_sft.folder.page import write_page
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.dry_run import dry_run
from usdm_sft.prepare.prepare import prepare

IDS = [f"d{number}" for number in range(40)]


def make_split(name, ids):
    return Split(name, tuple(Dialog(each, ()) for each in ids), {f"{name}-bad": "a reason"}, tuple(ids))


def take(ids, *options):
    splits = {"train": make_split("train", ids), "test": make_split("test", ["t"])}
    return {name: list(split.dialog_ids) for name, split in take_validation(splits, *options).items()}


@pytest.mark.parametrize(("val_dialogs", "number"), [(1, 1), (7, 7), (39, 39), (0.1, 4), (0.26, 10), (0.001, 1)])
def test_number_or_share_of_dialogs_in_order(val_dialogs, number):
    found = take(IDS, val_dialogs, 5)
    assert [*found] == ["train", "validation", "test"] and found["test"] == ["t"]
    ranked = sorted(IDS, key=lambda name: hashlib.sha256(f"5 {name}".encode()).hexdigest())
    assert found["validation"] == [name for name in IDS if name in ranked[:number]]
    assert found["train"] == [name for name in IDS if name in ranked[number:]]


def test_choice_depends_on_seed_and_ids_but_not_on_order():
    first = take(IDS, 10, 0)["validation"]
    assert take(IDS[::-1], 10)["validation"] == first[::-1]
    assert take(IDS, 10, 1)["validation"] != first
    assert {*take(IDS[:39], 10)["validation"]} <= {*take(IDS[:39], 11)["validation"]}


def test_dialogs_left_out_stay_with_train():
    splits = take_validation({"train": make_split("train", IDS)}, 3)
    assert splits["train"].left_out == {"train-bad": "a reason"} and splits["validation"].left_out == {}


@pytest.mark.parametrize(
    ("names", "val_dialogs", "message"),
    [
        (["test"], 3, "val_dialogs is 3, but the corpus has no split train: name its list, or leave it out"),
        (["train", "validation"], 0.1, "but the corpus has a split validation already: leave one of them out"),
        (["train"], 40, "val_dialogs is 40, but train has 40 dialogs with a pair: give less"),
        (["train"], 0.99, "val_dialogs is 0.99, but train has 40 dialogs with a pair: give less"),
    ],
)
def test_split_that_cannot_be_taken_is_refused(names, val_dialogs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        take_validation({name: make_split(name, IDS) for name in names}, val_dialogs)


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.0, 2.5, float("nan"), "3", True])
def test_wrong_number_is_refused(value):
    message = r"val_dialogs is .*: give a whole number of dialogs, such as 100, or a share below 1, such as 0\.05"
    with pytest.raises(ValueError, match=message):
        PrepareConfig(data_dir="d", output_path="o", val_dialogs=value)


@pytest.mark.parametrize(("given", "expected"), [("100", 100), ("0.05", 0.05)])
def test_command_line_takes_numbers_and_shares(given, expected):
    found = make_parser().parse_args(["doctor", "--val_dialogs", given]).doctor.val_dialogs
    assert found == expected and type(found) is type(expected)


def test_folder_has_whole_dialogs_in_three_splits(mini, unit_model, finished, tmp_path):
    reuse_units(finished, tmp_path)
    given = options(mini, unit_model, tmp_path, val_dialogs=0.5, val_seed=3)
    found = dry_run(PrepareConfig(**given)).splits
    counts = prepare(**given)
    assert counts["splits"] == found and [*found] == ["train", "validation", "test"]
    assert (counts["settings"]["val_dialogs"], counts["settings"]["val_seed"]) == (0.5, 3)
    assert verify(tmp_path / "out") == {name: split["rows"] for name, split in found.items()}
    rows, whole = (datasets.load_dataset(str(folder / "out"), "single_turn") for folder in (tmp_path, finished))
    dialogs = {name: {*split["dialog_id"]} for name, split in rows.items()}
    assert len(dialogs["train"]) == len(dialogs["validation"]) == 2 and not dialogs["train"] & dialogs["validation"]
    for row in whole["train"]:
        [same] = [each for name in ("train", "validation") for each in rows[name] if each["id"] == row["id"]]
        assert same == row
    assert list(rows["test"]) == list(whole["test"])
    write_page(tmp_path / "out", tmp_path / "page.html", split="validation", data_dir=mini / "corpus")
    assert {row["id"] for row in page_data(tmp_path / "page.html")["examples"]} == {*rows["validation"]["id"]}
    made = load_dataset(mini / "corpus", val_dialogs=0.5, val_seed=3, cache_dir=str(tmp_path / "datasets"))
    assert {name: made[name]["id"][:] for name in made} == {name: rows[name]["id"][:] for name in rows}


def test_folder_without_the_option_is_as_before(finished, undisturbed):
    assert not {"val_dialogs", "val_seed"} & {*read_counts(finished / "out")["settings"]}
    assert not [name for name in content(finished / "out") if "validation" in name]
