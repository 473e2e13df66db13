import json
import re
import shutil
from xml.etree import ElementTree

import datasets
import pytest
from huggingface_hub import DatasetCard

from tests.helpers import options
from usdm_sft.corpus import dailytalk
from usdm_sft.folder import card as card_module
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.config import Template
from usdm_sft.units import published
from usdm_sft.utils.files import sha256_file


@pytest.fixture(scope="module")
def card(dataset_folder):
    return DatasetCard.load(dataset_folder / "README.md")


def tables(text):
    """The cells of each row of all Markdown tables."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def test_metadata_describes_the_splits(card):
    data = card.data.to_dict()
    assert (data.get("language"), data["license"], data["size_categories"]) == (None, "unknown", "n<1K")
    assert "text-generation" in data["task_categories"]
    assert [config["config_name"] for config in data["configs"]] == ["single_turn"]
    splits = data["dataset_info"]["splits"]
    assert {split["name"]: split["num_examples"] for split in splits} == {"train": 10, "test": 3}


def test_numbers_equal_those_of_the_rows(card, dataset_folder, tmp_path):
    rows = datasets.load_dataset(str(dataset_folder), cache_dir=str(tmp_path))
    counts = json.loads((dataset_folder / "counts.json").read_text())
    cells = tables(card.text)
    for split, split_rows in rows.items():
        tokens = [len(ids) for ids in split_rows["input_ids"]]
        labelled = sum(label != -100 for labels in split_rows["labels"] for label in labels)
        units = {unit for role in ("user", "agent") for units in split_rows[f"{role}_units"] for unit in units}
        seconds = {
            (row["dialog_id"], row["turn"] + after): row[f"{role}_seconds"]
            for row in split_rows
            for after, role in enumerate(("user", "agent"))
        }
        numbers = (len(set(split_rows["dialog_id"])), len(split_rows), len(split_rows))
        hours = f"{sum(seconds.values()) / 3600:.2g}"
        last = (f"{sum(tokens):,}", f"{labelled:,}", str(len(units)))
        assert (split, *map(str, numbers), hours, *last) in cells
        [row] = [row for row in cells if row[:2] == ("tokens", split)]
        assert float(row[2]) == pytest.approx(sum(tokens) / len(tokens), abs=0.005)
        assert row[-1] == f"{max(tokens):,}"
    for name, digest in counts["digests"].items():
        assert (f"sha256 of {name}", f"`{digest}`") in cells
    for name, version in counts["versions"].items():
        assert (f"version of {name}", version) in cells
    assert ("precision", "fp32") in cells
    schema = {row[0].strip("`") for row in cells if row[0].startswith("`")}
    assert set(rows["train"].column_names) <= schema


def test_left_out_dialogs_and_labelled_tokens_are_shown(card):
    assert "Left out of train: 2 dialogs and 0 pairs." in card.text
    assert "- d11: one speaker speaks twice in a row" in card.text
    assert "Nothing was left out of test." in card.text
    assert "loss   did you water the plants on the balcony?⏎" in card.text


def test_picture_of_the_example_counts_its_labelled_tokens(card, dataset_folder):
    assert "](pictures/example.svg)" in card.text and card.text.count("<details>") == card.text.count("</details>") == 3
    svg = ElementTree.parse(dataset_folder / "pictures" / "example.svg").getroot()
    assert svg[0].text == "One training example: 305 tokens. The loss counts the 148 highlighted ones."
    names = [element.text for element in svg.iter() if element.get("class") == "name"]
    assert names == ["instruction", "user's speech", "transcript", "heading", "answer", "agent's speech", "end"]


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("d23_0", "d23_0"),
        ("_a_ __b ~~c~~", r"\_a\_ \_\_b \~\~c\~\~"),
        ("# 1", r"\# 1"),
        ("1. a", r"1\. a"),
        ("3.5 1. a", "3.5 1. a"),
        ("- <b>a|b`*[c](d)</b>\n", r"\- &lt;b&gt;a\|b\`\*\[c\](d)&lt;/b&gt;"),
    ],
)
def test_untrusted_text_is_no_markdown(text, markdown):
    assert card_module._plain(text) == markdown


def test_names_of_columns():
    assert [card_module._code(name) for name in ("user_text", "user_a|b`<u>")] == [
        "`user_text`",
        r"<code>user_a\|b\`&lt;u&gt;</code>",
    ]


def test_card_has_no_placeholders_and_complete_tables(card):
    assert not re.search(r"\{\{|\}\}|\{%|%\}|None\.", card.text)
    lines = card.text.splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r"\|(-+\|)+", line):
            width = line.count("|")
            assert lines[number - 1].count("|") == width == lines[number + 1].count("|"), lines[number - 1]


def test_unknown_sources_are_left_to_the_publisher(card):
    """The mini corpus has DailyTalk's layout only, and the toy unit model is not SeamlessM4T's."""
    assert "# Spoken dialogs for USDM\n" in card.text
    assert "split lists have DailyTalk's layout but differ from the ones that DailyTalk publishes" in card.text
    for name in ("keonlee9420", "DailyDialog", "d1383", "SeamlessM4T", "XLS-R", "USTM", "CC BY"):
        assert name not in card.text
    for key in ("lee2022dailytalk", "seamless2023m4t", "babu2021xlsr", "li2017dailydialog"):
        assert key not in card.text
    cells = [row[0] for row in tables(card.text)]
    assert "the corpus: <!-- publisher: corpus -->to be filled in by the publisher<!-- end -->" in cells
    unit_model = "<!-- publisher: units -->to be filled in by the publisher<!-- end -->"
    assert f"the unit model (layer 35, 100 units): {unit_model}" in cells
    assert 'model="path/to/your/model",  # a model with 42,003 embeddings' in card.text


@pytest.fixture
def make(mini, unit_model, dataset_folder, tmp_path):
    """Return a function that prepares the mini corpus, with the cache of `dataset_folder`; it returns counts and card."""

    def run(**changes):
        shutil.copytree(dataset_folder.parent / "cache", tmp_path / "cache")
        counts = prepare(**options(mini, unit_model, tmp_path, shard_dialogs=64) | changes)
        verify(tmp_path / "out")
        return counts, DatasetCard.load(tmp_path / "out" / "README.md")

    return run


@pytest.fixture
def known_lists(mini, monkeypatch):
    """Treat the lists of the mini corpus as the published ones."""
    lists = {split: ("", sha256_file(mini / "corpus" / f"{split}.txt")) for split in ("train", "test")}
    monkeypatch.setattr(dailytalk, "SPLIT_LISTS", lists)


@pytest.fixture
def known_unit_model(unit_model, monkeypatch):
    """Treat the sources of the toy unit model as the published ones."""
    sources = json.loads((unit_model / "unit_model.json").read_text())["sources"]
    monkeypatch.setitem(published.KNOWN_DIGESTS, "xlsr2_1b_v2.pt", sources["checkpoint"])
    monkeypatch.setitem(published.KNOWN_DIGESTS, "kmeans_10k.npy", sources["kmeans"])


@pytest.mark.usefixtures("known_lists", "known_unit_model")
def test_published_sources_are_named_with_licence_and_citation(make):
    counts, card = make()
    assert counts["corpus"] == "DailyTalk" and counts["unit_model"]["name"] == "xlsr2_1b_v2"
    data = card.data.to_dict()
    # DailyTalk's own tag would allow what DailyDialog forbids.
    assert (data["language"], data["license"]) == ("en", "other")
    assert data["license_name"] == "cc-by-sa-4.0-with-texts-from-cc-by-nc-sa-4.0"
    assert data["license_link"] == "https://github.com/keonlee9420/DailyTalk"
    for name in ("# DailyTalk for USDM\n", "DailyDialog", "SeamlessM4T", "XLS-R", "d1383", 'model="naver-ai/USTM",\n'):
        assert name in card.text
    for key in ("lee2022dailytalk", "kim2024usdm", "seamless2023m4t", "babu2021xlsr", "li2017dailydialog"):
        assert f"{{{key}," in card.text
    assert "come from the split lists and were" in card.text and "not confirmed" in card.text
    assert "to be filled in" not in card.text


@pytest.mark.usefixtures("known_lists")
def test_edited_split_lists_are_not_named_dailytalk(mini, make, tmp_path):
    edited = tmp_path / "train.txt"
    edited.write_bytes(b"".join((mini / "corpus" / "train.txt").read_bytes().splitlines(keepends=True)[1:]))
    lists = {"train_metadata_path": str(edited), "test_metadata_path": str(mini / "corpus" / "test.txt")}
    counts, card = make(**lists)
    assert counts["corpus"] == "split list" and card.data.license == "unknown"
    assert "if the lists are an edited copy of DailyTalk's, its licence and citation apply" in card.text
    assert "lee2022dailytalk" not in card.text and "d1383" not in card.text


def test_tokenizer_from_a_folder_is_not_named(make, dataset_folder):
    counts, card = make(pretrained_model_name_or_path=str(dataset_folder / "tokenizer"))
    assert counts["tokenizer"] == {"name": None, "num_units": 10_000}
    assert "the tokenizer, loaded from a folder: 42,003 tokens, including 10,000 units" in card.text
    assert str(dataset_folder) not in card.text and "USTM" not in card.text


def test_card_follows_the_options(make):
    template = Template(user_role="A|<b>", loss=("user_text",))
    _, card = make(history=1, agent="1", shuffle_seed=1234, template=template)
    assert card.data.task_categories == ["automatic-speech-recognition"]
    assert "User/agent pairs with up to 1 earlier exchange as training data" in card.text
    assert "a variant of the USDM template" in card.text
    assert "if the later one is by speaker 1, who is always the agent" in card.text
    assert "as context without labels" in card.text and "Rows have no history" not in card.text
    assert "These tokens are labelled: the user's text and the newline after it.\n" in card.text
    assert "The rows of each split are shuffled with seed 1234." in card.text
    assert "- Exchanges repeat" in card.text and "- Turns repeat" not in card.text
    cells = tables(card.text)
    assert ("max_length", "8,192") in cells and ("shuffle_seed", "1234") in cells
    assert "| template.user_role | A\\|&lt;b&gt; |" in card.text
    meanings = {row[0].strip("`"): row[2] for row in cells if row[0].startswith("`")}
    assert meanings["turn"] == "number of the last user turn of the row in its dialog"
    assert meanings["user_seconds"] == "length of the audio in seconds; one entry per exchange"


def test_card_of_conversations(make):
    _, card = make(config_name="multi_turn", max_length=400, overflow="split")
    assert "Conversations as training data" in card.text
    assert (
        "3 rows of train did not fit into `max_length` tokens and were split into several rows, between exchanges:"
        in card.text
    )
    assert "Rows of more than 400 tokens were split into several rows, between exchanges." in card.text
    assert "- Turns repeat" in card.text and "Rows have no history" not in card.text


def test_settings_without_a_value_are_not_listed(card):
    names = {row[0] for row in tables(card.text)}
    assert "history" in names and not names & {"agent", "shuffle_seed", "num_output_shards"}
    assert "The rows are in the order of their dialogs and turns." in card.text


@pytest.mark.slow
def test_long_lists_are_cut(make, monkeypatch):
    monkeypatch.setattr("usdm_sft.folder.card.SHOWN_REASONS", 2)
    counts, card = make(max_length=300)
    left_out = counts["splits"]["train"]["pairs_left_out"]
    assert len(left_out) > 3
    assert (
        f"Left out of train: 2 dialogs and {len(left_out)} pairs. Of the pairs, 0 had bad audio and {len(left_out)} did not fit"
        in card.text
    )
    assert f"\n- {len(left_out) - 2} more: see `counts.json`\n" in card.text
    _, second, third, *_ = left_out
    assert f"\n- {second}: " in card.text and f"\n- {third}: " not in card.text


@pytest.mark.slow
def test_untrusted_names_become_plain_text(mini, unit_model, make, tmp_path):
    """A dialog name and a source of an untrusted unit model folder are escaped."""
    folder = shutil.copytree(unit_model, tmp_path / "unit_model")
    description = json.loads((folder / "unit_model.json").read_text())
    description["sources"] = {"<img src=x>|a": "`b`\n# c"}
    (folder / "unit_model.json").write_text(json.dumps(description))
    row = {"dialog": "[x](http://evil) <b>", "turn": 0, "speaker": "A", "text": "hello"}
    row["audio"] = str(mini / "corpus" / "data" / "3" / "0_0_d3.wav")
    rows = [row, *(row | {"dialog": "d", "turn": turn, "speaker": "AB"[turn]} for turn in (0, 1))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, card = make(unit_model=str(folder), data_dir=str(tmp_path))
    assert "\n- \\[x\\](http://evil) &lt;b&gt;: a single turn makes no pair\n" in card.text
    assert "| sha256 of the unit model's source &lt;img src=x&gt;\\|a | \\`b\\` # c |\n" in card.text
    assert "- The manifests have no emotions.\n" in card.text and "emotions, and units" not in card.text


def test_card_shows_the_agreement_of_a_faster_precision(make):
    counts, card = make(precision="bf16")
    share = f"{100 * counts['agreement']['share']:.2f} % of the units"
    assert f"{counts['agreement']['utterances']} utterances, {share}" in card.text
