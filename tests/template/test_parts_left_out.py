"""Templates that leave parts out: recognition, synthesis, answers in text, and the presets for them."""

import dataclasses
import functools
import pickle
from itertools import combinations

import pytest
import torch
import yaml
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bases import byte_level
from tests.helpers import REPOSITORY
from usdm_sft.template.config import PARTS, REFERENCE, Template
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.parts import ROW_PARTS, find_parts
from usdm_sft.template.tokenizer import add_units
from usdm_sft.training import StepLogitsProcessor, next_prompt

NEWLINE, SPACE, CORRESPOND, UNIT_0 = 13, 28705, 32001, 32002
SUBSETS = [parts for number in (2, 3, 4) for parts in combinations(PARTS, number)]
PRESETS = ("asr", "s2t", "t2t", "tts")
ROW = {"user_units": [5, 5, 7], "user_text": "What? ", "agent_text": "### Agent", "agent_units": [3]}
OTHER = {"user_units": [9], "user_text": " é 🤖", "agent_text": " Yes.", "agent_units": [0, 0]}


def preset(name):
    return Template(**yaml.safe_load((REPOSITORY / "configs" / "templates" / f"{name}.yaml").read_text()))


def batch(*exchanges):
    return {part: [[exchange[part] for exchange in exchanges]] for part in PARTS}


def as_string(parts, exchanges, instruction=REFERENCE.instruction):
    """The string of a row: each turn is a heading and a line, whose parts have <|correspond|> between them."""
    text = instruction
    for exchange in exchanges:
        values = {
            part: value.lower() if isinstance(value, str) else "".join(f"<|unit{unit}|>" for unit in value)
            for part, value in exchange.items()
            if part in parts
        }
        text += "\n"
        for role in ("user", "agent"):
            names = [
                name
                for name in (("user_units", "user_text"), ("agent_text", "agent_units"))[role == "agent"]
                if name in parts
            ]
            if names:
                text += f"### {role.capitalize()}\n{'<|correspond|>'.join(values[name] for name in names)}\n"
    return text


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_ids_equal_those_of_the_whole_string(tokenizer, make_encoder, parts):
    encoder = make_encoder("reference", parts)
    for exchanges in ([ROW], [OTHER], [ROW, OTHER, ROW]):
        ids = encoder(batch(*exchanges))["input_ids"][0].tolist()
        assert ids == tokenizer(as_string(parts, exchanges) + "</s>").input_ids
        assert encoder.decode(ids) == as_string(parts, exchanges) + "</s>"


WORDS = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="▁<|"), min_size=1, max_size=12)
WORDS = WORDS.filter(str.strip)


@settings(max_examples=120, deadline=None)
@given(
    parts=st.sampled_from(SUBSETS),
    exchanges=st.lists(
        st.fixed_dictionaries(
            {
                part: WORDS if part.endswith("_text") else st.lists(st.integers(0, 19), min_size=1, max_size=4)
                for part in PARTS
            }
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_any_text_comes_back_in_both_forms_of_tokenization(make_encoder, tokenizers, parts, exchanges):
    for tokenization, tokenizer in tokenizers.items():
        encoder = make_encoder(tokenization, parts)
        row = encoder(batch(*exchanges))
        ids = row["input_ids"][0].tolist()
        assert encoder.decode(ids) == as_string(parts, exchanges) + tokenizer.eos_token
        history, last = [[each[part] for part in parts] for each in exchanges[:-1]], exchanges[-1]
        for number in range(1, len(parts)):
            prompt = encoder.prompt(**{part: last[part] for part in parts[:number]}, history=history).tolist()
            assert ids[: len(prompt)] == prompt


@pytest.fixture(scope="module")
def tokenizers(tokenizer):
    return {"reference": tokenizer, "separate": add_units(byte_level(), 20, "base")}


@pytest.fixture(scope="module")
def make_encoder(tokenizers):
    @functools.cache
    def make(tokenization, parts, loss=None):
        template = Template(tokenization=tokenization, parts=parts, loss=loss)
        return TemplateEncoder(tokenizers[tokenization], template)

    return make


@pytest.mark.parametrize("tokenization", ["reference", "separate"])
@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_every_generated_part_is_labelled_and_has_a_step(make_encoder, parts, tokenization):
    encoder = make_encoder(tokenization, parts)
    encoded = encoder(batch(ROW))
    ids, labels = encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist()
    labelled = []
    for step, number in zip(encoder.steps, range(1, len(parts)), strict=True):
        prompt = encoder.prompt(**{part: ROW[part] for part in parts[:number]}).tolist()
        stop = ids.index(step.stop_id, len(prompt))
        labelled += range(len(prompt), stop + 1)
        allowed = torch.isfinite(StepLogitsProcessor(step)(None, torch.zeros(1, 43_000))[0])
        assert allowed[ids[len(prompt) : stop + 1]].all()
        assert step.name == {"user_text": "transcript", "agent_text": "answer", "agent_units": "speech"}[parts[number]]
        if number + 1 < len(parts):
            following = next_prompt(step, torch.tensor([prompt]), torch.tensor(ids[len(prompt) : stop + 1]))[0].tolist()
            assert following == encoder.prompt(**{part: ROW[part] for part in parts[: number + 1]}).tolist()
    assert [position for position, label in enumerate(labels) if label != -100] == labelled
    assert all(label in (-100, token_id) for token_id, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize("tokenization", ["reference", "separate"])
@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_the_part_of_each_token_is_found_from_the_ids(make_encoder, parts, tokenization):
    for part in parts[1:]:
        encoder = make_encoder(tokenization, parts, (part,))
        encoded = encoder(batch(ROW, OTHER))
        found = find_parts(encoded["input_ids"][0], encoder.layout)
        assert (found == list(ROW_PARTS).index(part)).tolist() == (encoded["labels"][0] != -100).tolist()
    unit_0 = UNIT_0 if tokenization == "reference" else encoder.tokens.unit_0
    expected = [unit_0 + unit for unit in [5, 5, 7, 9]] if "user_units" in parts else []
    ids = encoded["input_ids"][0][found == list(ROW_PARTS).index("user_units")]
    assert ids[encoder.layout.is_unit(ids)].tolist() == expected


def test_speech_ends_with_correspond_and_the_rest_is_frame(make_encoder):
    ids = make_encoder("reference", PARTS)(batch(ROW))["input_ids"][0].tolist()
    parts = find_parts(ids).tolist()
    assert [token for token, part in zip(ids, parts, strict=True) if part == 1] == [32_007, 32_007, 32_009, CORRESPOND]
    assert parts[0] == parts[-1] == parts[-2] == 0


def labelled_ids(name, rows, tokenizer):
    """The labelled ids of each row with a preset."""
    encoder = TemplateEncoder(tokenizer, preset(name))
    encoded = encoder({part: rows[part][:] for part in PARTS})
    return [labels[labels != -100].tolist() for labels in encoded["labels"]]


@pytest.fixture(scope="module")
def rows(dataset_folder):
    return load_dataset(str(dataset_folder), split="train")


def test_asr_trains_the_transcript(rows, tokenizer):
    for ids, text in zip(labelled_ids("asr", rows, tokenizer), rows["user_text"], strict=True):
        assert (tokenizer.decode(ids[:-1]), ids[-1]) == (text.lower(), NEWLINE)


@pytest.mark.parametrize("name", ["s2t", "t2t"])
def test_s2t_and_t2t_train_the_answer_in_text(name, rows, tokenizer):
    for ids, text in zip(labelled_ids(name, rows, tokenizer), rows["agent_text"], strict=True):
        assert (tokenizer.decode(ids[:-1]), ids[-1]) == (text.lower(), NEWLINE)


def test_tts_trains_the_units_of_the_answer(rows, tokenizer):
    for ids, units in zip(labelled_ids("tts", rows, tokenizer), rows["agent_units"], strict=True):
        assert ([token_id - UNIT_0 for token_id in ids[:-1]], ids[-1]) == (list(units), SPACE)


def test_each_preset_gives_the_model_what_its_task_gives(tokenizer):
    given = {
        "asr": "### User\n<|unit5|><|unit5|><|unit7|><|correspond|>",
        "s2t": "### User\n<|unit5|><|unit5|><|unit7|>\n### Agent\n",
        "t2t": "### User\nwhat? \n### Agent\n",
        "tts": "### Agent\n### agent<|correspond|>",
    }
    for name, expected in given.items():
        encoder = TemplateEncoder(tokenizer, preset(name))
        part = encoder.template.parts[0]
        assert encoder.decode(encoder.prompt(**{part: ROW[part]})) == encoder.template.instruction + "\n" + expected


def test_presets_have_instructions_of_their_own():
    files = sorted((REPOSITORY / "configs" / "templates").glob("*.yaml"))
    assert [file.stem for file in files] == list(PRESETS)
    assert len({preset(name).instruction for name in PRESETS} | {REFERENCE.instruction}) == 5
    for name in PRESETS:
        assert preset(name) == Template(
            instruction=preset(name).instruction, parts=preset(name).parts
        )  # its loss is the default


def test_loss_follows_the_parts():
    assert Template(parts=["user_text", "user_units"]).loss == ("user_text",)
    assert Template(parts=PARTS[::-1]) == REFERENCE == Template(loss=PARTS[1:])
    assert dataclasses.replace(REFERENCE, parts=("agent_text", "agent_units"), loss=None).loss == ("agent_units",)


def test_settings_of_the_reference_do_not_name_its_parts():
    assert "parts" not in REFERENCE.settings()
    settings = Template(parts=("user_units", "agent_text")).settings()
    assert (settings["parts"], settings["loss"]) == (["user_units", "agent_text"], ["agent_text"])
    assert Template(**settings) == Template(parts=("user_units", "agent_text"))


def test_key_depends_on_the_parts_and_survives_pickling(make_encoder):
    encoders = [make_encoder("separate", parts) for parts in SUBSETS]
    assert len({str(encoder.key) for encoder in encoders}) == len(SUBSETS)
    for encoder in encoders:
        copy = pickle.loads(pickle.dumps(encoder))
        assert copy.key == encoder.key
        assert copy(batch(ROW))["input_ids"][0].tolist() == encoder(batch(ROW))["input_ids"][0].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": []}, r"template\.parts is \[\]: give a list of two or more of user_units, user_text, agent_text, agent_units, "),
        ({"parts": ["user_text"]}, r"template\.parts is \['user_text'\]: give a list of two or more"),
        ({"parts": ["user_text", "user_text"]}, r"template\.parts is \['user_text', 'user_text'\]: give a list of two"),
        ({"parts": "user_units"}, r"template\.parts is 'user_units': give a list .*, such as \[user_units, user_text\]"),
        ({"parts": ["user_units", "text"]}, r"template\.parts contains 'text': give a list of two or more of user_units, "),
        ({"parts": ["user_units", ["user_text"]]}, r"template\.parts contains \['user_text'\]: give a list"),
        ({"parts": ["user_units", "user_text"], "loss": ["agent_text"]},
         r"template\.loss contains 'agent_text', which cannot be labelled with template\.parts user_units, user_text: name one or more of user_text"),
        ({"parts": ["user_text", "agent_text"], "loss": ["user_text"]}, r"'user_text', which cannot be labelled with .*: name one or more of agent_text"),
    ],
)  # fmt: skip
def test_invalid_parts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Template(**change)


@pytest.mark.parametrize(
    ("parts", "given", "message"),
    [
        (PARTS, {}, "user_units is missing: every prompt begins with it"),
        (PARTS[:2], {"user_units": [1], "user_text": "a"}, "user_text is the last part of the template: leave it out, the model"),
        (PARTS[:2], {"user_units": [1], "agent_text": "a"}, "the template has no agent_text: give one or more of user_units$"),
        (PARTS[1:], {"agent_text": "a"}, "agent_text comes without user_text: give user_text as well"),
        (PARTS[::2], {"user_units": []}, "user_units is empty, and the template has no text in this turn: leave it out"),
        (PARTS[1:3], {"user_text": ""}, "user_text '' is empty or white space only"),
        (PARTS[:2], {"user_units": [1], "history": [([1], "a", "b", [2])]}, r"history\[0\] has 4 parts: give user_units, user_text"),
    ],
)  # fmt: skip
def test_prompts_that_a_template_does_not_have_are_refused(tokenizer, parts, given, message):
    with pytest.raises(ValueError, match=message):
        TemplateEncoder(tokenizer, Template(parts=parts)).prompt(**given)
