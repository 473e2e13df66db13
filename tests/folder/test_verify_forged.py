"""Forged counts.json, cards and tokenizers whose digests fit."""

import json
import re
import shutil

import pytest

from tests.helpers import edit_counts, find_problems, replace_file
from usdm_sft.folder.layout import read_counts, read_template
from usdm_sft.folder.verify import VerificationError, verify

AGAIN = r"run prepare again and pass --overwrite \(Python: overwrite=True\)"
NO_COUNTS = rf"is not the counts of a dataset folder: {AGAIN}$"


def change_split(split, **changes):
    return lambda counts: counts["splits"][split].update(changes)


@pytest.mark.parametrize(
    "forgeries",
    [
        [
            (lambda counts: counts["files"].update({"README.md": 5}), r"'README\.md' has 5 instead of a sha256"),
            (lambda counts: counts["splits"].update(dev={}), "names no file of split dev"),
        ],
        [(lambda counts: counts["settings"].update(max_length=300), r"\d+ tokens, more than max_length 300")],
        [(lambda counts: counts["digests"].clear(), r"tokenizer is not the tokenizer that counts\.json names")],
        [
            (change_split("train", labelled_tokens=5), "train has 1301 labelled_tokens, not 5"),
            (change_split("train", dialogs=9), "train has 4 dialogs, not 9"),
            (change_split("train", pairs=9), "train has 10 pairs, those in .* included, not 9"),
            (change_split("test", utterances=9), "the rows of test have 5 utterances, not 9"),
            (change_split("test", hours=9.0), r"the rows of test have 0\.00\d+ hours, not 9\.0"),
            (change_split("test", pairs_with_bad_audio=1), "names 0 pairs with bad audio, not 1"),
            (lambda counts: counts["statistics"]["test"].update(distinct_units=5), "statistics of test differ from those of its rows"),
            (lambda counts: counts.update(num_units=1), r"train has unit \d+, but num_units is 1"),
            (lambda counts: counts["tokenizer"].update(num_units=9), f"tokenizer is not that of the folder: {AGAIN}$"),
        ],
        [
            (lambda counts: counts["splits"]["test"].pop("pairs"), f"counts of test are not those of a dataset .*: {AGAIN}$"),
            (lambda counts: counts.pop("tokenizer"), f"tokenizer is not that of the folder: {AGAIN}$"),
        ],
        [(lambda counts: counts.pop("unit_model"), r"row 0 \(d3_0\): user_units: 107 units \(50 per second\) last 2\.14 s, not 2\.14625 s$")],
        [(lambda counts: counts["unit_model"].clear(), f"does not have all that the card says .*: {AGAIN}$")],
        [(lambda counts: counts["settings"].update(shuffle_seed=7), f"README.md is not the card .* differs in its section 'Contents', its section 'How it was made': .*{AGAIN}$")],
    ],
    ids=["files", "length", "digests", "totals", "missing", "unit model", "its description", "settings"],
)  # fmt: skip
def test_counts_that_do_not_follow_from_the_folder(folder_copy, forgeries):
    for change, _ in forgeries:
        edit_counts(folder_copy, change)
    problems = find_problems(folder_copy)
    for _, message in forgeries:
        assert any(re.search(message, problem) for problem in problems), (message, problems)


NAMES = ["../secret", "/etc/passwd", "a/../b", "..", "", "a//b", "a\\b", "a\0b", "a\nb", "a\ud800", "\x1b[2J"]
PLACES = {
    "config": lambda counts, name: counts.update(config=name),
    "splits": lambda counts, name: counts["splits"].update({name: counts["splits"]["train"]}),
    "files": lambda counts, name: counts["files"].update({name: "0" * 64}),
}


@pytest.fixture
def only_counts(dataset_folder, tmp_path):
    """A folder with the counts.json of a dataset folder."""
    shutil.copy(dataset_folder / "counts.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("place", "name"), [*((place, name) for place in PLACES for name in NAMES), ("config", "a/b"), ("splits", "a/b")]
)
def test_names_outside_the_folder_are_refused(only_counts, place, name):
    edit_counts(only_counts, lambda counts: PLACES[place](counts, name))
    message = f"counts.json: {name!r} is not a name in a dataset folder: run prepare again"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_counts(only_counts)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("key", "config") for value in (None, 5)),
        *({name: value} for name in ("settings", "digests", "splits", "statistics", "files") for value in (None, [], "x", 5)),
        *({"num_units": value} for value in (None, "x", 0, -1, 65_537, 10**400)),
        {"splits": {}}, {"splits": {"train": None}}, {"splits": {"train": []}}, {"settings": {}},
        {"settings": {"template": None, "history": 0, "max_length": 5}},
        {"settings": {"template": {}, "history": "x", "max_length": 5}},
        {"settings": {"template": {}, "history": 0, "max_length": None}},
        *({"unit_model": value} for value in ("x", [1], 5)), {"versions": "x"},
        *({"splits": {"train": {name: value}}} for name in ("pairs_with_bad_rows", "pairs_left_out", "dialogs_left_out", "turns_left_out")
          for value in ("x", [1], None)),
        {"utterances": []}, {"utterances": {"train": {}}}, {"utterances": {"train": 1, "test": {}}},
    ],
    ids=str,
)  # fmt: skip
def test_counts_of_other_types_are_refused(only_counts, change):
    edit_counts(only_counts, lambda counts: counts.update(change))
    with pytest.raises(ValueError, match=f"^{re.escape(str(only_counts / 'counts.json'))} {NO_COUNTS}"):
        read_counts(only_counts)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("min_seconds", "max_seconds", "max_gap") for value in ("x", [1])),
        *({name: value} for name in ("corpus", "agent", "merge", "on_bad_rows") for value in ({}, [1])),
        {"corpus": "foo"}, {"corpus": 5}, {"merge_speaker_turns": "x"}, {"keep_columns": "x"}, {"keep_columns": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_other_types_are_refused(only_counts, change):
    edit_counts(only_counts, lambda counts: counts["settings"].update(change))
    with pytest.raises(ValueError, match=f"^{re.escape(str(only_counts / 'counts.json'))} {NO_COUNTS}"):
        read_counts(only_counts)


@pytest.mark.parametrize(
    ("config", "message"), [(5, f" {NO_COUNTS}"), ("../secret", ": '../secret' is not a name in a dataset folder: run prep")]
)  # fmt: skip
def test_every_command_refuses_bad_counts_in_one_line(only_counts, refused, config, message):
    edit_counts(only_counts, lambda counts: counts.update(config=config))
    text = only_counts / "text"
    for args in (["verify"], ["stats"], ["show"], ["export", str(text)], ["push", "user/name"]):
        error = refused(args[0], only_counts, *args[1:])
        assert re.match(rf"dailytalk-usdm {args[0]}: {re.escape(str(only_counts / 'counts.json'))}{message}", error)
    assert not text.exists()


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (change_split("train", hours=10**400), f"splits.train.hours is 1{'0' * 39}..."),
        (change_split("train", pairs=float("nan")), "splits.train.pairs is nan"),
        (change_split("test", units=float("-inf")), "splits.test.units is -inf"),
        (lambda counts: counts.update(agreement={"share": 10**400}), f"agreement.share is 1{'0' * 39}..."),
        (lambda counts: counts["tokenizer"].update(ids={"opening": [1, 2**63]}), f"tokenizer.ids.opening is {2**63}"),
    ],
    ids=["hours", "NaN", "infinity", "agreement", "list"],
)
def test_numbers_that_no_folder_has_are_refused_with_their_key(only_counts, refused, forge, message):
    edit_counts(only_counts, forge)
    for command in ("verify", "show", "stats"):
        error = refused(command, only_counts)
        assert error.startswith(
            f"dailytalk-usdm {command}: {only_counts}/counts.json: {message}, too large or no number: run prep"
        )


def test_nested_value_in_counts_is_refused(only_counts):
    text = (only_counts / "counts.json").read_text().rstrip().removesuffix("}")
    nested = '{"x": ' * 990 + "1" + "}" * 990
    (only_counts / "counts.json").write_text(f'{text}, "x": {nested}}}')
    with pytest.raises(ValueError, match=r"counts\.json is not JSON \(maximum recursion depth .*\): run prepare again"):
        read_counts(only_counts)


def test_deeply_nested_counts_are_refused(tmp_path):
    (tmp_path / "counts.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"counts\.json is not JSON .*: run prepare again and pass --overwrite"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evil": 1}, r"settings\.template is not a template \(.*evil.*\): run prepare again"),
        ({"instruction": 5}, r"template\.instruction is 5: give a text"),
        ({"user_role": None}, r"template\.user_role is None: give a text"),
        ({"loss": 5}, r"template\.loss is 5: give a list of one or more of"),
    ],
)
def test_malformed_template_is_refused(only_counts, change, message):
    edit_counts(only_counts, lambda counts: counts["settings"]["template"].update(change))
    with pytest.raises(ValueError, match=message):
        read_template(only_counts / "counts.json", read_counts(only_counts))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"# no YAML",
        b"---\na: [\n---\n",
        b"---\na: b: c\n---\n",
        b"---\n- a\n---\n",
        b"---\nconfigs: 5\n---\n",
        b"\xff\xfe\0",
        b'---\nconfigs: !!python/object/apply:os.system ["touch pwned"]\n---\n',
        b"---\nconfigs:\n- config_name: single_turn\n  data_files: '../../**'\n---\n",
        b"---\nconfigs:\n- config_name: single_turn\n  data_files: http://127.0.0.1:9/x.parquet\n---\n",
    ],
)
def test_malformed_card_is_refused(folder_copy, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    replace_file(folder_copy, "README.md", text)
    with pytest.raises(ValueError, match=r"README\.md does not have the YAML of this folder \(") as raised:
        verify(folder_copy)
    assert "\n" not in str(raised.value) and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # `load_dataset` would read files that were not verified
        (lambda card: card.replace("path: single_turn/test-*", "path: other/test-*"),
         r"does not have .*its configs are not the data files of counts\.json"),
        (lambda card: card.partition("dataset_info:")[0] + "---\n",
         "does not have .*its dataset_info names no features or splits"),
        # `load_dataset` would give rows of its cache that another folder has
        (lambda card: DIGEST.sub("", card), "is not .* does not hold the digest of its data files"),
        (lambda card: DIGEST.sub(rf"\g<1>{'0' * 64}\n", card), "is not .* does not hold the digest of its data files"),
        (lambda card: card + "Free for any use.\n", f"is not the card .* differs in its section 'Citation': restore it, or {AGAIN}$"),
        (lambda card: re.sub(r"num_bytes: \d+", "num_bytes: 5", card, count=1).replace("license: unknown", "license: mit"),
         rf"is not the card .* differs in its YAML \(dataset_info\): restore it, or {AGAIN}$"),
    ],
    ids=["other files", "no features", "no digest", "other digest", "text", "YAML"],
)  # fmt: skip
def test_card_of_other_data_is_refused(folder_copy, change, message):
    card = (folder_copy / "README.md").read_text()
    assert change(card) != card
    replace_file(folder_copy, "README.md", change(card).encode())
    with pytest.raises(ValueError, match=f"README.md {message}"):
        verify(folder_copy)


DIGEST = re.compile(r"^(  description: data files with sha256 )[0-9a-f]{64}\n", re.MULTILINE)
CONFIG = "tokenizer/tokenizer_config.json"


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    replace_file(folder, CONFIG, json.dumps(config).encode())


def test_tokenizer_config_that_gives_other_ids(folder_copy):
    auto_map = {"AutoTokenizer": ["code.Tokenizer", None]}
    edit_config(folder_copy, tokenizer_class="LlamaTokenizerFast", eos_token="<s>", bos_token="</s>", auto_map=auto_map)
    expected = [
        "tokenizer_class is 'LlamaTokenizerFast', not 'PreTrainedTokenizerFast'",
        f"auto_map is {auto_map}, not None",
        "bos_token is '</s>', not '<s>'",
        "eos_token is '<s>', not '</s>'",
    ]
    again = "run prepare again and pass --overwrite (Python: overwrite=True)"
    assert find_problems(folder_copy) == [f"{folder_copy / CONFIG}: {text}: {again}" for text in expected]


def test_tokenizer_config_of_transformers_4_passes(folder_copy):
    token = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    changes = {"eos_token": token | {"__type": "AddedToken"}, "added_tokens_decoder": {"2": token | {"special": True}}}
    edit_config(folder_copy, **changes, extra_special_tokens={})
    assert verify(folder_copy) == {"train": 10, "test": 3}


def test_other_tokenizer_ends_verify_before_rows_are_read(folder_copy, monkeypatch):
    """Its rows could decode to any amount of text."""
    edit_counts(folder_copy, lambda counts: counts["digests"].update(tokenizer="0" * 64))
    monkeypatch.setattr("usdm_sft.folder.verify.check_rows", None)
    with pytest.raises(VerificationError, match=r"tokenizer is not the tokenizer that counts\.json names"):
        verify(folder_copy)
