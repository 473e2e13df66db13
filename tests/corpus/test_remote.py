"""Manifests and recordings in remote storage: fsspec's memory and a server of HTTP on this machine."""

import http.server
import json
import os
import shutil
import sys
import threading
import zipfile
from functools import partial

import fsspec
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

import dailytalk_usdm
from dailytalk_usdm import DailyTalkUSDM
from tests.helpers import options, reuse_units
from usdm_sft.audio.addresses import absolute_file, is_remote
from usdm_sft.corpus import remote
from usdm_sft.corpus.read import read_corpus
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.dry_run import dry_run
from usdm_sft.prepare.prepare import prepare


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; some names get a status, or half of what is promised."""

    requests: list[str]
    statuses: dict[str, int]

    def log_message(self, *_):
        pass

    def send_head(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.requests.append(f"{self.command} {name}")
        if name in self.statuses:
            return self.send_error(self.statuses[name])
        if name != "half.jsonl":
            return super().send_head()
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"x" * 500)
        return None


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def server(tmp_path, online):
    """The folder that is served, its address, its requests and its statuses by name."""
    (tmp_path / "served").mkdir()
    own = type("OwnHandler", (Handler,), {"requests": [], "statuses": {}, "folder": tmp_path / "served"})
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(own, directory=str(own.folder)))
    thread = threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    own.url = f"http://127.0.0.1:{served.server_port}"
    yield own
    served.shutdown()
    served.server_close()
    thread.join()


@pytest.fixture
def memory():
    """fsspec's files in memory."""
    storage = fsspec.filesystem("memory")
    yield storage
    storage.rm("/", recursive=True)


@pytest.fixture
def wavs(mini):
    return sorted((mini / "corpus" / "data").glob("*/*.wav"))


def write_manifests(corpus, folder):
    """A corpus with manifests in place of its split lists; returns the number of its turns."""
    shutil.copytree(corpus / "data", folder / "data")
    count = 0
    for split, content in read_corpus(
        {name: corpus / f"{name}.txt" for name in ("train", "test")}, data_dir=corpus
    ).items():
        turns = list(content.utterances())
        rows = [
            {"dialog": each.dialog_id, "turn": each.turn, "speaker": each.speaker, "text": each.text}
            | {"audio": os.path.relpath(each.audio, corpus), "emotion": each.emotion}
            for each in turns
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        count += len(turns)
    return count


def manifest(*audio):
    """A manifest of one dialog."""
    rows = [
        {"dialog": "d", "turn": turn, "speaker": "AB"[turn], "text": "x", "audio": name}
        for turn, name in enumerate(audio)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def open_corpus(data_dir, cache, **given):
    return DailyTalkUSDM(data_dir=data_dir, digest_cache_dir=cache, **given)


def audio_of(builder):
    return [each.audio for split in builder.whole_corpus.values() for each in split.utterances()]


def rows_of(folder):
    files = sorted(folder.glob("single_turn/*.parquet"))
    return [
        pq.read_table(file, columns=["id", "user_units", "agent_units", "input_ids", "labels"]).to_pylist()
        for file in files
    ]


@pytest.mark.slow
def test_rows_are_those_of_the_local_corpus(mini, unit_model, finished, server, memory, tmp_path):
    """The same ids, units and labels; every file is read once, and later runs ask for versions alone."""
    count = write_manifests(mini / "corpus", server.folder)
    memory.put(f"{server.folder}/", "/calls/", recursive=True)
    expected = rows_of(finished / "out")
    assert sum(map(len, expected)) > 5
    for name, data_dir in (("memory", "memory://calls"), ("http", server.url)):
        (tmp_path / name).mkdir()
        reuse_units(finished, tmp_path / name)
        given = options(mini, unit_model, tmp_path / name, data_dir=data_dir)
        prepare(**given)
        assert rows_of(tmp_path / name / "out") == expected
    fetched = [request for request in server.requests if request.startswith("GET") and request.endswith(".wav")]
    assert len(fetched) == len(set(fetched)) == count
    server.requests.clear()
    prepare(**given)
    dry_run(PrepareConfig(**given))
    assert not [request for request in server.requests if request.startswith("GET") and request.endswith(".wav")]


def test_files_are_fetched_again_when_they_change(wavs, server, memory, tmp_path):
    (server.folder / "train.jsonl").write_bytes(manifest("0.wav", "1.wav"))
    for turn in (0, 1):
        shutil.copyfile(wavs[turn], server.folder / f"{turn}.wav")
    memory.put(f"{server.folder}/", "/calls/", recursive=True)
    urls = (f"{server.url}/train.jsonl", "memory://calls/train.jsonl")
    before = [open_corpus(url, tmp_path) for url in urls]
    assert [audio_of(open_corpus(url, tmp_path)) for url in urls] == [audio_of(each) for each in before]
    shutil.copyfile(wavs[2], server.folder / "0.wav")
    os.utime(server.folder / "0.wav", (1, 1))
    memory.pipe("/calls/0.wav", wavs[2].read_bytes())
    for url, old in zip(urls, before, strict=True):
        new = open_corpus(url, tmp_path)
        assert audio_of(new)[0] != audio_of(old)[0] and audio_of(new)[1] == audio_of(old)[1]
        assert new.config.corpus_digest != old.config.corpus_digest


def test_damaged_copy_is_fetched_again(server, tmp_path):
    (server.folder / "a.jsonl").write_text("text")
    url = f"{server.url}/a.jsonl"
    copy = remote.fetch_files([url], tmp_path)[url]
    assert copy.name == "a.jsonl" and copy.read_text() == "text" and copy.is_relative_to(tmp_path / "remote")
    copy.write_text("tEXt")
    assert remote.fetch_files([url, url], tmp_path) == {url: copy} and copy.read_text() == "text"
    assert server.requests.count("GET a.jsonl") == 2


def test_load_dataset_reads_a_remote_corpus(wavs, memory, tmp_path):
    memory.pipe(
        {
            "/c/train.jsonl": manifest("0.wav", "1.wav"),
            "/c/0.wav": wavs[0].read_bytes(),
            "/c/1.wav": wavs[1].read_bytes(),
        }
    )
    caches = {"cache_dir": str(tmp_path / "datasets"), "digest_cache_dir": str(tmp_path / "cache")}
    [row] = dailytalk_usdm.load_dataset("memory://c", split="train", **caches)
    with open(row["agent_audio"]["path"], "rb") as file:
        assert (row["id"], file.read()) == ("d_0", wavs[1].read_bytes())


def test_addresses_of_segments_and_archives(memory, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/1.wav", b"in the archive")
    memory.pipe({"/a.zip": (tmp_path / "a.zip").read_bytes(), "/a b.wav": b"alone"})
    archive, alone = remote.fetch_files(["memory://a.zip", "memory://a b.wav"], tmp_path).values()
    assert (archive.name, alone.name) == ("a.zip", "a_b.wav")
    expected = {
        "memory://a b.wav#t=1,2&channel=1": f"{alone}#t=1,2&channel=1",
        "zip://x/1.wav::memory://a.zip#t=0,1": f"zip://x/1.wav::{archive}#t=0,1",
        "memory://a b.wav#t=0,1\nmemory://a b.wav#t=3,4": f"{alone}#t=0,1\n{alone}#t=3,4",
        "memory://nothing.wav#channel=0": "memory://nothing.wav#channel=0",
    }
    assert remote.fetch_addresses(["/here/a.wav", "zip://x::/here/a.zip#t=0.0,1", *expected], tmp_path) == expected


def test_missing_recording_is_bad_audio_like_any_other(wavs, memory, tmp_path):
    memory.pipe({"/c/train.jsonl": manifest("0.wav", "memory://other/1.wav"), "/c/0.wav": wavs[0].read_bytes()})
    said = "utterance d_1: audio file memory://other/1.wav does not exist: put it there, give --data_dir the folder"
    with pytest.raises(FileNotFoundError, match=said):
        open_corpus("memory://c", tmp_path).screen_audio()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("a.wav", "s3://bucket/calls/a.wav"), ("/etc/passwd", "s3://bucket/calls/etc/passwd"),
        ("zip://a.wav::/home/a.zip", "zip://a.wav::s3://bucket/calls/home/a.zip"),
        ("file:///etc/passwd", "s3://bucket/calls/file:///etc/passwd"),
        ("https://x::file:///etc/passwd", "s3://bucket/calls/https://x::file:///etc/passwd"),
        ("gs://other/a.wav", "gs://other/a.wav"),
    ],
)  # fmt: skip
def test_remote_manifest_names_no_file_of_this_machine(file, expected):
    assert absolute_file(file, "s3://bucket/calls/") == expected


def test_local_manifest_may_name_remote_recordings():
    assert absolute_file("https://host/a.wav", "/calls") == "https://host/a.wav"
    assert absolute_file("zip://a.wav::s3://b/a.zip", "/calls") == "zip://a.wav::s3://b/a.zip"
    assert list(map(is_remote, ("s3://a", "hub:user/a", "s3:/a", "ftp://a", "hf://a/b"))) == [
        True,
        False,
        False,
        False,
        True,
    ]


def test_manifests_that_the_options_name(server, tmp_path):
    (server.folder / "other.jsonl").write_bytes(manifest("0.wav", "1.wav"))
    url = f"{server.url}/other.jsonl"
    config = PrepareConfig(data_dir=tmp_path, output_path=tmp_path, train_metadata_path=url)
    builder = open_corpus(tmp_path, tmp_path, data_files=config.data_files)
    assert audio_of(builder) == [str(tmp_path / "0.wav"), str(tmp_path / "1.wav")]
    assert [*open_corpus(url, tmp_path).split_lists] == ["train"]
    with pytest.raises(FileNotFoundError, match=r"^http://.*/nothing.csv does not exist: correct the address$"):
        open_corpus(tmp_path, tmp_path, data_files=[f"{server.url}/nothing.csv"])


# Errors


def test_folder_without_a_manifest(memory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^memory://c has no manifest \(train.jsonl, .*: correct the address$"):
        open_corpus("memory://c", tmp_path)
    memory.pipe({"/c/train.jsonl": b"x", "/c/train.csv": b"y"})
    with pytest.raises(ValueError, match=r"^memory://c/train.csv stands beside train.jsonl: keep one, or name"):
        open_corpus("memory://c", tmp_path)


@pytest.mark.parametrize(
    ("name", "status", "expected"),
    [
        ("a.jsonl", 404, "does not exist: correct the address"),
        ("a.jsonl", 403, r"may not be read \(status 403\): give its driver credentials, or ask the owner for access"),
        (
            "a.jsonl",
            500,
            r"cannot be read \(status 500\): check the address and the network, and run again; files that ",
        ),
        ("half.jsonl", None, r"cannot be read \(Response payload is not completed.*500 of 1000 bytes.*\): check the "),
    ],
)
def test_error_of_a_server_is_one_line(server, tmp_path, name, status, expected):
    if status is not None:
        server.statuses[name] = status
    with pytest.raises(OSError, match=rf"^http://[0-9.:]*/{name} {expected}") as raised:
        open_corpus(f"http://user:password@{server.url[7:]}/{name}?signature=secret", tmp_path)
    assert not [part for part in ("\n", "secret", "password") if part in str(raised.value)]
    assert not [*tmp_path.rglob("*.unfinished")]


def test_server_that_is_not_there(online, tmp_path):
    said = r"^http://127.0.0.1:9/a.jsonl cannot be read \(Cannot connect to host 127.0.0.1:9 .*: check the address"
    with pytest.raises(OSError, match=said):
        open_corpus("http://127.0.0.1:9/a.jsonl", tmp_path)


def test_connection_that_breaks_without_an_error(memory, tmp_path, monkeypatch):
    memory.pipe("/a.jsonl", b"text")
    monkeypatch.setattr(type(memory), "info", lambda self, path: {"type": "file", "size": 10, "ETag": "1"})
    said = r"^memory://a.jsonl cannot be read \(the connection broke after 4 of 10 bytes\): check the address"
    with pytest.raises(OSError, match=said):
        remote.fetch_files(["memory://a.jsonl"], tmp_path)


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")])
def test_missing_driver_is_named(online, tmp_path, monkeypatch, protocol, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        OSError, match=rf"^{protocol}://b/a.csv needs the package {package} \(.*\): pip install {package}$"
    ):
        open_corpus(f"{protocol}://b/a.csv", tmp_path)


def test_offline_mode_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"^offline mode \(HF_HUB_OFFLINE\) forbids reading https://host/a.jsonl: unset it"
    ):
        open_corpus("https://host/a.jsonl?signature=secret", tmp_path)
