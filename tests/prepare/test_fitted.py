"""The rows of output files, part by part, are those of all rows in one list, cut by hand and shuffled by datasets."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from usdm_sft.corpus.features import TRAINER_COLUMNS, folder_features
from usdm_sft.prepare.overflow import Overflowed
from usdm_sft.prepare.plan import Shard
from usdm_sft.prepare.token_shards import KeptRows, ShardCounts, TokenShard

FEATURES = datasets.Features(
    {name: each for name, each in folder_features(lists=True).items() if name not in TRAINER_COLUMNS}
)
EXAMPLES = [
    name for name in FEATURES if not name.endswith(("_units", "_seconds")) and name not in ("input_ids", "labels")
]
EXCHANGES = [[3, 1, 2], [1, 4], [2], [1, 1, 5, 1, 3], [2, 1]]  # of each row of each work shard
# Which exchanges `max_length` leaves of the rows of each shard: none, one run or two. The others are whole.
RUNS = [{0: [(0, 1), (2, 3)]}, {1: [(0, 2), (2, 4)]}, {0: []}, {0: [], 2: [(1, 5)], 4: [(0, 1), (1, 2), (2, 3)]}, {}]


class Encoder:
    """Stands for the template: the ids of an exchange are the lengths of its parts."""

    last_exchange_only = False

    def __call__(self, batch):
        texts = zip(batch["user_text"], batch["user_units"], batch["agent_text"], batch["agent_units"], strict=True)
        ids = [[number for parts in zip(*row, strict=True) for number in map(len, parts)] for row in texts]
        return {"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]}


def make_row(dialog, num_exchanges, start=0):
    """Make a row of exchanges from `start` of a dialog; each differs from all others of the dialog."""
    numbers = range(start, start + num_exchanges)
    texts = {f"{role}_text": [f"{role} {'x' * number}" for number in numbers] for role in ("user", "agent")}
    units = {
        f"{role}_units": [[dialog, number] + [int(role == "user")] * number for number in numbers]
        for role in ("user", "agent")
    }
    row = {"id": f"d{dialog}_{2 * start}", "dialog_id": f"d{dialog}", "turn": 2 * start, **texts, **units}
    for role in ("user", "agent"):
        row[f"{role}_speaker"], row[f"{role}_emotion"] = [role] * num_exchanges, [str(number) for number in numbers]
        row[f"{role}_seconds"] = [float(number) for number in numbers]
    encoded = Encoder()({name: [values] for name, values in (texts | units).items()})
    return {name: (row | {name: values[0] for name, values in encoded.items()})[name] for name in FEATURES}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return the examples, the work shards, their token shards, and the rows that are left."""
    folder = tmp_path_factory.mktemp("tokens")
    whole, left, shards, tokens = [], [], [], []
    for number, (exchanges, runs) in enumerate(zip(EXCHANGES, RUNS, strict=True)):
        start, first = len(whole), len(left)
        for position, num in enumerate(exchanges):
            dialog = len(whole)
            whole.append(make_row(dialog, num))
            left += [make_row(dialog, stop - start, start) for start, stop in runs.get(position, [(0, num)])]
        path = folder / f"{number}.arrow"
        table = Dataset.from_list(whole[start:], features=FEATURES).remove_columns(EXAMPLES).data.table
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        shards.append(Shard(number, "train", (0, 0), start, len(whole), 0, 0, "", ""))
        counts = ShardCounts(
            len(left) - first, 0, 0, 0, 0.0, 0, sum(len(row["input_ids"]) for row in left[first:]), 0, 0
        )
        kept = [(row, *run) for row, _ in enumerate(exchanges) for run in runs.get(row, [(0, 0)])]
        cuts = Overflowed(np.array(kept, np.int32) if runs else range(len(exchanges)), {"d0_0": "cut"}, {})
        tokens.append(TokenShard(path, cuts, counts, []))
    examples = Dataset.from_list(whole, features=FEATURES).select_columns(EXAMPLES)
    return examples, shards, tokens, left


def test_rows_are_cut_as_expected(corpus):
    assert [(row["id"], len(row["user_text"])) for row in corpus[3]] == [
        ("d0_0", 1), ("d0_4", 1), ("d1_0", 1), ("d2_0", 2),
        ("d3_0", 1), ("d4_0", 2), ("d4_4", 2),
        ("d7_0", 1), ("d8_2", 4), ("d9_0", 1), ("d10_0", 1), ("d10_2", 1), ("d10_4", 1),
        ("d11_0", 2), ("d12_0", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [None, 0, 1, 12])
@pytest.mark.parametrize("num_files", [1, 2, 3, 5, 15])
def test_parts_of_the_rows_in_the_order_of_datasets(corpus, seed, num_files):
    examples, shards, tokens, left = corpus
    expected = Dataset.from_list(left, features=FEATURES)
    if seed is not None:
        expected = expected.shuffle(seed)
    split = KeptRows(examples, shards, tokens, Encoder(), seed)
    assert (split.num_rows, split.num_tokens) == (15, sum(len(row["input_ids"]) for row in left))
    start = 0
    for index in range(num_files):
        rows = expected.shard(num_files, index, contiguous=True).to_list()
        table = split.loader(split.part(start, start + len(rows)))
        assert table.to_pylist() == rows
        assert table.schema.remove_metadata() == FEATURES.arrow_schema.remove_metadata()
        start += len(rows)
    assert start == 15


def test_part_loads_only_its_work_shards(corpus, monkeypatch):
    examples, shards, tokens, _ = corpus
    tokens = [tokens[0], tokens[1]._replace(path="vanished"), *tokens[2:]]
    split = KeptRows(examples, shards, tokens, Encoder(), None)
    assert split.loader(split.part(0, 4))["id"].to_pylist() == ["d0_0", "d0_4", "d1_0", "d2_0"]
    assert split.loader(split.part(7, 9))["id"].to_pylist() == ["d7_0", "d8_2"]
    with pytest.raises(FileNotFoundError, match="vanished"):
        split.loader(split.part(3, 5))
