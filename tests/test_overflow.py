import pytest
from datasets import Dataset, Features, Sequence, Value

from usdm_sft.overflow import choose_overflow, fit_rows
from usdm_sft.template import COLUMNS, TemplateEncoder

FEATURES = Features(
    {"id": Value("string"), "dialog_id": Value("string"), "turn": Value("int32")}
    | {f"{role}_speaker": Sequence(Value("string")) for role in ("user", "agent")}
    | {f"{role}_text": Sequence(Value("string")) for role in ("user", "agent")}
    | {f"{role}_units": Sequence(Sequence(Value("uint16"))) for role in ("user", "agent")}
    | {name: Sequence(Value("int32")) for name in ("input_ids", "labels")}
)


def conversation(dialog, turn, user_units):
    """A row whose exchanges have so many units of the user; the first of each tells which exchange it is."""
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


def encoded(rows, encoder):
    out = encoder({name: [row[name] for row in rows] for name in COLUMNS})
    rows = [row | {name: out[name][i].tolist() for name in out} for i, row in enumerate(rows)]
    return Dataset.from_list(rows, features=FEATURES)


def tokens(encoder, user_units):
    return len(encoded([conversation("d1", 0, user_units)], encoder)[0]["input_ids"])


@pytest.fixture(scope="module")
def context_encoder(tokenizer):
    return TemplateEncoder(tokenizer, last_exchange_only=True)


def check(fitted, encoder, max_length):
    """Columns and ids agree in every row, and the row fits."""
    for row in fitted.rows:
        expected = encoder({name: [row[name]] for name in COLUMNS})
        assert row["input_ids"] == expected["input_ids"][0].tolist()
        assert row["labels"] == expected["labels"][0].tolist()
        assert len(row["input_ids"]) <= max_length
        assert {len(values) for name, values in row.items() if name.startswith(("user_", "agent_"))} == {
            len(row["user_text"])
        }


def held(fitted):
    """(id, turn, its exchanges by speaker) of each row."""
    return [(row["id"], row["turn"], [int(speaker[1:]) for speaker in row["user_speaker"]]) for row in fitted.rows]


@pytest.fixture(scope="module")
def rows(encoder):
    lengths = [("d1", 0, [9]), ("d2", 1, [20, 30, 40, 50]), ("d3", 0, [50, 50]), ("d4", 0, [999, 1]), ("d5", 0, [9])]
    return encoded([conversation(*each) for each in lengths], encoder)


def test_truncate_keeps_the_longest_leading_run(encoder, rows):
    limit = tokens(encoder, [20, 30, 40])  # exactly; one exchange more of d2 does not fit
    whole, other = tokens(encoder, [20, 30, 40, 50]), tokens(encoder, [999, 1])
    fitted = fit_rows(rows, encoder, limit, "truncate")
    check(fitted, encoder, limit)
    assert held(fitted) == [("d1_0", 0, [0]), ("d2_1", 1, [0, 1, 2]), ("d3_0", 0, [0, 1]), ("d5_0", 0, [0])]
    assert fitted.cut == {"d2_1": f"kept 3 of 4 exchanges ({whole} tokens, more than max_length {limit})"}
    assert fitted.left_out == {
        "d2_7": f"row d2_1 has {whole} tokens, more than max_length {limit}",
        "d4_0": f"{tokens(encoder, [999])} tokens, more than max_length {limit}",
        "d4_2": f"row d4_0 has {other} tokens, more than max_length {limit}",
    }
    assert fitted.rows.features == rows.features


def test_one_token_less_is_one_exchange_less(encoder, rows):
    fitted = fit_rows(rows, encoder, tokens(encoder, [20, 30, 40]) - 1, "truncate")
    assert ("d2_1", 1, [0, 1]) in held(fitted)


def test_split_keeps_every_run(encoder, rows):
    limit = tokens(encoder, [20, 30])
    fitted = fit_rows(rows, encoder, limit, "split")
    check(fitted, encoder, limit)
    assert held(fitted) == [
        ("d1_0", 0, [0]),
        ("d2_1", 1, [0, 1]),
        ("d2_5", 5, [2]),
        ("d2_7", 7, [3]),
        ("d3_0", 0, [0]),
        ("d3_2", 2, [1]),
        ("d4_2", 2, [1]),  # what comes before is too long by itself
        ("d5_0", 0, [0]),
    ]
    reasons = {
        name: f"{num} tokens, more than max_length {limit}"
        for name, num in {
            "d2_1": tokens(encoder, [20, 30, 40, 50]),
            "d3_0": tokens(encoder, [50, 50]),
            "d4_0": tokens(encoder, [999, 1]),
        }.items()
    }
    assert fitted.cut == {
        "d2_1": f"kept as d2_1, d2_5, d2_7 ({reasons['d2_1']})",
        "d3_0": f"kept as d3_0, d3_2 ({reasons['d3_0']})",
        "d4_0": f"kept as d4_2 ({reasons['d4_0']})",
    }
    assert fitted.left_out == {"d4_0": f"{tokens(encoder, [999])} tokens, more than max_length {limit}"}


def test_drop_leaves_conversations_out_whole(encoder, rows):
    limit = tokens(encoder, [50, 50])
    fitted = fit_rows(rows, encoder, limit, "drop")
    assert held(fitted) == [("d1_0", 0, [0]), ("d3_0", 0, [0, 1]), ("d5_0", 0, [0])]
    assert fitted.cut == {}
    reason = f"row d2_1 has {tokens(encoder, [20, 30, 40, 50])} tokens, more than max_length {limit}"
    assert {name: why for name, why in fitted.left_out.items() if name.startswith("d2")} == dict.fromkeys(
        ["d2_1", "d2_3", "d2_5", "d2_7"], reason
    )


def test_context_loses_its_oldest_exchanges(context_encoder):
    lengths = [
        ("d1", 4, [20, 30, 40]),
        ("d2", 4, [1, 1, 999]),
        ("d3", 0, [999]),
        ("d4", 2, [30, 40]),
        ("d5", 2, [999, 1]),
    ]
    rows = encoded([conversation(*each) for each in lengths], context_encoder)
    limit = tokens(context_encoder, [30, 40])
    fitted = fit_rows(rows, context_encoder, limit, "truncate")
    check(fitted, context_encoder, limit)
    assert held(fitted) == [("d1_4", 4, [1, 2]), ("d4_2", 2, [0, 1]), ("d5_2", 2, [1])]
    whole, other = tokens(context_encoder, [20, 30, 40]), tokens(context_encoder, [999, 1])
    assert fitted.cut == {
        "d1_4": f"kept 1 of 2 earlier exchanges ({whole} tokens, more than max_length {limit})",
        "d5_2": f"kept 0 of 1 earlier exchanges ({other} tokens, more than max_length {limit})",
    }
    reason = f"{tokens(context_encoder, [999])} tokens, more than max_length {limit}"
    assert fitted.left_out == {"d2_4": reason, "d3_0": reason}


def test_nothing_is_touched_where_all_fits(encoder, rows):
    for overflow in ("drop", "truncate", "split"):
        fitted = fit_rows(rows, encoder, 8192, overflow)
        assert fitted.rows[:] == rows[:]
        assert (fitted.cut, fitted.left_out) == ({}, {})


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
def test_what_is_chosen(overflow, config_name, history, expected):
    assert choose_overflow(overflow, config_name, history) == expected


@pytest.mark.parametrize(
    ("overflow", "history", "message"),
    [
        ("cut", 0, "overflow 'cut' is unknown: choose one of drop, truncate, split"),
        ("truncate", 0, "overflow is truncate, but a row of single_turn is one pair, which goes whole: use drop"),
        ("split", 0, "overflow is split, but a row of single_turn is one pair"),
        ("split", 1, "overflow is split, but a row with history is about its last pair: use truncate or drop"),
    ],
)
def test_what_makes_no_sense(overflow, history, message):
    with pytest.raises(ValueError, match=message):
        choose_overflow(overflow, "single_turn", history)
