"""The files of the config `utterances`: what an interrupted run left of them, and what they add up to."""

import hashlib

import pyarrow.parquet as pq
import pytest

from tests.helpers import LastFirst, run_tasks_here
from usdm_sft.executors.tasks import TaskPool
from usdm_sft.folder.parquet import write_utterances

loaded = []  # the files whose rows were made


def load(part):
    """Yield the rows of a file: two turns of a dialog, of which the second has no recording."""
    loaded.append(part)
    row = {"dialog": part, "turn": 0, "speaker": "A", "text": "yes", "emotion": ""}
    yield row | {"audio": {"bytes": b"x" * 10, "path": f"{part}.wav"}, "units": [1, 2], "seconds": 0.5}
    if part == "interrupted":
        raise KeyboardInterrupt
    yield row | {"turn": 1, "audio": None, "units": None, "seconds": None}


class Dialogs:
    """A split with one dialog in each file."""

    loader = staticmethod(load)

    def __init__(self, *names):
        self._names = names

    def __len__(self):
        return len(self._names)

    def part(self, index):
        return self._names[index]


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """A pool of two tasks, which run in this process."""
    run_tasks_here(monkeypatch)
    loaded.clear()
    return TaskPool("ray", 2, tmp_path / "cache")


def inodes(folder):
    return {path.name: path.stat().st_ino for path in sorted(folder.iterdir())}


def test_files_of_an_interrupted_run_are_kept(tmp_path, pool):
    folder, splits = tmp_path / "utterances", {"train": Dialogs("d1", "d2"), "test": Dialogs("d3", "d4")}
    expected = write_utterances(folder, splits, pool, key="key")
    before = inodes(folder)
    assert list(before) == [f"{split}-0000{index}-of-00002.parquet" for split in ("test", "train") for index in (0, 1)]
    assert write_utterances(folder, splits, pool, key="key") == expected
    assert (inodes(folder), loaded) == (before, ["d1", "d2", "d3", "d4"])
    # A task whose file vanished or changed makes its files again, the other one none.
    (folder / "test-00000-of-00002.parquet").write_bytes(b"other")
    (folder / "foreign").touch()
    (folder / "train-00000-of-00003.parquet").touch()
    assert write_utterances(folder, splits, pool, key="key") == expected
    assert loaded[4:] == ["d3", "d4"]
    assert {name: each for name, each in inodes(folder).items() if name.startswith("train")} == {
        name: each for name, each in before.items() if name.startswith("train")
    }
    assert list(inodes(folder)) == list(before)


def test_files_of_other_rows_are_written_again(tmp_path, pool):
    folder = tmp_path / "utterances"
    write_utterances(folder, {"train": Dialogs("d1", "d2")}, pool, key="key")
    write_utterances(folder, {"train": Dialogs("d5", "d6")}, pool, key="other")
    assert loaded == ["d1", "d2", "d5", "d6"]
    assert [pq.read_table(path)["dialog"].unique().to_pylist() for path in sorted(folder.iterdir())] == [["d5"], ["d6"]]


def test_an_unfinished_file_never_has_the_name_of_a_finished_one(tmp_path):
    folder = tmp_path / "utterances"
    with pytest.raises(KeyboardInterrupt):
        write_utterances(folder, {"train": Dialogs("d1", "interrupted")}, LastFirst(1), key="key")
    assert not list(folder.glob("*.parquet"))
    counts, _, _ = write_utterances(folder, {"train": Dialogs("d1")}, LastFirst(1), key="key")
    assert [path.name for path in folder.iterdir()] == ["train-00000-of-00001.parquet"]
    assert counts == {"train": {"utterances": 2, "recordings": 1, "audio_bytes": 10, "hours": 0.000139}}


def test_counts_of_files_that_are_finished_in_any_order(tmp_path):
    splits = {"train": Dialogs("d1", "d2", "d3"), "test": Dialogs("d4")}
    counts, info, digests = write_utterances(tmp_path / "utterances", splits, LastFirst(1), key="key")
    assert counts == {
        "train": {"utterances": 6, "recordings": 3, "audio_bytes": 30, "hours": 0.000417},
        "test": {"utterances": 2, "recordings": 1, "audio_bytes": 10, "hours": 0.000139},
    }
    assert info["config_name"] == "utterances"
    assert [(split["name"], split["num_examples"]) for split in info["splits"]] == [("train", 6), ("test", 2)]
    assert info["dataset_size"] == sum(split["num_bytes"] for split in info["splits"])
    assert info["download_size"] == sum(path.stat().st_size for path in digests)
    assert digests == {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "utterances").iterdir()
    }
