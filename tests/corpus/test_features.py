"""The columns of the builder and of the dataset folder."""

import datasets
import pyarrow.parquet as pq
import pytest

from dailytalk_usdm import DailyTalkUSDM
from usdm_sft.corpus.features import example_features, folder_features


def test_columns_of_the_builder(mini):
    names = ["speaker", "text", "emotion", "audio"]
    expected = ["id", "dialog_id", "turn", *(f"{role}_{name}" for role in ("user", "agent") for name in names)]
    for lists in (False, True):
        assert list(example_features(lists=lists)) == expected
    assert DailyTalkUSDM(data_dir=mini / "corpus").info.features == example_features(lists=False)


@pytest.mark.parametrize("lists", [False, True])
def test_columns_of_the_dataset_folder(lists):
    def wrap(name):
        return f"list<element: {name}>" if lists else name

    utterance = {"speaker": "string", "text": "string", "emotion": "string", "units": "list<element: uint16>", "seconds": "float"}  # fmt: skip
    expected = {"id": "string", "dialog_id": "string", "turn": "int32"}
    expected |= {f"{role}_{name}": wrap(kind) for role in ("user", "agent") for name, kind in utterance.items()}
    expected |= {"input_ids": "list<element: int32>", "labels": "list<element: int32>"}
    expected |= {"attention_mask": "list<element: int8>", "length": "int32"}
    schema = folder_features(lists=lists).arrow_schema
    assert {field.name: str(field.type).replace("item:", "element:") for field in schema} == expected


def test_prepare_writes_the_columns_of_the_dataset_folder(dataset_folder):
    for path in dataset_folder.glob("single_turn/*.parquet"):
        written = pq.read_schema(path).remove_metadata()
        assert datasets.Features.from_arrow_schema(written) == folder_features(lists=False)
        assert written.names == list(folder_features(lists=False))


def test_columns_for_trainers_follow_from_the_ids(dataset_folder):
    num_rows = 0
    for path in dataset_folder.glob("single_turn/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            assert row["attention_mask"] == [1] * len(row["input_ids"]) and row["length"] == len(row["input_ids"])
            num_rows += 1
    assert num_rows == 13
