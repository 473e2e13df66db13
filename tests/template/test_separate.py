"""The template with the tokenizer of another base model: `tokenization="separate"`."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.bases import BASES, byte_level
from tests.helpers import ids_and_labels
from tests.template.rendering import render
from usdm_sft.template.config import Template
from usdm_sft.template.encoder import COLUMNS, TemplateEncoder
from usdm_sft.template.tokenizer import add_units
from usdm_sft.template.view import format_example
from usdm_sft.training import StepLogitsProcessor, next_prompt

SEPARATE = Template(tokenization="separate")
ROW = {"user_units": [3, 3, 5], "user_text": "Where were you?", "agent_text": "at home.", "agent_units": [19, 0]}


def columns(*rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def batch_of(exchanges):
    """A batch of one row with these exchanges."""
    return {name: [list(values)] for name, values in zip(COLUMNS, zip(*exchanges, strict=True), strict=True)}


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return add_units(BASES[request.param](), 20, request.param)


@pytest.fixture(scope="module")
def encoder(base):
    return TemplateEncoder(base, SEPARATE)


def by_hand(tokenizer, row):
    """Ids and labels of a row of one exchange, from the tokenizer alone: each line encoded on its own."""

    def line(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def ids(*tokens):
        return tokenizer.convert_tokens_to_ids(list(tokens))

    newline = [next(i for t, i in tokenizer.get_vocab().items() if t in ("Ċ", "\n"))]
    units = [ids(*(f"<|unit{unit}|>" for unit in row[name])) for name in ("user_units", "agent_units")]
    before = tokenizer("x").input_ids[: tokenizer("x").input_ids.index(line("x")[0])]
    parts = [
        (before + line(SEPARATE.instruction.strip()) + 2 * newline + line("### User") + newline, False),
        (units[0] + ids("<|correspond|>"), False),
        (line(row["user_text"].lower()) + newline, True),
        (line("### Agent") + newline, False),
        (line(row["agent_text"].lower()) + ids("<|correspond|>") + units[1] + newline, True),
        ([tokenizer.eos_token_id] if tokenizer.eos_token else [], False),
    ]
    whole = [i for part, _ in parts for i in part]
    return whole, [i if labelled else -100 for part, labelled in parts for i in part]


def test_ids_and_labels_are_those_of_lines_encoded_alone(base, encoder):
    assert ids_and_labels(encoder, columns(ROW)) == by_hand(base, ROW)


def test_prompts_are_prefixes_and_each_step_ends_in_one_known_id(encoder, base):
    ids, labels = ids_and_labels(encoder, columns(ROW))
    given = [ROW["user_units"]], [ROW["user_units"], ROW["user_text"]], [*ROW.values()][:3]
    for step, values in zip(encoder.steps, given, strict=True):
        prompt = encoder.prompt(*values).tolist()
        assert ids[: len(prompt)] == prompt
        stop = ids.index(step.stop_id, len(prompt))
        assert labels[len(prompt) : stop + 1] == ids[len(prompt) : stop + 1]
        following = next_prompt(step, torch.tensor([prompt]), torch.tensor(ids[len(prompt) : stop]))[0].tolist()
        assert ids[: len(following)] == following
        assert following[stop + 1 :] == (
            [*base("### Agent", add_special_tokens=False).input_ids, encoder.tokens.newline]
        ) * (step.name == "transcript")


def test_stages_allow_only_what_training_teaches(encoder, base):
    size = len(base) + 7  # embeddings of a model may have more rows than the tokenizer has tokens
    added = {i for i, token in base.added_tokens_decoder.items() if token.content.strip()}
    units = set(range(encoder.tokens.unit_0, encoder.tokens.unit_0 + 20))
    newline, correspond = encoder.tokens.newline, encoder.tokens.correspond
    melted = {i for token, i in base.get_vocab().items() if "Ċ" in token} - {newline}
    text = set(range(len(base))) - added - melted - {newline}
    allowed = [
        set(torch.isfinite(StepLogitsProcessor(step)(None, torch.zeros(1, size))[0]).nonzero().flatten().tolist())
        for step in encoder.steps
    ]
    assert allowed == [text | {newline}, text | {correspond}, units | {newline}]
    assert [step.stop_id for step in encoder.steps] == [newline, correspond, newline]


def test_example_for_the_terminal_hides_nothing(encoder, base):
    ids, labels = ids_and_labels(encoder, columns(ROW))
    row = {"id": "d1_0", "input_ids": ids, "labels": labels}
    shown = format_example(row, base.backend_tokenizer, color=False).splitlines()
    spaces = "".join(shown).replace(" ", "")
    units = "<|unit3|><|unit3|><|unit5|><|correspond|>"
    for text in ("wherewereyou?⏎", "athome.<|correspond|><|unit19|><|unit0|>⏎", units):
        assert text in spaces
    assert [line.split()[0] for line in shown if "you?" in line or "home" in line] == ["loss", "loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_text": "naïve 日本"}, r"row 0 of the batch: user_text 'naïve 日本' becomes '(<unk>|\[UNK\])', which does not stand"),
        ({"id": "d1_0", "agent_text": "go <|unit5|>"}, "row d1_0: agent_text .*part of a special token"),
        ({"agent_text": "<|end|> </s>"}, "agent_text .*part of a special token"),
        ({"user_units": [20]}, "user_units contains unit 20, but the tokenizer has units 0 to 19"),
    ],
)  # fmt: skip
def test_texts_that_the_tokenizer_cannot_hold_are_refused(encoder, base, change, message):
    if "naïve" in str(change) and base.unk_token is None:  # a byte-level tokenizer knows every text
        text = change["user_text"]
        assert text in encoder.decode(encoder(columns(ROW | change))["input_ids"][0])
        return
    with pytest.raises(ValueError, match=message):
        encoder(columns(ROW | change))


def test_key_depends_on_eos():
    first, other = (add_units(byte_level(), 20, "base") for _ in range(2))
    other.eos_token = "<|im_start|>"
    assert TemplateEncoder(first, SEPARATE).key != TemplateEncoder(other, SEPARATE).key


def test_wrong_form_for_a_tokenizer_is_refused(base):
    with pytest.raises(ValueError, match=r"is not USTM's tokenizer: .*template.tokenization separate"):
        TemplateEncoder(base)
    with pytest.raises(ValueError, match="give a tokenizer of transformers, which knows its EOS"):
        TemplateEncoder(base.backend_tokenizer, SEPARATE)


def test_words_that_the_tokenizer_does_not_know_are_refused(base):
    template = Template(tokenization="separate", user_role="日本")
    if base.unk_token is None:
        assert "### 日本\n" in TemplateEncoder(base, template).decode(TemplateEncoder(base, template).prompt([1]))
        return
    with pytest.raises(ValueError, match=r"the template's words .*日本.*: a part becomes .*: choose other words"):
        TemplateEncoder(base, template)


UNITS = st.lists(st.integers(0, 19), max_size=6)
PLAIN_WORDS = st.text("abeotxyzABE .,!?'-", min_size=1, max_size=12).filter(str.strip)
PLAIN_EXCHANGE = st.tuples(UNITS, PLAIN_WORDS, PLAIN_WORDS, UNITS)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.lists(PLAIN_EXCHANGE, min_size=1, max_size=3))
def test_known_texts_have_the_ids_of_their_lines(encoder, base, row):
    ids, labels = ids_and_labels(encoder, batch_of(row))
    newline, expected = encoder.tokens.newline, []
    for _, user_text, agent_text, agent_units in row:
        user, agent = (base(text.lower(), add_special_tokens=False).input_ids for text in (user_text, agent_text))
        units = base.convert_tokens_to_ids([f"<|unit{unit}|>" for unit in agent_units])
        expected += [*user, newline, *agent, encoder.tokens.correspond, *units, newline]
    assert [label for label in labels if label != -100] == expected
    assert encoder.decode(ids) == render({name: values[0] for name, values in batch_of(row).items()}, encoder)
    prompt = encoder.prompt(*row[-1][:3], history=row[:-1]).tolist()
    assert ids[: len(prompt)] == prompt


@pytest.mark.skipif(importlib.util.find_spec("mistral_common") is None, reason="needs the extra demo")
@pytest.mark.slow
def test_a_published_tokenizer_of_131072_tokens(tmp_path):
    """Tekken, Mistral Nemo's byte-level tokenizer, has "?\\n" as one token and 1,188 tokens with a newline."""
    import mistral_common
    from transformers.integrations.mistral import convert_tekken_tokenizer

    file = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    tokenizer = add_units(convert_tekken_tokenizer(str(file)), 10_000, "tekken")
    assert tokenizer("you?\n", add_special_tokens=False).tokens()[-1] == "?Ċ"
    encoder = TemplateEncoder(tokenizer, SEPARATE)
    assert ids_and_labels(encoder, columns(ROW)) == by_hand(tokenizer, ROW)
    blocked = torch.isinf(StepLogitsProcessor(encoder.steps[0])(None, torch.zeros(1, len(tokenizer)))[0])
    assert blocked[tokenizer.convert_tokens_to_ids("?Ċ")] and not blocked[encoder.tokens.newline]
