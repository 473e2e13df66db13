"""Units that the corpus has: a dataset folder without a unit model, whose ids follow from texts and units by hand."""

import json
import shutil
import signal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from dailytalk_usdm import unflatten_units
from tests.forked import run_command
from tests.helpers import content, find_problems, inodes, run_tasks_here, stop_run
from usdm_sft.cli.main import main
from usdm_sft.folder.edit import edit
from usdm_sft.folder.layout import read_counts
from usdm_sft.folder.statistics import summarize_split
from usdm_sft.folder.verify import verify
from usdm_sft.folder.verify_rows import digest_turns
from usdm_sft.prepare import open_run
from usdm_sft.prepare import prepare as pipeline
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.dry_run import check_dry_run, describe_dry_run, dry_run
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.tokenizer import load_tokenizer, save_tokenizer

SIZES = [30, 20, 10, 10, 10, 10, 5, 5]  # 100 units, as many as the small tokenizer has
STARTS = [0, 30, 50, 60, 70, 80, 90, 95]  # of each stream, added up by hand
RATE = 12.5


def make_rows(split, num_dialogs):
    """Dialogs of four turns, with frames of eight streams."""
    rng = np.random.default_rng(len(split))
    return [
        {
            "dialog": f"{split}-{dialog}",
            "turn": turn,
            "speaker": "AB"[turn % 2],
            "text": f"Turn {turn} of {dialog}?",
            "units": rng.integers(0, SIZES, (3 + turn + dialog, 8)).tolist(),
        }
        for dialog in range(num_dialogs)
        for turn in range(4)
    ]


def write_corpus(folder, splits, suffix="jsonl"):
    folder.mkdir()
    for split, rows in splits.items():
        path = folder / f"{split}.{suffix}"
        if suffix == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(small_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    save_tokenizer(small_tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def no_unit_model(monkeypatch):
    """Fail where a unit model is looked for or opened."""
    refused = ("units.model.UnitModel.from_pretrained", "prepare.open_run.open_for", "prepare.open_run.find_unit_model")
    for name in (*refused, "prepare.open_run.find_devices", "prepare.dry_run.locate_unit_model"):
        monkeypatch.setattr(f"usdm_sft.{name}", lambda *args, **kwargs: pytest.fail("a unit model or a GPU"))


@pytest.fixture(scope="module")
def splits():
    return {"train": make_rows("train", 4), "test": make_rows("test", 1)}


@pytest.fixture(scope="module")
def corpus(splits, tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("given") / "corpus", splits)


@pytest.fixture
def given(corpus, tokenizer_folder, tmp_path):
    """Return the options of a run, with changes."""

    def options(**changes):
        return {
            "data_dir": str(corpus), "output_path": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache"),
            "pretrained_model_name_or_path": str(tokenizer_folder), "shard_dialogs": 1,
            "unit_rate": RATE, "num_units": SIZES, "streams": "flatten",
        } | changes  # fmt: skip

    return options


def load(folder, split="train"):
    return datasets.load_dataset(
        str(folder), read_counts(folder)["config"], split=split, cache_dir=str(folder.parent / "datasets")
    )


def encode_by_hand(tokenizer, row):
    """The ids of the whole text of a row, and its labels, from the special tokens in it."""
    instruction = read_instruction()
    speech = {role: "".join(f"<|unit{unit}|>" for unit in row[f"{role}_units"]) for role in ("user", "agent")}
    text = (
        f"{instruction}\n### User\n{speech['user']}<|correspond|>{row['user_text'].lower()}\n"
        f"### Agent\n{row['agent_text'].lower()}<|correspond|>{speech['agent']}\n</s>"
    )
    ids = tokenizer(text).input_ids
    first, second = (place for place, token in enumerate(ids) if token == 32_001)
    newlines = [place for place, token in enumerate(ids) if token == 13 and place > first]
    labels = [-100] * len(ids)
    for start, stop in ((first + 1, newlines[0] + 1), (newlines[1] + 1, second + 1), (second + 1, len(ids) - 2)):
        labels[start:stop] = ids[start:stop]
    return ids, labels


def read_instruction():
    return (
        "Below is a conversation between the user and the agent. Each turn includes the user's speech and its corresponding transcript, "
        "along with the agent's response text and the corresponding speech.\n"
    )


@pytest.mark.parametrize("streams", ["flatten", "first", None])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_ids_follow_from_texts_and_units(given, splits, tokenizer_folder, tmp_path, streams, suffix):
    rows = splits
    if streams is None:  # one stream of its own
        rows = {
            split: [row | {"units": [frame[1] for frame in row["units"]]} for row in each]
            for split, each in splits.items()
        }
    folder = write_corpus(tmp_path / "corpus", rows, suffix)
    sizes = SIZES if streams else 20
    counts = prepare(**given(data_dir=str(folder), streams=streams, num_units=sizes))
    assert counts["num_units"] == {"flatten": 100, "first": 30, None: 20}[streams]
    assert counts["unit_model"] is None and counts["agreement"] is None and "unit model" not in counts["digests"]
    named = {
        name: counts["settings"][name] for name in ("unit_rate", "num_units", "streams") if name in counts["settings"]
    }
    expected = {"unit_rate": 12.5, "num_units": SIZES if streams else [20]}
    assert named == (expected | {"streams": streams} if streams else expected)
    assert verify(tmp_path / "out") == {"train": 12, "test": 3}
    tokenizer = load_tokenizer(tokenizer_folder)
    for split, turns in rows.items():
        found = {(row["dialog"], row["turn"]): row for row in turns}
        dataset = load(tmp_path / "out", split)
        assert len(dataset) == {"train": 12, "test": 3}[split]
        for row in dataset:
            for side, role in enumerate(("user", "agent")):
                turn = found[row["dialog_id"], row["turn"] + side]
                units = (
                    [unit + start for frame in turn["units"] for unit, start in zip(frame, STARTS, strict=True)]
                    if streams == "flatten"
                    else [frame[0] if streams else frame for frame in turn["units"]]
                )
                assert row[f"{role}_units"] == units and row[f"{role}_text"] == turn["text"]
                assert row[f"{role}_seconds"] == np.float32(len(turn["units"]) / 12.5)
                if streams == "flatten":
                    assert unflatten_units(row[f"{role}_units"], SIZES).tolist() == turn["units"]
            assert (row["input_ids"], row["labels"]) == encode_by_hand(tokenizer, row)
    hours = sum(len(row["units"]) for row in rows["train"]) / 12.5 / 3600
    assert counts["splits"]["train"]["hours"] == round(hours, 6)


def test_json_lines_and_parquet_give_the_same_rows(given, splits, tmp_path):
    write_corpus(tmp_path / "corpus", splits, "parquet")
    prepare(**given())
    prepare(**given(data_dir=str(tmp_path / "corpus"), output_path=str(tmp_path / "parquet")))
    one, two = (content(tmp_path / name / "single_turn") for name in ("out", "parquet"))
    assert one == two and len(one) == 15


@pytest.mark.parametrize(
    "config",
    [
        {},
        pytest.param({"config_name": "multi_turn"}, marks=pytest.mark.slow),
        pytest.param({"unit_repetition": "collapse", "history": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_units_of_a_unit_model_give_its_rows(
    mini, unit_model, finished, tokenizer_folder, tmp_path, monkeypatch, config
):
    """The units of the demo's folder as a manifest give every column of it again."""
    made = finished / "out"
    splits = {}
    for split in ("train", "test"):
        turns = {}
        for row in load_rows(made, split):
            for side, role in enumerate(("user", "agent")):
                place = row["dialog_id"], row["turn"] + side
                names = ("speaker", "text", "emotion", "units")
                turns[place] = {"dialog": place[0], "turn": place[1]} | {name: row[f"{role}_{name}"] for name in names}
        splits[split] = [turns[place] for place in sorted(turns, key=lambda place: (int(place[0][1:]), place[1]))]
    options = {
        "pretrained_model_name_or_path": "mistral-common",
        "shard_dialogs": 1,
        "cache_dir": tmp_path / "cache",
    } | config
    prepare(
        data_dir=write_corpus(tmp_path / "corpus", splits),
        output_path=tmp_path / "out",
        unit_rate=50,
        num_units=100,
        **options,
    )
    expected = made
    if config:
        monkeypatch.undo()
        shutil.copytree(finished / "cache" / "units", tmp_path / "cache" / "units", dirs_exist_ok=True)
        expected = tmp_path / "expected"
        prepare(data_dir=mini / "corpus", unit_model=unit_model, output_path=expected, **options)
    for split in ("train", "test"):
        rows, others = load_rows(expected, split), load_rows(tmp_path / "out", split)
        assert len(rows) == len(others) > 0
        for row, other in zip(rows, others, strict=True):
            seconds = [name for name in row if name.endswith("_seconds")]
            assert {**row, **dict.fromkeys(seconds)} == {**other, **dict.fromkeys(seconds)}
            for name in seconds:  # frames of 25 ms every 20 ms; a last one that is not complete has no unit
                assert np.all(np.abs(np.subtract(row[name], other[name])) < 0.025)
    assert verify(tmp_path / "out") == {
        "train": len(load_rows(expected, "train")),
        "test": len(load_rows(expected, "test")),
    }
    one, two = (read_counts(folder)["splits"]["train"] for folder in (expected, tmp_path / "out"))
    others = {"hours": 0, "dialogs_left_out": None}  # the manifest has only the dialogs of the rows
    assert one | others == two | others


def load_rows(folder, split):
    paths = sorted((folder / read_counts(folder)["config"]).glob(f"{split}-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_finished_work_is_kept_and_output_does_not_depend_on_it(given, tmp_path, monkeypatch):
    prepare(**given(output_path=str(tmp_path / "undisturbed"), cache_dir=str(tmp_path / "other")))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "fit_splits", lambda *args: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception, match="stopped"):
            prepare(**given())
    shards = inodes(tmp_path, "cache/units/*.arrow")
    assert len(shards) == 5
    prepare(**given())
    assert inodes(tmp_path, "cache/units/*.arrow") == shards
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    before = content(tmp_path / "cache" / "tokens")
    prepare(**given(output_path=str(tmp_path / "first"), streams="first"))  # other units have other keys
    assert before.items() < content(tmp_path / "cache" / "tokens").items()
    assert inodes(tmp_path, "cache/units/*.arrow").items() > shards.items()


@pytest.mark.slow
def test_killed_run_goes_on(given, tmp_path):
    options = given()
    run = run_command(["prepare", *(f"--{name}={value}" for name, value in options.items())], start_new_session=True)
    stop_run(run, tmp_path, "cache/units/*.arrow", signal.SIGKILL)
    prepare(**options)
    prepare(**given(output_path=str(tmp_path / "undisturbed"), cache_dir=str(tmp_path / "other")))
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.slow
def test_number_of_processes_changes_no_byte(given, tmp_path, forked_processes, monkeypatch):
    prepare(**given(num_proc=1))
    monkeypatch.setattr(open_run, "UTTERANCES_PER_PROCESS", 1)
    prepare(**given(num_proc=2, output_path=str(tmp_path / "two"), cache_dir=str(tmp_path / "other")))
    assert content(tmp_path / "two") == content(tmp_path / "out")


def test_tasks_change_no_byte(given, tmp_path, monkeypatch):
    pytest.importorskip("datatrove", reason="needs the extra 'executors'")
    ranks = run_tasks_here(monkeypatch)
    prepare(**given(executor="ray", tasks=2, num_gpus=0))
    assert ranks  # of token shards and Parquet files; the units are written by this process
    prepare(**given(output_path=str(tmp_path / "alone"), cache_dir=str(tmp_path / "other")))
    assert content(tmp_path / "alone") == content(tmp_path / "out")


@pytest.mark.parametrize("changes", [{}, {"streams": "first", "unit_repetition": "collapse"}], ids=str)
def test_dry_run_counts_what_the_run_counts(given, tmp_path, changes):
    config = PrepareConfig(**given(**changes))
    found = dry_run(config)
    assert not (tmp_path / "out").exists() and found.has_model and found.units_per_second == (12.5 if changes else 100)
    lines = describe_dry_run(found, config)
    assert lines == [
        "cache: it has the units of 0 of 5 work shards, and the tokens of 0",
        "time: the corpus has its units, and none are to be computed",
    ]
    assert [finding.subject for finding in check_dry_run(found, config)] == ["disk"]
    assert found.splits == prepare(**given(**changes))["splits"]


def test_sizes_follow_from_the_rate_of_units(given, tmp_path):
    """Per second of 50 units 1,400 bytes in the cache and 600 in the folder, and 10 MB for a tokenizer and pictures (checks.py)."""
    found = dry_run(PrepareConfig(**given()))
    hour = found.__class__(**{**vars(found), "seconds": 36_000.0, "missing_seconds": 36_000.0})
    [disk] = check_dry_run(hour, PrepareConfig(**given(model_cache_dir=str(tmp_path))))
    assert disk.message.endswith(", which take about 154.0 MB")  # 36,000 * 2 * 2,000 + 10,000,000


def test_doctor_needs_no_model_and_no_recording(given, capsys):
    main(["doctor", *(f"--{name}={value}" for name, value in given().items())])
    out = capsys.readouterr().out.splitlines()
    assert "ok       device: none is needed: the corpus has its units (--unit_rate)" in out
    assert "ok       unit model: none is needed: the corpus has its units (--unit_rate)" in out
    assert "ok       corpus: its units: 12.5 frames of 8 units per second, 100 different ones in the rows" in out
    assert "ok       recordings: none: the corpus has the units of 20 turns, 0.0025 hours" in out


def test_recordings_beside_units_are_kept(given, splits, tmp_path):
    rows = [row | {"audio": f"{number}.wav"} for number, row in enumerate(splits["train"])]
    folder = write_corpus(tmp_path / "corpus", {"train": rows})
    for row in rows:
        soundfile.write(folder / row["audio"], np.full(1280 * len(row["units"]) - 100, 0.1), 16_000)
    counts = prepare(**given(data_dir=str(folder), keep_audio=True))
    assert "lists and audio" in counts["digests"] and counts["utterances"]["train"]["recordings"] == 16
    assert verify(tmp_path / "out") == {"train": 12}
    table = pq.read_table(tmp_path / "out" / "utterances" / "train-00000-of-00001.parquet").to_pylist()
    assert [row["audio"]["bytes"] for row in table] == [(folder / row["audio"]).read_bytes() for row in rows]
    assert [row["seconds"] for row in table] == [np.float32(len(row["units"]) / 12.5) for row in rows]
    (folder / "3.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match=r"utterance train-0_3: audio file .*3\.wav "):
        prepare(**given(data_dir=str(folder), output_path=str(tmp_path / "bad")))
    counts = prepare(
        **given(data_dir=str(folder), output_path=str(tmp_path / "bad"), on_bad_audio="skip", keep_audio=True)
    )
    assert list(counts["splits"]["train"]["pairs_left_out"]) == ["train-0_2"]
    assert verify(tmp_path / "bad") == {"train": 11}


def test_recordings_of_another_length_are_refused(given, splits, tmp_path):
    rows = [row | {"audio": "a.wav"} for row in splits["train"]]
    folder = write_corpus(tmp_path / "corpus", {"train": rows})
    soundfile.write(folder / "a.wav", np.full(160_000, 0.1), 16_000)
    message = r"the recordings have 160\.00 s in all, but their units at unit_rate 12\.5 last 7\.68 s: correct unit_rate, or the"
    with pytest.raises(ValueError, match=message):
        prepare(**given(data_dir=str(folder)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_units": 30}, r"the corpus has 240 different units in 8 streams, the tokenizer only 100: use the tokenizer that belongs to it, or make one with 'dailytalk-usdm tokenizer"),
        ({"num_units": 101, "streams": "first"}, "the corpus has 101 different units, the tokenizer only 100: use the tokenizer that"),
        ({"keep_audio": True}, r"keep_audio is given, but 20 turns of the corpus \(first train-0_0\) without a recording cannot be kept: add the"),
        ({"streams": None}, r"train\.jsonl:1: units has frames of 8 units: choose with --streams first"),
        ({"unit_repetition": "collapse"}, "unit_repetition is collapse, but neighbours in flattened streams are units of different streams"),
        ({"unit_model": "mine", "precision": "bf16"}, "unit_model, precision are of the unit model, but with unit_rate the units are read from"),
        ({"unit_rate": None}, "num_units and streams are given without unit_rate"),
        ({"num_units": None}, "unit_rate is 12.5, but num_units is missing"),
        ({"num_units": "many"}, "num_units is 'many', a value of type str: give a whole number, or a list with one for each stream"),
        ({"num_units": 0}, "num_units is 0: give a whole number, or a list with one for each stream"),
        ({"unit_rate": -1}, "unit_rate is -1: give a positive number"),
        ({"streams": "all"}, "streams 'all' is unknown: choose one of first, flatten"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(given, tmp_path, changes, message):
    given_options = given(**changes)
    if changes.get("unit_rate", RATE) is None:
        del given_options["unit_rate"]
    with pytest.raises(ValueError, match=message):
        prepare(**given_options)
    assert not (tmp_path / "out").exists()


def test_command_takes_one_number_and_lists(given, tmp_path, capsys):
    options = given(num_units="[30, 20, 10, 10, 10, 10, 5, 5]")
    main(["prepare", *(f"--{name}={value}" for name, value in options.items())])
    yaml = tmp_path / "run.yaml"
    yaml.write_text("unit_rate: 12.5\nnum_units: 30\nstreams: first\n")
    for name in ("unit_rate", "num_units", "streams"):
        del options[name]
    options["output_path"] = str(tmp_path / "first")
    main(["prepare", "--config", str(yaml), *(f"--{name}={value}" for name, value in options.items())])
    found = [read_counts(tmp_path / name)["settings"]["num_units"] for name in ("out", "first")]
    assert found == [SIZES, [30] * 8]
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "--data_dir=a", "--output_path=b", "--num_units=many"])
    assert (
        "num_units is 'many': give a whole number, or a list with one for each stream, such as [1024, 1024]"
        in capsys.readouterr().err
    )


def test_tampered_seconds_and_units_are_found(given, tmp_path):
    from tests.helpers import edit_counts, edit_rows

    prepare(**given())
    name = "single_turn/test-00000-of-00003.parquet"
    for number, (change, message) in enumerate(
        [
            (
                {"user_seconds": lambda each: each + 0.08},
                "user_units: 24 units (12.5 frames of 8 units per second) last 0.24 s, not 0.32 s",
            ),
            ({"agent_units": lambda each: each[:-1]}, "agent_units: 31 units instead of whole frames of 8"),
            ({"agent_units": lambda each: each[::-1]}, "agent_units: unit "),
            (
                {"agent_units": lambda each: each[8:]},
                "agent_units: 24 units (12.5 frames of 8 units per second) last 0.24 s, not 0.32 s",
            ),
        ]
    ):
        folder = shutil.copytree(tmp_path / "out", tmp_path / str(number))
        edit_rows(
            folder,
            name,
            lambda rows, change=change: [
                row.update({key: edit(row[key]) for key, edit in change.items()}) for row in rows
            ],
        )
        problems = find_problems(folder)
        assert f"{folder / name}: row 0 (test-0_0): {message}" in problems[0], problems
    folder = shutil.copytree(tmp_path / "out", tmp_path / "rate")
    edit_counts(folder, lambda counts: counts["settings"].update(unit_rate=25.0))
    assert "last 0.12 s, not 0.24 s" in find_problems(folder)[0]
    edit_counts(folder, lambda counts: counts["settings"].update(unit_rate="fast"))
    with pytest.raises(ValueError, match=r"counts\.json is not the counts of a dataset folder"):
        verify(folder)


def test_bad_rows_and_further_columns_in_the_folder(given, splits, tmp_path, capsys, caplog):
    """Counts, card, summary and verify agree on what was left out, and a further column that was changed is found."""
    rows = {
        split: [row | {"topic": f"topic {row['turn']}", "note": 1} for row in of_split]
        for split, of_split in splits.items()
    }
    rows["train"][1]["text"] = ""
    rows["train"][6]["text"] = "<|unit1|>"
    rows["train"][15]["units"] = [[0] * 8]  # 0.08 s
    rows["train"][9] |= {"audio": str(tmp_path / "a.wav"), "start": 0, "end": 1.5}
    soundfile.write(tmp_path / "a.wav", np.zeros(7680), 16_000)
    corpus = write_corpus(tmp_path / "corpus", rows)
    changes = {
        "data_dir": str(corpus),
        "on_bad_rows": "clip",
        "min_seconds": 0.1,
        "keep_columns": "topic",
        "config_name": "multi_turn",
    }
    counts = prepare(**given(**changes))
    train = counts["splits"]["train"]
    assert train["turns_left_out"] == {"no text": 1, "shorter than min_seconds": 1, "special token in the text": 1}
    assert train["pairs_left_out"] == {
        "train-0_0": "train.jsonl:2: text missing",
        "train-0_1": "train.jsonl:2: text missing",
        "train-1_1": "train.jsonl:7: text '<|unit1|>' holds '<|', which is part of a special token",
        "train-1_2": "train.jsonl:7: text '<|unit1|>' holds '<|', which is part of a special token",
        "train-3_2": "train.jsonl:16: has 0.08 s, less than min_seconds 0.1",
    }
    clipped = "train.jsonl:10: is to be cut up to 1.5 s, but has 0.48 s"
    assert train["turns_clipped"] == {"train-2_1": clipped} and "turns_clipped" not in counts["splits"]["test"]
    assert (train["pairs"], train["pairs_with_bad_rows"], train["pairs_with_bad_audio"]) == (12, 5, 0)
    assert "turns_left_out" not in counts["splits"]["test"]
    assert "train: column note is ignored: keep it with --keep_columns note" in caplog.text
    out = tmp_path / "out"
    assert verify(out)["train"] == train["rows"]
    assert load(out)[0]["user_topic"] == ["topic 2"] and load(out)[0]["agent_topic"] == ["topic 3"]
    card = (out / "README.md").read_text()
    assert (
        "Of the pairs, 0 had bad audio, 5 had turns that were left out (no text: 1, shorter than min_seconds: 1, special token in the text: 1)"
        in card
    )
    assert (
        f"The end of 1 turn of train was past the recording, and was cut at the end of the recording:\n\n- train-2_1: {clipped}\n"
        in card
    )
    assert summarize_split(train).endswith("; cut at the end of the recording: 1 turn")
    (tmp_path / "drop.json").write_text('{"rows": ["train-2_0", "train-2_1"]}')
    assert "turns_clipped" not in edit(out, tmp_path / "edited", tmp_path / "drop.json")["splits"]["train"]
    assert "| `user_topic` | list of string | as in the manifest; one entry per exchange |" in card
    assert (
        "left out: 0 rows too long, 5 pairs for their turns (no text: 1, shorter than min_seconds: 1, special"
        in summarize_split(train)
    )
    tea, milk = (digest_turns([("A", "hi", "", topic, [1], 0.1)], 4) for topic in ("tea", "milk"))
    assert tea != milk  # verify compares the turns of all rows by them
