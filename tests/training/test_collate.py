import numpy as np
import pytest
import torch

from tests.helpers import loss_by_hand, tiny_model
from usdm_sft.training import PaddingCollator, PaddingFreeCollator

ROW = {"id": "d1_0", "user_text": "dropped", "user_units": [1]}


@pytest.fixture(scope="module")
def rows(encoder):
    texts = ["yes.", "what did you say?", "i said that it was raining all day."]
    batch = {
        "user_units": [[1, 2, 3], [4], list(range(50))],
        "user_text": texts,
        "agent_text": texts[::-1],
        "agent_units": [[9] * 30, [8, 7], [5, 6]],
    }
    encoded = encoder(batch)
    return [ROW | {name: encoded[name][i].tolist() for name in encoded} for i in range(3)]


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def test_padding(tokenizer, rows):
    batch = PaddingCollator(tokenizer, pad_to_multiple_of=64)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][i].tolist() == row["input_ids"] + [42_002] * (batch["input_ids"].shape[1] - length)
        assert batch["labels"][i, :length].tolist() == row["labels"]
        assert set(batch["labels"][i, length:].tolist()) <= {-100}
        assert batch["attention_mask"][i].sum() == length
    assert batch["input_ids"].shape[1] % 64 == 0


def test_padding_free(rows):
    batch = PaddingFreeCollator(return_flash_attn_kwargs=True)(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    for name in ("input_ids", "labels"):
        assert batch[name].tolist() == [np.concatenate([row[name] for row in rows]).tolist()]
    assert batch["position_ids"].tolist() == [np.concatenate([np.arange(length) for length in lengths]).tolist()]
    assert batch["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths).tolist()]
    assert batch["max_length_q"] == max(lengths)


def test_padding_free_batches_can_be_dispatched(rows):
    """One process reads for all: accelerate concatenates the batches and gives each process its part."""
    operations = pytest.importorskip("accelerate.utils.operations", reason="needs the extra 'train'")
    batches = [PaddingFreeCollator()(rows[:1]) for _ in range(2)]
    whole = operations.concatenate(batches)
    for process, batch in enumerate(batches):
        part = operations.slice_tensors(whole, slice(process, process + 1))
        assert {name: value.tolist() for name, value in part.items()} == {n: v.tolist() for n, v in batch.items()}
    assert not part["use_cache"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_is_that_of_each_row_alone(tokenizer, rows, model, attention):
    model.set_attn_implementation(attention)
    expected = loss_by_hand(model, rows)
    with torch.no_grad():
        assert abs(model(**PaddingCollator(tokenizer)(rows)).loss.item() - expected) < 1e-4
        assert abs(model(**PaddingFreeCollator()(rows)).loss.item() - expected) < 1e-4
        leaky = PaddingFreeCollator()(rows) | {"use_cache": None}
        assert abs(model(**leaky).loss.item() - expected) > 1e-4  # rows attend to each other: why use_cache is set


@pytest.mark.parametrize("collate", [PaddingFreeCollator(), None])
def test_rows_without_labels(tokenizer, rows, collate):
    with pytest.raises(ValueError, match="the rows have no labels: map TemplateEncoder over the dataset first"):
        (collate or PaddingCollator(tokenizer))([{"input_ids": [1, 2]}])


def test_arrays_of_a_formatted_dataset(tokenizer, rows):
    arrays = [{name: np.array(row[name], np.int32) for name in ("input_ids", "labels")} for row in rows]
    for collate in (PaddingCollator(tokenizer), PaddingFreeCollator()):
        assert torch.equal(collate(arrays)["labels"], collate(rows)["labels"])
