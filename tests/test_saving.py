"""Pairs and conversations of the builder are saved and pushed with their recordings. Also run on datasets 3.6."""

import json
import os
import subprocess
import sys
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile

from dailytalk_usdm import load_dataset
from tests.mini_hub import serve
from usdm_sft.audio.reading import read_waveform

pytestmark = pytest.mark.loading

TURNS = [  # a segment, a channel of a segment, and a channel of a member of an archive
    {"speaker": "a", "audio": "call.wav", "start": 0, "end": 0.5},
    {"speaker": "b", "audio": "call.wav", "start": 0.5, "end": 1.25, "channel": 1},
    {"speaker": "a", "audio": "zip://calls/one.wav::calls.zip"},
    {"speaker": "b", "audio": "zip://calls/one.wav::calls.zip", "channel": 0},
    {"speaker": "a", "audio": "whole.flac"},
    {"speaker": "a", "audio": "call.wav", "start": 1, "end": 2},  # merged with the turn before
    {"speaker": "b", "audio": "call.wav", "channel": 1},
]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(-9_000, 9_000, (32_000, 2)).astype(np.int16)
    soundfile.write(folder / "call.wav", noise, 16_000)
    soundfile.write(folder / "whole.flac", noise[:8_000, 0], 16_000)
    with zipfile.ZipFile(folder / "calls.zip", "w") as archive:
        archive.writestr("calls/one.wav", (folder / "call.wav").read_bytes())
    rows = [{"dialog": "d", "turn": number, "text": f"turn {number}.", **turn} for number, turn in enumerate(TURNS)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(corpus, tmp_path, name):
    files = {"test": str(corpus / "test.jsonl")}
    options = {"data_files": files, "merge_speaker_turns": True, "cache_dir": str(tmp_path / "cache")}
    return load_dataset(corpus, name, split="test", **options)


def recordings(rows):
    """The recordings of every row, each with its role."""
    for row in rows:
        for role in ("user", "agent"):
            values = row[f"{role}_audio"]
            yield from values if isinstance(values, list) else [values]


def check_embedded(saved, expected):
    """Every recording of saved rows lies in them, with the samples of the original."""
    found = list(recordings(saved))
    for value, original in zip(found, recordings(expected), strict=True):
        assert original["bytes"] is None
        assert value["path"] == os.path.basename(value["path"]) and not os.path.exists(value["path"])
        np.testing.assert_array_equal(read_waveform(value["bytes"]), read_waveform(original["path"]))
    return found


def undecoded(rows):
    """A saved column is a plain `Audio`, which datasets 4 and later decode with torchcodec."""
    for name, feature in list(rows.features.items()):
        if name.endswith("_audio"):
            plain = datasets.Audio(decode=False)
            rows = rows.cast_column(name, plain if isinstance(feature, datasets.Audio) else datasets.Sequence(plain))
    return rows


@pytest.mark.parametrize("name", ["single_turn", "multi_turn"])
def test_saved_rows_hold_their_recordings(corpus, tmp_path, name):
    rows = load(corpus, tmp_path, name)
    rows.save_to_disk(str(tmp_path / "saved"))
    saved = undecoded(datasets.load_from_disk(str(tmp_path / "saved")))
    found = check_embedded(saved, rows)
    if name == "single_turn":
        assert [value["path"] for value in found[:4]] == [
            "call.wav_t_0_0.5.flac",
            "call.wav_t_0.5_1.25_channel_1.flac",
            "call.wav_t_0.5_1.25_channel_1.flac",
            "one.wav",
        ]


def test_rows_in_parquet_keep_their_addresses(corpus, tmp_path):
    rows = load(corpus, tmp_path, "single_turn")
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    saved = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    assert list(recordings(undecoded(saved))) == list(recordings(rows))


def test_recording_that_is_lost_cannot_be_saved(corpus, tmp_path):
    rows = load(corpus, tmp_path, "single_turn")
    (corpus / "call.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"call\.wav#t=0,0\.5"):
        rows.save_to_disk(str(tmp_path / "saved"))


def test_recordings_of_other_datasets_are_embedded_as_before(tmp_path):
    """A file, a file with the name of a segment, and bytes."""
    contents = {}
    for name in ("a.wav", "b.wav#t=0,1"):
        contents[name] = name.encode()
        (tmp_path / name).write_bytes(contents[name])
    values = [{"bytes": None, "path": str(tmp_path / name)} for name in contents]
    values += [{"bytes": b"stored", "path": "c.wav#t=0,1"}, None]
    audio = datasets.Audio()
    embedded = audio.embed_storage(pa.array(values, audio.pa_type)).to_pylist()
    assert embedded == [*({"bytes": data, "path": name} for name, data in contents.items()), *values[2:]]


PUSH = """
import sys
import datasets
from dailytalk_usdm import load_dataset
corpus, cache, out = sys.argv[1:]
rows = load_dataset(corpus, data_files={"test": corpus + "/test.jsonl"}, split="test", cache_dir=cache, merge_speaker_turns=True)
rows.push_to_hub("tester/pairs")
datasets.load_dataset("tester/pairs", split="test").to_parquet(out)
"""


@pytest.mark.slow
def test_pushed_rows_hold_their_recordings(corpus, tmp_path):
    server, _, url = serve(token="hf_test")
    hub = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    hub["HF_HOME"] = str(tmp_path / "hf")
    command = [sys.executable, "-c", PUSH, str(corpus), str(tmp_path / "cache"), str(tmp_path / "rows.parquet")]
    done = subprocess.run(command, env=os.environ | hub, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    saved = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    check_embedded(undecoded(saved), load(corpus, tmp_path, "single_turn"))
