"""The recipes of docs/training/evaluation.md: loss by part, and word error rate of the transcript."""

from itertools import pairwise

import datasets
import pytest
import torch
from transformers import GenerationMixin

from tests.code_blocks import find_code
from tests.helpers import tiny_mistral

PARTS = ["user_text", "agent_text", "agent_units"]
CORRESPOND = 32_001
# For "how was the concert?", "loud, long, and wonderful." and "The Café on Main Street is closed.": no error; a word inserted; one replaced and one
# deleted. These are 3 of 15 words.
WRITTEN = ["how was the concert?", "loud, long, and quite wonderful", "the cafe on street is closed."]


def split_labels(row):
    """Positions of the labelled tokens by part. A gap ends the transcript, and `<|correspond|>` ends the answer."""
    labelled = [place for place, label in enumerate(row["labels"]) if label != -100]
    gap = next(index for index, (a, b) in enumerate(pairwise(labelled), 1) if b > a + 1)
    end = next(index for index in range(gap, len(labelled)) if row["labels"][labelled[index]] == CORRESPOND) + 1
    return dict(zip(PARTS, (labelled[:gap], labelled[gap:end], labelled[end:]), strict=True))


@pytest.fixture
def rows(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return datasets.load_dataset("dailytalk-usdm-data", split="test")


def test_loss_by_part(rows):
    names = {}
    exec(find_code("Template(loss=(part,))"), names)
    model, sums = tiny_mistral().eval(), dict.fromkeys(PARTS, 0.0)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probabilities = model(ids).logits[0].log_softmax(-1)
        for part, places in split_labels(row).items():
            sums[part] -= sum(log_probabilities[place - 1, row["input_ids"][place]].item() for place in places)
    assert names["sums"] == pytest.approx(sums, rel=1e-5)
    assert names["counts"] == {part: sum(len(split_labels(row)[part]) for row in rows) for part in PARTS}
    assert sum(names["counts"].values()) == 352  # "labelled_tokens" of the reference's lines


def test_word_error_rate(rows, tokenizer, monkeypatch, capsys):
    heard = iter(WRITTEN)

    def generate(model, prompt, **options):
        assert options["eos_token_id"] == 13
        text = tokenizer(next(heard) + "\n", add_special_tokens=False, return_tensors="pt").input_ids
        return torch.cat([prompt, text], 1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    names = {}
    exec(find_code("def count_errors"), names)
    assert capsys.readouterr().out.strip() == "word error rate: 20.0% of 15 words"
    count_errors = names["count_errors"]
    assert count_errors("abc", "abc") == 0  # words are letters here
    assert count_errors("abc", "") == 3
    assert count_errors("", "ab") == 2
    assert count_errors("abcd", "xbc") == 2  # one replaced, one deleted
    assert count_errors("bcd", "abcd") == 1  # one inserted
