"""The training recipes on two ranks, one after the other in the same two processes."""

import json
import subprocess
import sys

import datasets
import pytest

pytest.importorskip("trl", reason="needs the extra 'train'")

from tests.code_blocks import find_code, small_environment
from tests.test_docs import shrink

pytestmark = pytest.mark.slow

RUN = """
import json, os
import datasets
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # as in conftest.py
with open("recipes.json") as file:
    recipes = json.load(file)
seen = {}
for name, code in recipes.items():
    names = {}
    exec(code, names)
    seen[name] = names["seen"]
with open("seen-" + os.environ["RANK"], "w") as file:
    json.dump(seen, file)
"""

# The two ways of docs/training/pytorch.md.
SAMPLERS = """
import torch.distributed
from datasets import load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

torch.distributed.init_process_group("gloo")
rows = load_dataset("dailytalk-usdm-data", split="train").select_columns("id")
sampled = [name for batch in DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows)) for name in batch["id"]]
stream = load_dataset("dailytalk-usdm-data", split="train", streaming=True).select_columns("id")
part = split_dataset_by_node(stream, torch.distributed.get_rank(), 2)
seen = [sampled, [row["id"] for row in part]]
"""

RECORD = """
seen = []
for batch in trainer.get_train_dataloader():
    if "attention_mask" in batch:  # padded
        seen += [ids[: sum(mask)] for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist())]
    else:
        starts = [i for i, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
        [ids] = batch["input_ids"].tolist()
        seen += [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)])]
"""


def untrained(code):
    return shrink(code).replace("trainer.train()\n", "") + RECORD


def make_recipes():
    """Return the code of each recipe; it leaves in `seen` what a rank saw."""
    trainer, trl = find_code("pad_to_multiple_of=8"), find_code("LoraConfig")
    padding_free = trainer.replace("PaddingCollator(tokenizer, pad_to_multiple_of=8)", "PaddingFreeCollator()")
    map_style = trainer.replace(", streaming=True).shuffle(seed=1, buffer_size=1000)", ")")
    recipes = {
        "samplers": SAMPLERS,
        "padded": shrink(trainer) + RECORD,
        "padding-free": untrained(padding_free.replace("import PaddingCollator,", "import PaddingFreeCollator,")),
        "map-style": untrained(map_style).replace("max_steps=1, ", "max_steps=1, per_device_train_batch_size=4, "),
        "trl": shrink(trl.replace('split="train"', 'split="test"')) + "seen = trainer.state.global_step\n",
    }
    assert len({*recipes.values(), trainer, trl}) == len(recipes) + 2  # each was changed
    return recipes


@pytest.fixture(scope="module")
def seen(workplace):
    """What each of two ranks saw, by recipe."""
    (workplace / "recipes.json").write_text(json.dumps(make_recipes()))
    (workplace / "run.py").write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"]
    environment = small_environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((workplace / f"seen-{rank}").read_text()) for rank in range(2))
    return {name: (first[name], second[name]) for name in first}


@pytest.fixture(scope="module")
def rows(workplace):
    return datasets.load_dataset(str(workplace / "dailytalk-usdm-data"), split="train")


@pytest.mark.parametrize("collator", ["padded", "padding-free"])
def test_trainer_reads_every_row_of_a_stream_once(seen, rows, collator):
    first, second = seen[collator]
    assert [len(first), len(second)] == [5, 5] and sorted(first + second) == sorted(rows["input_ids"][:])


def test_trainer_with_map_style_rows_repeats_some(seen, rows):
    first, second = seen["map-style"]
    assert [len(first), len(second)] == [8, 8]  # two batches of 4 for each rank, of 10 rows
    assert {*map(tuple, first + second)} == {*map(tuple, rows["input_ids"][:])}


def test_trl_recipe_runs(seen):
    assert seen["trl"] == (1, 1)


def test_samplers_of_plain_pytorch_give_each_rank_its_own_rows(seen, rows):
    for first, second in zip(*seen["samplers"], strict=True):
        assert sorted(first + second) == sorted(rows["id"][:])
