"""A dataset of the Hub is untrusted: it must not make a run read any other file of the user."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from huggingface_hub import constants

from tests.helpers import REPOSITORY, content
from tests.mini_hub import serve
from usdm_sft.corpus.builder import DailyTalkUSDM
from usdm_sft.corpus.hub_corpus import check_data_files, fetch_corpus
from usdm_sft.corpus.problems import CorpusError
from usdm_sft.corpus.read import Rules, read_corpus
from usdm_sft.corpus.saved_dataset import RECIPE as SAVED

ROW = {"dialog": "d", "turn": 0, "speaker": "A", "text": "hello"}


def wav(seed):
    content = io.BytesIO()
    soundfile.write(content, np.random.default_rng(seed).uniform(-0.5, 0.5, 8000), 16_000, format="WAV")
    return content.getvalue()


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """The folder of the downloaded dataset user/calls, beside one of another dataset; both hold a.wav."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for number, name in enumerate(("calls", "private")):
        folder = tmp_path / "hub" / f"datasets--user--{name}" / "snapshots" / "1"
        (folder.parents[1] / "blobs").mkdir(parents=True)
        folder.mkdir(parents=True)
        (folder.parents[1] / "blobs" / "2").write_bytes(wav(number))
        (folder / "a.wav").symlink_to("../../blobs/2")
        with zipfile.ZipFile(folder / "a.zip", "w") as file:
            file.writestr("a.wav", wav(number))
    (tmp_path / "secret.wav").write_bytes(wav(2))
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as file:
        file.writestr("a.wav", wav(2))
    (tmp_path / "hub/datasets--user--calls/snapshots/1/link.wav").symlink_to(tmp_path / "secret.wav")
    return tmp_path / "hub" / "datasets--user--calls" / "snapshots" / "1"


def replace_builder(monkeypatch, loaded):
    """The Hub serves a dataset with these splits."""
    config = SimpleNamespace(data_files=None)
    builder = SimpleNamespace(
        config=config, builder_configs={}, download_and_prepare=lambda: None, as_dataset=lambda: loaded
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, revision: builder)


def fetch(audio, tmp_path, monkeypatch, **columns):
    """`fetch_corpus` of a dataset with two rows, the first with its audio in it."""
    first = {"bytes": wav(3), "path": None} if isinstance(audio, dict) else None
    rows = [ROW | {"audio": first} | columns, ROW | {"turn": 1, "speaker": "B", "audio": audio} | columns]
    loaded = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    replace_builder(monkeypatch, loaded)
    return fetch_corpus("hub:user/calls", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["text", "audio"])
@pytest.mark.parametrize(
    "path",
    [
        "{home}/secret.wav",
        "{home}/nothing.wav",
        "{snapshot}/../../../../secret.wav",
        "../../../secret.wav",
        "secret.wav",
        "file://{home}/secret.wav",
        "{home}/secret.wav#t=0,0.25",
        "{home}/secret.wav#channel=0",
        "zip://a.wav::{home}/secret.zip",
        "zip://a.wav::../../../secret.zip",
        "zip://a.wav::{snapshot}/../../../../secret.zip#t=0,0.25",
        "{snapshot}/a.wav\n{home}/secret.wav",
        "{snapshot}/a.wav#t=0,0.1\nzip://a.wav::{home}/secret.zip",
        "{home}/hub/datasets--user--private/snapshots/1/a.wav",
        "zip://a.wav::{home}/hub/datasets--user--private/snapshots/1/a.zip",
        "{snapshot}/link.wav",
        "{home}/secret.wav\0",
    ],
)
def test_a_row_that_names_a_file_outside_the_dataset_is_refused(snapshot, tmp_path, monkeypatch, kind, path):
    path = path.format(home=tmp_path, snapshot=snapshot)
    audio = path if kind == "text" else {"bytes": None, "path": path}
    for _ in range(2):  # an unfinished manifest is not used
        with pytest.raises(
            CorpusError, match=r"^user/calls, split train, row 1: audio .* is not a file of the dataset: put"
        ):
            fetch(audio, tmp_path, monkeypatch)


@pytest.mark.parametrize("address", ["{}/a.wav", "zip://a.wav::{}/a.zip"])
def test_a_row_may_name_a_file_of_the_dataset_itself(snapshot, tmp_path, monkeypatch, address):
    address = address.format(snapshot)
    lists = fetch({"bytes": None, "path": address}, tmp_path, monkeypatch, start=0.0, end=0.25)
    [dialog] = read_corpus(lists)["train"].dialogs
    assert dialog.utterances[1].audio == f"{address}#t=0,0.25"


def test_path_beside_audio_bytes_is_ignored(snapshot, tmp_path, monkeypatch):
    """`push_to_hub` keeps the name that a recording had."""
    lists = fetch({"bytes": wav(4), "path": f"{tmp_path}/secret.wav"}, tmp_path, monkeypatch)
    [dialog] = read_corpus(lists)["train"].dialogs
    for utterance, seed in zip(dialog.utterances, (3, 4), strict=True):
        with open(utterance.audio, "rb") as file:
            assert file.read() == wav(seed)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_recording(manifest):
    flip(manifest.parent / hashlib.sha256(wav(4)).hexdigest())


def lose_recording(manifest):
    (manifest.parent / hashlib.sha256(wav(4)).hexdigest()).unlink()


def lose_last_row(manifest):
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]))


def interrupt(manifest):
    """Leave what a power cut may leave before the record is written: recordings without their bytes."""
    (manifest.parent / "manifest.sha256").unlink()
    manifest.write_bytes(b"")
    (manifest.parent / hashlib.sha256(wav(4)).hexdigest()).write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_recording, lose_recording, flip, lose_last_row, interrupt])
def test_damage_in_the_cache_is_found_and_made_good(snapshot, tmp_path, monkeypatch, caplog, damage):
    audio = {"bytes": wav(4), "path": None}
    [manifest] = fetch(audio, tmp_path, monkeypatch).values()
    before = content(manifest.parent)
    assert before.keys() == {
        "manifest.jsonl", "manifest.sha256", *(hashlib.sha256(wav(seed)).hexdigest() for seed in (3, 4))
    }  # fmt: skip
    damage(manifest)
    assert content(manifest.parent) != before
    assert fetch(audio, tmp_path, monkeypatch) == {"train": manifest}
    assert content(manifest.parent) == before
    assert ("was damaged after it was written: making it again" in caplog.text) == (damage is not interrupt)
    with monkeypatch.context() as patch:  # nothing is written when all is whole
        patch.setattr("usdm_sft.corpus.hub_corpus.write_then_replace", None)
        assert fetch(audio, tmp_path, monkeypatch) == {"train": manifest}


def test_recording_in_a_binary_column_is_read(snapshot, tmp_path, monkeypatch):
    rows = [ROW | {"turn": turn, "speaker": "AB"[turn], "audio": wav(turn)} for turn in range(2)]
    replace_builder(monkeypatch, datasets.DatasetDict(train=datasets.Dataset.from_list(rows)))
    [dialog] = read_corpus(fetch_corpus("hub:user/calls", tmp_path / "cache"))["train"].dialogs
    for turn, utterance in enumerate(dialog.utterances):
        with open(utterance.audio, "rb") as file:
            assert file.read() == wav(turn)


def test_further_columns_are_kept_and_those_with_bytes_left_out(snapshot, tmp_path, monkeypatch):
    further = {"role": "agent", "words": [{"word": "hi", "start": 0.5}], "note": None, "picture": [{"png": b"x"}]}
    lists = fetch({"bytes": wav(4), "path": None}, tmp_path, monkeypatch, **further)
    split = read_corpus(lists, Rules(keep_columns="all"))["train"]
    assert split.columns == ("role", "words", "note")
    assert split.dialogs[0].utterances[1].more == {"role": "agent", "words": '[{"word": "hi", "start": 0.5}]'}
    plain = fetch({"bytes": wav(4), "path": None}, tmp_path, monkeypatch)["train"]
    assert [*json.loads(plain.read_text().splitlines()[0])] == ["dialog", "turn", "speaker", "text", "audio"]


def save_pairs(folder, audio, **columns):
    """A saved dataset of two dialogs with two turns; the last turn of both has its own recording."""
    rows = [
        ROW | {"dialog": dialog, "turn": turn, "speaker": "AB"[turn], "audio": audio if turn else wav(0)} | columns
        for dialog in "de"
        for turn in (0, 1)
    ]
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(folder)


@pytest.mark.parametrize(
    ("audio", "options", "message"),
    [
        (wav(1), {"agent": "channel=1"}, "saved, split train: no turn is on channel 1, that of the agent: its turns have no channel"),
        (wav(1), {"agent": "C"}, "saved, split train: no turn is by the agent 'C': the speakers are 'A, B'"),
        (
            wav(1),
            {"agent": "column=side"},
            "saved, split train, row 0: dialog d names 'z' as the agent in column side: give one of its speakers 'A, B' in its rows\n"
            "saved, split train, row 2: dialog e names 'z' as the agent in column side: give one of its speakers 'A, B' in its rows",
        ),
        (wav(1), {"keep_columns": "mood"}, "saved, split train has no column mood: its further columns are 'side'"),
        (
            b"<html>",
            {},
            "utterance d_1: audio of saved is not audio that soundfile can read (Format not recognised): replace the file, or leave out its "
            "pairs with --on_bad_audio skip\n"
            "utterance e_1: audio of saved is not audio that soundfile can read (Format not recognised): replace the file, or leave out its "
            "pairs with --on_bad_audio skip",
        ),
    ],
    ids=["channel", "speaker", "column", "further", "audio"],
)  # fmt: skip
def test_errors_of_a_saved_dataset_name_it_and_not_the_cache(tmp_path, monkeypatch, audio, options, message):
    monkeypatch.chdir(tmp_path)
    save_pairs(tmp_path / "saved", audio, side="z")
    with pytest.raises(ValueError, match=r"saved") as raised:
        DailyTalkUSDM(data_dir="saved", digest_cache_dir=tmp_path / "cache", **options).screen_audio()
    assert str(raised.value) == message


def test_rows_of_a_saved_dataset_that_are_left_out_are_placed_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [ROW | {"turn": turn, "speaker": "AB"[turn % 2], "audio": wav(turn)} for turn in range(4)]
    rows[3]["text"] = ""
    datasets.Dataset.from_list(rows).save_to_disk("saved")
    builder = DailyTalkUSDM(data_dir="saved", digest_cache_dir=tmp_path / "cache", on_bad_rows="skip")
    assert builder.screen_audio()[0]["train"].pairs_left_out == {"d_2": "row 3: text missing"}


def test_agent_and_further_columns_of_a_saved_dataset(tmp_path):
    audio = {"bytes": wav(4), "path": None}
    rows = [ROW | {"turn": turn, "speaker": "AB"[turn], "audio": audio, "role": "B"} for turn in range(2)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "train.parquet")
    for folder in ("saved", "rows"):
        lists = SAVED.find(tmp_path / folder, tmp_path / "cache", True, False)
        split = read_corpus(lists, Rules(agent="column=role", keep_columns="role"))["train"]
        assert [each.more for each in split.dialogs[0].utterances] == [{"role": "B"}, {"role": "B"}]


def test_too_long_further_columns_do_not_spoil_a_dataset(snapshot, tmp_path, monkeypatch, caplog):
    lists = fetch({"bytes": wav(4), "path": None}, tmp_path, monkeypatch, vector=[0.5] * 250_000)
    split = read_corpus(lists, Rules(keep_columns="all"))["train"]
    assert [each.more for each in split.dialogs[0].utterances] == [{}, {}]
    assert "the further columns of 2 rows are left out, because they have more than 1,000,000 characters" in caplog.text


def test_dataset_without_texts_is_read_where_none_is_needed(tmp_path, monkeypatch):
    audio = {"bytes": wav(4), "path": None}
    rows = [{"dialog": "d", "turn": turn, "speaker": "AB"[turn], "audio": audio} for turn in range(2)]
    replace_builder(monkeypatch, datasets.DatasetDict(train=datasets.Dataset.from_list(rows)))
    lists = fetch_corpus("hub:user/calls", tmp_path / "cache")
    [dialog] = read_corpus(lists, Rules(needs_text=False))["train"].dialogs
    assert [each.text for each in dialog.utterances] == ["", ""]
    with pytest.raises(CorpusError, match=r"manifest\.jsonl:1: text missing: complete the row"):
        read_corpus(lists)


def test_text_in_the_place_of_bytes_is_refused(snapshot, tmp_path, monkeypatch):
    rows = [ROW | {"audio": {"bytes": "text", "path": None}}]
    replace_builder(monkeypatch, datasets.DatasetDict(train=datasets.Dataset.from_list(rows)))
    with pytest.raises(
        CorpusError, match=r"row 0: audio is a str, not the bytes of a recording: put the recording into"
    ):
        fetch_corpus("hub:user/calls", tmp_path / "cache")


def test_folder_with_the_name_of_the_dataset_is_refused(tmp_path, monkeypatch):
    """datasets reads ./user/calls where it exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "calls").mkdir(parents=True)
    with pytest.raises(
        ValueError,
        match=r"^hub:user/calls names a dataset of the Hub, but .*/user/calls exists here and would be read in its place: run",
    ):
        fetch_corpus("hub:user/calls@v1", tmp_path / "cache")


def test_row_without_a_recording_names_a_missing_file(snapshot, tmp_path, monkeypatch):
    features = datasets.Features(
        {name: datasets.Value("string") for name in ROW} | {"turn": datasets.Value("int32"), "audio": datasets.Audio()}
    )
    table = pa.Table.from_pylist([ROW | {"audio": None}], schema=features.arrow_schema)
    replace_builder(monkeypatch, datasets.DatasetDict(train=datasets.Dataset(table)))
    [manifest] = fetch_corpus("hub:user/calls", tmp_path / "cache").values()
    assert json.loads(manifest.read_text())["audio"] == "no recording in row 0"


def test_the_first_twenty_bad_rows_are_named(snapshot, tmp_path, monkeypatch):
    rows = [ROW | {"turn": turn, "speaker": "AB"[turn % 2], "audio": f"/{turn}.wav"} for turn in range(30)]
    loaded = datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
    replace_builder(monkeypatch, loaded)
    with pytest.raises(CorpusError, match=r"row 19: audio '/19\.wav' .*\n\.\.\. and 10 more problems$"):
        fetch_corpus("hub:user/calls", tmp_path / "cache")


def test_audio_folder_on_the_hub_is_read(tmp_path):
    """`datasets` names the downloaded files, or the members of the downloaded archive."""
    files = {f"{turn}.wav": wav(turn) for turn in range(2)}
    rows = [ROW | {"turn": turn, "speaker": "AB"[turn], "file_name": f"{turn}.wav"} for turn in range(2)]
    files["metadata.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    # datasets 5 imports torchcodec before it looks at an audio file, but uses nothing of it here.
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").touch()
    (tmp_path / "torchcodec" / "encoders.py").write_text("class AudioEncoder: pass\n")
    (tmp_path / "torchcodec" / "decoders.py").write_text("class AudioDecoder: pass\nclass VideoDecoder: pass\n")
    server, hub, url = serve()
    for repository, served in (("tester/files", files), ("tester/zip", {"train.zip": zipped.getvalue()})):
        changes = {f"train/{name}": ("reg", content) for name, content in served.items()}
        hub.commit(hub.create("datasets", repository, False), "main", changes, [], "data", None)
    environment = os.environ | {
        "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}",
    }  # fmt: skip
    code = """
import hashlib
from usdm_sft.audio.addresses import open_file
from usdm_sft.corpus.hub_corpus import fetch_corpus
from usdm_sft.corpus.read import Rules, read_corpus
from usdm_sft.corpus.saved_dataset import RECIPE as SAVED
for name in ("files", "zip"):
    [dialog] = read_corpus(fetch_corpus(f"hub:tester/{name}"))["train"].dialogs
    print(*(hashlib.sha256(open_file(u.audio).read()).hexdigest() for u in dialog.utterances))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    server.shutdown()
    expected = " ".join(hashlib.sha256(wav(turn)).hexdigest() for turn in range(2))
    assert done.stdout.splitlines() == [expected, expected], done.stderr[-2000:]


@pytest.mark.parametrize(
    "file", ["/home/user/calls.parquet", "../calls.parquet", "file:///calls.parquet", "zip://a::/b.zip"]
)
def test_dataset_card_that_names_a_local_file_as_data_is_refused(file):
    with pytest.raises(CorpusError, match=rf"^dataset user/calls names the local file {file} as its data: use another"):
        check_data_files("user/calls", {"train": ["hf://datasets/user/calls@1/a.parquet", file]})


def test_data_files_of_the_hub_are_accepted():
    check_data_files(
        "user/calls", {"train": ["hf://datasets/user/calls@1/a.parquet", "zip://a.csv::https://host/b.zip"]}
    )
    check_data_files("user/calls", None)
