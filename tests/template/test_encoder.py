import json
import re

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer

from tests.helpers import FIXTURES
from usdm_sft.corpus.problems import CorpusError
from usdm_sft.corpus.read import read_corpus
from usdm_sft.template.encoder import COLUMNS, TemplateEncoder

ROW = {"user_units": [6129, 1666, 3785], "user_text": "What? You want to leave early?", "agent_text": "yes. can I?",
       "agent_units": [226, 4372, 2533]}  # fmt: skip


def columns(*rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def pair_columns(pairs, units):
    return {
        "id": [user.id for user, _ in pairs],
        "user_units": [units[user.id]["units"] for user, _ in pairs],
        "user_text": [user.text for user, _ in pairs],
        "agent_text": [agent.text for _, agent in pairs],
        "agent_units": [units[agent.id]["units"] for _, agent in pairs],
    }


def lines(encoded, max_length=8192):
    """The rows in the format of the reference's train.txt."""
    return [
        " ".join(map(str, ids)) + "|" + " ".join(map(str, labels))
        for ids, labels in zip(encoded["input_ids"], encoded["labels"], strict=True)
        if len(ids) <= max_length
    ]


@pytest.mark.oracle
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_line_equals_the_reference(encoder, shared, split):
    folder = shared / "oracle" / "tokens"
    units = json.loads((folder / "utterances.json").read_text())
    corpus = read_corpus({name: folder / "raw" / f"{name}.txt" for name in ("train", "test")})
    pairs = [pair for dialog in corpus[split].dialogs for pair in dialog.pairs()]
    expected = (folder / "out" / f"{split}.txt").read_text().split("\n")
    assert sorted(lines(encoder(pair_columns(pairs, units)))) == sorted(expected)
    assert len(expected) == {"train": 292, "test": 58}[split]


def test_edge_dialogs_equal_the_reference(encoder, tmp_path):
    folder = FIXTURES / "tokens-edge"
    units = json.loads((folder / "utterances.json").read_text())
    expected, dialogs = {}, {}
    for split in ("train", "test"):
        expected[split] = (folder / "out" / f"{split}.txt").read_text(encoding="utf-8").split("\n")
        with open(folder / "raw" / f"{split}.txt", encoding="utf-8", newline="\n") as raw:
            for line in raw:
                dialog = re.search(r"_(d\d+)\|", line)[1]
                dialogs.setdefault(dialog, {}).setdefault(split, []).append(line)
    refused, equal = set(), 0
    for dialog, splits in dialogs.items():
        for split, dialog_lines in splits.items():
            (tmp_path / split).write_text("".join(dialog_lines), encoding="utf-8", newline="")
        try:
            corpus = read_corpus({split: tmp_path / split for split in splits})
        except CorpusError:
            refused.add(dialog)
            continue
        for split in splits:
            pairs = [pair for each in corpus[split].dialogs for pair in each.pairs()]
            for line in lines(encoder(pair_columns(pairs, units))) if pairs else []:
                expected[split].remove(line)
                equal += 1
    assert refused == {"d9006", "d9007", "d9008", "d9010", "d9016", "d9017", "d9018"}
    assert equal == 32  # of 45; the others come from refused dialogs


def test_conversations_equal_the_reference(encoder):
    examples = [json.loads(line) for line in (FIXTURES / "multi-turn" / "examples.jsonl").read_text().splitlines()]
    rows = [{name: [exchange[name] for exchange in e["exchanges"]] for name in COLUMNS} for e in examples]
    encoded = encoder(columns(*rows))
    assert [ids.tolist() for ids in encoded["input_ids"]] == [example["input_ids"] for example in examples]
    assert [labels.tolist() for labels in encoded["labels"]] == [example["labels"] for example in examples]
    assert {len(example["exchanges"]) for example in examples} == {1, 2}


def test_texts_agent_units_and_stop_tokens_are_labelled(encoder, tokenizer):
    encoded = encoder(columns(ROW))
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    assert ids.dtype == labels.dtype == np.int32
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    user = ["▁what", "?", "▁you", "▁want", "▁to", "▁leave", "▁early", "?", "<0x0A>"]
    agent = ["yes", ".", "▁can", "▁i", "?", "<|correspond|>", "<|unit226|>", "<|unit4372|>", "<|unit2533|>", "▁"]
    start = tokens.index("▁what")
    agent_start = start + len(user) + 3  # ### ▁Agent <0x0A>
    assert [token for token, label in zip(tokens, labels, strict=True) if label != -100] == user + agent
    assert labels[start : start + len(user)].tolist() == ids[start : start + len(user)].tolist()
    assert (
        labels[agent_start : agent_start + len(agent)].tolist() == ids[agent_start : agent_start + len(agent)].tolist()
    )
    assert tokens[-2:] == ["<0x0A>", "</s>"]


def test_decode_gives_the_text_that_tokenizes_to_the_ids(encoder, tokenizer):
    ids = encoder(columns(ROW))["input_ids"][0]
    text = encoder.decode(ids)
    assert text.endswith(
        "\n### User\n<|unit6129|><|unit1666|><|unit3785|><|correspond|>what? you want to leave early?\n"
        "### Agent\nyes. can i?<|correspond|><|unit226|><|unit4372|><|unit2533|>\n</s>"
    )
    assert tokenizer(text).input_ids == ids.tolist()


def test_each_row_of_a_batch_decodes_to_its_own_text(encoder):
    second = {"user_units": [5], "user_text": "why?", "agent_text": "no.", "agent_units": [7, 5]}
    texts = encoder.decode_batch(encoder(columns(ROW, second, ROW))["input_ids"])
    assert texts[1].endswith(
        "\n### User\n<|unit5|><|correspond|>why?\n### Agent\nno.<|correspond|><|unit7|><|unit5|>\n</s>"
    )
    assert [texts[0], texts[2]] == [encoder.decode(encoder(columns(ROW))["input_ids"][0])] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_text": ""}, r"row 0 of the batch: user_text '' is empty or white space only: correct the text"),
        ({"agent_text": "a\tb"}, r"row 0 of the batch: agent_text 'a\\tb' holds the control character"),
        ({"id": "d1_0", "agent_text": "go <|unit5|>"}, r"row d1_0: agent_text .*holds '<\|', which is part of a special"),
        ({"user_units": [3, 10_000]}, r"user_units contains unit 10000, but the tokenizer has units 0 to 9999"),
        ({"agent_units": [-1]}, "agent_units contains unit -1"),
        ({"agent_units": [0.5]}, "agent_units is not a flat list of integers"),
        ({"id": "d1_0", "user_text": None}, "row d1_0: user_text is missing"),
        ({"user_text": [], "agent_text": [], "user_units": [], "agent_units": []}, "row 0 of the batch: it has no exchange"),
        ({"user_text": ["a", "b"], "agent_text": ["c"], "user_units": [[1]], "agent_units": [[1]]},
         r"the columns have different numbers of exchanges \(user_units 1, user_text 2, agent_text 1, agent_units 1\)"),
    ],
)  # fmt: skip
def test_invalid_rows_are_refused(encoder, change, message):
    with pytest.raises(ValueError, match=message):
        encoder(columns(ROW | change))


def test_other_added_tokens_are_refused_and_quoted(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken("[laughs]", normalized=False)])
    encoder = TemplateEncoder(backend)
    with pytest.raises(
        ValueError, match=r"user_text 'ha \[laughs\]' contains '\[laughs\]', an added token of the tokenizer: correct"
    ):
        encoder(columns(ROW | {"user_text": "ha [LAUGHS]"}))


def test_a_lower_one_eighth_block_comes_back_as_a_space(encoder):
    ids = encoder(columns(ROW | {"user_text": "a▁b"}))["input_ids"][0]
    assert "<|correspond|>a b\n" in encoder.decode(ids)


def test_long_rows_are_encoded_whole(encoder):
    encoded = encoder(columns(ROW | {"agent_units": [7] * 20_000}))
    assert len(encoded["input_ids"][0]) == len(encoder(columns(ROW))["input_ids"][0]) - 3 + 20_000


def test_truncation_and_padding_of_the_caller_are_ignored(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert lines(TemplateEncoder(backend)(columns(ROW))) == lines(TemplateEncoder(tokenizer)(columns(ROW)))


@pytest.mark.parametrize("streaming", [False, True])
def test_map_gives_the_same_rows(encoder, streaming):
    dataset = Dataset.from_dict(columns(ROW, ROW | {"user_text": "hm."}))
    if streaming:
        dataset = dataset.to_iterable_dataset()
    rows = list(dataset.map(encoder, batched=True))
    expected = encoder(columns(ROW, ROW | {"user_text": "hm."}))["input_ids"]
    assert [list(row["input_ids"]) for row in rows] == [ids.tolist() for ids in expected]
    if not streaming:
        assert dataset.map(encoder, batched=True).features["labels"].feature.dtype == "int32"
