from typing import NamedTuple

import numpy as np
import pytest
from datasets import Dataset, Features, Sequence, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from usdm_sft.prepare.config import choose_overflow
from usdm_sft.prepare.overflow import find_cuts, take_rows
from usdm_sft.template.config import Template
from usdm_sft.template.encoder import COLUMNS, TemplateEncoder

FEATURES = Features(
    {"id": Value("string"), "dialog_id": Value("string"), "turn": Value("int32")}
    | {f"{role}_speaker": Sequence(Value("string")) for role in ("user", "agent")}
    | {f"{role}_text": Sequence(Value("string")) for role in ("user", "agent")}
    | {f"{role}_units": Sequence(Sequence(Value("uint16"))) for role in ("user", "agent")}
    | {name: Sequence(Value("int32")) for name in ("input_ids", "labels")}
)


def conversation(dialog, turn, user_units):
    """Make a row of exchanges with the given numbers of user units; the units of exchange k are all k."""
    num = len(user_units)
    return {
        "id": f"{dialog}_{turn}",
        "dialog_id": dialog,
        "turn": turn,
        "user_speaker": [f"u{k}" for k in range(num)],
        "agent_speaker": [f"a{k}" for k in range(num)],
        "user_text": ["yes"] * num,
        "agent_text": ["yes"] * num,
        "user_units": [[k] * length for k, length in enumerate(user_units)],
        "agent_units": [[k] for k in range(num)],
    }


def encode(rows, encoder):
    out = encoder({name: [row[name] for row in rows] for name in COLUMNS})
    rows = [row | {name: out[name][i].tolist() for name in out} for i, row in enumerate(rows)]
    return Dataset.from_list(rows, features=FEATURES)


def tokens(encoder, user_units):
    return len(encode([conversation("d1", 0, user_units)], encoder)[0]["input_ids"])


@pytest.fixture(scope="module")
def history_encoder(tokenizer):
    return TemplateEncoder(tokenizer, last_exchange_only=True)


class Fitted(NamedTuple):
    rows: list
    cut: dict
    left_out: dict


def fit_rows(rows, encoder, max_length, overflow):
    table = rows.data.table
    cuts = find_cuts(table, encoder, max_length, overflow)
    kept = take_rows(table, cuts.kept, encoder)
    assert kept.schema == table.schema
    return Fitted(kept.to_pylist(), cuts.cut, cuts.left_out)


def check(fitted, encoder, max_length):
    """Check that in every row ids and labels are those of its columns, and that the row fits."""
    for row in fitted.rows:
        expected = encoder({name: [row[name]] for name in COLUMNS})
        assert row["input_ids"] == expected["input_ids"][0].tolist()
        assert row["labels"] == expected["labels"][0].tolist()
        assert len(row["input_ids"]) <= max_length
        assert {len(values) for name, values in row.items() if name.startswith(("user_", "agent_"))} == {
            len(row["user_text"])
        }


def summarize(fitted):
    """Return (id, turn, numbers of the exchanges) of each row."""
    return [(row["id"], row["turn"], [int(speaker[1:]) for speaker in row["user_speaker"]]) for row in fitted.rows]


@pytest.fixture(scope="module")
def rows(encoder):
    lengths = [("d1", 0, [9]), ("d2", 1, [20, 30, 40, 50]), ("d3", 0, [50, 50]), ("d4", 0, [999, 1]), ("d5", 0, [9])]
    return encode([conversation(*each) for each in lengths], encoder)


def test_truncate_keeps_the_longest_leading_run(encoder, rows):
    limit = tokens(encoder, [20, 30, 40])  # three exchanges of d2 fit exactly
    whole, other = tokens(encoder, [20, 30, 40, 50]), tokens(encoder, [999, 1])
    fitted = fit_rows(rows, encoder, limit, "truncate")
    check(fitted, encoder, limit)
    assert summarize(fitted) == [("d1_0", 0, [0]), ("d2_1", 1, [0, 1, 2]), ("d3_0", 0, [0, 1]), ("d5_0", 0, [0])]
    assert fitted.cut == {"d2_1": f"kept 3 of 4 exchanges ({whole} tokens, more than max_length {limit})"}
    assert fitted.left_out == {
        "d2_7": f"row d2_1 has {whole} tokens, more than max_length {limit}",
        "d4_0": f"{tokens(encoder, [999])} tokens, more than max_length {limit}",
        "d4_2": f"row d4_0 has {other} tokens, more than max_length {limit}",
    }


def test_split_keeps_every_run(encoder, rows):
    limit = tokens(encoder, [20, 30])
    fitted = fit_rows(rows, encoder, limit, "split")
    check(fitted, encoder, limit)
    assert summarize(fitted) == [
        ("d1_0", 0, [0]),
        ("d2_1", 1, [0, 1]),
        ("d2_5", 5, [2]),
        ("d2_7", 7, [3]),
        ("d3_0", 0, [0]),
        ("d3_2", 2, [1]),
        ("d4_2", 2, [1]),  # the exchange before is too long by itself
        ("d5_0", 0, [0]),
    ]
    whole = {"d2_1": [20, 30, 40, 50], "d3_0": [50, 50], "d4_0": [999, 1]}
    kept = {"d2_1": "d2_1, d2_5, d2_7", "d3_0": "d3_0, d3_2", "d4_0": "d4_2"}
    assert fitted.cut == {
        name: f"kept as {kept[name]} ({tokens(encoder, units)} tokens, more than max_length {limit})"
        for name, units in whole.items()
    }
    assert fitted.left_out == {"d4_0": f"{tokens(encoder, [999])} tokens, more than max_length {limit}"}


def test_drop_leaves_out_whole_conversations(encoder, rows):
    limit = tokens(encoder, [50, 50])
    fitted = fit_rows(rows, encoder, limit, "drop")
    assert summarize(fitted) == [("d1_0", 0, [0]), ("d3_0", 0, [0, 1]), ("d5_0", 0, [0])]
    assert fitted.cut == {}
    reason = f"row d2_1 has {tokens(encoder, [20, 30, 40, 50])} tokens, more than max_length {limit}"
    assert {name: why for name, why in fitted.left_out.items() if name.startswith("d2")} == dict.fromkeys(
        ["d2_1", "d2_3", "d2_5", "d2_7"], reason
    )


def test_history_loses_its_oldest_exchanges(history_encoder):
    lengths = [
        ("d1", 4, [20, 30, 40]),
        ("d2", 4, [1, 1, 999]),
        ("d3", 0, [999]),
        ("d4", 2, [30, 40]),
        ("d5", 2, [999, 1]),
    ]
    rows = encode([conversation(*each) for each in lengths], history_encoder)
    limit = tokens(history_encoder, [30, 40])
    fitted = fit_rows(rows, history_encoder, limit, "truncate")
    check(fitted, history_encoder, limit)
    assert summarize(fitted) == [("d1_4", 4, [1, 2]), ("d4_2", 2, [0, 1]), ("d5_2", 2, [1])]
    whole, other = tokens(history_encoder, [20, 30, 40]), tokens(history_encoder, [999, 1])
    assert fitted.cut == {
        "d1_4": f"kept 1 of 2 earlier exchanges ({whole} tokens, more than max_length {limit})",
        "d5_2": f"kept 0 of 1 earlier exchanges ({other} tokens, more than max_length {limit})",
    }
    reason = f"{tokens(history_encoder, [999])} tokens, more than max_length {limit}"
    assert fitted.left_out == {"d2_4": reason, "d3_0": reason}


TEXTS = st.text(st.sampled_from("aé's .,\u2028▁#你\U0001f600 User"), min_size=1, max_size=12).map(
    lambda text: f"x{text}"
)
UNITS = st.lists(st.integers(0, 9999), max_size=12)
EXCHANGES = st.lists(st.tuples(UNITS, TEXTS, TEXTS, UNITS), min_size=1, max_size=7)


def row_of(exchanges, dialog="d1"):
    user_units, user_text, agent_text, agent_units = (list(values) for values in zip(*exchanges, strict=True))
    row = conversation(dialog, 0, [0] * len(exchanges))
    return row | {
        "user_units": user_units, "user_text": user_text, "agent_text": agent_text, "agent_units": agent_units,
    }  # fmt: skip


def length_by_encoding(row, start, stop, encoder):
    return len(encoder({name: [row[name][start:stop]] for name in COLUMNS})["input_ids"][0])


def runs_by_encoding_every_length(row, encoder, max_length, overflow):
    """Find the runs to keep without adding lengths: encode and measure each candidate."""
    num = len(row["user_text"])
    if length_by_encoding(row, 0, num, encoder) <= max_length:
        return [range(num)]
    if overflow == "drop":
        return []
    if encoder.last_exchange_only:
        starts = [start for start in range(1, num) if length_by_encoding(row, start, num, encoder) <= max_length]
        return [range(start, num) for start in starts[:1]]
    runs, start = [], 0
    while start < num:
        stops = [stop for stop in range(num, start, -1) if length_by_encoding(row, start, stop, encoder) <= max_length]
        runs += [range(start, stop) for stop in stops[:1]]
        if overflow == "truncate":
            break
        start = stops[0] if stops else start + 1
    return runs


# Each example takes 0.3 s.
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    conversations=st.lists(EXCHANGES, min_size=1, max_size=3),
    overflow=st.sampled_from(["drop", "truncate", "split"]),
    history=st.booleans(),
    long_words=st.booleans(),
    data=st.data(),
)
def test_runs_equal_those_found_by_encoding_every_length(
    tokenizer, encoder, history_encoder, conversations, overflow, history, long_words, data
):
    chosen_encoder = history_encoder if history else encoder
    if long_words:  # the heading between exchanges is longer than the opening of a row; the lengths still add up
        words = Template(instruction="", user_role="The one who speaks first", agent_role="A")
        chosen_encoder = TemplateEncoder(tokenizer, words, last_exchange_only=history)
    overflow = "truncate" if history and overflow == "split" else overflow
    raw = [row_of(exchanges, f"d{k}") for k, exchanges in enumerate(conversations)]
    rows = encode(raw, chosen_encoder)
    longest = max(len(row["input_ids"]) for row in rows)
    # The length of a run, or one token more or less: a wrong sum shows there.
    chosen = data.draw(st.sampled_from(raw))
    start = data.draw(st.integers(0, len(chosen["user_text"]) - 1))
    stop = data.draw(st.integers(start + 1, len(chosen["user_text"])))
    max_length = length_by_encoding(chosen, start, stop, chosen_encoder) + data.draw(st.integers(-1, 1))
    max_length = data.draw(st.sampled_from([max_length, longest, longest - 1, 1]))

    fitted = fit_rows(rows, chosen_encoder, max_length, overflow)
    check(fitted, chosen_encoder, max_length)
    expected, left_out = [], {}
    for row in raw:
        runs = runs_by_encoding_every_length(row, chosen_encoder, max_length, overflow)
        expected += [(row["dialog_id"], list(run)) for run in runs]
        whole = length_by_encoding(row, 0, len(row["user_text"]), chosen_encoder)
        for k in range(len(row["user_text"])):
            if (history and k < len(row["user_text"]) - 1) or any(k in run for run in runs):
                continue
            alone = length_by_encoding(row, k, k + 1, chosen_encoder)
            left_out[f"{row['dialog_id']}_{0 if history else 2 * k}"] = (
                f"{alone} tokens, more than max_length {max_length}"
                if alone > max_length
                else f"row {row['id']} has {whole} tokens, more than max_length {max_length}"
            )
    assert [(row["dialog_id"], [int(who[1:]) for who in row["user_speaker"]]) for row in fitted.rows] == expected
    assert fitted.left_out == left_out


@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_each_exchange_is_encoded_once_and_again_only_if_kept(encoder, overflow):
    rows = encode([conversation("d1", 0, [30] * 40)], encoder)
    num_encoded = []

    class Counting:
        last_exchange_only = False

        def __call__(self, batch):
            num_encoded.append(sum(len(np.atleast_1d(text)) for text in batch["user_text"]))
            return encoder(batch)

    limit = tokens(encoder, [30] * 10)
    fitted = fit_rows(rows, Counting(), limit, overflow)
    kept = {"truncate": [10], "split": [10, 10, 10, 10]}[overflow]
    assert [len(row["user_text"]) for row in fitted.rows] == kept
    assert num_encoded == [40, *kept]


@pytest.mark.parametrize(
    ("overflow", "config_name", "history", "expected"),
    [
        (None, "single_turn", 0, "drop"),
        ("drop", "single_turn", 0, "drop"),
        (None, "single_turn", 2, "truncate"),
        ("drop", "single_turn", 2, "drop"),
        (None, "multi_turn", 0, "truncate"),
        ("split", "multi_turn", 0, "split"),
    ],
)
def test_default_and_explicit_overflow(overflow, config_name, history, expected):
    assert choose_overflow(overflow, config_name, history) == expected


@pytest.mark.parametrize(
    ("overflow", "history", "message"),
    [
        ("cut", 0, "overflow 'cut' is unknown: choose one of drop, truncate, split"),
        ("truncate", 0, "overflow is truncate, but a row of single_turn is one pair and cannot be cut: use drop"),
        ("split", 0, "overflow is split, but a row of single_turn is one pair"),
        (
            "split",
            1,
            "overflow is split, but with history only the last pair of a row is labelled: use truncate or drop",
        ),
    ],
)
def test_overflow_that_the_config_does_not_allow(overflow, history, message):
    with pytest.raises(ValueError, match=message):
        choose_overflow(overflow, "single_turn", history)
