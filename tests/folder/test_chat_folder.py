"""A dataset folder of conversations in the chat form, from prepare to verify, show and the page."""

import json
import shutil
from fnmatch import fnmatch

import datasets
import pytest
from tokenizers import AddedToken

from tests.bases import byte_level
from tests.chat_templates import THINKING
from tests.helpers import edit_counts, options, replace_file, reuse_units
from usdm_sft.cli.main import main
from usdm_sft.folder.verify import VerificationError, verify
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template import tokenizer as loading
from usdm_sft.template.config import Template
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import build_tokenizer, load_tokenizer, save_tokenizer

MAX_LENGTH = 600


@pytest.fixture(scope="module")
def root(mini, unit_model, finished, tmp_path_factory):
    """The mini corpus as conversations in a chat template whose last answer differs: the dataset folder `out`."""
    root = tmp_path_factory.mktemp("chat")
    reuse_units(finished, root)
    chat = byte_level()
    special = ["<|im_end|>", "<think>", "</think>"]
    chat.add_tokens([AddedToken(token, normalized=False, special=True) for token in special], special_tokens=True)
    chat.chat_template = THINKING
    chat.save_pretrained(root / "base")
    save_tokenizer(build_tokenizer(root / "base", 100), root / "tokenizer")
    chosen = {"config_name": "multi_turn", "max_length": MAX_LENGTH, "overflow": "split"}
    tokenizer = {
        "pretrained_model_name_or_path": root / "tokenizer",
        "template": Template(tokenization="chat", lowercase=False),
    }
    prepare(**options(mini, unit_model, root, **chosen, **tokenizer))
    return root


def test_verify_passes_and_long_conversations_are_split_to_fit(root):
    number = verify(root / "out")
    counts = json.loads((root / "out" / "counts.json").read_text())
    rows = datasets.load_dataset(str(root / "out"), split="train")
    train = counts["splits"]["train"]
    assert number["train"] == len(rows) and max(rows["length"]) <= MAX_LENGTH
    assert train["rows_cut"] and all(reason.startswith("kept as ") for reason in train["rows_cut"].values())
    assert sum(map(len, rows["user_text"])) == train["pairs"] - len(train["pairs_left_out"])


def test_texts_of_rows_keep_their_case(root):
    texts = datasets.load_dataset(str(root / "out"), split="test")["user_text"]
    encoder = TemplateEncoder(load_tokenizer(root / "tokenizer"), Template(tokenization="chat", lowercase=False))
    decoded = encoder.decode_batch(datasets.load_dataset(str(root / "out"), split="test")["input_ids"])
    assert any(text != text.lower() for row in texts for text in row)
    assert all(text in row for row, row_texts in zip(decoded, texts, strict=True) for text in row_texts)
    assert "the template keeps it as it is" in (root / "out" / "README.md").read_text()


def test_counts_are_those_of_the_rows(root):
    counts = json.loads((root / "out" / "counts.json").read_text())
    rows = datasets.load_dataset(str(root / "out"), split="test")
    exchanges = sum(map(len, rows["agent_units"]))
    units = sum(len(units) for row in rows["agent_units"] for units in row)
    summary = counts["statistics"]["test"]
    assert summary["labelled_units"] == units
    assert summary["labelled_parts"]["agent_units"] == units + exchanges  # each with its stop token
    assert summary["labelled_parts"]["frame"] == summary["labelled_parts"]["user_units"] == 0


def test_show_and_page_spell_the_messages(root, capsys, tmp_path):
    main(["show", str(root / "out"), "--split", "test"])
    shown = capsys.readouterr().out.splitlines()
    row = datasets.load_dataset(str(root / "out"), split="test")[0]
    text = f"{row['user_text'][0].lower()}<|continue|>{row['agent_text'][0].lower()}<|correspond|><|unit"
    assert any(line.startswith(f"loss  {text}") and line.endswith("<|im_end|>") for line in shown)
    assert "      <|im_start|>assistant⏎" in shown
    main(["show", str(root / "out"), "--split", "test", "--html", str(tmp_path / "page.html")])
    assert '"user_text",' in (tmp_path / "page.html").read_text()


def test_card_says_that_messages_are_labelled(root):
    card = (root / "out" / "README.md").read_text()
    assert "Each exchange is a message of the user and one of the assistant in the tokenizer's chat template" in card
    assert (
        "the agent's text and the special token after it; the agent's units and the special token after them." in card
    )


def test_chat_template_comes_with_a_tokenizer_on_the_hub(root, tmp_path, monkeypatch):
    def download(name, *, allow_patterns, **options):
        for file in (root / "out" / "tokenizer").iterdir():
            if any(fnmatch(f"tokenizer/{file.name}", pattern) for pattern in allow_patterns):
                (tmp_path / "tokenizer").mkdir(exist_ok=True)
                shutil.copy(file, tmp_path / "tokenizer")
        return tmp_path

    monkeypatch.setattr(loading, "hf_hub_download", lambda *args, **options: None)
    monkeypatch.setattr(loading, "snapshot_download", download)
    loaded = load_tokenizer("tester/pairs", subfolder="tokenizer", repo_type="dataset")
    assert loaded.chat_template == THINKING


def test_changed_ids_of_the_chat_template_are_found(root, tmp_path, refused):
    folder = shutil.copytree(root / "out", tmp_path / "out")
    edit_counts(folder, lambda counts: counts["tokenizer"]["chat"].pop("stop_id"))
    assert "counts.json: tokenizer.chat is {" in refused("show", folder, "--html", tmp_path / "page.html")


def test_changed_chat_template_is_found(root, tmp_path):
    folder = shutil.copytree(root / "out", tmp_path / "out")
    file = "tokenizer/chat_template.jinja"
    before = (folder / file).read_bytes()
    assert b"<think>\\n\\n</think>" in before
    replace_file(folder, file, before.replace(b"<think>\\n\\n</think>", b"<think></think>"))
    with pytest.raises(VerificationError, match="input_ids differ from the encoded columns: token"):
        verify(folder)
