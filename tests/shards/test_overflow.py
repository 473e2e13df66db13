import numpy as np
import pytest
from datasets import Dataset, Features, Sequence, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from usdm_sft.shards.overflow import choose_overflow, fit_rows
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
    """The runs of exchanges to keep, found without addition: each candidate is encoded and measured."""
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


SLOW_FIXTURES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the encoder is of the session


@SLOW_FIXTURES
@given(exchanges=EXCHANGES, cuts=st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_ids_of_a_conversation_are_prefix_blocks_and_suffix(encoder, exchanges, cuts):
    opening = encoder._open.tolist()
    closing, heading = encoder._close.tolist(), encoder._next.tolist()
    row = row_of(exchanges)
    blocks = []
    for k in range(len(exchanges)):
        ids = encoder({name: [row[name][k]] for name in COLUMNS})["input_ids"][0].tolist()
        assert ids[: len(opening)] == opening and ids[-len(closing) :] == closing
        blocks.append(ids[len(opening) : -len(closing)])
    start, stop = sorted(min(cut, len(exchanges)) for cut in cuts)
    if start == stop:
        start, stop = 0, len(exchanges)
    expected = list(blocks[start])
    for block in blocks[start + 1 : stop]:
        expected += heading + block
    ids = encoder({name: [row[name][start:stop]] for name in COLUMNS})["input_ids"][0].tolist()
    assert ids == opening + expected + closing


@SLOW_FIXTURES
@given(
    conversations=st.lists(EXCHANGES, min_size=1, max_size=3),
    overflow=st.sampled_from(["drop", "truncate", "split"]),
    history=st.booleans(),
    long_words=st.booleans(),
    data=st.data(),
)
def test_runs_are_those_that_encoding_every_length_gives(
    tokenizer, encoder, context_encoder, conversations, overflow, history, long_words, data
):
    its_encoder = context_encoder if history else encoder
    if long_words:  # the heading between exchanges is then longer than what opens a row, and the lengths still add up
        words = Template(instruction="", user_role="The one who speaks first", agent_role="A")
        its_encoder = TemplateEncoder(tokenizer, words, last_exchange_only=history)
    overflow = "truncate" if history and overflow == "split" else overflow
    raw = [row_of(exchanges, f"d{k}") for k, exchanges in enumerate(conversations)]
    rows = encoded(raw, its_encoder)
    longest = max(len(row["input_ids"]) for row in rows)
    # At a length of some run exactly, or one token beside it: where a wrong sum shows.
    chosen = data.draw(st.sampled_from(raw))
    start = data.draw(st.integers(0, len(chosen["user_text"]) - 1))
    stop = data.draw(st.integers(start + 1, len(chosen["user_text"])))
    max_length = length_by_encoding(chosen, start, stop, its_encoder) + data.draw(st.integers(-1, 1))
    max_length = data.draw(st.sampled_from([max_length, longest, longest - 1, 1]))

    fitted = fit_rows(rows, its_encoder, max_length, overflow)
    check(fitted, its_encoder, max_length)
    expected, left_out = [], {}
    for row in raw:
        runs = runs_by_encoding_every_length(row, its_encoder, max_length, overflow)
        expected += [(row["dialog_id"], list(run)) for run in runs]
        whole = length_by_encoding(row, 0, len(row["user_text"]), its_encoder)
        for k in range(len(row["user_text"])):
            if (history and k < len(row["user_text"]) - 1) or any(k in run for run in runs):
                continue
            alone = length_by_encoding(row, k, k + 1, its_encoder)
            left_out[f"{row['dialog_id']}_{0 if history else 2 * k}"] = (
                f"{alone} tokens, more than max_length {max_length}"
                if alone > max_length
                else f"row {row['id']} has {whole} tokens, more than max_length {max_length}"
            )
    assert [(row["dialog_id"], [int(who[1:]) for who in row["user_speaker"]]) for row in fitted.rows] == expected
    assert fitted.left_out == left_out


@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_each_exchange_is_encoded_once_to_be_measured_and_once_more_where_it_is_kept(encoder, overflow):
    rows = encoded([conversation("d1", 0, [30] * 40)], encoder)
    encoded_exchanges = []

    class Counting:
        last_exchange_only = False

        def __call__(self, batch):
            encoded_exchanges.append(sum(len(np.atleast_1d(text)) for text in batch["user_text"]))
            return encoder(batch)

    limit = tokens(encoder, [30] * 10)
    fitted = fit_rows(rows, Counting(), limit, overflow)
    kept = {"truncate": [10], "split": [10, 10, 10, 10]}[overflow]
    assert [len(row["user_text"]) for row in fitted.rows] == kept
    assert encoded_exchanges == [40, *kept]


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
