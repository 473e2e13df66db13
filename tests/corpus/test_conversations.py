"""prepare() of whole conversations and of pairs with earlier exchanges, from the corpus to the folder."""

import json
import shutil

import datasets
import pytest

from tests.helpers import FIXTURES, REPOSITORY, command, options
from usdm_sft.cli.main import main
from usdm_sft.folder.export import export
from usdm_sft.prepare import open_run as devices
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.config import Template
from usdm_sft.template.encoder import COLUMNS, TemplateEncoder
from usdm_sft.units.model import UnitModel

pytestmark = pytest.mark.loading

EXAMPLES = [json.loads(line) for line in (FIXTURES / "multi-turn" / "examples.jsonl").read_text().splitlines()]
CONVERSATIONS = {
    "train": ["d3_0", "d3_1", "d8_0", "d8_1", "d20_0", "d77_0", "d77_1"],
    "test": ["d105_0", "d105_1", "d2001_0"],
}


@pytest.fixture(scope="module")
def work(dataset_folder, finished, tmp_path_factory):
    """A folder whose `cache` has the units of the mini corpus: no test here may read audio or compute a forward pass."""
    folder = tmp_path_factory.mktemp("conversations")
    shutil.copytree(dataset_folder.parent / "cache" / "units", folder / "cache" / "units")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitModel, "forward_pack", None)
        patch.setattr("usdm_sft.units.reading.read_waveform", None)
        yield folder


@pytest.fixture(scope="module")
def run(work, mini, unit_model):
    """prepare() of the mini corpus into a folder, all on one cache -> (folder, counts)."""

    def run(output, **changes):
        given = {"output_path": str(work / output), "shard_dialogs": 64} | changes
        return work / output, prepare(**options(mini, unit_model, work, **given))

    return run


@pytest.fixture(scope="module")
def single(dataset_folder):
    return rows_of(dataset_folder)


@pytest.fixture(scope="module")
def multi(run):
    return run("multi", config_name="multi_turn")


@pytest.fixture(scope="module")
def history(run):
    return run("history", history=1)


def rows_of(folder, split="train", **options):
    loaded = datasets.load_dataset(str(folder), split=split, cache_dir=str(folder.parent / "datasets"), **options)
    return {row["id"]: row for row in loaded}


def test_config_file_gives_the_conversations_of_the_reference(multi, work, mini, unit_model, capsys):
    config = str(REPOSITORY / "configs" / "multi_turn.yaml")
    more = ["--config", config, "--output_path", str(multi[0]), "--shard_dialogs", "64"]
    main([*command(mini, unit_model, work)[3:], *more])
    out = capsys.readouterr().out
    assert "train: 7 rows from 4 dialogs" in out and "cut:" not in out
    expected = {example["exchanges"][0]["user_text"]: example for example in EXAMPLES}
    found = {split: rows_of(multi[0], split) for split in ("train", "test")}
    assert {split: list(rows) for split, rows in found.items()} == CONVERSATIONS
    for row in (found["train"] | found["test"]).values():
        example = expected.pop(row["user_text"][0])
        assert [dict(zip(COLUMNS, values, strict=True)) for values in zip(*map(row.get, COLUMNS), strict=True)] == example["exchanges"]  # fmt: skip
        assert (row["input_ids"], row["labels"]) == (example["input_ids"], example["labels"])
    assert not expected


def test_columns_of_a_conversation_are_those_of_its_pairs(multi, single):
    rows = rows_of(multi[0])
    assert list(rows["d8_1"]) == list(single["d8_1"])
    for name, row in rows.items():
        assert (row["id"], row["dialog_id"], row["turn"]) == (name, name.split("_")[0], int(name.split("_")[1]))
        pairs = [single[f"{row['dialog_id']}_{row['turn'] + 2 * k}"] for k in range(len(row["user_text"]))]
        for column, values in row.items():
            if column.startswith(("user_", "agent_")):
                assert values == [pair[column] for pair in pairs], (name, column)
    assert [len(row["user_text"]) for row in rows.values()] == [2, 1, 2, 2, 1, 1, 1]


def test_types_and_streaming(multi):
    loaded = datasets.load_dataset(str(multi[0]), split="train", cache_dir=str(multi[0].parent / "datasets"))
    types = {
        name: str(loaded.data.schema.field(name).type.value_type) for name in ("user_seconds", "input_ids", "labels")
    }
    assert types == {"user_seconds": "float", "input_ids": "int32", "labels": "int32"}
    assert str(loaded.data.schema.field("agent_units").type.value_type.value_type) == "uint16"
    assert rows_of(multi[0], streaming=True) == rows_of(multi[0])


def test_counts_of_conversations(multi, single):
    output, counts = multi
    assert json.loads((output / "counts.json").read_text()) == counts
    assert counts["config"] == "multi_turn"
    assert (counts["settings"]["overflow"], counts["settings"]["history"]) == ("truncate", 0)
    train, rows = counts["splits"]["train"], rows_of(output).values()
    assert (train["dialogs"], train["pairs"], train["rows"], train["utterances"]) == (4, 10, 7, 14)
    assert train["units"] == sum(len(row[f"{role}_units"]) for row in single.values() for role in ("user", "agent"))
    assert train["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert train["labelled_tokens"] == sum(label != -100 for row in single.values() for label in row["labels"])
    assert (train["pairs_left_out"], train["rows_cut"]) == ({}, {})


def test_other_rows_need_no_forward_pass(multi, history):
    assert UnitModel.forward_pack is None
    assert [counts["splits"]["train"]["rows"] for _, counts in (multi, history)] == [7, 10]


def test_command_reports_rows_that_were_cut(work, mini, unit_model, capsys):
    more = ["--output_path", str(work / "cut"), "--max_length", "450", "--config_name", "multi_turn"]
    main([*command(mini, unit_model, work)[3:], *more, "--shard_dialogs", "64"])
    assert "train: 7 rows from 4 dialogs" in (out := capsys.readouterr().out)
    assert "left out: 3 rows too long, 2 dialogs (d11: one speaker" in out and "no pair); shortened: 3 rows" in out


@pytest.mark.parametrize("overflow", ["truncate", "split", "drop"])
def test_conversations_that_are_too_long(run, multi, single, encoder, overflow):
    whole = {name: len(row["input_ids"]) for name, row in rows_of(multi[0]).items()}
    limit = whole["d8_1"]  # kept whole; d8_0 is longer
    assert [name for name, length in whole.items() if length > limit] == ["d8_0"]
    output, counts = run(f"short-{overflow}", config_name="multi_turn", overflow=overflow, max_length=limit)
    reason = f"{whole['d8_0']} tokens, more than max_length {limit}"
    train, rows = counts["splits"]["train"], rows_of(output)
    expected = {
        "truncate": (["d8_0"], {"d8_0": f"kept 1 of 2 exchanges ({reason})"}, {"d8_2": f"row d8_0 has {reason}"}),
        "split": (["d8_0", "d8_2"], {"d8_0": f"kept as d8_0, d8_2 ({reason})"}, {}),
        "drop": ([], {}, dict.fromkeys(("d8_0", "d8_2"), f"row d8_0 has {reason}")),
    }[overflow]
    assert list(rows) == ["d3_0", "d3_1", *expected[0], "d8_1", "d20_0", "d77_0", "d77_1"]
    assert (train["rows_cut"], train["pairs_left_out"]) == expected[1:]
    assert train["rows"] == len(rows)
    for name in expected[0]:
        assert rows[name]["input_ids"] == single[name]["input_ids"]
        assert rows[name]["labels"] == single[name]["labels"]
        assert rows[name]["user_text"] == [single[name]["user_text"]]


def test_earlier_exchanges_are_context(history, single, multi):
    output, counts = history
    rows, conversations = rows_of(output), rows_of(multi[0])
    assert list(rows) == list(single)
    for name, row in rows.items():
        assert (row["turn"], row["user_text"][-1]) == (single[name]["turn"], single[name]["user_text"])
    assert [name for name, row in rows.items() if len(row["user_text"]) == 2] == ["d3_2", "d8_2", "d8_3"]
    for name, conversation in (("d3_2", "d3_0"), ("d8_2", "d8_0"), ("d8_3", "d8_1")):
        ids, labels = rows[name]["input_ids"], rows[name]["labels"]
        assert ids == conversations[conversation]["input_ids"]
        first = len(single[conversation]["input_ids"]) - 2  # without the newline and </s>
        assert labels == [-100] * first + conversations[conversation]["labels"][first:]
    for name in ("d3_0", "d3_1", "d77_1"):
        assert rows[name]["labels"] == single[name]["labels"]
    assert (counts["config"], counts["settings"]["history"]) == ("single_turn", 1)
    assert counts["splits"]["train"]["rows"] == counts["splits"]["train"]["pairs"] == 10


def test_context_is_cut_before_the_pair(run, single):
    limit = max(len(row["input_ids"]) for row in single.values())
    output, counts = run("short-history", history=1, max_length=limit)
    rows = rows_of(output)
    assert list(counts["splits"]["train"]["rows_cut"]) == ["d3_2", "d8_2", "d8_3"]
    assert counts["splits"]["train"]["rows_cut"]["d8_3"].startswith("kept 0 of 1 earlier exchanges (")
    assert {name: row["input_ids"] for name, row in rows.items()} == {
        name: row["input_ids"] for name, row in single.items()
    }


@pytest.mark.parametrize("kind", ["multi_turn", "history"])
def test_folder_is_enough_to_encode_again(run, history, tokenizer, kind):
    robot = {"config_name": "multi_turn", "template": Template(agent_role="Robot")}
    output, _ = history if kind == "history" else run("robot", **robot)
    settings = json.loads((output / "counts.json").read_text())["settings"]
    encoder = TemplateEncoder(tokenizer, Template(**settings["template"]), last_exchange_only=settings["history"] > 0)
    rows = datasets.load_dataset(str(output), split="train", cache_dir=str(output.parent / "datasets"))
    again = rows.remove_columns(["input_ids", "labels"]).map(encoder, batched=True)
    assert again["input_ids"][:] == rows["input_ids"][:] and again["labels"][:] == rows["labels"][:]


def test_output_does_not_depend_on_the_size_of_work_shards(run, multi, finished, work):
    cache = shutil.copytree(finished / "cache" / "units", work / "other" / "units").parent
    output, _ = run("one-dialog-a-shard", config_name="multi_turn", shard_dialogs=1, cache_dir=str(cache))
    assert rows_of(output) == rows_of(multi[0])


def test_export(multi, tmp_path):
    assert export(multi[0], tmp_path) == {"train": 7, "test": 3}
    lines = [line for split in ("train", "test") for line in (tmp_path / f"{split}.txt").read_text().split("\n")]
    expected = [" ".join(map(str, e["input_ids"])) + "|" + " ".join(map(str, e["labels"])) for e in EXAMPLES]
    assert sorted(lines) == sorted(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config_name": "double_turn"}, "config_name 'double_turn' is unknown: choose one of single_turn, multi_turn"),
        ({"config_name": "multi_turn", "history": 1}, "multi_turn holds whole conversations"),
        ({"overflow": "truncate"}, "overflow is truncate, but a row of single_turn is one pair"),
    ],
)
def test_bad_settings_are_refused_before_any_work(run, monkeypatch, options, message):
    monkeypatch.setattr(devices, "find_devices", None)
    with pytest.raises(ValueError, match=message):
        run("refused", **options)
