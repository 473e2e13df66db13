"""The division of the recordings of a folder into files, and the rows of a part of a work shard."""

from types import SimpleNamespace

import pytest

from tests.prepare.test_plan import leave_out_dialogs, plan, split
from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.corpus.left_out import leave_out
from usdm_sft.prepare import utterance_files
from usdm_sft.prepare.plan import Plan, Shard, ShardContents
from usdm_sft.prepare.utterance_files import UtteranceFiles


def files_of(whole, made):
    """Return the ids of the dialogs of each file."""
    files = UtteranceFiles(
        SimpleNamespace(whole_corpus={"train": whole}, further_columns=()),
        "train",
        made,
        {shard.units_key: shard.units_key for shard in made},
    )
    parts = [files.part(index) for index in range(len(files))]
    assert all(len(part.content.rows) == 0 for file in parts for part in file)
    assert {part.units for file in parts for part in file} == {shard.units_key for shard in made}
    return [[[dialog.id for dialog in part.dialogs] for part in file] for file in parts]


@pytest.mark.parametrize(
    ("seconds", "files"),
    [
        ([4, 6, 1, 9, 2], [[(0, 0, 1), (1, 0, 1)], [(2, 0, 1), (3, 0, 1)], [(4, 0, 1)]]),  # two files are full
        ([5, 6, 4], [[(0, 0, 1)], [(1, 0, 1), (2, 0, 1)]]),
        ([10], [[(0, 0, 1)]]),
        ([11, 3], [[(0, 0, 2)], [(0, 1, 2)], [(1, 0, 1)]]),  # nothing joins a part of a long work shard
        ([3, 31, 3], [[(0, 0, 1)], [(1, 0, 4)], [(1, 1, 4)], [(1, 2, 4)], [(1, 3, 4)], [(2, 0, 1)]]),
        (
            [3, 41, 3],
            [[(0, 0, 1)], [(1, 0, 4)], [(1, 1, 4)], [(1, 2, 4)], [(1, 3, 4)], [(2, 0, 1)]],
        ),  # it has 4 dialogs
    ],
)
def test_work_shards_share_files_or_are_divided(monkeypatch, seconds, files):
    monkeypatch.setattr(utterance_files, "FILE_SECONDS", 10)
    made = Plan()
    content = ShardContents([], [], [], [], [], [("a", 2), ("b", 3), ("b", 2), ("c", 2), ("d", 2)], 0, [], False)
    for number, each in enumerate(seconds):
        made.add(Shard(number, "train", (0, 4), 0, 0, each * SAMPLE_RATE, 0, "", ""), content)
    found = UtteranceFiles(
        SimpleNamespace(whole_corpus={"train": split({})}, further_columns=()), "train", made, {}
    )._files
    assert [[(shard.number, number, count) for shard, number, count in file] for file in found] == files


def test_long_dialog_is_not_divided(monkeypatch):
    monkeypatch.setattr(utterance_files, "SAMPLE_RATE", 1)
    monkeypatch.setattr(utterance_files, "FILE_SECONDS", 500)
    whole = split({"d0": 2, "d1": 10, "d2": 2, "d3": 2})  # of 800, 4,000, 800 and 800 samples
    assert files_of(whole, plan(whole, shard_dialogs=1)) == [[["d0"]], [["d1"]], [["d2"]], [["d3"]]]
    assert files_of(whole, plan(whole, shard_dialogs=2)) == [[["d0"]], [["d1"]], [["d2"]], [["d3"]]]


def test_every_dialog_is_in_one_file(monkeypatch):
    whole = split({f"d{number}": 2 for number in range(7)})
    made = plan(whole, shard_dialogs=5)  # shards of 4,000 and 1,600 samples
    assert files_of(whole, made) == [[["d0", "d1", "d2", "d3", "d4"], ["d5", "d6"]]]
    monkeypatch.setattr(utterance_files, "SAMPLE_RATE", 1)
    monkeypatch.setattr(utterance_files, "FILE_SECONDS", 1_500)
    assert files_of(whole, made) == [[["d0"]], [["d1", "d2"]], [["d3", "d4"]], [["d5"]], [["d6"]]]
    monkeypatch.setattr(utterance_files, "FILE_SECONDS", 4_500)
    assert files_of(whole, made) == [[["d0", "d1", "d2", "d3", "d4"]], [["d5", "d6"]]]


def test_only_dialogs_without_a_pair_are_left_out():
    whole = split({"d0": 2, "d1": 5, "d2": 2, "d3": 3, "d4": 2, "d5": 2})
    left = leave_out_dialogs(whole, "d0", "d4", "d5")
    left = leave_out(left, {"d1_2": "is bad", "d3_0": "is bad"})
    made = plan(left)
    assert files_of(whole, made) == [[["d1"], ["d2", "d3"]]]
    files = UtteranceFiles(
        SimpleNamespace(whole_corpus={"train": whole}, further_columns=()),
        "train",
        made,
        {each.units_key: "" for each in made},
    )
    ((first, second),) = (files.part(index) for index in range(len(files)))
    assert [each.id for each in first.dialogs[0].utterances] == ["d1_0", "d1_1", "d1_2", "d1_3", "d1_4"]
    assert first.content.ids == ["d1_0", "d1_1", "d1_3", "d1_4"]
    assert [each.id for each in second.dialogs[1].utterances] == ["d3_0", "d3_1", "d3_2"]
    assert second.content.ids == ["d2_0", "d2_1", "d3_1", "d3_2"]


def test_dialogs_with_bad_audio_are_divided_with_the_others(monkeypatch):
    whole = split({f"d{number}": 2 for number in range(6)} | {"d6": 4})
    made = plan(leave_out(leave_out_dialogs(whole, "d1", "d2"), {"d6_0": "is bad"}), shard_dialogs=7)
    monkeypatch.setattr(utterance_files, "SAMPLE_RATE", 1)
    monkeypatch.setattr(utterance_files, "FILE_SECONDS", 2_000)  # 4,400 samples are left
    assert files_of(whole, made) == [[["d0"]], [["d3", "d4"]], [["d5", "d6"]]]
