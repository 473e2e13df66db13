"""The compact form of a corpus gives back what was put in, in order, and its digest is that of the same JSON."""

import hashlib
import json
import pickle
import tracemalloc

import numpy as np
import pytest

from usdm_sft.audio.digest_table import AudioDigest, AudioDigests
from usdm_sft.corpus.bad_audio import _Addresses, corpus_digest
from usdm_sft.corpus.dialogs import CompactDialogs, Dialog, Split, Utterance
from usdm_sft.corpus.turns import Turns


def make_dialog(name, num_turns=3, agent=None):
    texts = ["hällo", "日本 \U0001f600", "lone \ud800 surrogate"]
    return Dialog(
        name,
        tuple(Utterance(f"{name}_{i}", name, i, "AB"[i % 2], texts[i % 3], "", f"/a/{name}.wav#t={i},{i + 1}") for i in range(num_turns)),
        agent,
    )  # fmt: skip


def test_dialogs_come_back_as_they_were():
    dialogs = [make_dialog("a"), make_dialog("b", 2, agent="B"), make_dialog("ü", 5)]
    compact = CompactDialogs(dialogs)
    assert list(compact) == dialogs and len(compact) == 3
    assert [compact[0], compact[-1], *compact[1:]] == [dialogs[0], dialogs[2], *dialogs[1:]]
    assert [each.audio for each in compact[1].utterances] == ["/a/b.wav#t=0,1", "/a/b.wav#t=1,2"]  # == leaves it out
    assert list(pickle.loads(pickle.dumps(compact))) == dialogs
    assert compact == dialogs and compact != dialogs[:2] and compact != [*dialogs[:2], make_dialog("c")]
    assert not CompactDialogs()
    with pytest.raises(IndexError, match="out of range"):
        compact[3]


def test_dialogs_take_less_than_half_of_the_memory_of_objects():
    def kept(make):
        tracemalloc.start()
        result = make(make_dialog(f"call_{index:06d}", 10) for index in range(300))
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert len(result) == 300
        return used

    assert kept(CompactDialogs) < 0.5 * kept(list)


def test_turns_in_any_order_become_dialogs_in_order_of_appearance():
    turns = Turns(lambda number: f"list:{number}")
    dialogs = {name: make_dialog(name, 4).utterances for name in "ba"}
    for number, (name, turn) in enumerate(
        [("b", 2), ("a", 0), ("b", 3), ("a", 3), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    ):
        assert turns.find(name, turn) is None
        turns.add(dialogs[name][turn], number)
    assert list(turns.first_lines()) == [("b", 0), ("a", 1)]
    found = [
        ("b", [*zip(dialogs["b"], (4, 6, 0, 2), strict=True)]),
        ("a", [*zip(dialogs["a"], (1, 5, 7, 3), strict=True)]),
    ]
    assert list(turns.dialogs()) == found
    assert [turns.find("b", turn) for turn in range(5)] == [4, 6, 0, 2, None] and turns.find("c", 0) is None
    turns.arrange(["a"])
    assert list(turns.dialogs()) == found[1:] and list(turns.first_lines()) == [("a", 1)]
    turns.arrange([])
    assert list(turns.dialogs()) == [] == list(Turns(str).dialogs())


def test_digests_are_found_by_address_in_the_order_of_first_use():
    addresses = ["b", "a", "b", "c\ud800", "a"]
    digests = {
        "b": AudioDigest("1" * 64, 5, 0.5),
        "a": AudioDigest("", 0, 0.0, "is empty"),
        "c\ud800": AudioDigest("f" * 64, 7, 1.0),
    }
    table = AudioDigests(addresses)
    assert list(table) == list(digests) and len(table) == 3
    assert table.find_unset().tolist() == [0, 1, 2]
    assert table.put(np.array([2, 0]), [digests["c\ud800"], None]) == 1
    assert table.find_unset().tolist() == [0, 1]
    assert table.addresses_at(table.find_unset()) == ["b", "a"]
    assert table.put(np.array([1, 0]), [digests["a"], digests["b"]]) == 2
    assert not len(table.find_unset())
    assert dict(table) == digests == dict(pickle.loads(pickle.dumps(table)))
    assert table.problems == {"a": "is empty"}
    assert table.find_all(["a", "b", "a"]) == [digests["a"], digests["b"], digests["a"]]
    assert dict(table.select(["c\ud800", "b"])) == {name: digests[name] for name in ("c\ud800", "b")}
    for unknown in ("", "0", "d", "zz"):
        with pytest.raises(KeyError, match=f"'{unknown}'"):
            table.find_all(["a", unknown])
    assert list(AudioDigests([])) == []


def test_addresses_of_splits_are_found_by_index():
    dialogs = [make_dialog("a"), make_dialog("b", 2), make_dialog("ü", 5), make_dialog("a")]
    audio = [utterance.audio for dialog in dialogs for utterance in dialog.utterances]
    empty = Split("none", (), {}, ())
    addresses = _Addresses(
        {
            "train": Split("train", CompactDialogs(dialogs[:2]), {}, ()),
            "none": empty,
            "test": Split("test", dialogs[2:], {}, ()),
        }
    )
    assert list(addresses) == audio and len(addresses) == 13 == len(audio)
    assert [addresses[index] for index in (12, 0, 4, 5, 3, 9, 10, 2)] == [audio[i] for i in (12, 0, 4, 5, 3, 9, 10, 2)]
    table = AudioDigests(addresses)
    assert list(table) == audio[:10]  # the last three are duplicates
    assert table.addresses_at(np.array([9, 0, 4])) == [audio[9], audio[0], audio[4]]
    table = AudioDigests([*audio[10:], *audio])
    assert list(table) == [*audio[:3], *audio[3:10]]
    assert [batch for _, batch in table.batches(np.array([4, 9]))] == [[audio[4], audio[9]]]
    assert not len(_Addresses({"none": empty}))


@pytest.mark.parametrize("pairs", [{}, {"d1_0": "audio of ü: is empty"}])
@pytest.mark.parametrize("num", [0, 1, 3])
def test_digest_of_a_corpus_is_that_of_its_json(num, pairs):
    table = AudioDigests([str(index) for index in range(num)])
    table.put(np.arange(num), [AudioDigest(f"{index:064x}", 1, 0.1) for index in range(num)])
    splits = {"train": Split("train", (), {}, (), pairs), "test": Split("test", (), {}, ())}
    lists = {"train": "0" * 64, "test": "1" * 64}
    expected = json.dumps([lists, [f"{index:064x}" for index in range(num)], *([pairs] if pairs else [])])
    assert corpus_digest(lists, table, splits) == hashlib.sha256(expected.encode()).hexdigest()
