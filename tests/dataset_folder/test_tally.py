"""Counts of equal numbers in sorted arrays."""

import json
import pickle
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from usdm_sft.dataset_folder import tally
from usdm_sft.dataset_folder.layout import data_files, read_counts
from usdm_sft.dataset_folder.rows import iter_rows
from usdm_sft.dataset_folder.statistics import SplitStatistics, _digest_ids
from usdm_sft.dataset_folder.tally import Tally


def as_dict(found):
    values, counts = found.weighted()
    assert list(values) == sorted(set(values.tolist()))
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("few", [0, 4096])
@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [
        (np.int64, np.random.default_rng(0).integers(-(2**62), 2**62, 40)),
        (np.int64, np.arange(40)),  # counted without sorting, where there are more of them than the largest
        (np.float32, np.random.default_rng(1).uniform(-1, 30, 40).astype(np.float32)),
    ],
    ids=["int64", "small numbers", "float32"],
)
def test_counts_are_those_of_a_counter(monkeypatch, few, dtype, numbers):
    monkeypatch.setattr(tally, "_FEW", few)
    rng = np.random.default_rng(2)
    found, expected = Tally(dtype), Counter()
    assert as_dict(found) == {}
    for size in (0, 1, 5, 300, 2, 0, 70):
        part = rng.choice(numbers, size)
        found.add(part)
        expected.update(part.tolist())
        values, counts = rng.choice(numbers, size), rng.integers(1, 1000, size)
        other = Tally(dtype)
        other.add(values, counts)
        found.merge(other)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            expected[value] += count
    assert as_dict(found) == expected
    assert len(found.weighted()) == expected.total()
    assert found.weighted().values.dtype == dtype
    assert found.weighted().counts.dtype == np.int64
    assert as_dict(pickle.loads(pickle.dumps(found))) == expected


def test_different_numbers_take_16_bytes_in_a_pickle():
    found = Tally()
    for first in range(0, 50_000, 1000):
        found.add(np.arange(first, first + 1000))
        found.add(np.arange(first, first + 1000))
    assert len(pickle.dumps(found)) < 16 * 50_000 + 1000


def test_merges_sort_a_number_only_when_the_numbers_have_doubled(monkeypatch):
    weigh, sizes = tally.weigh, []
    monkeypatch.setattr(tally, "_FEW", 0)
    monkeypatch.setattr(tally, "weigh", lambda *args: sizes.append(len(args[0])) or weigh(*args))
    found = Tally()
    for first in range(0, 256_000, 1000):
        found.add(np.arange(first, first + 1000), np.ones(1000, np.int64))
    assert len(found.weighted().values) == 256_000
    assert sum(sizes) <= 3 * 256_000
    assert len(sizes) < 12


def test_statistics_of_shuffled_rows_in_several_files(dataset_folder):
    """The rows of a dialog lie apart, so that each file counts some of its pairs."""
    counts = read_counts(dataset_folder)
    paths = data_files(dataset_folder, counts)["train"]
    rows = pa.Table.from_batches([batch for path in paths for batch in iter_rows(path)])
    order = np.random.default_rng(0).permutation(len(rows))
    merged = SplitStatistics()
    for part in np.array_split(order, 3):
        statistics = SplitStatistics()
        for half in np.array_split(part, 2):
            (batch,) = rows.take(half).combine_chunks().to_batches()
            statistics.add(batch)
        merged.merge(pickle.loads(pickle.dumps(statistics)))
    expected = Counter(Counter(rows["dialog_id"].to_pylist()).values())
    assert max(expected) > 1
    found = merged.distributions()["pairs per dialog"]
    assert dict(zip(found.values.tolist(), found.counts.tolist(), strict=True)) == expected
    assert json.loads(json.dumps(merged.summary())) == counts["statistics"]["train"]


def test_similar_ids_are_different_dialogs():
    assert len({*_digest_ids(f"session{number:06d}" for number in range(10_000)).tolist()}) == 10_000
