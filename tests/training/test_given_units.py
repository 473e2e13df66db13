"""Rows of units that the corpus had train as other rows do."""

import json

import datasets
import pytest
import torch

from tests.helpers import loss_by_hand, tiny_mistral
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.tokenizer import load_tokenizer, save_tokenizer
from usdm_sft.training import PaddingCollator


@pytest.fixture(scope="module")
def folder(small_tokenizer, tmp_path_factory):
    """A dataset folder of two flattened streams."""
    root = tmp_path_factory.mktemp("given")
    save_tokenizer(small_tokenizer, root / "tokenizer")
    (root / "corpus").mkdir()
    rows = [
        {
            "dialog": "c",
            "turn": turn,
            "speaker": "AB"[turn % 2],
            "text": f"turn {turn}",
            "units": [[turn, 9], [3, turn]] * (turn + 1),
        }
        for turn in range(4)
    ]
    (root / "corpus" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(
        data_dir=root / "corpus", output_path=root / "out", cache_dir=root / "cache",
        pretrained_model_name_or_path=root / "tokenizer", unit_rate=12.5, num_units=50, streams="flatten",
    )  # fmt: skip
    return root / "out"


@pytest.fixture
def dataset(folder, tmp_path):
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "datasets"))


def test_loss_of_a_padded_batch(folder, dataset):
    model = tiny_mistral().eval()
    batch = PaddingCollator(load_tokenizer(folder / "tokenizer"))(list(dataset))
    assert batch["input_ids"].shape[0] == 3
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert abs(loss - loss_by_hand(model, list(dataset))) < 1e-4


def test_sft_trainer(folder, dataset, tmp_path):
    trl = pytest.importorskip("trl", reason="needs the extra 'train'")
    expected = loss_by_hand(tiny_mistral().eval(), list(dataset))
    trainer = trl.SFTTrainer(
        model=tiny_mistral(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trained"), max_length=8192, max_steps=1, per_device_train_batch_size=3, learning_rate=0.0,
            logging_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=load_tokenizer(folder / "tokenizer"),
    )  # fmt: skip
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - expected) < 1e-4
