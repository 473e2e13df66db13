"""How many output files a split gets, and which rows each has. No rows are written."""

import pytest

from usdm_sft.folder import parquet
from usdm_sft.folder.parquet import WrittenFile, write_parquet
from usdm_sft.folder.statistics import SplitStatistics
from usdm_sft.template.parts import REFERENCE_LAYOUT


class Rows:
    """Rows that are described by their positions."""

    loader = None

    def __init__(self, num_rows, num_tokens):
        self.num_rows, self.num_tokens = num_rows, num_tokens

    def part(self, start, stop):
        return range(start, stop)


class Pool:
    """Writes nothing, and finishes the last file first."""

    def __init__(self):
        self.parts = {}

    def map(self, function, items, *, name, keys, is_valid):
        assert len(set(keys)) == len(items) == len(keys)
        for index in reversed(range(len(items))):
            _, path, part = items[index]
            self.parts[path.name] = part
            yield index, WrittenFile(path, len(part), SplitStatistics(), f"sha256 of {path.name}")


def divide(folder, num_output_shards=None, **splits):
    pool = Pool()
    rows = {name: Rows(*numbers) for name, numbers in splits.items()}
    written = write_parquet(folder / "single_turn", rows, num_output_shards, REFERENCE_LAYOUT, pool, key="key")
    for split in splits:
        names = [name for name in sorted(pool.parts) if name.startswith(split)]
        assert [path.name for path in written[split].digests] == names
        assert list(written[split].digests.values()) == [f"sha256 of {name}" for name in names]
        assert written[split].num_bytes == splits[split][0]
        assert [index for name in names for index in pool.parts[name]] == list(range(splits[split][0]))
    return {split: len(each.digests) for split, each in written.items()}, pool.parts


@pytest.mark.parametrize(
    ("numbers", "num_files"),
    [
        ((1_000, 6_400), 64),  # few tokens: as many files as by default
        ((1_000, 6_401), 65),  # 64 files would have more than 100 tokens each on average
        ((1_000, 25_000), 250),
        ((40, 100), 40),  # no file without a row
        ((40, 25_000), 40),
    ],
)
def test_default_number_of_files_of_train(tmp_path, monkeypatch, numbers, num_files):
    monkeypatch.setattr(parquet, "MAX_TOKENS", 100)
    assert divide(tmp_path, train=numbers)[0] == {"train": num_files}


def test_default_number_of_files_of_other_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_TOKENS", 100)
    found, parts = divide(tmp_path, train=(70, 70), test=(30, 800), dev=(30, 801))
    assert found == {"train": 64, "test": 8, "dev": 9}
    assert [len(parts[f"test-{index:05d}-of-00008.parquet"]) for index in range(8)] == [4, 4, 4, 4, 4, 4, 3, 3]


def test_number_of_files_that_the_user_sets_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_TOKENS", 100)
    assert divide(tmp_path, 3, train=(1_000, 25_000), test=(2, 2))[0] == {"train": 3, "test": 2}


def test_twenty_million_tokens_in_a_file(tmp_path):
    assert divide(tmp_path, train=(100, 64 * 20_000_000), test=(100, 180_000_001))[0] == {"train": 64, "test": 10}


def test_files_of_another_number_are_removed(tmp_path):
    folder = tmp_path / "single_turn"
    folder.mkdir()
    kept, other = (folder / f"train-00000-of-0000{number}.parquet" for number in (2, 3))
    kept.touch()
    other.touch()
    divide(tmp_path, 2, train=(4, 4))
    assert list(folder.iterdir()) == [kept]


def test_files_with_more_tokens_than_a_column_holds_are_refused(tmp_path):
    assert divide(tmp_path, 1, train=(1_000, 2**31 - 1))[0] == {"train": 1}
    message = "num_output_shards 1 puts 2,147,483,648 tokens of train into each file, more than the 2,147,483,647 that one can hold: raise it to 108"
    with pytest.raises(ValueError, match=message):
        divide(tmp_path, 1, train=(1_000, 2**31))
    assert divide(tmp_path, train=(1_000, 2**31))[0] == {"train": 108}
