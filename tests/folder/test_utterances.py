"""`--keep_audio`: the config `utterances`, and a pushed folder that is a corpus again."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from huggingface_hub.repocard import metadata_load

from tests.helpers import (
    REPOSITORY,
    LastFirst,
    content,
    edit_rows,
    find_problems,
    options,
    replace_file,
    replace_table,
    reuse_units,
)
from tests.mini_hub import serve
from usdm_sft.cli.main import main
from usdm_sft.corpus import hub_corpus as hub
from usdm_sft.folder import parquet, verify_utterances, writer
from usdm_sft.folder import rows as folder_rows
from usdm_sft.folder.verify import VerificationError, verify
from usdm_sft.prepare import utterance_files as shard_utterances
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units.convert import convert

FILE = "utterances/train-00000-of-00001.parquet"
TABLE = ["dialog", "turn", "speaker", "text", "emotion", "units", "seconds"]


@pytest.fixture(scope="module")
def kept(mini, unit_model, finished, tmp_path_factory):
    """The mini corpus with its audio; copy it to change it."""
    root = tmp_path_factory.mktemp("kept")
    reuse_units(finished, root)
    prepare(**options(mini, unit_model, root, keep_audio=True))
    return root


@pytest.fixture(scope="module")
def other_model(mini, tmp_path_factory):
    """A unit model that gives other units."""
    source, folder = mini / "unit_model", tmp_path_factory.mktemp("other")
    np.save(folder / "kmeans.npy", np.load(source / "kmeans.npy")[::-1].copy())
    return convert(
        source / "checkpoint.pt", folder / "kmeans.npy", folder / "model", model_config=source / "config.json"
    )


@pytest.fixture(scope="module")
def by_other_model(kept, mini, other_model, tmp_path_factory):
    """The folder that the other unit model gives for the mini corpus."""
    folder = tmp_path_factory.mktemp("by_other_model") / "out"
    prepare(**options(mini, other_model, kept, output_path=str(folder)))
    return folder


@pytest.fixture
def copy(kept, tmp_path):
    return shutil.copytree(kept / "out", tmp_path / "copy")


@pytest.fixture
def from_hub(monkeypatch):
    """Return a function: the Hub has this folder as user/calls."""

    def serve(folder):
        builder = datasets.load_dataset_builder

        def load_dataset_builder(name, config=None, *, revision=None):
            return builder(str(folder) if name == "user/calls" else name, config)

        monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
        monkeypatch.setattr(hub, "check_data_files", lambda repository, data_files: None)  # they are local

    return serve


def lines_of(mini):
    return {
        (f"d{fields[0].split('_d')[1]}", int(fields[0].split("_")[0])): fields
        for split in ("train", "test")
        for fields in (line.split("|") for line in (mini / "corpus" / f"{split}.txt").read_text().splitlines())
    }


def rows_of(folder):
    """The rows of the folder: the bytes of its Parquet files."""
    return {name: data for name, data in content(folder).items() if name.startswith("single_turn/")}


def test_each_recording_is_there_once_with_its_text_and_units(kept, mini):
    lines, expected = lines_of(mini), json.loads((mini / "expected" / "units.json").read_text())
    found = {}
    for split, dialogs in (("train", ["d3", "d8", "d20", "d77"]), ("test", ["d105", "d2001"])):
        rows = pq.read_table(kept / "out" / f"utterances/{split}-00000-of-00001.parquet").to_pylist()
        assert list(dict.fromkeys(row["dialog"] for row in rows)) == dialogs
        found |= {(row["dialog"], row["turn"]): row for row in rows}
        assert sum(row["dialog"] in dialogs for row in found.values()) == len(rows)
    left_out = [key for key in lines if key[0] in ("d11", "d42")]
    assert sorted(found) == sorted(set(lines) - set(left_out))
    for (dialog, turn), row in found.items():
        name, speaker, _, text, emotion = lines[dialog, turn]
        assert (row["speaker"], row["text"], row["emotion"]) == (speaker, text, emotion)
        assert row["audio"]["bytes"] == (mini / "corpus" / "data" / dialog[1:] / f"{name}.wav").read_bytes()
        assert row["audio"]["path"] == f"{dialog}_{turn}.wav"
        assert row["units"] == expected[name]
        assert row["seconds"] == pytest.approx(
            soundfile.info(io.BytesIO(row["audio"]["bytes"])).duration, abs=1 / 16_000
        )


def test_rows_are_those_of_a_folder_without_audio(kept, undisturbed):
    found = content(kept / "out")
    assert {name for name in found if name not in undisturbed} == {FILE, FILE.replace("train", "test")}
    differ = [name for name, data in undisturbed.items() if found[name] != data]
    assert sorted(differ) == ["README.md", "counts.json"]


def test_load_dataset_opens_the_config_without_torchcodec(kept, tmp_path):
    loaded = datasets.load_dataset(str(kept / "out"), "utterances", cache_dir=str(tmp_path))
    assert loaded.num_rows == {"train": 14, "test": 5}
    assert loaded["train"].features["audio"] == datasets.Audio()
    assert loaded["train"].column_names == [*TABLE[:5], "audio", *TABLE[5:]]
    row = loaded["test"].cast_column("audio", datasets.Audio(decode=False))[0]
    assert soundfile.info(io.BytesIO(row["audio"]["bytes"])).samplerate == 22_050
    default = datasets.load_dataset(str(kept / "out"), cache_dir=str(tmp_path))
    assert default.num_rows == {"train": 10, "test": 3}
    metadata = json.loads(pq.read_schema(kept / "out" / FILE).metadata[b"huggingface"])
    assert metadata["info"]["features"]["audio"] == {"_type": "Audio"}


def test_counts_and_card_name_the_recordings(kept, mini):
    counts = json.loads((kept / "out" / "counts.json").read_text())
    wavs = [mini / "corpus" / "data" / dialog for dialog in ("105", "2001")]
    sizes = [path.stat().st_size for folder in wavs for path in folder.iterdir()]
    hours = sum(soundfile.info(path).duration for folder in wavs for path in folder.iterdir()) / 3600
    assert counts["utterances"]["test"] == {
        "utterances": 5,
        "recordings": 5,
        "audio_bytes": sum(sizes),
        "hours": pytest.approx(hours, abs=1e-6),
    }
    card = (kept / "out" / "README.md").read_text()
    assert "contains no audio" not in card
    assert "Whoever publishes it publishes their voices" in card
    assert f"| test | 5 | 5 | {hours:.2g} | {sum(sizes):,} |" in card
    configs = metadata_load(kept / "out" / "README.md")["configs"]
    assert [(config["config_name"], config.get("default")) for config in configs] == [
        ("single_turn", True),
        ("utterances", None),
    ]


def test_card_without_audio_says_nothing_of_voices(dataset_folder):
    card = (dataset_folder / "README.md").read_text()
    assert "The dataset contains no audio." in card and "voices" not in card and "utterances`" not in card


def test_repeated_run_changes_nothing(kept, mini, unit_model, caplog):
    before = {path: path.stat().st_mtime_ns for path in (kept / "out").rglob("*")}
    with caplog.at_level("INFO", "usdm_sft"):
        prepare(**options(mini, unit_model, kept, keep_audio=True))
    assert "is finished already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (kept / "out").rglob("*")} == before


def test_keep_audio_is_a_setting_of_the_folder(copy, kept, mini, unit_model, undisturbed):
    """Without --overwrite a folder with audio is not replaced by one without; with it, no recording remains."""
    changes = {"output_path": str(copy), "keep_audio": False}
    with pytest.raises(
        FileExistsError, match=r"the result of other settings \(keep_audio: True -> default\): name another output_path"
    ):
        prepare(**options(mini, unit_model, kept, **changes))
    assert (copy / FILE).is_file()
    prepare(**options(mini, unit_model, kept, **changes, overwrite=True))
    assert content(copy) == undisturbed


def test_damaged_recordings_are_written_again(copy, kept, mini, unit_model):
    (copy / FILE).write_bytes(b"")
    prepare(**options(mini, unit_model, kept, keep_audio=True, output_path=str(copy), overwrite=True))
    assert content(copy) == content(kept / "out")


def test_files_hold_whole_dialogs_of_limited_length(kept, mini, unit_model, tmp_path, monkeypatch):
    """Several files of one work shard; `kept` has several work shards in one file."""
    whole = pq.read_table(kept / "out" / FILE).to_pylist()
    seconds = Counter()
    for row in whole:
        seconds[row["dialog"]] += row["seconds"]
    limit = math.ceil(1.5 * max(seconds.values()))
    monkeypatch.setattr(shard_utterances, "FILE_SECONDS", limit)
    monkeypatch.setattr(parquet, "_AUDIO_GROUP_BYTES", max(len(row["audio"]["bytes"]) for row in whole))
    changes = {"output_path": str(tmp_path / "out"), "shard_dialogs": 64, "keep_audio": True}
    prepare(**options(mini, unit_model, kept, **changes))
    files = sorted((tmp_path / "out" / "utterances").glob("train-*"))
    assert [path.name for path in files] == [f"train-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))]
    tables = [pq.read_table(path).to_pylist() for path in files]
    assert [row for table in tables for row in table] == whole
    assert sum(len({row["dialog"] for row in table}) for table in tables) == len(seconds)
    assert len(files) == math.ceil(sum(seconds.values()) / limit) > 1
    assert max(pq.ParquetFile(path).metadata.num_row_groups for path in files) > 1
    assert verify(tmp_path / "out") == {"train": 10, "test": 3}


@pytest.mark.parametrize("change", ["other", "none"])
def test_audio_that_changes_after_its_units_were_made_is_refused(
    mini, unit_model, finished, tmp_path, monkeypatch, change
):
    reuse_units(finished, tmp_path)
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    recording, other = (corpus / "data" / "105" / name for name in ("0_1_d105.wav", "1_0_d105.wav"))

    def change_and_write(*args, **kwargs):
        if change == "other":
            shutil.copyfile(other, recording)
        else:
            recording.unlink()
        return write(*args, **kwargs)

    write = writer.write_utterances
    monkeypatch.setattr(writer, "write_utterances", change_and_write)
    with pytest.raises(
        ValueError, match=r"0_1_d105\.wav was changed during the run.*: let nothing write to it, and run"
    ):
        prepare(**options(mini, unit_model, tmp_path, keep_audio=True, data_dir=str(corpus)))
    assert not (tmp_path / "out" / "counts.json").exists()


def test_verify_passes_and_stats_prints_the_recordings(copy, capsys):
    assert verify(copy) == {"train": 10, "test": 3}
    main(["stats", str(copy)])
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["turns", "with", "a", "recording", "14", "5"] in out
    counts = json.loads((copy / "counts.json").read_text())["utterances"]
    assert ["bytes", "of", "audio", *(f"{counts[split]['audio_bytes']:,}" for split in ("train", "test"))] in out


def cut_audio(row):
    """Drop the last four samples of a recording, and say so in its header."""
    samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")
    file = io.BytesIO()
    soundfile.write(file, samples[:-4], rate, format="WAV")
    row["audio"]["bytes"] = file.getvalue()


def test_verify_finds_changed_utterances(copy):
    def change(rows):
        rows[0]["audio"], rows[1]["audio"] = rows[1]["audio"], rows[0]["audio"]  # d3_0, d3_1
        cut_audio(rows[2])  # d3_2
        rows[4]["units"][0] = 99  # d8_0

    edit_rows(copy, FILE, change)
    problems = find_problems(copy)
    for message in (
        r"d3_0: the recording makes \d+ units, not \d+",
        r"d3_2: the recording has [\d.]+ seconds, not [\d.]+",
        r"row 0 \(d8_0\): turn 0 differs from the utterance d8_0",
    ):
        assert any(re.search(message, problem) for problem in problems), problems


def spoil(rows):
    """One utterance has another text, one no sound, two are there twice, of which one with another text and no sound, one is missing."""
    rows[1].update(text="other")  # d3_1
    rows[2]["audio"].update(bytes=b"no audio")  # d3_2
    rows += [rows[0], rows[4] | {"text": "later", "audio": rows[2]["audio"]}]  # d3_0, d8_0
    del rows[9]  # d20_0


def check_spoiled(folder, num_proc):
    recordings, rows = str(folder / FILE), str(folder / "single_turn" / "train-0000{}-of-00010.parquet: row 0")
    expected = [
        f"{recordings}: d3_2: audio bytes (8 bytes) is not audio that",
        f"{recordings}: d8_0: audio bytes (8 bytes) is not audio that",
        f"{recordings}: d3_0 is there twice",
        f"{recordings}: d8_0 is there twice",
        f"{rows.format(0)} (d3_0): turn 1 differs from the utterance d3_1",
        f"{rows.format(1)} (d3_1): turn 1 differs from the utterance d3_1",
        f"{rows.format(3)} (d8_0): turn 0 differs from the utterance d8_0",  # the last of two counts
        f"{rows.format(7)} (d20_0): turn 0 is not among the utterances",
        f"{folder / 'counts.json'}: utterances of train are {{'utterances': 15, 'recordings': 15, ",
        f"{folder / 'README.md'}: its YAML does not say that train has 15 utterances",
    ]
    problems = find_problems(folder, num_proc=num_proc)
    assert [found[: len(text)] for found, text in zip(problems, expected, strict=True)] == expected


def test_problems_do_not_depend_on_ranges_and_processes(copy, forked_processes, monkeypatch):
    edit_rows(copy, FILE, spoil)
    check_spoiled(copy, 1)
    replace_table(copy, FILE, lambda table: table, row_group_size=2)
    monkeypatch.setattr(verify_utterances, "_UTTERANCES_PER_RANGE", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_rows, "ProcessPool", LastFirst)
        check_spoiled(copy, 1)
    monkeypatch.setattr(verify_utterances, "_UTTERANCES_PER_PROCESS", 1)
    check_spoiled(copy, 2)


def test_check_of_utterances_stops_after_the_shown_problems(copy, monkeypatch):
    edit_rows(copy, FILE, lambda rows: [row.update(text=None) if row["turn"] == 4 else cut_audio(row) for row in rows])
    replace_table(copy, FILE, lambda table: table, row_group_size=2)
    monkeypatch.setattr(verify_utterances, "_UTTERANCES_PER_RANGE", 2)
    # The row group with the missing value is a problem after those of the row groups before it.
    assert [problem for problem in find_problems(copy) if "a value of d8_4 is missing: run prepare again" in problem]
    monkeypatch.setattr(verify_utterances, "LIMIT", 3)
    found = [re.search(r": (d\d_\d): the recording has", problem)[1] for problem in find_problems(copy)]
    assert found == ["d3_0", "d3_1", "d3_2", "d3_3"]  # of two ranges with two each


def test_damaged_file_is_a_problem_with_those_of_the_others(copy):
    edit_rows(copy, FILE, spoil)
    damaged = FILE.replace("00000-of", "00001-of")
    replace_file(copy, damaged, b"PAR1")
    found = find_problems(copy)
    assert f"{damaged} is damaged" in found[0] and "d3_2: audio bytes" in found[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].update(units=None), "a value of d3_0 is missing"),
        (lambda rows: rows[0]["audio"].update(bytes=None), "d3_0 has no recording"),
    ],
)
def test_verify_refuses_missing_values(copy, change, message):
    edit_rows(copy, FILE, change)
    assert f"{message}: run prepare again" in find_problems(copy)[0]


def test_verify_refuses_other_columns(copy):
    replace_table(copy, FILE, lambda table: table.drop_columns(["emotion"]))
    with pytest.raises(ValueError, match="does not have the columns of the config utterances: run prepare again"):
        verify(copy)


def test_verify_finds_a_recording_in_the_other_split(copy):
    """An utterance of train may not be in test."""
    moved = []
    edit_rows(copy, FILE, lambda rows: moved.extend(rows[4:9]) or rows.__delitem__(slice(4, 9)))
    edit_rows(copy, FILE.replace("train", "test"), lambda rows: rows.extend(moved))
    with pytest.raises(VerificationError, match=r"\(d8_0\): turn 0 is not among the utterances"):
        verify(copy)


def test_verify_finds_a_file_of_recordings_that_does_not_belong(folder_copy, kept):
    (folder_copy / "utterances").mkdir()
    shutil.copyfile(kept / "out" / FILE, folder_copy / FILE)
    with pytest.raises(VerificationError, match=r"train-00000-of-00001\.parquet does not belong to the folder: remove"):
        verify(folder_copy)


@pytest.mark.slow
def test_folder_on_the_hub_is_a_corpus(kept, mini, unit_model, other_model, by_other_model, tmp_path, from_hub):
    """The same unit model gives the same rows, another one those that it gives for the original corpus."""
    from_hub(kept / "out")
    given = {"data_dir": "hub:user/calls", "cache_dir": str(tmp_path / "cache"), "keep_audio": True}
    prepare(**options(mini, unit_model, tmp_path, **given, output_path=str(tmp_path / "same")))
    assert rows_of(tmp_path / "same") == rows_of(kept / "out")
    for name in (FILE, FILE.replace("train", "test")):
        assert (tmp_path / "same" / name).read_bytes() == (kept / "out" / name).read_bytes()
    prepare(**options(mini, other_model, tmp_path, **given))
    assert rows_of(tmp_path / "out") == rows_of(by_other_model) != rows_of(kept / "out")
    assert verify(tmp_path / "out") == {"train": 10, "test": 3}


PUSH_AND_PREPARE = """
import sys
from usdm_sft.cli.main import main
folder, model, output, cache = sys.argv[1:]
main(["push", folder, "tester/calls"])
main(["prepare", "--data_dir", "hub:tester/calls", "--unit_model", model, "--output_path", output, "--cache_dir", cache,
      "--pretrained_model_name_or_path", "mistral-common"])
import datasets
print(datasets.load_dataset("tester/calls", "utterances", split="test")["text"][0])
print(datasets.load_dataset("tester/calls", split="test")["id"][:])
"""


@pytest.mark.slow
def test_pushed_folder_is_prepared_again_with_another_unit_model(kept, other_model, by_other_model, tmp_path):
    server, _, url = serve()
    environment = os.environ | {
        "HF_ENDPOINT": url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    arguments = [kept / "out", other_model, tmp_path / "out", tmp_path / "cache"]
    command = [sys.executable, "-c", PUSH_AND_PREPARE, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["how was the concert?", "['d105_0', 'd105_1', 'd2001_0']"]
    assert rows_of(tmp_path / "out") == rows_of(by_other_model)


def make_calls(mini, folder):
    """The mini corpus as telephone calls: one stereo recording for each dialog, a manifest for each split."""
    folder.mkdir()
    for split in ("train", "test"):
        rows = []
        for (dialog, turn), (name, speaker, _, text, emotion) in sorted(lines_of(mini).items()):
            if f"{name}|" not in (mini / "corpus" / f"{split}.txt").read_text() or dialog in ("d11", "d42"):
                continue
            samples, rate = soundfile.read(mini / "corpus" / "data" / dialog[1:] / f"{name}.wav", dtype="int16")
            path, channel = folder / f"{dialog}.aiff", int(speaker)
            before = soundfile.read(path, dtype="int16")[0] if turn else np.zeros((0, 2), np.int16)
            both = np.zeros((len(before) + len(samples), 2), np.int16)
            both[: len(before)], both[len(before) :, channel] = before, samples
            soundfile.write(path, both, rate)
            place = {"start": len(before) / rate, "end": len(both) / rate, "channel": channel}
            row = {"dialog": dialog, "turn": turn, "speaker": speaker, "text": text, "emotion": emotion}
            rows.append(row | place | {"audio": path.name})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.slow
def test_turns_of_calls_on_the_hub_give_the_same_rows(mini, unit_model, tmp_path, from_hub):
    """Segments of one channel of longer recordings become recordings of their own."""
    make_calls(mini, tmp_path / "calls")
    prepare(**options(mini, unit_model, tmp_path, data_dir=str(tmp_path / "calls"), keep_audio=True))
    row = pq.read_table(tmp_path / "out" / FILE).to_pylist()[0]
    assert row["audio"]["path"].endswith("_0.flac")
    assert soundfile.info(io.BytesIO(row["audio"]["bytes"])).channels == 1
    assert verify(tmp_path / "out") == {"train": 10, "test": 3}
    from_hub(tmp_path / "out")
    given = {"data_dir": "hub:user/calls", "output_path": str(tmp_path / "again"), "keep_audio": True}
    prepare(**options(mini, unit_model, tmp_path, **given))
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "out")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


@pytest.mark.slow
def test_merged_turns_on_the_hub_give_the_same_rows(mini, unit_model, tmp_path, from_hub):
    given = {"keep_audio": True, "history": 1}
    counts = prepare(**options(mini, unit_model, tmp_path, **given, merge_speaker_turns=True))
    assert counts["splits"]["train"]["dialogs"] == 5  # d11 as well
    rows = [row for row in pq.read_table(tmp_path / "out" / FILE).to_pylist() if row["dialog"] == "d11"]
    assert [(row["turn"], row["text"]) for row in rows] == [(0, "is this seat taken?"), (1, "no, please. sit down.")]
    assert verify(tmp_path / "out")["test"] == 3
    from_hub(tmp_path / "out")
    prepare(
        **options(mini, unit_model, tmp_path, **given, data_dir="hub:user/calls", output_path=str(tmp_path / "again"))
    )
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "out")


@pytest.mark.slow
def test_turn_without_a_recording_is_bad_audio_on_the_hub(mini, unit_model, tmp_path, from_hub):
    """Where bad audio was left out, the turn stays without a recording, so that the dialog has no gap."""
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    (corpus / "data" / "8" / "2_1_d8.wav").unlink()
    (corpus / "data" / "20" / "0_1_d20.wav").unlink()  # its only pair
    given = {"keep_audio": True, "on_bad_audio": "skip"}
    counts = prepare(**options(mini, unit_model, tmp_path, **given, data_dir=str(corpus)))
    rows = pq.read_table(tmp_path / "out" / FILE).to_pylist()
    assert "d20" not in {row["dialog"] for row in rows}
    [row] = [row for row in rows if row["audio"] is None]
    assert (row["dialog"], row["turn"], row["units"], row["seconds"]) == ("d8", 2, None, None)
    assert (counts["utterances"]["train"]["utterances"], counts["utterances"]["train"]["recordings"]) == (12, 11)
    assert verify(tmp_path / "out") == {"train": 7, "test": 3}
    from_hub(tmp_path / "out")
    given |= {"data_dir": "hub:user/calls", "output_path": str(tmp_path / "again")}
    with pytest.raises(
        FileNotFoundError,
        match=r"utterance d8_2: audio file .*/no recording in row 6 does not exist: .* --on_bad_audio skip",
    ):
        prepare(**options(mini, unit_model, tmp_path, **given | {"on_bad_audio": "error"}))
    counts = prepare(**options(mini, unit_model, tmp_path, **given))
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "out")
    assert counts["splits"]["train"]["pairs_left_out"] == {
        f"d8_{turn}": "audio of d8_2: does not exist" for turn in (1, 2)
    }
