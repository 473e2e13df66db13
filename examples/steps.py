# %% [markdown]
# # From recordings to `input_ids` and `labels`, step by step
#
# `dailytalk-usdm prepare` runs these steps for a whole corpus. Here they run one by one, on the corpus of the demo. Make it first:
# `dailytalk-usdm demo`.

# %%
from datasets import load_dataset

import dailytalk_usdm

DEMO = "dailytalk-usdm-demo"

# %% [markdown]
# ## 1. Pairs
#
# A row is a user turn and the agent turn after it. Its audio is the path of the recording.

# %%
pairs = dailytalk_usdm.load_dataset(f"{DEMO}/corpus", split="train")
print(pairs)
print("user: ", pairs[0]["user_text"])
print("agent:", pairs[0]["agent_text"])

# %% [markdown]
# ## 2. Units
#
# The unit model turns each recording into 50 numbers per second. The one of the demo is a toy with 100 units and random weights; the published
# one has 10,000.

# %%
unit_tokenizer = dailytalk_usdm.UnitTokenizer.from_pretrained(f"{DEMO}/unit_model", device="cpu")
with_units = pairs.map(unit_tokenizer, batched=True, batch_size=8)
print(
    f"{with_units[0]['user_seconds']:.2f} s are {len(with_units[0]['user_units'])} units:",
    with_units[0]["user_units"][:10],
    "...",
)

# %% [markdown]
# ## 3. Ids and labels
#
# The template puts the user's units, both texts and the agent's units into one sequence. Its labels are -100 where no loss is computed.

# %%
tokenizer = dailytalk_usdm.load_tokenizer(f"{DEMO}/dataset/tokenizer")
rows = with_units.map(dailytalk_usdm.TemplateEncoder(tokenizer), batched=True)
input_ids, labels = rows[0]["input_ids"], rows[0]["labels"]
print(f"{len(input_ids)} tokens, {sum(label != -100 for label in labels)} labelled")
print(tokenizer.decode(input_ids)[:250], "...")

# %% [markdown]
# ## 4. The same as `prepare`
#
# `prepare` made the dataset of the demo from the same corpus. It also counts, caches, resumes and writes a card.

# %%
prepared = load_dataset(f"{DEMO}/dataset", split="train")
print("identical to prepare:", all(rows[name][:] == prepared[name][:] for name in ("id", "input_ids", "labels")))
