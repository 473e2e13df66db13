"""The recipe of docs/training/other-models.md for the embeddings of a base model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.bases import byte_level
from tests.code_blocks import find_code
from usdm_sft.template.tokenizer import build_tokenizer, load_tokenizer, save_tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 8, 64], ids=["no spare rows", "few spare rows", "more rows than tokens"])
def test_new_rows_are_the_mean_of_the_old_ones(tmp_path, monkeypatch, tied, spare):
    monkeypatch.chdir(tmp_path)
    base = byte_level()
    base.save_pretrained("Qwen/Qwen3-0.6B")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(base) + spare, tie_word_embeddings=tied, **shape))
    model.save_pretrained("Qwen/Qwen3-0.6B")
    save_tokenizer(build_tokenizer("Qwen/Qwen3-0.6B", 20), tmp_path / "qwen-units")
    exec(find_code("resize_token_embeddings"), {})

    grown, old, tokenizer = (
        AutoModelForCausalLM.from_pretrained("qwen-units-model"),
        len(base),
        load_tokenizer("qwen-units"),
    )
    assert load_tokenizer("qwen-units-model").get_vocab() == tokenizer.get_vocab()
    pairs = [
        (model.get_input_embeddings(), grown.get_input_embeddings()),
        (model.get_output_embeddings(), grown.get_output_embeddings()),
    ]
    for before, after in pairs:
        assert after.weight.shape[0] == max(len(tokenizer), old + spare)
        assert torch.equal(after.weight[:old], before.weight[:old])
        mean = before.weight[:old].double().mean(dim=0).float()
        assert torch.allclose(after.weight[old:], mean.expand(after.weight.shape[0] - old, -1), atol=1e-6)
    assert (pairs[0][1].weight.data_ptr() == pairs[1][1].weight.data_ptr()) == tied
