"""Turns are grouped into dialogs, and the digest of a corpus is that of its JSON."""

import hashlib
import json

import pytest

from usdm_sft.audio.digests import AudioDigest
from usdm_sft.corpus.dialogs import Dialog, Split, Turns, Utterance
from usdm_sft.corpus.left_out import corpus_digest


def make_dialog(name, num_turns=3, agent=None):
    texts = ["hällo", "日本 \U0001f600", "lone \ud800 surrogate"]
    return Dialog(
        name,
        tuple(Utterance(f"{name}_{i}", name, i, "AB"[i % 2], texts[i % 3], "", f"/a/{name}.wav#t={i},{i + 1}") for i in range(num_turns)),
        agent,
    )  # fmt: skip


def test_turns_are_grouped_into_dialogs_as_they_appear():
    turns = Turns(lambda number: f"list:{number}")
    dialogs = {name: make_dialog(name, 4).utterances for name in "ba"}
    for number, (name, turn) in enumerate(
        [("b", 2), ("a", 0), ("b", 3), ("a", 3), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    ):
        assert turns.find(name, turn) is None
        turns.add(dialogs[name][turn], number)
    assert list(turns.dialogs) == ["b", "a"]
    assert turns.dialogs["a"] == [(dialogs["a"][turn], number) for turn, number in ((0, 1), (3, 3), (1, 5), (2, 7))]
    assert [turns.find("b", turn) for turn in range(5)] == [4, 6, 0, 2, None] and turns.find("c", 0) is None


@pytest.mark.parametrize("pairs", [{}, {"d1_0": "audio of ü: is empty"}])
@pytest.mark.parametrize("num", [0, 1, 3])
def test_digest_of_a_corpus_is_that_of_its_json(num, pairs):
    audio = {str(index): AudioDigest(f"{index:064x}", 1, 0.1) for index in range(num)}
    splits = {"train": Split("train", (), {}, (), pairs), "test": Split("test", (), {}, ())}
    lists = {"train": "0" * 64, "test": "1" * 64}
    expected = json.dumps([lists, [f"{index:064x}" for index in range(num)], *([pairs] if pairs else [])])
    assert corpus_digest(lists, audio, splits) == hashlib.sha256(expected.encode()).hexdigest()
