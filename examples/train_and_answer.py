"""Train a tiny model on the dataset of the demo, and let it answer a user's speech in three steps.

    dailytalk-usdm demo
    python examples/train_and_answer.py

The model is too small to say anything sensible; a real one is naver-ai/USTM, and docs/training has the recipes for it.
"""

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import MistralConfig, MistralForCausalLM

from dailytalk_usdm import PaddingCollator, StepLogitsProcessor, TemplateEncoder, load_tokenizer, next_prompt

DATASET = "dailytalk-usdm-demo/dataset"
EPOCHS = 3
MAX_NEW_TOKENS = {"transcript": 12, "answer": 12, "speech": 50}  # 50 units are one second of speech

torch.manual_seed(0)
tokenizer = load_tokenizer(f"{DATASET}/tokenizer")
config = MistralConfig(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=tokenizer.pad_token_id,
)
model = MistralForCausalLM(config)

rows = load_dataset(DATASET, split="train")
batches = DataLoader(rows, batch_size=2, shuffle=True, collate_fn=PaddingCollator(tokenizer))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(1, EPOCHS + 1):
    total = 0.0
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    print(f"epoch {epoch}: loss {total / len(batches):.2f}")

units = load_dataset(DATASET, split="test")[0]["user_units"]
encoder = TemplateEncoder(tokenizer)
prompt = torch.tensor(encoder.prompt(units))[None].long()
model.eval()
for step in encoder.steps:
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        eos_token_id=step.stop_id,
        logits_processor=[StepLogitsProcessor(step)],
        max_new_tokens=MAX_NEW_TOKENS[step.name],
        do_sample=True,
    )[0, prompt.shape[1] :]
    prompt = next_prompt(step, prompt, generated)
    print(f"{step.name}, {len(generated)} tokens: {tokenizer.decode(generated)}")
