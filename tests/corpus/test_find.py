"""Where split lists, manifests and recordings are found."""

import pytest

from dailytalk_usdm import DailyTalkUSDM
from usdm_sft.corpus import dailytalk, find

UTTERANCE = "0_0_d1|0|{P}|hello.|none\n"


@pytest.mark.parametrize("names", dailytalk.LIST_NAMES)
@pytest.mark.parametrize("given", [".", "data"])
def test_split_lists_beside_the_data(tmp_path, names, given):
    (tmp_path / "data" / "1").mkdir(parents=True)
    for name in names.values():
        (tmp_path / name).write_text(UTTERANCE)
    found = dailytalk.find_split_lists(tmp_path / given)
    assert {split: path.name for split, path in found.items()} == names
    assert dailytalk.find_data_folder(tmp_path / given).resolve() == tmp_path / "data"


def test_split_lists_beside_a_linked_data_folder(tmp_path):
    """The audio may lie on another disk, with other lists beside it."""
    for place in ("disk", "here"):
        (tmp_path / place).mkdir()
        for name in ("train.txt", "test.txt"):
            (tmp_path / place / name).touch()
    (tmp_path / "disk" / "data" / "1").mkdir(parents=True)
    (tmp_path / "here" / "data").symlink_to(tmp_path / "disk" / "data")
    expected = {split: tmp_path / "here" / f"{split}.txt" for split in ("train", "test")}
    assert (
        dailytalk.find_split_lists(tmp_path / "here")
        == dailytalk.find_split_lists(tmp_path / "here" / "data")
        == expected
    )


def test_no_split_lists_and_no_data(tmp_path):
    (tmp_path / "data").mkdir()
    assert dailytalk.find_split_lists(tmp_path) is None
    (tmp_path / "train_phone.txt").write_text(UTTERANCE)
    with pytest.raises(FileNotFoundError, match=r"train_phone\.txt has no val_phone\.txt beside it: add it"):
        dailytalk.find_split_lists(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds neither a folder 'data' nor numbered dialog folders"):
        dailytalk.find_data_folder(tmp_path / "data")


@pytest.mark.parametrize("name", ["find_data_folder", "find_recordings", "find_split_lists"])
def test_data_dir_that_does_not_exist(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"^data_dir .*/nowhere does not exist: give the folder of the corpus"):
        getattr(dailytalk, name)(tmp_path / "nowhere")


def test_list_that_is_named_lies_beside_the_archive(tmp_path):
    (tmp_path / "DailyTalk.zip").touch()
    found = find.find_lists(tmp_path / "DailyTalk.zip", {"train": "lists/train.txt"})
    assert found == {"train": tmp_path / "lists" / "train.txt"}


@pytest.mark.parametrize("given", ["data_dir", "lists alone"])
def test_folder_with_a_newline_in_its_path_is_refused(tmp_path, given):
    folder = tmp_path / "two\nlines" / "corpus"
    (folder / "data" / "1").mkdir(parents=True)
    (folder / "train.txt").write_text(UTTERANCE)
    with pytest.raises(ValueError, match=r"two\\nlines.*holds a newline, which separates .*: rename the folder"):
        find.find_root(folder if given == "data_dir" else None, {"train": folder / "train.txt"})


def test_missing_data_dir_is_reported_before_its_lists(tmp_path):
    for data_files in (None, {"train": "train.txt"}, {"train": "train.jsonl"}):
        with pytest.raises(FileNotFoundError, match=r"^data_dir .*/nowhere does not exist"):
            DailyTalkUSDM(data_dir=tmp_path / "nowhere", data_files=data_files)


@pytest.mark.parametrize(
    ("data_files", "expected"),
    [
        ("l.txt", {"train": "l.txt"}),
        (["l.txt"], {"train": "l.txt"}),
        ({"test": "l.txt", "validation": ["v.txt"]}, {"test": "l.txt", "validation": "v.txt"}),
        (
            {"train": "train_phone.txt", "validation": "val_phone.txt"},
            {"train": "train_phone.txt", "validation": "val_phone.txt"},
        ),
    ],
)
def test_named_lists_are_relative_to_data_dir(tmp_path, data_files, expected):
    lists = find.find_lists(tmp_path, data_files)
    assert lists == {split: tmp_path / name for split, name in expected.items()}


def test_several_lists_of_a_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data_files names 2 split lists for test: name one"):
        find.find_lists(tmp_path, {"test": ["a.txt", "b.txt"]})


@pytest.mark.parametrize(
    "guess", [{"train": ["train_phone.txt"], "validation": ["val_phone.txt"]}, {"train": ["1/0_0_d1.wav", "x.txt"]}]
)
def test_guess_of_datasets_is_ignored(tmp_path, guess):
    (tmp_path / "data").mkdir()
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).touch()
    expected = {"train": tmp_path / "train.txt", "test": tmp_path / "test.txt"}
    assert find.find_lists(tmp_path, guess, resolved=True) == expected


def test_manifests_take_precedence_over_split_lists(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train.txt", "test.txt", "train.jsonl"):
        (tmp_path / name).touch()
    assert find.find_lists(tmp_path) == {"train": tmp_path / "train.jsonl"}
