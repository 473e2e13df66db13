"""The plan of work shards: their contents, their ranges of rows and dialogs, their keys, and its memory."""

from types import SimpleNamespace

import pytest

from usdm_sft.audio.digests import AudioDigest
from usdm_sft.corpus.dialogs import Dialog, Split, Utterance
from usdm_sft.corpus.left_out import leave_out
from usdm_sft.prepare.plan import ShardContents, plan_shards

SAMPLES = {"a_0": 16_000, "a_1": 8_000, "a_2": 24_000, "b_0": 4_000, "b_1": 32_000}  # of an utterance; others have 400


class Digests:
    """The digest of an address is made of its name."""

    def __getitem__(self, address):
        num_samples = SAMPLES.get(address.removesuffix(".wav"), 400)
        return AudioDigest(f"sha {address}", num_samples, num_samples / 16_000)


def dialog(name, num_turns):
    turns = [
        Utterance(f"{name}_{turn}", name, turn, "AB"[turn % 2], f"text {turn} of {name}", "", f"{name}_{turn}.wav")
        for turn in range(num_turns)
    ]
    return Dialog(name, tuple(turns))


def split(lengths, name="train"):
    dialogs = [dialog(*each) for each in lengths.items()]
    return Split(name, dialogs, {}, tuple(lengths))


def plan(*splits, shard_dialogs=2, name="single_turn", history=0):
    builder = SimpleNamespace(
        corpus={each.name: each for each in splits},
        config=SimpleNamespace(name=name, history=history),
        audio_digests=Digests(),
        unit_streams=None,
    )
    return plan_shards(builder, SimpleNamespace(key=("model",)), SimpleNamespace(key=("template",)), shard_dialogs)


def leave_out_dialogs(whole, *names):
    return leave_out(whole, {each.id: "is bad" for each in whole.utterances() if each.dialog_id in names})


def summarize(made):
    return [(each.number, each.split, each.dialogs, each.start, each.stop) for each in made]


LENGTHS = {"a": 3, "b": 2, "c": 2, "d": 4, "e": 2}


def test_contents_come_back():
    made = plan(split(LENGTHS), split({"t": 2}, "test"))
    assert summarize(made) == [
        (0, "train", (0, 2), 0, 3),
        (1, "train", (2, 4), 3, 7),
        (2, "train", (4, 6), 7, 8),
        (3, "test", (0, 2), 0, 1),
    ]
    assert made.content(made[0]) == ShardContents(
        ids=["a_0", "a_1", "a_2", "b_0", "b_1"],
        audio=["a_0.wav", "a_1.wav", "a_2.wav", "b_0.wav", "b_1.wav"],
        digests=["sha a_0.wav", "sha a_1.wav", "sha a_2.wav", "sha b_0.wav", "sha b_1.wav"],
        lengths=[16_000, 8_000, 24_000, 4_000, 32_000],
        seconds=[1.0, 0.5, 1.5, 0.25, 2.0],
        dialogs=[("a", 3), ("b", 2)],
        num_pairs=3,
        rows=[[(0, 1)], [(1, 2)], [(3, 4)]],
        lists=False,
    )
    assert (made[0].num_samples, made[0].longest) == (84_000, 32_000)
    assert made.content(made[3]).ids == ["t_0", "t_1"]
    assert [shard.number for shard in made.of_split("train")] == [0, 1, 2]
    assert len({shard.units_key for shard in made} | {shard.tokens_key for shard in made}) == 8


@pytest.mark.parametrize(
    ("name", "history", "rows"),
    [("multi_turn", 0, [[(0, 1), (2, 3)], [(1, 2)]]), ("single_turn", 1, [[(0, 1)], [(1, 2)], [(0, 1), (2, 3)]])],
)
def test_rows_of_several_exchanges(name, history, rows):
    made = plan(split({"a": 4}), name=name, history=history)
    content = made.content(made[0])
    assert (content.rows, content.lists, content.num_pairs) == (rows, True, 3)
    assert (made[0].start, made[0].stop) == (0, len(rows))


def test_dialogs_left_out_do_not_change_later_shards():
    whole = split(LENGTHS)
    first, second, third = plan(whole)
    made = plan(leave_out_dialogs(whole, "c", "d"))
    assert summarize(made) == [(0, "train", (0, 2), 0, 3), (1, "train", (4, 6), 3, 4)]
    assert [(each.units_key, each.tokens_key) for each in made] == [
        (each.units_key, each.tokens_key) for each in (first, third)
    ]
    made = plan(leave_out_dialogs(whole, "a"))
    assert summarize(made) == [(0, "train", (0, 2), 0, 1), (1, "train", (2, 4), 1, 5), (2, "train", (4, 6), 5, 6)]
    assert made.content(made[0]).dialogs == [("b", 2)]
    assert [each.units_key for each in made[1:]] == [second.units_key, third.units_key]
    assert made[0].units_key != first.units_key


def test_dialog_that_bad_audio_cuts_has_several_parts():
    whole = split({"a": 2, "b": 5, "c": 2})
    made = plan(leave_out(whole, {"b_2": "is bad"}))
    content = made.content(made[0])
    assert summarize(made) == [(0, "train", (0, 2), 0, 3), (1, "train", (2, 4), 3, 4)]
    assert content.ids == ["a_0", "a_1", "b_0", "b_1", "b_3", "b_4"]
    assert (content.dialogs, content.rows) == ([("a", 2), ("b", 2), ("b", 2)], [[(0, 1)], [(2, 3)], [(4, 5)]])
