import pytest

from usdm_sft.corpus.dialogs import Dialog, Utterance
from usdm_sft.corpus.examples import CONFIGS, check_config, config_has_lists, make_examples


def dialog(num_turns):
    return Dialog(
        "d7", tuple(Utterance(str(turn), "d7", turn, str(turn % 2), "a", "none") for turn in range(num_turns))
    )


def rows(num_turns, name, history=0):
    """id -> the turns of its exchanges."""
    return {
        example.id: [(user.turn, agent.turn) for user, agent in example.exchanges]
        for example in make_examples(dialog(num_turns), name, history)
    }


def test_single_turn():
    assert rows(2, "single_turn") == {"d7_0": [(0, 1)]}
    assert rows(4, "single_turn") == {"d7_0": [(0, 1)], "d7_1": [(1, 2)], "d7_2": [(2, 3)]}


def test_history_is_of_the_same_user_and_ends_with_the_pair():
    assert rows(6, "single_turn", history=1) == {
        "d7_0": [(0, 1)],
        "d7_1": [(1, 2)],
        "d7_2": [(0, 1), (2, 3)],
        "d7_3": [(1, 2), (3, 4)],
        "d7_4": [(2, 3), (4, 5)],
    }
    assert rows(8, "single_turn", history=2)["d7_6"] == [(2, 3), (4, 5), (6, 7)]
    assert rows(8, "single_turn", history=99)["d7_5"] == [(1, 2), (3, 4), (5, 6)]


@pytest.mark.parametrize(
    ("num_turns", "expected"),
    [
        (2, {"d7_0": [(0, 1)]}),
        (3, {"d7_0": [(0, 1)], "d7_1": [(1, 2)]}),
        (4, {"d7_0": [(0, 1), (2, 3)], "d7_1": [(1, 2)]}),
        (5, {"d7_0": [(0, 1), (2, 3)], "d7_1": [(1, 2), (3, 4)]}),
    ],
)
def test_multi_turn_from_the_even_and_from_the_odd_start(num_turns, expected):
    assert rows(num_turns, "multi_turn") == expected


@pytest.mark.parametrize("num_turns", range(2, 12))
def test_every_pair_is_in_exactly_one_conversation(num_turns):
    exchanges = [exchange for its in rows(num_turns, "multi_turn").values() for exchange in its]
    assert sorted(exchanges) == [(turn, turn + 1) for turn in range(num_turns - 1)]


def test_configs_with_list_columns():
    assert [config_has_lists(name, 0) for name in CONFIGS] == [False, True]
    assert config_has_lists("single_turn", 1)


@pytest.mark.parametrize(
    ("name", "history", "message"),
    [
        ("single", 0, "config 'single' is unknown: choose one of single_turn, multi_turn"),
        ("single_turn", -1, "history is -1: give the number of earlier exchanges, 0 or more"),
        ("multi_turn", 2, "history is 2, but multi_turn holds whole conversations: set it with single_turn only"),
    ],
)
def test_unknown_config_and_wrong_history_are_refused(name, history, message):
    with pytest.raises(ValueError, match=message):
        check_config(name, history)


def test_named_agent_answers_every_exchange_of_a_conversation():
    speakers = "ABABCAB"  # B answers 1, 3 and 6; between 3 and 6 others talk
    utterances = tuple(Utterance(str(i), "d7", i + 3, speaker, "a", "none") for i, speaker in enumerate(speakers))
    named = Dialog("d7", utterances, agent="B")

    def turns(name, history=0):
        made = make_examples(named, name, history)
        return {example.id: [(user.turn, agent.turn) for user, agent in example.exchanges] for example in made}

    assert turns("single_turn") == {"d7_3": [(3, 4)], "d7_5": [(5, 6)], "d7_8": [(8, 9)]}
    assert turns("single_turn", 5) == {"d7_3": [(3, 4)], "d7_5": [(3, 4), (5, 6)], "d7_8": [(8, 9)]}
    assert turns("multi_turn") == {"d7_3": [(3, 4), (5, 6)], "d7_8": [(8, 9)]}
