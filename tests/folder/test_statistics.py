import json
import math
import pickle
import shutil
from collections import Counter
from itertools import groupby
from operator import itemgetter

import datasets
import matplotlib
import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from tests.helpers import content, find_problems, replace_table
from usdm_sft.cli.main import main
from usdm_sft.folder import pictures
from usdm_sft.folder.layout import data_files, read_counts, read_layout
from usdm_sft.folder.pictures import CAPTIONS
from usdm_sft.folder.rows import divide_files
from usdm_sft.folder.statistics import SplitStatistics, Weighted, compute_statistics
from usdm_sft.folder.verify import verify


@pytest.fixture(scope="module")
def rows(dataset_folder, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("datasets"))
    return {
        split: list(split_rows)
        for split, split_rows in datasets.load_dataset(str(dataset_folder), cache_dir=cache).items()
    }


def test_pickled_statistics_have_the_size_of_their_values():
    numbers = Weighted(np.array([3, 7]), np.array([10**9, 2 * 10**9]))
    assert numbers.total == 3 * 10**9 and len(pickle.dumps(numbers)) < 1000


def test_bars_of_a_picture_are_shares(dataset_folder):
    counts = read_counts(dataset_folder)
    layout = read_layout(dataset_folder / "counts.json", counts)
    statistics = compute_statistics(data_files(dataset_folder, counts), layout)
    figure = Figure()
    pictures._plot_labels(figure, statistics, counts["num_units"])
    loss, share, pairs = figure.axes
    assert sum(bar.get_width() for bar in loss.patches) == pytest.approx(2)  # of two splits
    assert sum(bar.get_height() for bar in pairs.patches) == pytest.approx(2)
    filled = [bar.get_height() for bar in share.patches if isinstance(bar, Rectangle)]  # the first split's
    assert sum(filled) == pytest.approx(1) and len(filled) == 1 + math.isqrt(
        sum(map(itemgetter("rows"), counts["statistics"].values()))
    )


@pytest.mark.parametrize("emotions", [{"none": 1}, {"none": 80, "joy": 79, "fear": 1}, dict.fromkeys("abcdefghij", 5)])
def test_legend_covers_no_bar(emotions):
    statistics = {split: SplitStatistics(emotions=Counter(emotions)) for split in ("train", "test")}
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    pictures._plot_emotions(axes, statistics)
    figure.draw_without_rendering()
    legend = axes.get_legend().get_window_extent()
    assert len(axes.patches) == 2 * len(emotions)
    assert not any(legend.overlaps(bar.get_window_extent()) for bar in axes.patches)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == sorted(emotions, key=lambda name: (-emotions[name], name))


def test_ticks_are_not_rounded():
    assert [pictures._percent(share, 0) for share in (0.0, 0.475, 0.5, 0.0125)] == ["0%", "47.5%", "50%", "1.25%"]


def test_split_without_rows_is_refused(dataset_folder, tmp_path, capsys):
    folder = shutil.copytree(dataset_folder, tmp_path / "folder")
    for path in data_files(folder, read_counts(folder))["test"]:
        replace_table(folder, path.relative_to(folder).as_posix(), lambda table: table.slice(0, 0))
    with pytest.raises(SystemExit):
        main(["stats", str(folder)])
    assert "split test has no rows: verify its folder" in capsys.readouterr().err
    assert find_problems(folder) == ["the files of split test have no rows"]


def test_statistics_equal_those_of_the_rows(dataset_folder, rows):
    counts = json.loads((dataset_folder / "counts.json").read_text())
    assert counts["num_units"] == 100
    for split, split_rows in rows.items():
        found = counts["statistics"][split]
        labelled = [[label for label in row["labels"] if label != -100] for row in split_rows]
        units = Counter(unit for row in split_rows for unit in [*row["user_units"], *row["agent_units"]])
        assert (found["rows"], found["dialogs"]) == (len(split_rows), len({row["dialog_id"] for row in split_rows}))
        assert found["tokens"] == sum(len(row["input_ids"]) for row in split_rows)
        assert found["labelled_tokens"] == sum(map(len, labelled))
        assert found["labelled_units"] == sum(len(row["agent_units"]) for row in split_rows)
        assert found["labelled_parts"] == {
            "frame": 0,
            "user_units": 0,
            "user_text": sum(labels.index(13) + 1 for labels in labelled),  # with the newline
            "agent_text": sum(labels.index(32001) - labels.index(13) for labels in labelled),  # with <|correspond|>
            "agent_units": sum(len(row["agent_units"]) + 1 for row in split_rows),  # with the "▁"
        }
        runs = [
            len(list(run))
            for row in split_rows
            for role in ("user", "agent")
            for _, run in groupby(row[f"{role}_units"])
        ]
        assert found["distributions"]["units in a run"]["max"] == max(runs)
        assert found["distributions"]["units in a run"]["mean"] == pytest.approx(np.mean(runs), abs=1e-4)
        assert (found["units"], found["distinct_units"]) == (units.total(), len(units))
        assert found["emotions"] == Counter(row[f"{role}_emotion"] for row in split_rows for role in ("user", "agent"))
        seconds = [row["agent_seconds"] for row in split_rows]
        expected = {
            "mean": np.mean(seconds), "min": min(seconds), "median": np.median(seconds),
            "95 %": np.quantile(seconds, 0.95), "max": max(seconds),
        }  # fmt: skip
        assert found["distributions"]["agent seconds"] == pytest.approx(expected, abs=1e-3)
        pairs = Counter(row["dialog_id"] for row in split_rows)
        assert found["distributions"]["pairs per dialog"]["mean"] == pytest.approx(
            np.mean(list(pairs.values())), abs=1e-4
        )
        shares = [len(labels) / len(row["labels"]) for labels, row in zip(labelled, split_rows, strict=True)]
        assert found["distributions"]["labelled share"]["max"] == pytest.approx(max(shares), abs=1e-4)


def test_stats_prints_numbers_and_draws_the_pictures_of_the_card(folder_copy, rows, tmp_path, capsys):
    """Settings of the user for matplotlib do not count."""
    card = (folder_copy / "README.md").read_text()
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):
        main(["stats", str(folder_copy), "--out", str(tmp_path / "new" / "plots")])
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"pictures: {tmp_path / 'new' / 'plots'}"
    assert ["rows", "10", "3"] in [line.split() for line in out]
    bars = out[out.index("tokens per row, train") + 1 : out.index("tokens per row, test") - 1]
    assert sum(int(bar.split()[-1]) for bar in bars) == 10 and max(bar.count("#") for bar in bars) == 40
    tokens = sum(len(row["input_ids"]) for row in rows["train"])
    assert next(line.split() for line in out if line.startswith("tokens "))[1] == f"{tokens:,}"
    assert {path.name for path in (tmp_path / "new" / "plots").iterdir()} == CAPTIONS.keys()
    for name in CAPTIONS:
        assert f"](pictures/{name})" in card
        assert (tmp_path / "new" / "plots" / name).read_bytes() == (folder_copy / "pictures" / name).read_bytes()
        assert np.asarray(Image.open(tmp_path / "new" / "plots" / name)).std() > 10  # it is not blank


@pytest.fixture
def snapshot(folder_copy, tmp_path):
    """The dataset folder as `snapshot_download` lays it out: each file is a link to a blob."""
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in folder_copy.rglob("*") if path.is_file())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    return folder_copy


def test_stats_changes_no_file_of_the_folder(snapshot, tmp_path, monkeypatch):
    """Another version of matplotlib draws other bytes; the files are those of the Hub's cache."""
    before = content(snapshot)
    monkeypatch.setattr(pictures, "_DPI", 50)
    main(["stats", str(snapshot)])
    assert content(snapshot) == before
    assert all(path.is_symlink() for path in snapshot.rglob("*") if path.is_file())
    (tmp_path / "plots").mkdir()
    for name in ("lengths.png", "labels.png.unfinished"):
        (tmp_path / "plots" / name).symlink_to(tmp_path / "blobs" / "0")
    main(["stats", str(snapshot), "--out", str(tmp_path / "plots")])
    assert content(snapshot) == before
    assert not any(path.is_symlink() for path in (tmp_path / "plots").iterdir())
    assert verify(snapshot) == {"train": 10, "test": 3}


def test_statistics_of_shuffled_rows_in_several_files(dataset_folder):
    """The rows of a dialog lie apart, so that each file counts some of its pairs."""
    counts = read_counts(dataset_folder)
    ranges = divide_files({"train": data_files(dataset_folder, counts)["train"]})
    rows = pa.Table.from_batches([batch for each in ranges for batch in each.read()])
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
