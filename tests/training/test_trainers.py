"""Every trainer takes the rows as they are, and its first loss equals the one computed by hand."""

import re

import pytest

pytest.importorskip("trl", reason="needs the extra 'train'")

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.helpers import REPOSITORY, loss_by_hand, tiny_mistral
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.training import REFERENCE_STAGES, PaddingCollator, PaddingFreeCollator, StepLogitsProcessor, next_prompt


@pytest.fixture(scope="module")
def tokenizer(dataset_folder):
    return load_tokenizer(dataset_folder / "tokenizer")


def load(dataset_folder, streaming=False):
    return datasets.load_dataset(str(dataset_folder), split="test", streaming=streaming)


BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "streaming"])


@pytest.fixture(scope="module")
def expected(dataset_folder):
    return loss_by_hand(tiny_mistral().eval(), list(load(dataset_folder)))


def arguments(kind, tmp_path, **changes):
    options = {"max_steps": 1, "per_device_train_batch_size": 3, "learning_rate": 0.0, "logging_steps": 1}
    options |= {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    return kind(output_dir=str(tmp_path / "out"), **(options | changes))


def first_loss(trainer):
    trainer.train()
    return trainer.state.log_history[0]["loss"]


@BOTH
@pytest.mark.parametrize("padding_free", [False, True])
def test_trainer(dataset_folder, tokenizer, expected, tmp_path, streaming, padding_free):
    trainer = Trainer(
        model=tiny_mistral(),
        args=arguments(TrainingArguments, tmp_path),
        train_dataset=load(dataset_folder, streaming),
        data_collator=PaddingFreeCollator() if padding_free else PaddingCollator(tokenizer),
        processing_class=tokenizer,
    )
    assert abs(first_loss(trainer) - expected) < 1e-4


@pytest.mark.parametrize(
    ("options", "streaming"),
    [({}, False), ({}, True), ({"packing": True}, True), ({"padding_free": True, "max_length": None}, False)],
    ids=["padding-map", "padding-streaming", "packing-streaming", "padding-free-map"],
)
def test_sft_trainer(dataset_folder, tokenizer, expected, tmp_path, options, streaming):
    changes = {"max_length": 8192, "packing_strategy": "bfd", "gradient_checkpointing": False, **options}
    if options.get("packing"):
        changes["per_device_train_batch_size"] = 1  # all three rows in one
    trainer = SFTTrainer(
        model=tiny_mistral(),
        args=arguments(SFTConfig, tmp_path, **changes),
        train_dataset=load(dataset_folder, streaming),
        processing_class=tokenizer,
    )
    assert abs(first_loss(trainer) - expected) < 1e-4


def test_max_length_of_the_trainer_decides_whether_rows_are_cut(dataset_folder, tokenizer, tmp_path):
    rows, lengths = load(dataset_folder), {}
    longest = max(map(len, rows["input_ids"]))
    for max_length in (longest - 10, 8192):
        args = arguments(SFTConfig, tmp_path, max_length=max_length)
        trainer = SFTTrainer(model=tiny_mistral(), args=args, train_dataset=rows, processing_class=tokenizer)
        lengths[max_length] = max(batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader())
    assert lengths == {longest - 10: longest - 10, 8192: longest}


@BOTH
def test_plain_pytorch(dataset_folder, tokenizer, expected, streaming):
    [batch] = DataLoader(load(dataset_folder, streaming), batch_size=3, collate_fn=PaddingCollator(tokenizer))
    with torch.no_grad():
        assert abs(tiny_mistral()(**batch).loss.item() - expected) < 1e-4


@pytest.mark.slow
def test_a_trained_model_generates_its_training_example(dataset_folder, tokenizer):
    """Labels and stop tokens are right: a model that fits them answers in three steps, speech included."""
    row = load(dataset_folder)[0]
    batch, model = PaddingCollator(tokenizer)([row]), tiny_mistral(hidden_size=96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    while not losses or (losses[-1] > 0.01 and len(losses) < 300):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.01 < 5 < losses[0]

    model.eval()
    encoder = TemplateEncoder(tokenizer)
    texts = (), (row["user_text"],), (row["user_text"], row["agent_text"])
    prompt = torch.tensor(encoder.prompt(row["user_units"]))[None].long()
    for step, given in zip(REFERENCE_STAGES, texts, strict=True):
        assert prompt[0].tolist() == encoder.prompt(row["user_units"], *given).tolist()
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=400,
            eos_token_id=step.stop_id,
            logits_processor=[StepLogitsProcessor(step)],
        )[0, prompt.shape[1] :]
        assert generated[-1] == step.stop_id
        prompt = next_prompt(step, prompt, generated)
    assert [token_id - 32_002 for token_id in generated[:-1].tolist()] == row["agent_units"]
    assert prompt[0].tolist() == row["input_ids"][:-2]  # all but the last newline and </s>


@pytest.mark.slow
def test_trl_command(workplace, monkeypatch, capsys):
    """The script that `trl sft` starts, with its parser, in this process."""
    from trl.scripts import sft

    monkeypatch.chdir(workplace)
    arguments = [
        *["--config", "configs/trl_sft.yaml", "--model_name_or_path", "naver-ai/USTM", "--output_dir", "trl-out"],
        *["--dataset_name", "dailytalk-usdm-data", "--dataset_train_split", "test", "--max_steps", "2"],
        *["--use_cpu", "true", "--bf16", "false", "--logging_steps", "1", "--dtype", "float32"],
    ]
    sft.main(*sft.make_parser().parse_args_and_config(arguments))
    assert len(re.findall(r"'loss': ", capsys.readouterr().out)) == 2
    saved = load_tokenizer("trl-out")
    assert saved("<|correspond|> yes").input_ids == [1, 32_001, 28_705, 5_081]


def test_accelerate_config_is_valid():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(REPOSITORY / "configs" / "accelerate_zero3.yaml"))
    assert config.distributed_type == "DEEPSPEED"
    assert config.deepspeed_config["zero_stage"] == 3


def test_streaming_splits_over_ranks_and_workers(dataset_folder):
    whole = sorted(datasets.load_dataset(str(dataset_folder), split="train")["id"])
    stream = datasets.load_dataset(str(dataset_folder), split="train", streaming=True).select_columns(["id"])
    parts = [[row["id"] for row in split_dataset_by_node(stream, rank, 2)] for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == whole and [len(part) for part in parts] == [5, 5]
    assert sorted(row["id"] for row in DataLoader(stream, batch_size=None, num_workers=2)) == whole
