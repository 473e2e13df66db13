"""Templates that leave parts out: recognition, synthesis, answers in text, and the presets for them."""

import dataclasses
import functools
import pickle
from itertools import combinations

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bases import byte_level
from tests.helpers import REPOSITORY, ids_and_labels
from usdm_sft.template.config import PARTS, REFERENCE, Template
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.parts import ROW_PARTS, find_parts
from usdm_sft.template.tokenizer import add_units
from usdm_sft.training import StepLogitsProcessor, next_prompt

NEWLINE, SPACE, CORRESPOND, UNIT_0 = 13, 28705, 32001, 32002
SUBSETS = [parts for number in (2, 3, 4) for parts in combinations(PARTS, number)]
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
        text += "\n"
        for heading, names in (("### User", PARTS[:2]), ("### Agent", PARTS[2:])):
            values = [exchange[name] for name in names if name in parts]
            written = [each.lower() if isinstance(each, str) else units_as_text(each) for each in values]
            if written:
                text += f"{heading}\n{'<|correspond|>'.join(written)}\n"
    return text


def units_as_text(units):
    return "".join(f"<|unit{unit}|>" for unit in units)


@pytest.fixture(scope="module")
def tokenizers(small_tokenizer):
    return {"reference": small_tokenizer, "separate": add_units(byte_level(), 20, "base")}


@pytest.fixture(scope="module")
def make_encoder(tokenizers):
    @functools.cache
    def make(tokenization, parts, loss=None):
        return TemplateEncoder(tokenizers[tokenization], Template(tokenization=tokenization, parts=parts, loss=loss))

    return make


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_ids_equal_those_of_the_whole_string(small_tokenizer, make_encoder, parts):
    encoder = make_encoder("reference", parts)
    for exchanges in ([ROW], [OTHER], [ROW, OTHER, ROW]):
        ids = encoder(batch(*exchanges))["input_ids"][0].tolist()
        text = as_string(parts, exchanges) + "</s>"
        assert ids == small_tokenizer(text).input_ids
        assert encoder.decode(ids) == text


WORDS = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="▁<|"), min_size=1, max_size=12)
WORDS = WORDS.filter(str.strip)
VALUES = {
    part: WORDS if part.endswith("_text") else st.lists(st.integers(0, 19), min_size=1, max_size=4) for part in PARTS
}


@settings(max_examples=60, deadline=None)
@given(parts=st.sampled_from(SUBSETS), exchanges=st.lists(st.fixed_dictionaries(VALUES), min_size=1, max_size=3))
def test_any_text_comes_back_in_both_forms_of_tokenization(make_encoder, tokenizers, parts, exchanges):
    for tokenization, tokenizer in tokenizers.items():
        encoder = make_encoder(tokenization, parts)
        ids = encoder(batch(*exchanges))["input_ids"][0].tolist()
        assert encoder.decode(ids) == as_string(parts, exchanges) + tokenizer.eos_token
        history, last = [[each[part] for part in parts] for each in exchanges[:-1]], exchanges[-1]
        for number in range(1, len(parts)):
            prompt = encoder.prompt(**{part: last[part] for part in parts[:number]}, history=history).tolist()
            assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("tokenization", ["reference", "separate"])
@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_every_generated_part_is_labelled_and_has_a_step(make_encoder, parts, tokenization):
    encoder = make_encoder(tokenization, parts)
    ids, labels = ids_and_labels(encoder, batch(ROW))
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


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_the_part_of_each_token_is_found_from_the_ids(make_encoder, parts):
    for tokenization in ("reference", "separate"):
        encoder = make_encoder(tokenization, parts)
        encoded = encoder(batch(ROW, OTHER))
        ids, labelled = encoded["input_ids"][0], encoded["labels"][0] != -100
        found = np.array(list(ROW_PARTS))[find_parts(ids, encoder.layout)]
        assert np.isin(found, parts[1:]).tolist() == labelled.tolist()
        units = [encoder.tokens.unit_0 + unit for unit in [5, 5, 7, 9]] if "user_units" in parts else []
        assert ids[(found == "user_units") & encoder.layout.is_unit(ids)].tolist() == units
    for part in parts[1:]:  # a loss in one part of the separate form
        assert (found == part).tolist() == (
            make_encoder("separate", parts, (part,))(batch(ROW, OTHER))["labels"][0] != -100
        ).tolist()


def test_speech_ends_with_correspond_and_the_rest_is_frame(make_encoder):
    ids = make_encoder("reference", PARTS)(batch(ROW))["input_ids"][0].tolist()
    parts = find_parts(ids).tolist()
    assert [token for token, part in zip(ids, parts, strict=True) if part == 1] == [32_007, 32_007, 32_009, CORRESPOND]
    assert parts[0] == parts[-1] == parts[-2] == 0


# The column that a preset teaches, and the prompt for ROW.
TAUGHT = {
    "asr": ("user_text", "### User\n<|unit5|><|unit5|><|unit7|><|correspond|>"),
    "s2t": ("agent_text", "### User\n<|unit5|><|unit5|><|unit7|>\n### Agent\n"),
    "t2t": ("agent_text", "### User\nwhat? \n### Agent\n"),
    "tts": ("agent_units", "### Agent\n### agent<|correspond|>"),
}


@pytest.mark.parametrize("name", TAUGHT)
def test_preset_gives_and_teaches_what_its_task_says(rows, small_tokenizer, name):
    column, prompt = TAUGHT[name]
    encoder = TemplateEncoder(small_tokenizer, preset(name))
    for labels, value in zip(encoder({part: rows[part][:] for part in PARTS})["labels"], rows[column], strict=True):
        *ids, stop = labels[labels != -100].tolist()
        if column == "agent_units":
            assert ([token_id - UNIT_0 for token_id in ids], stop) == (list(value), SPACE)
        else:
            assert (small_tokenizer.decode(ids), stop) == (value.lower(), NEWLINE)
    part = encoder.template.parts[0]
    assert encoder.decode(encoder.prompt(**{part: ROW[part]})) == f"{encoder.template.instruction}\n{prompt}"


@pytest.fixture(scope="module")
def rows(dataset_folder):
    return load_dataset(str(dataset_folder), split="train")


def test_presets_have_instructions_of_their_own():
    files = sorted((REPOSITORY / "configs" / "templates").glob("*.yaml"))
    presets = {file.stem: preset(file.stem) for file in files}
    assert list(presets) == list(TAUGHT)
    assert len({each.instruction for each in presets.values()} | {REFERENCE.instruction}) == 5
    for each in presets.values():  # the loss is the default
        assert each == Template(instruction=each.instruction, parts=each.parts)


def test_loss_follows_the_parts():
    assert Template(parts=["user_text", "user_units"]).loss == ("user_text",)
    assert Template(parts=PARTS[::-1]) == REFERENCE == Template(loss=PARTS[1:])
    assert dataclasses.replace(REFERENCE, parts=("agent_text", "agent_units"), loss=None).loss == ("agent_units",)
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
        assert ids_and_labels(copy, batch(ROW)) == ids_and_labels(encoder, batch(ROW))


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
def test_prompts_that_a_template_does_not_have_are_refused(make_encoder, parts, given, message):
    with pytest.raises(ValueError, match=message):
        make_encoder("reference", parts).prompt(**given)
