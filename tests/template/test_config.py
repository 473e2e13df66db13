import json
import pickle
from dataclasses import replace

import pytest
import torch
import yaml
from datasets.fingerprint import Hasher
from tokenizers import AddedToken, Tokenizer

from tests.bases import byte_level
from tests.helpers import FIXTURES, REPOSITORY, ids_and_labels
from usdm_sft.template.config import LABELS, REFERENCE, Template
from usdm_sft.template.encoder import COLUMNS, TemplateEncoder
from usdm_sft.template.tokenizer import add_units
from usdm_sft.training import REFERENCE_STAGES, next_prompt

EXAMPLES = [json.loads(line) for line in (FIXTURES / "multi-turn" / "examples.jsonl").read_text().splitlines()]
BATCH = {name: [[exchange[name] for exchange in e["exchanges"]] for e in EXAMPLES] for name in COLUMNS}
NEWLINE, CORRESPOND = 13, 32001


def parts_of(ids, header):
    """The part of each token after the header, found from the newlines and <|correspond|> alone."""
    found, position = [None] * header, header
    while len(found) < len(ids):
        for end, part in [
            (CORRESPOND, None),  # the user's units
            (NEWLINE, "user_text"),
            (NEWLINE, None),  # the agent's heading
            (CORRESPOND, "agent_text"),
            (NEWLINE, "agent_units"),  # all but the newline itself
        ]:
            stop = ids.index(end, position) + 1
            found += [part] * (stop - position)
            position = stop
        found[-1] = None
        for _ in range(2 if position < len(ids) - 1 else 0):  # "\n### User\n"
            stop = ids.index(NEWLINE, position) + 1
            found += [None] * (stop - position)
            position = stop
        if position == len(ids) - 1:  # </s>
            found.append(None)
    return found


def labels_of(ids, header, loss, exchanges=None):
    """Labels in the parts of `loss` only, and in the last `exchanges` exchanges only if that is given."""
    parts = parts_of(ids, header)
    if exchanges is not None:
        starts = [k for k in range(len(ids)) if parts[k] == "user_text" and parts[k - 1] is None]
        parts = [None] * starts[-exchanges] + parts[starts[-exchanges] :]
    return [i if part in loss else -100 for i, part in zip(ids, parts, strict=True)]


@pytest.fixture(scope="module")
def header(encoder):
    return len(encoder.prompt([])) - 1  # without the <|correspond|> after it


@pytest.mark.parametrize(
    "loss",
    [["agent_text"], ["agent_units", "user_text"], LABELS],
)
def test_each_loss_has_the_labels_of_the_reference_in_its_parts(tokenizer, header, loss):
    encoded = TemplateEncoder(tokenizer, Template(loss=loss))(BATCH)
    for ids, labels, example in zip(encoded["input_ids"], encoded["labels"], EXAMPLES, strict=True):
        assert ids.tolist() == example["input_ids"]
        assert labels_of(example["input_ids"], header, LABELS) == example["labels"]
        assert labels.tolist() == labels_of(example["input_ids"], header, loss)
        assert {*labels.tolist()} > {-100}


def test_stop_tokens_are_labelled_with_their_parts(small_tokenizer):
    batch = {"user_units": [[1]], "user_text": ["no"], "agent_text": ["yes"], "agent_units": [[2, 3]]}
    encoders = {part: TemplateEncoder(small_tokenizer, Template(loss=[part])) for part in LABELS}
    labels = {part: ids_and_labels(encoder, batch)[1][-13:] for part, encoder in encoders.items()}
    assert labels == {
        #            no   \n | ### Agent \n | yes   <|correspond|> <|unit2|> <|unit3|> ▁ | \n </s>
        "user_text": [-100, 708, 13, *[-100] * 10],
        "agent_text": [*[-100] * 6, 9780, 32001, *[-100] * 5],
        "agent_units": [*[-100] * 8, 32004, 32005, 28705, -100, -100],
    }


def test_labels_in_the_last_exchange_only(tokenizer, header):
    encoded = TemplateEncoder(tokenizer, last_exchange_only=True)(BATCH)
    for ids, labels, example in zip(encoded["input_ids"], encoded["labels"], EXAMPLES, strict=True):
        assert ids.tolist() == example["input_ids"]
        assert labels.tolist() == labels_of(example["input_ids"], header, LABELS, exchanges=1)
        assert (labels.tolist() == example["labels"]) == (len(example["exchanges"]) == 1)


TEMPLATES = [
    Template(user_role="Customer", agent_role="Call Centre"),
    Template(user_role="Q:", agent_role=" A "),
    Template(user_role="用户", agent_role="Ünï 🤖"),
    Template(instruction=""),
    Template(instruction="\n\n  two lines,\nno newline at the end"),
    Template(instruction="Transcribe.\n", agent_role="#"),
]
TEXTS = ["what?", " a  leading space", "é", "🤖 robot", "### agent", "user", "..."]


def as_string(template, exchanges):
    """The string of a row that the reference tokenizes."""
    text = template.instruction
    for user_units, user_text, agent_text, agent_units in exchanges:
        user, agent = ("".join(f"<|unit{unit}|>" for unit in units) for units in (user_units, agent_units))
        text += f"\n### {template.user_role}\n{user}<|correspond|>{user_text}"
        text += f"\n### {template.agent_role}\n{agent_text}<|correspond|>{agent}\n"
    return text + "</s>"


@pytest.mark.parametrize("template", [REFERENCE, *TEMPLATES])
def test_ids_and_prompts_are_those_of_the_whole_string(small_tokenizer, template):
    encoder = TemplateEncoder(small_tokenizer, template)
    header = len(encoder.prompt([])) - 1
    for user_text in TEXTS:
        exchanges = [([5, 6], user_text, agent_text, [7]) for agent_text in TEXTS]
        for row in (exchanges[:1], exchanges):
            batch = {name: [list(values)] for name, values in zip(COLUMNS, zip(*row, strict=True), strict=True)}
            ids, labels = ids_and_labels(encoder, batch)
            assert ids == small_tokenizer(as_string(template, row)).input_ids
            assert labels == labels_of(ids, header, LABELS)
            assert encoder.decode(ids) == as_string(template, row)
            prompts = [encoder.prompt(*row[-1][:number], history=row[:-1]).tolist() for number in (1, 2, 3)]
            assert [ids[: len(prompt)] for prompt in prompts] == prompts
    generated = ids[len(prompts[0]) : ids.index(NEWLINE, len(prompts[0])) + 1]
    after = next_prompt(encoder.steps[0], torch.tensor(prompts[0])[None], torch.tensor(generated))
    assert after[0].tolist() == prompts[1]


@pytest.mark.parametrize("lowercase", [True, False])
def test_case_of_texts(small_tokenizer, lowercase):
    template = Template(lowercase=lowercase)
    encoder = TemplateEncoder(small_tokenizer, template)
    row = ([5], "Where WERE you?", "At Home. ÉT", [7])
    read = tuple(each.lower() if lowercase and isinstance(each, str) else each for each in row)
    ids = encoder({name: [value] for name, value in zip(COLUMNS, row, strict=True)})["input_ids"][0].tolist()
    assert ids == small_tokenizer(as_string(template, [read])).input_ids
    assert ids[: len(encoder.prompt(*row[:3]))] == encoder.prompt(*row[:3]).tolist()
    assert template.settings().get("lowercase", True) == lowercase and ("lowercase" in template.settings()) != lowercase


def test_stages_of_the_reference_template(encoder):
    assert encoder.steps == REFERENCE_STAGES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": "Say <|unit3|>\n"}, r"template\.instruction holds '<\|', which is part of a special token: remove it"),
        ({"instruction": "a\n\tb\n"}, r"template\.instruction holds the control character '\\t': remove it"),
        ({"user_role": ""}, r"template\.user_role '' is empty or white space only: give one line of plain text"),
        ({"agent_role": "A\nB"}, r"template\.agent_role 'A\\nB' holds the control character '\\n': give one line"),
        ({"agent_role": "</s>"}, r"template\.agent_role '</s>' holds '</s>'"),
        ({"tokenization": "whole"}, r"template\.tokenization is 'whole': give one of reference, separate, chat"),
        ({"lowercase": "no"}, r"template\.lowercase is 'no': give True or False"),
        ({"loss": []}, r"template\.loss is \[\]: give a list of one or more of user_text, agent_text, agent_units, "),
        ({"loss": "user_text"}, r"template\.loss is 'user_text': give a list of .*, such as \[user_text, agent_text\]"),
        ({"loss": ["user_text", "user_units"]}, r"template\.loss contains 'user_units', which cannot be labelled: name one or more of user_text, ag"),
    ],
)  # fmt: skip
def test_invalid_templates_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Template(**change)


@pytest.mark.parametrize("name", ["instruction", "user_role", "agent_role"])
def test_added_tokens_in_the_template_are_refused(small_tokenizer, name):
    backend = Tokenizer.from_str(small_tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("[Bot]", normalized=False)])
    TemplateEncoder(backend, Template(**{name: "Bot"}))
    message = rf"template\.{name} contains '\[Bot\]', an added token of the tokenizer: remove it"
    with pytest.raises(ValueError, match=message):
        TemplateEncoder(backend, Template(**{name: "a [Bot]"}))


def test_fingerprint_and_key_depend_on_the_template():
    """Both survive pickling."""
    tokenizer, template = add_units(byte_level(), 6, "base"), Template(tokenization="separate")
    changes = {"loss": ["user_text"]}, {"user_role": "U"}, {"instruction": ""}, {"lowercase": False}
    templates = template, *(replace(template, **change) for change in changes)
    encoders = [TemplateEncoder(tokenizer, each) for each in templates]
    encoders.append(TemplateEncoder(tokenizer, template, last_exchange_only=True))
    fingerprints = [Hasher.hash(each) for each in encoders]
    assert len(set(fingerprints)) == len({json.dumps(each.key) for each in encoders}) == 6
    texts = {"user_text": [["no", "Why"]], "agent_text": [["yes", "so"]]}
    batch = {"user_units": [[[1], [4]]], **texts, "agent_units": [[[2, 3], [5]]]}
    for each in encoders:
        assert ids_and_labels(pickle.loads(pickle.dumps(each)), batch) == ids_and_labels(each, batch)
    spelled = replace(template, loss=["agent_units", "user_text", "agent_text", "user_text"])
    assert spelled == template and Hasher.hash(TemplateEncoder(tokenizer, spelled)) == fingerprints[0]


def test_single_turn_yaml_has_the_template_of_the_reference():
    written = yaml.safe_load((REPOSITORY / "configs" / "single_turn.yaml").read_text())["template"]
    assert written == {"instruction": REFERENCE.instruction, "user_role": "User", "agent_role": "Agent"}
    assert Template(**written) == REFERENCE
    assert REFERENCE.loss == ("user_text", "agent_text", "agent_units")
