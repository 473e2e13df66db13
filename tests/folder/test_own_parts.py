"""The parts of the dataset card that are the publisher's own: filled in, kept, and covered by no digest."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import DatasetCard, snapshot_download

from tests import bases
from tests.helpers import content, edit_counts, find_problems, options
from usdm_sft.folder.finished import find_finished
from usdm_sft.folder.own_parts import Card, check_options, fill_in, plain_card
from usdm_sft.folder.push import push
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.config import Template
from usdm_sft.template.tokenizer import build_tokenizer, save_tokenizer

ALL = {
    "title": "Calls of the help desk",
    "license": "cc-by-4.0",
    "language": "en, de",
    "source": "[Calls | 2026](https://example.org)",
    "citation": "@misc{calls, title={Calls}}",
}
# A card of each kind before anything is filled in, and as `plain_card` returns it.
OTHER = """---
license: unknown
size_categories: n<1K
pretty_name: Spoken dialogs for USDM
tags:
- usdm
---

# Spoken dialogs for USDM

<!-- publisher: text -->
<!-- what you write between these two marks is kept -->
<!-- end -->

| the corpus: <!-- publisher: corpus -->to be filled in by the publisher<!-- end --> | <!-- publisher: corpus licence -->to be filled in by the publisher<!-- end -->; or |

<!-- publisher: citation -->
<!-- what you write between these two marks is kept -->
<!-- end -->

The end.
"""
HINT = "<!-- what you write between these two marks is kept -->"
EMPTY_BLOCKS = [(f"<!-- publisher: {name} -->\n{HINT}\n<!-- end -->\n\n", "") for name in ("text", "citation")]
MARKS = [("<!-- publisher: corpus -->", ""), ("<!-- publisher: corpus licence -->", ""), ("<!-- end -->", "")]
FILLED = [
    ("license: unknown", "language:\n- en\n- de\nlicense: cc-by-4.0"),
    ("pretty_name: Spoken dialogs for USDM", "pretty_name: Calls of the help desk"),
    ("# Spoken dialogs for USDM", "# Calls of the help desk"),
    ("corpus -->to be filled in by the publisher", "corpus -->[Calls \\| 2026](https://example.org)"),
    ("corpus licence -->to be filled in by the publisher", "corpus licence -->cc-by-4.0"),
    (f"citation -->\n{HINT}\n", "citation -->\n```bibtex\n@misc{calls, title={Calls}}\n```\n"),
]
DAILYTALK = """---
language: en
license: other
size_categories: n<1K
pretty_name: DailyTalk for USDM
license_name: cc-by-sa-4.0-with-texts-from-cc-by-nc-sa-4.0
license_link: https://github.com/keonlee9420/DailyTalk
tags:
- usdm
---

# DailyTalk for USDM

The end.
"""


def change(text, *changes):
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return text


OTHER_PLAIN = change(OTHER, *EMPTY_BLOCKS, *MARKS, ("<!-- end -->", ""))


def test_options_are_filled_in():
    filled = fill_in(OTHER, Card(**ALL))
    assert filled == change(OTHER, *FILLED)
    for text in (filled, OTHER, OTHER_PLAIN):  # the last is of an earlier version
        assert plain_card(text, "manifest") == OTHER_PLAIN
    assert fill_in(OTHER, Card(), filled) == filled  # a later run


def test_licence_of_ones_own_takes_the_place_of_all_of_dailytalks():
    filled = fill_in(DAILYTALK, Card(title="Mine", license="cc-by-nc-sa-4.0"))
    lines = filled.splitlines()
    assert lines[1:5] == ["language: en", "license: cc-by-nc-sa-4.0", "size_categories: n<1K", "pretty_name: Mine"]
    assert "license_" not in filled and "\n# Mine\n" in filled
    assert plain_card(filled, "DailyTalk") == DAILYTALK


def test_parts_of_the_first_card_win():
    first = OTHER.replace("# Spoken dialogs", "# First").replace("\n<!-- what you", "\nFirst.\n<!-- what you", 1)
    second = fill_in(OTHER, Card(title="Second", source="second"))
    text = OTHER.replace("corpus licence -->to be filled in by the publisher", "corpus licence -->MIT")
    filled = fill_in(text, Card(), first, second)
    for line in ("# First for USDM", "First.", "pretty_name: Second", "corpus -->second<", "licence -->MIT<"):
        assert line in filled
    assert fill_in(OTHER, Card(), "# A README of something else\n", OTHER_PLAIN) == OTHER


def test_other_metadata_of_the_publisher_is_kept():
    text = OTHER.replace("tags:\n", "annotations_creators:\n- expert\n# a remark\ntags:\n")
    assert plain_card(text, "manifest") == OTHER_PLAIN
    assert "annotations_creators:\n- expert\n# a remark\ntags:" in fill_in(OTHER, Card(), text)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("title", " ", "card.title is ' ': give a text"),
        ("title", 5, "card.title is 5: give a text"),
        ("citation", "<!-- end -->", "card.citation is '<!-- end -->': give a text without marks of comments"),
        ("source", "a\nb", "card.source is 'a\\nb': give one line"),
        (
            "license",
            "My Licence",
            "card.license is 'My Licence': give the Hub's name of it, such as cc-by-4.0, or other",
        ),
        ("language", "English", "card.language is 'English': give codes of ISO 639, such as en or en,de"),
    ],
)
def test_value_that_cannot_stand_in_a_card(option, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Card(**{option: value})


def test_option_without_a_place():
    with pytest.raises(ValueError, match=r"the card has no place for card\.source, because .* or prepare a new folder"):
        fill_in(OTHER_PLAIN, Card(source="here"))
    with pytest.raises(
        ValueError, match=r"card\.source is 'here', but the card names DailyTalk as the source: leave it"
    ):
        check_options(Card(source="here"), "DailyTalk")
    check_options(Card(**ALL), "manifest")


def edit_card(folder, *changes):
    (folder / "README.md").write_text(change((folder / "README.md").read_text(), *changes))


FILLED_BY_HAND = (
    ("license: unknown", "license: mit"),
    ("# Spoken dialogs for USDM", "# Calls"),
    ("corpus -->to be filled in by the publisher", "corpus -->the help desk"),
    ("units licence -->to be filled in by the publisher", "units licence -->MIT"),
    (HINT, "Ask for the recordings.\n\n## Thanks\n"),
)


def test_card_that_was_filled_in_by_hand_is_correct(folder_copy):
    digest = json.loads((folder_copy / "counts.json").read_text())["files"]["README.md"]
    marks = r"<!-- publisher: (text|citation) -->.*?<!-- end -->\n\n|<!-- publisher: [a-z ]+ -->|<!-- end -->"
    plain = re.sub(marks, "", (folder_copy / "README.md").read_text(), flags=re.DOTALL)
    assert hashlib.sha256(plain.encode()).hexdigest() == digest
    edit_card(folder_copy, *FILLED_BY_HAND)
    assert verify(folder_copy) == {"train": 10, "test": 3}
    (folder_copy / "README.md").write_text(plain)  # as an earlier version wrote it
    assert verify(folder_copy) == {"train": 10, "test": 3}


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("Nothing was left out of test.", "All is well.", "its section 'Contents'"),
        ("## Contents", "## Inhalt", "its section 'Inhalt', its section 'Contents'"),
        ("The dataset contains no audio.", "", "its section 'introduction'"),
        ("- usdm\nconfigs", "- usdm\n- best\nconfigs", "its YAML (tags)"),
        ("size_categories: n<1K", "size_categories: n>1T", "its YAML (size_categories)"),
        (
            "<!-- end -->",
            "",
            "its section 'introduction', its section 'Load it and train on it', its section 'Contents', ...",
        ),
        ("- usdm\nconfigs", "- usdm\n- [best\nconfigs", "its text"),
    ],
)
def test_other_changes_of_the_card_are_found(folder_copy, old, new, place):
    edit_card(folder_copy, (old, new))
    [problem] = find_problems(folder_copy)
    own = "text of your own goes between the marks <!-- publisher: text --> and <!-- end -->; licence, language, title and heading are free"
    again = "run prepare again and pass --overwrite (Python: overwrite=True)"
    assert problem == f"{folder_copy}/README.md was edited in {place}: undo it, or {again}; {own}"
    counts = json.loads((folder_copy / "counts.json").read_text())
    with pytest.raises(FileExistsError) as raised:
        find_finished(folder_copy, counts, overwrite=False)
    assert str(raised.value) == (
        f"{folder_copy} holds the result of this run, but README.md was edited in {place} (undo it; {own}): name another output_path, or "
        "pass --overwrite (Python: overwrite=True)"
    )


def test_second_configs_in_the_yaml_are_found(folder_copy):
    """The last of two entries counts, and one whose key is in quotes is none of those that the folder decides."""
    edit_card(folder_copy, ("dataset_info:", '"configs": []\ndataset_info:'))
    with pytest.raises(ValueError, match="its configs are not the data files"):
        verify(folder_copy)


def test_later_runs_keep_what_was_filled_in(mini, unit_model, finished, tmp_path, caplog):
    arguments = options(mini, unit_model, tmp_path)
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = content(tmp_path / "out")
    edit_card(tmp_path / "out", *FILLED_BY_HAND)
    caplog.set_level("INFO")
    prepare(**arguments, card=Card(license="cc-by-4.0"))
    assert caplog.messages[-1] == f"{tmp_path}/out/README.md has the new card.license"
    assert {name for name, data in content(tmp_path / "out").items() if data != before[name]} == {"README.md"}
    prepare(**arguments | {"max_length": 8000}, overwrite=True)
    text = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "license: cc-by-4.0",
        "# Calls",
        "corpus -->the help desk<",
        "corpus licence -->cc-by-4.0<",
        "## Thanks",
    ):
        assert line in text
    assert verify(tmp_path / "out") == {"train": 10, "test": 3}


@pytest.fixture
def hub(served_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", served_hub.token)
    return served_hub


def test_push_fills_in_and_keeps_the_card_of_the_hub(hub, folder_copy, tmp_path):
    before = content(folder_copy)
    push(folder_copy, "tester/calls", card=Card(**ALL))
    repository = hub.repos["datasets", "tester/calls"]

    def pushed():
        return hub.blob(repository["commits"][repository["refs"]["main"]]["files"]["README.md"]).decode()

    card = DatasetCard(pushed())
    assert (card.data.license, card.data.language, card.data.pretty_name) == ("cc-by-4.0", ["en", "de"], ALL["title"])
    assert "path/to/this/folder" not in pushed() and "USER/NAME" not in pushed()
    edited = pushed().replace("units -->to be filled in by the publisher", "units -->our own")
    hub.commit(repository, "main", {"README.md": ("reg", edited.encode())}, [], "edited on the Hub", None)
    push(folder_copy, "tester/calls", card=Card(license="mit"))
    assert pushed() == edited.replace("cc-by-4.0", "mit")
    assert content(folder_copy) == before
    copy = snapshot_download("tester/calls", repo_type="dataset", local_dir=tmp_path / "copy")
    assert verify(copy) == {"train": 10, "test": 3}
    push(copy, "tester/renamed")
    [*_, head] = hub.repos["datasets", "tester/renamed"]["commits"].values()
    assert hub.blob(head["files"]["README.md"]).decode() == pushed().replace("tester/calls", "tester/renamed")


def test_card_that_changes_during_a_push_is_refused(hub, folder_copy, monkeypatch):
    monkeypatch.setattr("usdm_sft.folder.push.verify", lambda folder: edit_card(folder, ("Nothing was", "All was")))
    with pytest.raises(ValueError, match=r"README\.md was changed after it was verified: push again"):
        push(folder_copy, "tester/calls")


@pytest.mark.slow
def test_code_of_the_pushed_card_runs_from_another_folder(hub, mini, unit_model, tmp_path):
    """It loads the rows, grows the embeddings of the base model that it names, and trains."""
    pytest.importorskip("trl", reason="needs the extra 'train'")
    from transformers import LlamaConfig, LlamaForCausalLM

    base = bases.byte_level()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(base), **shape)).save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    files = {path.name: ("reg", path.read_bytes()) for path in (tmp_path / "base").iterdir()}
    hub.commit(hub.create("models", "tester/base", False), "main", files, [], "base", None)
    save_tokenizer(build_tokenizer("tester/base", 100), tmp_path / "tokenizer")
    made = {"pretrained_model_name_or_path": tmp_path / "tokenizer", "template": Template(tokenization="separate")}
    prepare(**options(mini, unit_model, tmp_path, **made))
    edit_counts(tmp_path / "out", lambda counts: counts["tokenizer"].update(base_model="tester/other"))
    assert "counts.json: tokenizer is not that of the folder" in find_problems(tmp_path / "out")[0]
    edit_counts(tmp_path / "out", lambda counts: counts["tokenizer"].update(base_model="tester/base"))
    push(tmp_path / "out", "tester/calls")
    [*_, head] = hub.repos["datasets", "tester/calls"]["commits"].values()
    card = hub.blob(head["files"]["README.md"]).decode()
    assert "the tokenizer of [tester/base](https://huggingface.co/tester/base) with the units, loaded from" in card
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    code = code.replace(
        'output_dir="usdm"', 'output_dir="usdm", bf16=False, use_cpu=True, max_steps=1'
    )  # a machine without a GPU
    code += f"\nassert model.get_input_embeddings().num_embeddings == {len(base) + 103}\n"
    (tmp_path / "elsewhere").mkdir()
    hub_here = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
    }
    run = {"cwd": tmp_path / "elsewhere", "env": os.environ | hub_here, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train_loss" in done.stdout
