"""Published corpora, unit models and tokenizers are named only if their digests match."""

import json
from pathlib import Path

import pytest

from usdm_sft.corpus import dailytalk
from usdm_sft.corpus.find import describe_corpus
from usdm_sft.template.tokenizer import describe_tokenizer, ustm_tokens
from usdm_sft.units.published import describe_unit_model

TRAIN, TEST = (sha256 for _, sha256 in dailytalk.SPLIT_LISTS.values())
OTHER = "0" * 64


@pytest.mark.parametrize(
    ("lists", "digests", "expected"),
    [
        ({"train": "train.txt", "test": "val"}, {"train": TRAIN, "test": TEST}, "DailyTalk"),
        ({"train": "any.txt"}, {"train": TEST}, "DailyTalk"),
        ({"train": "train_phone.txt", "test": "val_phone.txt"}, {"train": OTHER, "test": TEST}, "split list"),
        ({"train": "train.jsonl", "test": "test.csv"}, {"train": OTHER, "test": OTHER}, "manifest"),
        ({"train": "train.txt", "test": "test.csv"}, {"train": TRAIN, "test": OTHER}, "manifest and split list"),
    ],
)
def test_corpus_is_recognized_by_digest_and_not_by_name(lists, digests, expected):
    assert describe_corpus({split: Path(name) for split, name in lists.items()}, digests) == expected


SOURCES = {"checkpoint": "1" * 64, "kmeans": "2" * 64}


def unit_model_folder(parent, **description):
    folder = parent / "xlsr2_1b_v2"
    folder.mkdir()
    files = dict.fromkeys(("config.json", "model.safetensors", "kmeans.npy"), OTHER)
    description = {"layer": 35, "num_units": 10_000, "files": files, "sources": SOURCES} | description
    (folder / "unit_model.json").write_text(json.dumps(description))
    return folder


def record_download(parent, checkpoint=SOURCES["checkpoint"]):
    digests = {"xlsr2_1b_v2.pt": checkpoint, "kmeans_10k.npy": SOURCES["kmeans"]}
    (parent / "xlsr2_1b_v2.sha256.json").write_text(json.dumps(digests))


def test_downloaded_unit_model_is_recognized_by_its_record(tmp_path):
    record_download(tmp_path)
    expected = {"name": "xlsr2_1b_v2", "layer": 35, "sources": SOURCES}
    assert describe_unit_model(unit_model_folder(tmp_path)) == expected


@pytest.mark.parametrize(
    "difference",
    [{"layer": 34}, {"final_norm": True}, {"normalization": "none"}, {"sources": SOURCES | {"kmeans": OTHER}}],
    ids=str,
)
def test_unit_model_made_in_another_way_is_not_the_published_one(tmp_path, difference):
    record_download(tmp_path)
    found = describe_unit_model(unit_model_folder(tmp_path, **difference))
    assert found == {"name": None, "layer": 35, "sources": SOURCES} | difference


def test_unit_model_is_not_recognized_by_the_name_of_its_folder(tmp_path):
    folder = unit_model_folder(tmp_path)
    assert describe_unit_model(folder)["name"] is None
    record_download(tmp_path, checkpoint=OTHER)
    assert describe_unit_model(folder)["name"] is None


def test_description_of_a_tokenizer_has_its_name_but_no_path(tmp_path, monkeypatch):
    (tmp_path / "mistral-common").mkdir()
    monkeypatch.chdir(tmp_path)
    assert describe_tokenizer("naver-ai/USTM", ustm_tokens(10_000)) == {"name": "naver-ai/USTM", "num_units": 10_000}
    assert describe_tokenizer(str(tmp_path), ustm_tokens(100)) == {"name": None, "num_units": 100}
    assert (
        describe_tokenizer("mistral-common", ustm_tokens(100))["name"] == "mistral-common"
    )  # what load_tokenizer builds
