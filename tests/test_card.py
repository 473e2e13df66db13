import json
import re

import datasets
import pytest
from huggingface_hub import DatasetCard


@pytest.fixture(scope="module")
def card(dataset_folder):
    return DatasetCard.load(dataset_folder / "README.md")


def tables(text):
    """Cells of every row of every Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def test_metadata(card):
    data = card.data.to_dict()
    assert (data["language"], data["license"], data["size_categories"]) == ("en", "cc-by-sa-4.0", "n<1K")
    assert "text-generation" in data["task_categories"]
    assert [config["config_name"] for config in data["configs"]] == ["single_turn"]
    assert {split["name"]: split["num_examples"] for split in data["dataset_info"]["splits"]} == {
        "train": 10,
        "test": 3,
    }


def test_numbers_equal_the_data(card, dataset_folder, tmp_path):
    rows = datasets.load_dataset(str(dataset_folder), cache_dir=str(tmp_path))
    counts = json.loads((dataset_folder / "counts.json").read_text())
    cells = tables(card.text)
    for split, its in rows.items():
        tokens = [len(ids) for ids in its["input_ids"]]
        labelled = sum(label != -100 for labels in its["labels"] for label in labels)
        units = {unit for role in ("user", "agent") for units in its[f"{role}_units"] for unit in units}
        seconds = {
            (row["dialog_id"], row["turn"] + after): row[f"{role}_seconds"]
            for row in its
            for after, role in enumerate(("user", "agent"))
        }
        hours = f"{sum(seconds.values()) / 3600:.2f}"
        dialogs = str(len(set(its["dialog_id"])))
        expected = (
            split,
            dialogs,
            str(len(its)),
            str(len(its)),
            hours,
            str(sum(tokens)),
            str(labelled),
            str(len(units)),
        )
        assert expected in cells
        [row] = [row for row in cells if row[:2] == ("tokens", split)]
        assert float(row[2]) == pytest.approx(sum(tokens) / len(tokens), abs=1e-3)
        assert float(row[-1]) == max(tokens)
    for name, digest in counts["digests"].items():
        assert (f"sha256 of {name}", f"`{digest}`") in cells
    for name, version in counts["versions"].items():
        assert (f"version of {name}", version) in cells
    assert ("precision", "fp32") in cells
    schema = {row[0].strip("`") for row in cells if row[0].startswith("`")}
    assert set(rows["train"].column_names) <= schema


def test_left_out_and_the_loss_are_shown(card):
    assert "Left out of train: 2 dialogs and 0 pairs." in card.text
    assert "- d11: one speaker speaks twice in a row" in card.text
    assert "Nothing was left out of test." in card.text
    assert "loss   did you water the plants on the balcony?⏎" in card.text


def test_nothing_is_left_of_the_template_and_tables_are_whole(card):
    assert not re.search(r"\{\{|\}\}|\{%|%\}|None\.", card.text)
    lines = card.text.splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|(-+\|)+", line):  # a header before it, rows after it, all of one width
            width = line.count("|")
            assert lines[number - 1].count("|") == width == lines[number + 1].count("|"), lines[number - 1]


def test_every_source_is_named_with_licence_and_citation(card):
    for name in ("DailyTalk", "DailyDialog", "SeamlessM4T", "XLS-R", "naver-ai/USTM"):
        assert name in card.text
    for key in ("lee2022dailytalk", "kim2024usdm", "seamless2023m4t", "babu2021xlsr", "li2017dailydialog"):
        assert f"{{{key}," in card.text
    assert "not confirmed" in card.text and "d1383" in card.text


def test_agreement_of_a_faster_precision_is_in_the_card(mini, unit_model, tmp_path):
    from usdm_sft.pipeline import prepare

    counts = prepare(
        str(mini / "corpus"), str(tmp_path / "out"), unit_model=str(unit_model), precision="bf16",
        pretrained_model_name_or_path="mistral-common", cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    share = f"{100 * counts['agreement']['share']:.2f} % of the units"
    assert f"{counts['agreement']['utterances']} utterances, {share}" in (tmp_path / "out" / "README.md").read_text()
