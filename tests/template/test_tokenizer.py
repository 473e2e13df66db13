import json
import os
import re
import shutil

import datasets
import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.bases import byte_level, ids_of_transformers_4
from tests.helpers import replace_file
from usdm_sft.template import tokenizer as module
from usdm_sft.template.config import USTM
from usdm_sft.template.special_tokens import read_tokens
from usdm_sft.template.tokenizer import add_units, build_tokenizer, check_tokenizer, load_tokenizer, save_tokenizer
from usdm_sft.utils.errors import find_full_disk

# Texts whose ids in the legacy form differ from those in any other form.
HOSTILE = [
    " yes",
    "     x",
    "<|correspond|>yes<|correspond|>",
    "<|unit5|>\n</s>",
    "<|correspond|> \n### Agent\n yes.  it's ▁ok<|correspond|>",
    "a\u2028b 日本語 😀\xa0é",
]


@pytest.mark.oracle
def test_built_tokenizer_is_what_transformers_4_saves(tokenizer, shared):
    reference = json.loads((shared / "oracle" / "ustm-tokenizer" / "tokenizer.json").read_text())
    reference["model"]["merges"] = [merge.split(" ") for merge in reference["model"]["merges"]]
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == reference


@pytest.mark.oracle
def test_folder_of_the_reference_gives_the_same_ids(tokenizer, shared):
    loaded = load_tokenizer(shared / "oracle" / "ustm-tokenizer")
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert [loaded(text).input_ids for text in HOSTILE] == [tokenizer(text).input_ids for text in HOSTILE]


def test_auto_tokenizer_gives_the_same_ids_from_a_saved_folder(small_tokenizer, tmp_path):
    save_tokenizer(small_tokenizer, tmp_path)
    # A class that transformers 4 knows.
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    for model_config in (None, {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}):
        if model_config:  # as in a training checkpoint
            (tmp_path / "config.json").write_text(json.dumps(model_config))
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert [loaded(text).input_ids for text in HOSTILE] == [small_tokenizer(text).input_ids for text in HOSTILE]
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (1, 2, 32102, 32103)
    assert load_tokenizer(tmp_path).backend_tokenizer.to_str() == small_tokenizer.backend_tokenizer.to_str()


def test_tokenizer_of_mistral_common_is_the_one_that_is_built(tokenizer):
    assert load_tokenizer("mistral-common").backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.skipif("USDM_TRANSFORMERS_4" not in os.environ, reason="needs a Python with transformers 4.57 (.ci/run)")
def test_transformers_4_gives_the_same_ids(encoder, dataset_folder):
    rows = datasets.load_dataset("parquet", data_files=str(dataset_folder / "single_turn" / "*.parquet"), split="train")
    texts = [*HOSTILE, *map(encoder.decode, rows["input_ids"])]
    tokenizer = load_tokenizer(dataset_folder / "tokenizer")
    size, ids = ids_of_transformers_4(dataset_folder / "tokenizer", texts)
    assert size == 42_003 and ids == [tokenizer(text).input_ids for text in texts]
    assert ids[len(HOSTILE) :] == rows["input_ids"][:]


def test_tokenizer_in_a_folder_of_a_dataset_folder(tokenizer, dataset_folder):
    loaded = load_tokenizer(dataset_folder, subfolder="tokenizer")
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    with pytest.raises(FileNotFoundError, match=r"dataset/pictures has no tokenizer\.json: name a folder"):
        load_tokenizer(dataset_folder, subfolder="pictures")


def llama_folder(tokenizer, folder, **config):
    """A folder that makes AutoTokenizer rebuild the tokenizer, like the folder of naver-ai/USTM."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"} | config))
    return AutoTokenizer.from_pretrained(folder)


def test_rebuilt_or_non_legacy_tokenizer_is_refused(small_tokenizer, tmp_path):
    rebuilt = llama_folder(small_tokenizer, tmp_path / "legacy", legacy=True)
    with pytest.raises(ValueError, match=r"for ' yes' instead of \[28705, 5081\]: it was rebuilt .*load_tokenizer"):
        check_tokenizer(rebuilt.backend_tokenizer)
    rebuilt = llama_folder(small_tokenizer, tmp_path / "rebuilt", legacy=False)
    PreTrainedTokenizerFast(tokenizer_object=rebuilt.backend_tokenizer).save_pretrained(tmp_path / "non-legacy")
    with pytest.raises(ValueError, match=r"non-legacy gives \[32001, 9780, 32001\] .*not in the legacy form"):
        load_tokenizer(tmp_path / "non-legacy")


def swap_words(content):
    vocab = content["model"]["vocab"]
    vocab["▁is"], vocab["▁Below"] = vocab["▁Below"], vocab["▁is"]


HUGE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}
OTHER_VOCABULARY = r"its vocabulary is not that of Mistral-7B-v0\.1"
NO_UNITS = r"has no <\|correspond\|>: add the tokens for units with `dailytalk-usdm tokenizer`"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(added_tokens=content["added_tokens"][:3]), NO_UNITS),
        (swap_words, OTHER_VOCABULARY),
        (lambda content: content.update(normalizer=HUGE), OTHER_VOCABULARY),
    ],
    ids=["no units", "other vocabulary", "huge output"],
)
def test_other_tokenizer_is_refused(small_tokenizer, tmp_path, change, message):
    content = json.loads(small_tokenizer.backend_tokenizer.to_str())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        load_tokenizer(tmp_path)
    assert len(str(raised.value)) < 1000


def test_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json: name a folder with a fast tokenizer"):
        load_tokenizer(tmp_path)
    reasons = {
        "naver-ai/USTM": r"offline mode \(HF_HUB_OFFLINE\) forbids fetching naver-ai/USTM: run once without offline mode",
        "/no/such/folder": r"'/no/such/folder' is not the name of a repository \(.*\): give USER/NAME",
    }
    for name, reason in reasons.items():
        instead = "; or use 'mistral-common', which is built offline" if name == USTM else ""
        message = f"^tokenizer {name} is not a folder, and {reason}{instead}$"
        with pytest.raises((OSError, ValueError), match=message):
            load_tokenizer(name, model_cache_dir=tmp_path)
        with pytest.raises((OSError, ValueError), match=f"^tokenizer {name} is not a folder, and {reason}$"):
            build_tokenizer(name, 5, model_cache_dir=tmp_path)  # USTM's cannot take the place of a base


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", content) for content in ("", "[]", "{")]
    + [("tokenizer_config.json", content) for content in ("[]", '{"bos_token": 5}')],
)
def test_malformed_tokenizer_is_refused(small_tokenizer, tmp_path, name, content):
    small_tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"has a tokenizer that cannot be opened \(.+\): download it again$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("folder", ["Mistral-7B", "qwen"])
def test_page_of_html_in_place_of_a_file(small_tokenizer, tmp_path, name, folder):
    folder = tmp_path / folder
    small_tokenizer.save_pretrained(folder)
    (folder / name).write_text("\ufeff\n<!DOCTYPE html><title>Log in</title>", encoding="utf-8")
    message = f"{folder / name} is HTML and not JSON, such as a page to log in or of an error: download it again"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_tokenizer(folder, 5)
    instead = ", or use 'mistral-common'" if folder.name == "Mistral-7B" else ""
    with pytest.raises(ValueError, match=f"^{re.escape(message + instead)}$"):
        load_tokenizer(folder)


CONTRADICTIONS = [  # what tokenizers raises plain Exception for, and what it panics at, at load or at the first text
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Isolated", "invert": False}},
    {"model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}},
    {"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]]}},
]


@pytest.mark.parametrize("change", CONTRADICTIONS, ids=lambda change: next(iter(change.values()))["type"])
def test_tokenizer_that_contradicts_itself(tmp_path, change):
    add_units(byte_level(), 5, "base").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has a tokenizer that cannot be (opened|used) \(.+\): download it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("command", ["verify", "show"])
def test_folder_whose_tokenizer_contradicts_itself(small_tokenizer, folder_copy, refused, command):
    content = json.loads(small_tokenizer.backend_tokenizer.to_str()) | CONTRADICTIONS[1]
    replace_file(folder_copy, "tokenizer/tokenizer.json", json.dumps(content).encode())
    assert "has a tokenizer that cannot be" in refused(command, folder_copy)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_full_disk_while_the_tokenizer_is_saved(small_tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"the tokenizer cannot be written to .*: No space left on device") as raised:
        save_tokenizer(small_tokenizer, tmp_path)
    assert find_full_disk(raised.value) is raised.value


def test_code_beside_a_tokenizer_is_not_run(small_tokenizer, tmp_path):
    small_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'code-ran')!r}, 'w')")
    path = tmp_path / "tokenizer_config.json"
    auto_map = {"auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}, "tokenizer_class": "Fast"}
    path.write_text(json.dumps(json.loads(path.read_text()) | auto_map))
    assert load_tokenizer(tmp_path).backend_tokenizer.to_str() == small_tokenizer.backend_tokenizer.to_str()
    assert not (tmp_path / "code-ran").exists()


def test_another_model_in_mistral_common_is_refused(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.model.v1").write_bytes(b"other")
    monkeypatch.setattr(module.importlib.resources, "files", lambda name: tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.model\.v1 has sha256 .* install another release"):
        build_tokenizer()
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(ImportError, match="pip install 'dailytalk-usdm"):
        build_tokenizer()


@pytest.mark.parametrize("subfolder", [None, "tokenizer"])
def test_cached_tokenizer_does_not_wait_for_a_hub_that_is_down(served_hub, tmp_path, monkeypatch, subfolder):
    add_units(byte_level(), 50, "base").save_pretrained(tmp_path / "saved")
    prefix = f"{subfolder}/" if subfolder else ""
    files = {prefix + path.name: ("reg", path.read_bytes()) for path in (tmp_path / "saved").iterdir()}
    served_hub.commit(served_hub.create("models", "tester/cached", False), "main", files, [], "files", None)

    def load(name):
        save_tokenizer(load_tokenizer("tester/cached", tmp_path / "cache", subfolder=subfolder), tmp_path / name)
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    expected = load("online")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"it waits {seconds} s and asks again"))
    assert load("offline") == expected


def test_private_tokenizer_is_loaded_with_token_and_revision(served_hub, tmp_path):
    served_hub.token = "hf_aVerySecretToken"
    repo = served_hub.create("models", "tester/tokenizer", True)
    for branch, num_units in (("v1", 100), ("main", 50)):
        add_units(byte_level(), num_units, "base").save_pretrained(tmp_path / branch)
        files = {path.name: ("reg", path.read_bytes()) for path in (tmp_path / branch).iterdir()}
        served_hub.commit(repo, branch, files, [], branch, None)
    for revision, num_units in ((None, 50), ("v1", 100)):
        loaded = load_tokenizer("tester/tokenizer", tmp_path / "cache", revision=revision, token=served_hub.token)
        assert read_tokens(loaded).num_units == num_units
    message = r"^tokenizer tester/tokenizer is not a folder, and the Hub does not accept your token \(status 401"
    with pytest.raises(OSError, match=message) as raised:
        load_tokenizer("tester/tokenizer", tmp_path / "empty", token="hf_anotherSecret")
    assert "Secret" not in str(raised.value)
