"""The recipe of docs/training/mixing.md gives rows of both datasets, in the types of the dataset folder."""

import shutil

import datasets
import pytest

from tests.code_blocks import find_code

TEXTS = ["It rains.", "Two  spaces, and é.", "Yes."]


def test_mixing_with_texts(dataset_folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dataset_folder, "dailytalk-usdm-data")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    names = {}
    exec(find_code("interleave_datasets"), names)
    folder = datasets.load_dataset(str(dataset_folder), split="train")
    expected = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in folder}
    for text in TEXTS:
        ids = [*tokenizer(text).input_ids, 2]
        expected.add((tuple(ids), (-100, *ids[1:])))
    mixed = names["mixed"]
    assert {(tuple(row["input_ids"]), tuple(row["labels"])) for row in mixed} == expected  # no row is lost
    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in mixed)
    assert mixed.features == datasets.Features({name: folder.features[name] for name in mixed.column_names})
    with pytest.raises(ValueError, match="features"):  # why the recipe casts
        datasets.interleave_datasets([names["speech"], names["texts"]])
