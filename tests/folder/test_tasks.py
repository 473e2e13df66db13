"""Dataset folders whose template leaves parts out, from prepare to card and page."""

import itertools
import shutil

import pytest
from datasets import load_dataset

from tests.helpers import REPOSITORY, edit_rows, options, page_data, reuse_units
from tests.template.test_parts_left_out import preset
from usdm_sft.cli.main import main
from usdm_sft.folder.layout import read_counts, read_template
from usdm_sft.folder.page import write_page
from usdm_sft.folder.verify import VerificationError, verify
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.view import format_example


@pytest.fixture(scope="module")
def root(mini, unit_model, finished, tmp_path_factory):
    """The mini corpus as `asr`, and as `t2t` in conversations that are split at 60 tokens."""
    root = tmp_path_factory.mktemp("tasks")
    reuse_units(finished, root)
    prepare(**options(mini, unit_model, root, template=preset("asr"), output_path=root / "asr"))
    more = {"config_name": "multi_turn", "max_length": 60, "overflow": "split"}
    prepare(**options(mini, unit_model, root, template=preset("t2t"), output_path=root / "t2t", **more))
    return root


def encoder_of(folder, tokenizer):
    return TemplateEncoder(tokenizer, read_template(folder / "counts.json", read_counts(folder)))


def test_verify_passes_and_finds_a_changed_text(root, tmp_path):
    assert verify(root / "asr") == {"train": 10, "test": 3}
    assert set(verify(root / "t2t")) == {"train", "test"}
    folder = shutil.copytree(root / "asr", tmp_path / "asr")
    edit_rows(folder, "single_turn/train-00000-of-00010.parquet", lambda rows: rows[0].update(user_text="other"))
    with pytest.raises(VerificationError, match="input_ids differ from the encoded columns: token "):
        verify(folder)


def test_the_loss_falls_on_the_generated_part_alone(root, tokenizer):
    rows = load_dataset(str(root / "asr"), split="train")
    summary = read_counts(root / "asr")["statistics"]["train"]
    texts = sum(len(tokenizer(text.lower(), add_special_tokens=False).input_ids) + 1 for text in rows["user_text"])
    parts = {"frame": 0, "user_units": 0, "user_text": texts, "agent_text": 0, "agent_units": 0}
    assert summary["labelled_parts"] == parts and summary["labelled_tokens"] == texts and summary["labelled_units"] == 0
    assert summary["units"] == sum(len(units) for name in ("user_units", "agent_units") for units in rows[name])


def test_long_conversations_are_split_between_exchanges(root, tokenizer):
    encoder, rows = encoder_of(root / "t2t", tokenizer), load_dataset(str(root / "t2t"), split="train")
    counts = read_counts(root / "t2t")["splits"]["train"]
    assert counts["rows_cut"] and not counts["pairs_left_out"]
    kept = {row["id"]: row for row in rows}
    for row_id, described in counts["rows_cut"].items():
        pieces = [kept[name] for name in described.removeprefix("kept as ").partition(" (")[0].split(", ")]
        assert pieces[0]["id"] == row_id and len(pieces) > 1
        for piece, following in itertools.pairwise(pieces):
            longer = {name: [piece[name] + following[name][:1]] for name in ("user_text", "agent_text")}
            assert len(piece["input_ids"]) <= 60 < len(encoder(longer)["input_ids"][0])


def test_card_names_the_task_and_its_parts(root):
    card = (root / "asr" / "README.md").read_text()
    assert "task_categories:\n- automatic-speech-recognition\npretty_name:" in card
    assert (
        "and `input_ids` with `labels`, which put two parts of them (user's speech, transcript) into a variant of the USDM template"
        in card
    )
    assert "These tokens are labelled: the user's text and the newline after it.\n" in card
    assert "| template.parts | user_units, user_text |\n" in card
    card = (root / "t2t" / "README.md").read_text()
    assert "These tokens are labelled: the agent's text and the newline after it.\n" in card


def test_page_says_what_the_row_leaves_out(root, tmp_path):
    write_page(root / "asr", tmp_path / "page.html")
    data = page_data(tmp_path / "page.html")
    assert list(data["parts"]) == ["frame", "user_units", "user_text"]
    for example in data["examples"]:
        assert [turn["left_out"] for turn in example["turns"]] == [[], ["text", "units"]]
        assert {part for part, _, _ in example["parts"]} == set(data["parts"])


def test_show_prints_the_parts_of_the_template_alone(root, capsys):
    main(["show", str(root / "asr")])
    shown = capsys.readouterr().out
    assert "### User⏎" in shown and "### Agent" not in shown


@pytest.mark.parametrize("name", ["asr", "s2t", "t2t", "tts"])
def test_example_of_the_documentation_is_current(name, root, tokenizer):
    encoded = TemplateEncoder(tokenizer, preset(name))(load_dataset(str(root / "asr"), split="train")[:1])
    row = {"id": "d3_0"} | {column: values[0].tolist() for column, values in encoded.items()}
    _, _, example = format_example(row, tokenizer.backend_tokenizer, color=False).partition("\n")
    page = (REPOSITORY / "docs" / "training" / "tasks.md").read_text()
    assert f"`{name}`\n\n```text\n{example}\n```" in page
