"""A dataset folder with the tokenizer of another base model, from prepare to the answer of a trained model."""

import json
import shutil

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bases import byte_level
from tests.helpers import edit_counts, loss_by_hand, options, reuse_units
from usdm_sft.cli.main import main
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.config import Template
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import build_tokenizer, load_tokenizer, save_tokenizer
from usdm_sft.training import PaddingCollator, StepLogitsProcessor, next_prompt

SEPARATE = Template(tokenization="separate")


@pytest.fixture(scope="module")
def root(mini, unit_model, finished, tmp_path_factory):
    """The mini corpus with a byte-level tokenizer: `base`, `tokenizer` and the dataset folder `out`."""
    root = tmp_path_factory.mktemp("other_base")
    reuse_units(finished, root)
    byte_level().save_pretrained(root / "base")
    save_tokenizer(build_tokenizer(root / "base", 100), root / "tokenizer")
    prepare(**options(mini, unit_model, root, pretrained_model_name_or_path=root / "tokenizer", template=SEPARATE))
    return root


def test_verify_passes(root):
    assert verify(root / "out") == {"train": 10, "test": 3}


def test_counts_are_those_of_the_rows(root):
    counts = json.loads((root / "out" / "counts.json").read_text())
    rows = datasets.load_dataset(str(root / "out"), split="test")
    units = sum(len(units) for units in rows["agent_units"])
    summary = counts["statistics"]["test"]
    assert summary["labelled_units"] == units
    assert summary["labelled_parts"]["agent_units"] == units + len(rows)  # each with its stop token
    assert summary["labelled_parts"]["frame"] == summary["labelled_parts"]["user_units"] == 0
    assert counts["settings"]["template"]["tokenization"] == "separate"


def test_show_and_page_spell_the_tokens(root, capsys, tmp_path):
    main(["show", str(root / "out"), "--split", "test"])
    shown = capsys.readouterr().out
    text = datasets.load_dataset(str(root / "out"), split="test")[0]["user_text"].lower()
    assert f"loss  {text}⏎\n" in shown and "Ġ" not in shown
    main(["show", str(root / "out"), "--split", "test", "--html", str(tmp_path / "page.html")])
    assert "agent_units" in (tmp_path / "page.html").read_text()


def test_changed_ids_of_the_tokenizer_are_found(root, tmp_path, refused):
    folder = shutil.copytree(root / "out", tmp_path / "out")
    edit_counts(folder, lambda counts: counts["tokenizer"]["ids"].update(unit_0="x"))
    assert "counts.json: tokenizer.ids is {" in refused("show", folder, "--html", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.fixture(scope="module")
def batch(root):
    tokenizer = load_tokenizer(root / "out" / "tokenizer")
    rows = list(datasets.load_dataset(str(root / "out"), split="test").select([0]))
    return tokenizer, rows, PaddingCollator(tokenizer)(rows)


def tiny_model(tokenizer):
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape))


def test_loss_of_trl_equals_the_hand_computation(root, batch, tmp_path):
    trl = pytest.importorskip("trl", reason="needs the extra 'train'")
    tokenizer, rows, _ = batch
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        max_length=8192,
        learning_rate=0.0,
        logging_steps=1,
        per_device_train_batch_size=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model=tiny_model(tokenizer),
        args=arguments,
        train_dataset=datasets.load_dataset(str(root / "out"), split="test").select([0]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - loss_by_hand(tiny_model(tokenizer).eval(), rows)) < 1e-4


def test_a_trained_model_gives_its_example_back_in_three_steps(batch):
    tokenizer, [row], tensors = batch
    model = tiny_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        loss = model(**tensors).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.005:
            break
    assert loss.item() < 0.02
    model.eval()
    encoder = TemplateEncoder(tokenizer, SEPARATE)
    prompt = torch.tensor(encoder.prompt(row["user_units"]))[None].long()
    generated = {}
    for step in encoder.steps:
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            eos_token_id=step.stop_id,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=[StepLogitsProcessor(step)],
            do_sample=False,
            max_new_tokens=400,
        )[0, prompt.shape[1] :]
        generated[step.name] = ids.tolist()
        prompt = next_prompt(step, prompt, ids)
    assert tokenizer.decode(generated["transcript"]) == row["user_text"].lower() + "\n"
    assert tokenizer.decode(generated["answer"]) == row["agent_text"].lower() + "<|correspond|>"
    assert [i - encoder.tokens.unit_0 for i in generated["speech"][:-1]] == row["agent_units"]
    assert prompt[0].tolist() + list(encoder.tokens.closing) == row["input_ids"]
