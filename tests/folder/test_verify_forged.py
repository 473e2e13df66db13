"""Forged folders with digests that fit: what rows have in common, the totals of counts.json, the card and the tokenizer's settings."""

import json
import re

import pytest

from tests.folder.test_verify import FILE
from tests.helpers import edit_counts, edit_rows, options, replace_file
from usdm_sft.folder.verify import VerificationError, verify
from usdm_sft.prepare.prepare import prepare

AGAIN = r"run prepare again and pass --overwrite \(Python: overwrite=True\)$"


def forge_unit(encoder):
    """Return a change of a row: another unit in the user's speech, in ids and labels as well."""

    def change(row):
        row["user_units"][0] = (row["user_units"][0] + 1) % 50
        encoded = encoder({name: [row[name]] for name in encoder.template.parts})
        row.update({name: values[0].tolist() for name, values in encoded.items()})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "d9_9"}, r"row 0 \(d9_9\): the id of dialog_id and turn is d8_0"),
        ({"turn": 5}, "the id of dialog_id and turn is d8_5"),
        ({"dialog_id": "d9"}, "the id of dialog_id and turn is d9_0"),
        ({"turn": -2, "id": "d8_-2"}, "its first turn is -2"),
        ({"user_seconds": 1.0}, r"user_units are of \d+ frames, which is not the length of a recording of 1 s"),
        ({"agent_seconds": float("nan")}, "agent_units are of .* a recording of nan s"),
    ],
    ids=str,
)
def test_row_that_contradicts_itself(folder_copy, change, message):
    edit_rows(folder_copy, FILE, lambda rows: rows[0].update(change))
    with pytest.raises(VerificationError, match=message):
        verify(folder_copy)


@pytest.mark.parametrize("name", ["speaker", "text", "emotion", "units"])
def test_turn_that_differs_between_rows(folder_copy, encoder, name):
    """Of a text, the letters differ in case only, and have the same ids."""
    following = FILE.replace("3-of", "4-of")
    changes = {
        "speaker": lambda row: row.update(user_speaker="9"),
        "emotion": lambda row: row.update(user_emotion="fear"),
        "text": lambda row: row.update(user_text=row["user_text"].upper()),
        "units": forge_unit(encoder),
    }
    edit_rows(folder_copy, following, lambda rows: changes[name](rows[0]))
    place, first = f"{folder_copy / following}: row 0 (d8_1)", f"{folder_copy / FILE}: row 0 (d8_0)"
    with pytest.raises(VerificationError) as raised:
        verify(folder_copy)
    assert raised.value.problems == [f"{place}: turn 1 has another {name} than in {first}"]


def test_dialog_in_two_splits(folder_copy):
    name = "single_turn/test-00000-of-00003.parquet"
    edit_rows(folder_copy, name, lambda rows: rows[0].update(id="d8_90", dialog_id="d8", turn=90))
    with pytest.raises(VerificationError) as raised:
        verify(folder_copy)
    place = f"{folder_copy / name}: row 0 (d8_90)"
    assert raised.value.problems == [f"{place}: dialog d8 is in train as well: a dialog belongs to one split"]


def test_turns_of_shuffled_rows_with_history(mini, unit_model, tmp_path):
    """The turns of earlier exchanges are compared as well."""
    changes = {"history": 1, "shuffle_seed": 3, "num_output_shards": 1, "shard_dialogs": 64}
    prepare(**options(mini, unit_model, tmp_path, **changes))
    folder, name = tmp_path / "out", "single_turn/train-00000-of-00001.parquet"
    assert verify(folder) == {"train": 10, "test": 3}

    def forge(rows, speaker, turn):
        [row] = [row for row in rows if row["id"] == "d8_2"]
        row["agent_speaker"][0] = speaker  # of turn 1
        row.update(turn=turn, id=f"d8_{turn}")

    edit_rows(folder, name, lambda rows: forge(rows, "9", 2))
    with pytest.raises(VerificationError, match=r"turn 1 has another speaker than in .*parquet: row \d \(d8_\d\)"):
        verify(folder)
    edit_rows(folder, name, lambda rows: forge(rows, "9", 1))
    with pytest.raises(VerificationError, match=r"row \d \(d8_1\): its first turn is -1"):
        verify(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: counts["splits"]["train"].update(dialogs=9), "train has 4 dialogs, not 9"),
        (lambda counts: counts["splits"]["train"].update(pairs=9), "train has 10 pairs, those in .* included, not 9"),
        (lambda counts: counts["splits"]["test"].update(utterances=9), "the rows of test have 5 utterances, not 9"),
        (lambda counts: counts["splits"]["test"].update(hours=9.0), r"the rows of test have 0\.00\d+ hours, not 9\.0"),
        (lambda counts: counts["splits"]["test"].update(pairs_with_bad_audio=1), "names 0 pairs with bad audio, not 1"),
        (lambda counts: counts["splits"]["test"].pop("pairs"), f"counts of test are not those of a dataset .*: {AGAIN}"),
        (lambda counts: counts.update(num_units=1), r"train has unit \d+, but num_units is 1"),
        (lambda counts: counts["tokenizer"].update(num_units=9), f"tokenizer is not that of the folder: {AGAIN}"),
        (lambda counts: counts.pop("tokenizer"), f"tokenizer is not that of the folder: {AGAIN}"),
        (lambda counts: counts.pop("unit_model"), f"does not have all that the card says .*: {AGAIN}"),
        (lambda counts: counts["settings"].update(shuffle_seed=7), f"README.md is not the card .* in its text: .*{AGAIN}"),
    ],
)  # fmt: skip
def test_totals_that_do_not_follow(folder_copy, change, message):
    edit_counts(folder_copy, change)
    with pytest.raises(VerificationError, match=message):
        verify(folder_copy)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda card: card + "Free for any use.\n", "its text"),
        (lambda card: card.replace("license: unknown", "license: mit"), r"its YAML \(license\)"),
        (lambda card: re.sub(r"num_bytes: \d+", "num_bytes: 5", card, count=1), r"its YAML \(dataset_info\)"),
    ],
)
def test_card_that_is_not_the_rendered_one(folder_copy, change, where):
    card = (folder_copy / "README.md").read_text()
    replace_file(folder_copy, "README.md", change(card).encode())
    with pytest.raises(
        VerificationError, match=f"README.md is not the card .* differs in {where}: restore it, or {AGAIN}"
    ):
        verify(folder_copy)


CONFIG = "tokenizer/tokenizer_config.json"


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    replace_file(folder, CONFIG, json.dumps(config).encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast"}, "tokenizer_class is 'LlamaTokenizerFast', not 'PreTrainedTokenizerFast'"),
        ({"eos_token": "<s>"}, "eos_token is '<s>', not '</s>'"),
        ({"bos_token": "</s>"}, "bos_token is '</s>', not '<s>'"),
        ({"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}, r"auto_map is \{.*\}, not None"),
    ],
    ids=str,
)  # fmt: skip
def test_tokenizer_config_that_gives_other_ids(folder_copy, changes, message):
    edit_config(folder_copy, **changes)
    with pytest.raises(VerificationError, match=f"tokenizer_config.json: {message}: {AGAIN}"):
        verify(folder_copy)


def test_tokenizer_config_of_transformers_4_passes(folder_copy):
    token = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    changes = {"eos_token": token | {"__type": "AddedToken"}, "added_tokens_decoder": {"2": token | {"special": True}}}
    edit_config(folder_copy, **changes, extra_special_tokens={})
    assert verify(folder_copy) == {"train": 10, "test": 3}
