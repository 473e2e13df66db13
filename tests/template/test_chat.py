"""The template in the chat form: `tokenization="chat"`."""

import functools
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.bases import BASES
from tests.chat_templates import CHAT_ML, HEADERS, PLAIN, THINKING
from tests.helpers import REPOSITORY, ids_and_labels
from tests.template.rendering import render, stand_for
from usdm_sft.template import chat_render
from usdm_sft.template.config import LABELS, PARTS, Template
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.parts import ROW_PARTS, find_parts
from usdm_sft.template.tokenizer import add_units
from usdm_sft.template.view import format_example
from usdm_sft.training import StepLogitsProcessor, next_prompt

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


def row_of(number):
    return {name: [value] * number for name, value in ROW.items()}


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


STYLES = {"ml": CHAT_ML, "headers": HEADERS, "thinking": THINKING}


@pytest.fixture(scope="module", params=itertools.product(BASES, STYLES), ids="-".join)
def tokenizer(request):
    base, style = request.param
    return make_tokenizer(base, STYLES[style])


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return TemplateEncoder(tokenizer, CHAT)


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_ids_and_labels_are_those_of_the_rendered_chat(tokenizer, encoder, number):
    messages = messages_by_hand(number)
    fixed = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    text = tokenizer.apply_chat_template(messages, chat_template=fixed, tokenize=False)
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    expected = by_offsets(tokenizer, text, contents, STOPS[tokenizer.chat_template])
    assert ids_and_labels(encoder, rows_of(number)) == expected
    assert render(row_of(number), encoder) == text


@pytest.mark.parametrize("number", [1, 3])
def test_labels_are_the_assistant_mask_of_transformers(number):
    tokenizer = make_tokenizer()
    chat = tokenizer.apply_chat_template(messages_by_hand(number), return_dict=True, return_assistant_tokens_mask=True)
    encoder = TemplateEncoder(tokenizer, CHAT)
    ids, labels = ids_and_labels(encoder, rows_of(number))
    assert ids == chat["input_ids"]
    assert [label != -100 for label in labels] == [bool(mask) for mask in chat["assistant_masks"]]
    assert sum(chat["assistant_masks"]) > 10 * number
    assert encoder.decode(ids) == render(row_of(number), encoder)


def test_template_without_a_system_message():
    tokenizer = make_tokenizer(chat_template=PLAIN)
    encoder = TemplateEncoder(tokenizer, Template(tokenization="chat", instruction=""))
    messages = messages_by_hand(3, system=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.startswith("<s>[INST]<|unit3|>") and "<|correspond|>[/INST]where were you?" in text
    expected = by_offsets(tokenizer, text, [message["content"] for message in messages[1::2]], "</s>")
    assert ids_and_labels(encoder, rows_of(3)) == expected


@pytest.mark.parametrize(
    "parts", [parts for k in (2, 3, 4) for parts in itertools.combinations(PARTS, k)], ids=",".join
)
def test_first_part_is_the_users_and_the_rest_the_assistants(tokenizer, parts):
    written = {"user_units": units([3, 3, 5]), "user_text": "where were you?", "agent_text": "at home.", "agent_units": units([19, 0])}  # fmt: skip
    user, answer = written[parts[0]], written[parts[1]]
    if parts[0].split("_")[0] == parts[1].split("_")[0]:
        user += "<|correspond|>"
    for before, part in itertools.pairwise(parts[1:]):
        answer += ("<|correspond|>" if before[0] == part[0] else "<|continue|>") + written[part]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}] * 2
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoder = TemplateEncoder(tokenizer, Template(tokenization="chat", instruction="", parts=parts))
    ids, labels = ids_and_labels(encoder, rows_of(2))
    assert (ids, labels) == by_offsets(tokenizer, text, [answer] * 2, STOPS[tokenizer.chat_template])
    for part in parts[1:]:
        one = TemplateEncoder(tokenizer, Template(tokenization="chat", instruction="", parts=parts, loss=(part,)))
        found = [list(ROW_PARTS)[index] for index in find_parts(ids, one.layout)]
        assert [label != -100 for label in ids_and_labels(one, rows_of(2))[1]] == [name == part for name in found]
    indexes = {index for index in find_parts(ids, encoder.layout) if index}
    assert {ROW_PARTS[name] for name in parts} == {list(ROW_PARTS.values())[index] for index in indexes}


def test_last_exchange_alone_is_labelled(tokenizer, encoder):
    (ids, whole), (same_ids, last) = (
        ids_and_labels(each, rows_of(3))
        for each in (encoder, TemplateEncoder(tokenizer, CHAT, last_exchange_only=True))
    )
    assert ids == same_ids
    labelled = [[label for label in labels if label != -100] for labels in (whole, last)]
    assert labelled[0] == labelled[1] * 3
    start = len(last) - len(ids_and_labels(encoder, rows_of(1))[1])
    assert set(last[:start]) == {-100}


def test_prompts_are_prefixes_and_each_step_ends_in_one_known_id(tokenizer, encoder):
    ids, labels = ids_and_labels(encoder, rows_of(2))
    history = [tuple(ROW.values())]
    stops = tokenizer.convert_tokens_to_ids(["<|continue|>", "<|correspond|>", STOPS[tokenizer.chat_template]])
    assert [step.stop_id for step in encoder.steps] == stops
    assert [step.name for step in encoder.steps] == ["transcript", "answer", "speech"]
    prompt = encoder.prompt(ROW["user_units"], history=history).tolist()
    for step, number in zip(encoder.steps, (1, 2, 3), strict=True):
        assert encoder.prompt(*list(ROW.values())[:number], history=history).tolist() == prompt
        assert ids[: len(prompt)] == prompt
        stop = ids.index(step.stop_id, len(prompt))
        generated = ids[len(prompt) : stop + 1]
        assert labels[len(prompt) : stop + 1] == generated
        scores = StepLogitsProcessor(step)(None, torch.zeros(1, len(tokenizer)))[0]
        assert torch.isfinite(scores[generated]).all()
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        unit_ids = set(range(encoder.tokens.unit_0, encoder.tokens.unit_0 + 20))
        allowed = {int(i) for i in torch.isfinite(scores).nonzero()} & added
        assert allowed == {step.stop_id} | (unit_ids if step.name == "speech" else set())
        prompt = next_prompt(step, torch.tensor([prompt]), torch.tensor(generated))[0].tolist()
    assert ids[: len(prompt)] == prompt
    empty = encoder.prompt(ROW["user_units"], "").tolist()
    assert empty == [*encoder.prompt(ROW["user_units"]).tolist(), stops[0]]


def test_prompt_is_the_generation_prompt_of_the_template():
    tokenizer = make_tokenizer()
    messages = messages_by_hand(2)[:-1]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    encoder = TemplateEncoder(tokenizer, CHAT)
    assert encoder.prompt(ROW["user_units"], history=[tuple(ROW.values())]).tolist() == expected


def test_encoder_survives_pickling(encoder):
    copy = pickle.loads(pickle.dumps(encoder))
    assert ids_and_labels(copy, rows_of(2)) == ids_and_labels(encoder, rows_of(2))
    assert (copy.key, copy.steps, copy.layout) == (encoder.key, encoder.steps, encoder.layout)


def test_key_depends_on_the_chat_template():
    first, second = (TemplateEncoder(make_tokenizer(chat_template=each), CHAT).key for each in (CHAT_ML, THINKING))
    assert first != second


WORDS = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="▁"), min_size=1, max_size=12)
UNITS = st.lists(st.integers(0, 19), max_size=6)


@settings(max_examples=150, deadline=None)
@given(row=st.lists(st.tuples(UNITS, WORDS, WORDS, UNITS), min_size=1, max_size=3))
def test_ids_of_any_text_are_those_of_the_whole_string(row):
    encoder = chat_ml_encoder()
    batch = {name: [list(values)] for name, values in zip(PARTS, zip(*row, strict=True), strict=True)}
    try:
        ids, labels = ids_and_labels(encoder, batch)
    except ValueError as error:
        assert any(reason in str(error) for reason in ("special token", "white space", "added token"))
        return
    text = render({name: values[0] for name, values in batch.items()}, encoder)
    assert stand_for([ids], [text], encoder) == [True]
    assert encoder.decode(ids) == text
    names = [list(ROW_PARTS)[part] for part in find_parts(ids, encoder.layout)]
    assert [label != -100 for label in labels] == [name in LABELS for name in names]
    prompt = encoder.prompt(*row[-1][:3], history=row[:-1]).tolist()
    assert ids[: len(prompt)] == prompt


@functools.cache
def chat_ml_encoder():
    return TemplateEncoder(make_tokenizer(), CHAT)


@pytest.mark.parametrize(
    ("chat_template", "template", "message"),
    [
        (None, {}, "this tokenizer has no chat template: name the tokenizer of a chat model, or use template.tokenization sep"),
        (PLAIN, {}, r"refuses a conversation \(no system message, please\): if it takes no system message, set template.instr"),
        ("{{ messages[0].name.first }}", {}, "refuses a conversation .*: if it takes no system"),
        ("{{ 1 / 0 }}", {}, r"refuses a conversation \(division by zero\)"),
        (HEADERS.replace("'%d %b %Y'", "message.format"), {}, "formats the time in a way that cannot be fixed: write a date"),
        (CHAT_ML.replace("message in messages", "message in messages[:3]"), {}, "leaves out a message or repeats one"),
        (CHAT_ML.replace("'\\n' }}\n{%- endfor", "'\\n' * messages | length }}\n{%- endfor"), {}, "puts different words around an exchange"),
        (CHAT_ML.replace("{{- '<|im_start|>'", "{{- 'x' if messages | length < 4 }}{{- '<|im_start|>'", 1), {}, "puts different words around an exchange"),
        (CHAT_ML.replace("message.content +", "message.content | replace(',', ';') +"), {}, "changes the messages: use template.tokenization"),
        (CHAT_ML.replace("message.role == 'assistant'", "message.role == 'user'"), {}, r"marks other text as generated .*correct its \{% generation %\}"),
        (CHAT_ML.replace("if message.role == 'assistant'", "if message.role != 'system'"), {}, "marks other text as generated"),
        (CHAT_ML.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>model' }}"), {}, r"begins an answer with '.*model', but in a whole conversation with"),
        (CHAT_ML.replace("<|im_end|>", "(over)"), {}, r"does not end every answer with the same special token \(but with '.*'\)"),
        (PLAIN.replace("[/INST]", "[/INST] "), {"instruction": ""}, r"puts words before a text that become one token with it \('.*\[/INST\] '\): use template"),
        (PLAIN, {"instruction": "", "parts": ("user_text", "agent_text")}, "does not end a message of the user with a special token"),
    ],
)  # fmt: skip
def test_chat_template_that_the_form_cannot_use_is_refused(chat_template, template, message):
    with pytest.raises(ValueError, match=message):
        TemplateEncoder(make_tokenizer(chat_template=chat_template), Template(tokenization="chat", **template))


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MACROS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}"


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (LOOPS, r"refuses a conversation \(it takes more than 1 seconds\)"),
        (MACROS, r"refuses a conversation \(it takes more than 1 seconds\)"),
        ("{{ 'a' * 10**10 * messages | length }}", r"refuses a conversation \(MemoryError\)"),
        ("{{ 'a' * 3000000 * messages | length }}", r"\(its text has [\d,]+ characters, more than 1,00\d,\d{3}\)"),
    ],
)
def test_chat_template_is_rendered_with_a_bound(monkeypatch, hostile, message):
    monkeypatch.setattr(chat_render, "SECONDS", 1.0)
    with pytest.raises(ValueError, match=message):
        TemplateEncoder(make_tokenizer(chat_template=hostile + CHAT_ML), CHAT)
    monkeypatch.undo()
    TemplateEncoder(make_tokenizer(), CHAT)  # the next one is not disturbed


def test_chat_template_that_harms_long_conversations_only(monkeypatch):
    source = f"{{% if messages | length > 9 %}}{LOOPS}{{% endif %}}{CHAT_ML}"
    encoder = TemplateEncoder(make_tokenizer(chat_template=source), CHAT)
    monkeypatch.setattr(chat_render, "SECONDS", 1.0)
    with pytest.raises(ValueError, match="it takes more than 1 seconds"):
        render(row_of(6), encoder)


def test_white_space_that_the_template_removes_is_refused():
    template = Template(tokenization="chat", instruction="", parts=("user_text", "agent_text"))
    encoder = TemplateEncoder(make_tokenizer(chat_template=HEADERS), template)
    message = r"row 0 of the batch: .*_text ' ?hello ?' does not stay as it is in the chat template"
    for name, text in itertools.product(("user_text", "agent_text"), (" hello", "hello ")):
        with pytest.raises(ValueError, match=message):
            encoder({column: [value] for column, value in (ROW | {name: text}).items()})
    kept = TemplateEncoder(make_tokenizer(), template)
    ids, _ = ids_and_labels(kept, {name: [value] for name, value in (ROW | {"user_text": " hello "}).items()})
    assert " hello <|im_end|>" in kept.decode(ids)


def test_text_that_melts_into_the_words_before_it_is_refused():
    tokenizer = make_tokenizer(chat_template=PLAIN.replace("[/INST]", "[/INST]wher"))
    encoder = TemplateEncoder(tokenizer, Template(tokenization="chat", instruction=""))
    message = r"user_text 'e you' does not stay as it is in the chat template, which .*: correct the text"
    with pytest.raises(ValueError, match=message):
        encoder({name: [value] for name, value in (ROW | {"user_text": "e you"}).items()})


def test_instruction_and_roles_that_a_chat_cannot_hold():
    message = r"template.instruction '日本' has characters that the tokenizer does not know: c"
    with pytest.raises(ValueError, match=message):
        TemplateEncoder(make_tokenizer("unigram"), Template(tokenization="chat", instruction="日本"))
    message = "user_role and agent_role are not in a chat template, whose roles are user and"
    with pytest.raises(ValueError, match=message):
        Template(tokenization="chat", agent_role="Robot")


@pytest.mark.parametrize("name", ["gemma3", "llama3", "llama3_2", "phi3", "qwen2_5", "qwen3"])
def test_published_chat_templates(name):
    """Those that TRL ships, as published and with marks of the generated text."""
    trl = pytest.importorskip("trl", reason="needs the extra 'train'")
    for file in (f"{name}.jinja", f"{name}_training.jinja"):
        path = Path(trl.__file__).parent / "chat_templates" / file
        if not path.is_file():  # Llama 3.2's has no marks
            continue
        tokenizer = make_tokenizer(chat_template=path.read_text())
        written = {*re.findall(r"<\|\w+\|>|</?[a-z]+_of_turn>", tokenizer.chat_template)}
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in sorted(written)], special_tokens=True)
        encoder = TemplateEncoder(tokenizer, CHAT)
        for number in (1, 2, 5):
            ids, labels = ids_and_labels(encoder, rows_of(number))
            text = render(row_of(number), encoder)
            assert stand_for([ids], [text], encoder) == [True]
            assert "where were you?<|continue|>at home." in text
            if "{% generation %}" in tokenizer.chat_template:
                chat = tokenizer.apply_chat_template(
                    messages_by_hand(number), return_dict=True, return_assistant_tokens_mask=True
                )
                assert chat["input_ids"] == ids
                mask = chat["assistant_masks"]
                assert all(mask[i] for i, label in enumerate(labels) if label != -100)


def test_example_in_the_documentation_is_what_show_prints():
    tokenizer = make_tokenizer()
    row = ROW | {"user_units": [3, 3, 5, 5, 5, 7], "agent_units": [19, 0, 1, 1, 1, 2, 2]}
    ids, labels = ids_and_labels(TemplateEncoder(tokenizer, CHAT), {name: [value] for name, value in row.items()})
    shown = format_example({"id": "d1_0", "input_ids": ids, "labels": labels}, tokenizer.backend_tokenizer, color=False)
    _, example = shown.split("\n", 1)
    assert f"```text\n{example}\n```" in (REPOSITORY / "docs/training/other-models.md").read_text()
