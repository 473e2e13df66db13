"""Shifted labels are the targets of a plain cross entropy, without the shift inside the models of transformers."""

import datasets
import numpy as np
import pytest
import torch

from tests.helpers import tiny_mistral
from usdm_sft.training import ShiftedLabels


def test_labels_move_one_position_to_the_left():
    batch = {"input_ids": [[1, 5, 6, 2], [1, 7]], "labels": [[-100, 5, -100, 2], [-100, 7]]}
    shifted = ShiftedLabels()(batch)
    assert [labels.tolist() for labels in shifted["labels"]] == [[5, -100, 2, -100], [7, -100]]
    assert {labels.dtype for labels in shifted["labels"]} == {np.dtype(np.int32)}


@pytest.mark.parametrize("streaming", [False, True])
def test_loss_of_shifted_labels_equals_that_of_the_model(dataset_folder, streaming):
    rows = datasets.load_dataset(str(dataset_folder), split="test", streaming=streaming)
    if not streaming:
        assert rows.map(ShiftedLabels(), batched=True).features == rows.features
    model = tiny_mistral().eval()
    for row, shifted in zip(rows, rows.map(ShiftedLabels(), batched=True), strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            result = model(input_ids=ids, labels=torch.tensor([row["labels"]]), use_cache=False)
        targets = torch.as_tensor(shifted["labels"]).long()
        loss = torch.nn.functional.cross_entropy(result.logits[0], targets)
        assert loss == pytest.approx(result.loss.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([5, -100, 2, -100], "the labels are not those of input_ids, or are shifted already: shift them once"),
        ([-100, 5], "the labels are not those of input_ids"),
        ([1, 5, -100, 2], "the first token has the label 1, which no model can learn: set it to -100"),
    ],
)
def test_other_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        ShiftedLabels()({"input_ids": [[1, 5, 6, 2]], "labels": [labels]})
