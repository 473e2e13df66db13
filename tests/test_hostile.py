"""Untrusted text is either encoded without loss or refused, and is never interpreted as markup or code."""

import re

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import options, reuse_units
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.tokenizer import CORRESPOND, NEWLINE, SPACE, UNIT_0
from usdm_sft.utils.texts import text_problem

NASTY = [
    "### agent", "### user", "\n### agent\n", "<|unit5|>", "<|correspond|>", "</s>", "<s>", "<unk>", "<pad>", "\r", "\x85", "\u2028", "\u2029",
    "\x00", "\u202e", "\u200b", "\ufeff", "\ud800", "▁", "<0x0a>", "  ", "ÀÉ", "İ", "ß", "🙂", "\U000e0001", "{{ 7 * 7 }}", "$\\frac{1}{0}$",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(NASTY)), max_size=6).map("".join)
UNITS = st.lists(st.integers(0, 9_999), max_size=12)


@given(user_text=TEXTS, agent_text=TEXTS, user_units=UNITS, agent_units=UNITS)
@settings(max_examples=200, deadline=None)
def test_accepted_text_and_units_come_back(encoder, tokenizer, user_text, agent_text, user_units, agent_units):
    row = {"user_units": user_units, "user_text": user_text, "agent_text": agent_text, "agent_units": agent_units}
    batch = {name: [value] for name, value in row.items()}
    if text_problem(user_text) or text_problem(agent_text):
        with pytest.raises(ValueError, match=r"(user|agent)_text .*: correct the text"):
            encoder(batch)
        return
    encoded = encoder(batch)
    ids, labels = encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist()
    assert all(0 <= token_id < len(tokenizer) for token_id in ids)
    assert all(label in (-100, token_id) for label, token_id in zip(labels, ids, strict=True))
    # Independent of the encoder: each of the three labelled parts ends at its stop token.
    labelled = [label for label in labels if label != -100]
    assert labelled[-1] == SPACE
    speech = labelled.index(CORRESPOND)
    assert labelled[speech + 1 : -1] == [unit + UNIT_0 for unit in agent_units]
    end_of_user = labelled.index(NEWLINE)  # an accepted text has no newline
    texts = [labelled[:end_of_user], labelled[end_of_user + 1 : speech]]
    found = [
        encoder.decode([CORRESPOND, *texts[0]]).removeprefix("<|correspond|>"),
        tokenizer_text(tokenizer, texts[1]),
    ]
    assert found == [text.lower().replace("▁", " ") for text in (user_text, agent_text)]
    start = ids.index(CORRESPOND)
    assert ids[start - len(user_units) : start] == [unit + UNIT_0 for unit in user_units]


def tokenizer_text(tokenizer, ids):
    """Decode ids that follow a newline; without the newline the tokenizer would drop a leading space."""
    return tokenizer.backend_tokenizer.decode([NEWLINE, *ids], skip_special_tokens=False).removeprefix("\n")


@pytest.mark.parametrize("character", ["\r", "\n", "\x85", "\x00", "\x1b", "\ud800", "\x7f"])
def test_control_characters_are_refused(encoder, character):
    with pytest.raises(ValueError, match="holds the control character"):
        encoder({"user_units": [[1]], "user_text": [f"a{character}b"], "agent_text": ["c"], "agent_units": [[1]]})


@pytest.fixture
def prepare_with(mini, unit_model, finished, tmp_path):
    """Prepare the mini corpus with other lines of train.txt -> the counts."""
    reuse_units(finished, tmp_path)

    def run(change):
        corpus = tmp_path / "corpus"
        corpus.mkdir()
        (corpus / "data").symlink_to(mini / "corpus" / "data")
        (corpus / "test.txt").write_bytes((mini / "corpus" / "test.txt").read_bytes())
        lines = (mini / "corpus" / "train.txt").read_text().removesuffix("\n").split("\n")
        (corpus / "train.txt").write_text("\n".join(change(number, line) for number, line in enumerate(lines)))
        return prepare(**options(mini, unit_model, tmp_path, data_dir=str(corpus)))

    return run


def test_a_hundred_thousand_characters_are_left_out_by_length(prepare_with):
    def change(number, line):
        if not re.match(r"0_\d_d3\|", line):
            return line
        return "|".join([*line.split("|")[:3], "word " * 20_000, "none"])

    [(name, reason)] = prepare_with(change)["splits"]["train"]["pairs_left_out"].items()
    assert name == "d3_0" and re.fullmatch(r"\d{5,6} tokens, more than max_length 8192", reason)


@pytest.mark.slow
def test_markup_in_emotions_is_shown_as_text(prepare_with, tmp_path):
    """Emotions appear in the card and its pictures; they are not rendered as a template, as mathematics or as HTML."""
    hostile = ["{{ 7 * 7 }}", "$\\frac{1}{0}$", "<script>alert(1)</script>", "x" * 5000, "", *map(str, range(4))]
    prepare_with(lambda number, line: line.rpartition("|")[0] + "|" + hostile[number % len(hostile)])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "49" not in re.findall(r"\b\d+\b", card.partition("## Columns")[0].partition("## Contents")[2])
    assert "<script>" not in card
    assert verify(tmp_path / "out")["train"] == 10
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "datasets"))
    assert set(rows["user_emotion"]) <= set(hostile)
