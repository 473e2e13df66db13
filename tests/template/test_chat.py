"""The template in the chat form: `tokenization="chat"`."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.bases import BASES
from tests.chat_templates import CHAT_ML, HEADERS, PLAIN, THINKING
from usdm_sft.dataset_folder.row_check import render, stand_for
from usdm_sft.template.base import add_units
from usdm_sft.template.config import LABELS, PARTS, Template
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.parts import ROW_PARTS, find_parts
from usdm_sft.training.generation import StepLogitsProcessor, next_prompt

CHAT = Template(tokenization="chat")
ROW = {"user_units": [3, 3, 5], "user_text": "Where were you?", "agent_text": "at home.", "agent_units": [19, 0]}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<think>", "</think>"]  # fmt: skip
STOPS = {CHAT_ML: "<|im_end|>", HEADERS: "<|eot_id|>", THINKING: "<|im_end|>", PLAIN: "</s>"}


def make_tokenizer(base="byte-level", chat_template=CHAT_ML):
    tokenizer = BASES[base]()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.chat_template = chat_template
    return add_units(tokenizer, 20, base)


def rows_of(number):
    """A batch of one row with a number of exchanges."""
    return {name: [[value] * number] for name, value in ROW.items()}


def units(values):
    return "".join(f"<|unit{unit}|>" for unit in values)


def messages_by_hand(number, system=True):
    content = "where were you?<|continue|>at home.<|correspond|><|unit19|><|unit0|>"
    exchange = [
        {"role": "user", "content": "<|unit3|><|unit3|><|unit5|><|correspond|>"},
        {"role": "assistant", "content": content},
    ]
    return [{"role": "system", "content": CHAT.instruction.strip()}] * system + exchange * number


def by_offsets(tokenizer, text, contents, stop):
    """Ids and labels: the tokens inside the contents, and the stop token after each, by their characters."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    spans, start = [], 0
    for content in contents:
        start = text.index(content, start)
        spans.append((start, start := start + len(content) + len(stop)))
        assert text[:start].endswith(stop)
    return encoding.ids, [
        token_id if any(first <= begin and end <= last for first, last in spans) else -100
        for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
    ]


@pytest.fixture(scope="module", params=itertools.product(BASES, (CHAT_ML, HEADERS, THINKING)), ids=lambda p: f"{p[0]}-{['ml', 'headers', 'thinking'][(CHAT_ML, HEADERS, THINKING).index(p[1])]}")  # fmt: skip
def tokenizer(request):
    return make_tokenizer(*request.param)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return TemplateEncoder(tokenizer, CHAT)


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_ids_and_labels_are_those_of_the_rendered_chat(tokenizer, encoder, number):
    encoded = encoder(rows_of(number))
    messages = messages_by_hand(number)
    fixed = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    text = tokenizer.apply_chat_template(messages, chat_template=fixed, tokenize=False)
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    ids, labels = by_offsets(tokenizer, text, contents, STOPS[tokenizer.chat_template])
    assert (encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist()) == (ids, labels)
    assert render({name: values[0] for name, values in rows_of(number).items()}, encoder) == text


@pytest.mark.parametrize("number", [1, 3])
def test_labels_are_the_assistant_mask_of_transformers(number):
    tokenizer = make_tokenizer()
    chat = tokenizer.apply_chat_template(
        messages_by_hand(number), return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = TemplateEncoder(tokenizer, CHAT)(rows_of(number))
    assert encoded["input_ids"][0].tolist() == chat["input_ids"]
    assert (encoded["labels"][0] != -100).tolist() == [bool(mask) for mask in chat["assistant_masks"]]
    assert sum(chat["assistant_masks"]) > 10 * number
