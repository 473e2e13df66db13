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
from usdm_sft.audio.addresses import absolute_file, is_remote, zip_address
from usdm_sft.cli.main import main
from usdm_sft.corpus import remote
from usdm_sft.corpus.read import read_corpus
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.prepare import prepare


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; some names get a status or half a body, and /secret needs a signature."""

    requests: list[str]
    statuses: dict[str, int]

    def log_message(self, *_):
        pass

    def send_head(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.requests.append(f"{self.command} {self.path}")
        if name in self.statuses:
            return self.send_error(self.statuses[name])
        if name == "half.jsonl":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.send_header("ETag", '"1"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"x" * 500)
            return None
        return super().send_head()


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def server(tmp_path, online):
    """The folder that is served, its address, its requests and its statuses by name."""
    (tmp_path / "served").mkdir()
    handler = type("OwnHandler", (Handler,), {"requests": [], "statuses": {}})
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "served")))
    thread = threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    handler.folder, handler.url = tmp_path / "served", f"http://127.0.0.1:{served.server_port}"
    yield handler
    served.shutdown()
    served.server_close()
    thread.join()


@pytest.fixture
def memory():
    """fsspec's files in memory."""
    storage = fsspec.filesystem("memory")
    yield storage
    storage.rm("/", recursive=True)


def write_manifests(mini, folder):
    """The mini corpus with manifests in place of its split lists; returns the number of recordings."""
    shutil.copytree(mini / "corpus" / "data", folder / "data")
    count = 0
    lists = {split: mini / "corpus" / f"{split}.txt" for split in ("train", "test")}
    for split, content in read_corpus(lists, data_dir=mini / "corpus").items():
        with open(folder / f"{split}.jsonl", "w") as file:
            for each in content.utterances():
                count += 1
                audio = os.path.relpath(each.audio, mini / "corpus")
                row = {
                    "dialog": each.dialog_id,
                    "turn": each.turn,
                    "speaker": each.speaker,
                    "text": each.text,
                    "audio": audio,
                }
                file.write(json.dumps(row | {"emotion": each.emotion}) + "\n")
    return count


def write_turns(folder, audio=("0.wav", "1.wav")):
    """A manifest of one dialog."""
    rows = [
        {"dialog": "d", "turn": turn, "speaker": "AB"[turn], "text": "hello", "audio": name}
        for turn, name in enumerate(audio)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def open_corpus(data_dir, cache, **given):
    return DailyTalkUSDM(data_dir=data_dir, digest_cache_dir=cache, **given)


def turns_of(builder):
    return [each for split in builder.whole_corpus.values() for each in split.utterances()]


def rows_of(folder):
    columns = ["id", "user_text", "user_units", "input_ids", "labels"]
    return {
        file.name: pq.read_table(file, columns=columns).to_pylist()
        for file in sorted(folder.glob("single_turn/*.parquet"))
    }


@pytest.mark.slow
def test_rows_are_those_of_the_local_corpus(mini, unit_model, finished, server, memory, tmp_path):
    """The same ids, units and labels; every file is read once, and the second run asks for versions alone."""
    count = write_manifests(mini, server.folder)
    memory.put(f"{server.folder}/", "/calls/", recursive=True)
    expected = rows_of(finished / "out")
    assert sum(map(len, expected.values())) > 5
    for name, data_dir in (("memory", "memory://calls"), ("http", server.url)):
        (tmp_path / name).mkdir()
        reuse_units(finished, tmp_path / name)
        given = options(mini, unit_model, tmp_path / name, data_dir=data_dir)
        prepare(**given)
        assert rows_of(tmp_path / name / "out") == expected
    fetched = [
        request
        for request in server.requests
        if request.startswith("GET") and request.endswith((".wav", "train.jsonl"))
    ]
    assert len(fetched) == len(set(fetched)) == count + 1
    server.requests.clear()
    prepare(**given)
    assert not [
        request
        for request in server.requests
        if request.startswith("GET") and request.endswith((".wav", "train.jsonl"))
    ]
    assert main(["prepare", "--dry_run", *(f"--{name}={value}" for name, value in given.items())]) is None
    assert not [request for request in server.requests if request.startswith("GET") and request.endswith(".wav")]


def test_files_are_fetched_again_when_they_change(mini, server, memory, tmp_path):
    wavs = sorted((mini / "corpus" / "data").glob("*/*.wav"))
    for folder in (server.folder, tmp_path):
        for turn in (0, 1):
            shutil.copyfile(wavs[turn], folder / f"{turn}.wav")
    write_turns(server.folder)
    memory.put(f"{server.folder}/", "/calls/", recursive=True)
    for data_dir in (f"{server.url}/train.jsonl", "memory://calls/train.jsonl"):
        before = open_corpus(data_dir, tmp_path / "cache")
        assert turns_of(open_corpus(data_dir, tmp_path / "cache"))[0].audio == turns_of(before)[0].audio
        if data_dir.startswith("memory"):
            memory.pipe("/calls/0.wav", wavs[2].read_bytes())
        else:
            shutil.copyfile(wavs[2], server.folder / "0.wav")
            os.utime(server.folder / "0.wav", (1, 1))
        after = open_corpus(data_dir, tmp_path / "cache")
        first, second = (turns_of(builder) for builder in (before, after))
        assert first[0].audio != second[0].audio and first[1].audio == second[1].audio
        assert before.config.corpus_digest != after.config.corpus_digest
        shutil.copyfile(wavs[0], server.folder / "0.wav")


def test_damaged_copy_is_fetched_again(server, tmp_path):
    (server.folder / "a.jsonl").write_text("text")
    url = f"{server.url}/a.jsonl"
    copy = remote.fetch_files([url], tmp_path)[url]
    assert copy.name == "a.jsonl" and copy.read_text() == "text" and copy.is_relative_to(tmp_path / "remote")
    copy.write_text("tEXt")
    assert remote.fetch_files([url, url], tmp_path) == {url: copy} and copy.read_text() == "text"
    assert server.requests.count("GET /a.jsonl") == 2


def test_load_dataset_reads_a_remote_corpus(mini, memory, tmp_path):
    wavs = sorted((mini / "corpus" / "data").glob("*/*.wav"))
    write_turns(tmp_path)
    memory.pipe("/calls/train.jsonl", (tmp_path / "train.jsonl").read_bytes())
    for turn in (0, 1):
        memory.pipe(f"/calls/{turn}.wav", wavs[turn].read_bytes())
    caches = {"cache_dir": str(tmp_path / "datasets"), "digest_cache_dir": str(tmp_path / "cache")}
    [row] = dailytalk_usdm.load_dataset("memory://calls", split="train", **caches)
    with open(row["agent_audio"]["path"], "rb") as file:
        assert (row["id"], file.read()) == ("d_0", wavs[1].read_bytes())


def test_addresses_of_segments_and_archives(memory, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/1.wav", b"in the archive")
    memory.pipe("/a.zip", (tmp_path / "a.zip").read_bytes())
    memory.pipe("/a b.wav", b"alone")
    addresses = [
        "/here/a.wav",
        "memory://a b.wav#t=1,2&channel=1",
        "zip://x/1.wav::memory://a.zip#t=0,1",
        "memory://a b.wav#t=0,1\nmemory://a b.wav#t=3,4",
        "memory://nothing.wav#channel=0",
    ]
    copies = {path.name: path for path in remote.fetch_files(["memory://a.zip", "memory://a b.wav"], tmp_path).values()}
    alone, archive = copies["a_b.wav"], copies["a.zip"]
    assert remote.fetch_addresses(addresses, tmp_path) == {
        addresses[1]: f"{alone}#t=1,2&channel=1",
        addresses[2]: f"{zip_address(archive, 'x/1.wav')}#t=0,1",
        addresses[3]: f"{alone}#t=0,1\n{alone}#t=3,4",
        addresses[4]: "memory://nothing.wav#channel=0",
    }


def test_missing_recording_is_bad_audio_like_any_other(mini, memory, tmp_path):
    wavs = sorted((mini / "corpus" / "data").glob("*/*.wav"))
    write_turns(tmp_path, ("0.wav", "memory://other/1.wav"))
    memory.pipe("/calls/train.jsonl", (tmp_path / "train.jsonl").read_bytes())
    memory.pipe("/calls/0.wav", wavs[0].read_bytes())
    with pytest.raises(
        FileNotFoundError, match=r"utterance d_1: audio file memory://other/1.wav does not exist: replace the"
    ):
        open_corpus("memory://calls", tmp_path / "cache").screen_audio()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("a.wav", "s3://bucket/calls/a.wav"),
        ("/etc/passwd", "s3://bucket/calls/etc/passwd"),
        ("zip://a.wav::/home/a.zip", "zip://a.wav::s3://bucket/calls/home/a.zip"),
        ("file:///etc/passwd", "s3://bucket/calls/file:///etc/passwd"),
        ("filecache://x::file:///etc/passwd", "s3://bucket/calls/filecache://x::file:///etc/passwd"),
        ("https://x::file:///etc/passwd", "s3://bucket/calls/https://x::file:///etc/passwd"),
        ("gs://other/a.wav", "gs://other/a.wav"),
    ],
)
def test_remote_manifest_names_no_file_of_this_machine(file, expected):
    assert absolute_file(file, "s3://bucket/calls/") == expected


def test_local_manifest_may_name_remote_recordings():
    assert absolute_file("https://host/a.wav", "/calls") == "https://host/a.wav"
    assert absolute_file("zip://a.wav::s3://b/a.zip", "/calls") == "zip://a.wav::s3://b/a.zip"
    assert [is_remote(name) for name in ("s3://a", "hub:user/a", "/a", "s3:/a", "ftp://a", "hf://datasets/a/b")] == [
        True, False, False, False, False, True,
    ]  # fmt: skip


def test_manifests_that_the_options_name(server, tmp_path):
    (server.folder / "other.csv").write_text("dialog,turn,speaker,text,audio\nd,0,A,x,0.wav\nd,1,B,y,1.wav\n")
    url = f"{server.url}/other.csv"
    config = PrepareConfig(data_dir=tmp_path, output_path=tmp_path, train_metadata_path=url)
    assert config.data_files == {"train": url}
    builder = open_corpus(tmp_path, tmp_path / "cache", data_files=config.data_files)
    assert [each.audio for each in turns_of(builder)] == [str(tmp_path / "0.wav"), str(tmp_path / "1.wav")]
    assert [*open_corpus(url, tmp_path / "cache").split_lists] == ["train"]
    with pytest.raises(FileNotFoundError, match=r"^http://.*/nothing.csv does not exist: correct the address$"):
        open_corpus(tmp_path, tmp_path / "cache", data_files=[f"{server.url}/nothing.csv"])


# Errors


def test_folder_without_a_manifest(memory, server, tmp_path):
    for data_dir in ("memory://nowhere", server.url):
        with pytest.raises(
            FileNotFoundError, match=rf"^{data_dir} has no manifest \(train.jsonl, train.csv, .*: correct the address$"
        ):
            open_corpus(data_dir, tmp_path)
    memory.pipe({"/calls/train.jsonl": b"x", "/calls/train.csv": b"x"})
    with pytest.raises(ValueError, match=r"^memory://calls/train.csv stands beside train.jsonl: keep one, or name"):
        open_corpus("memory://calls", tmp_path)


@pytest.mark.parametrize(
    ("name", "status", "expected"),
    [
        ("train.jsonl", 404, "does not exist: correct the address"),
        (
            "train.jsonl",
            403,
            r"may not be read \(status 403\): give its driver credentials, or ask the owner for access",
        ),
        (
            "train.jsonl",
            500,
            r"cannot be read \(status 500\): check the address and the network, and run again; files that have ",
        ),
        (
            "half.jsonl",
            None,
            r"cannot be read \(Response payload is not completed.*500 of 1000 bytes.*\): check the address and",
        ),
    ],
)
def test_error_of_a_server_is_one_line(server, tmp_path, name, status, expected):
    (server.folder / "train.jsonl").write_text("")
    if status is not None:
        server.statuses[name] = status
    with pytest.raises(OSError, match=rf"^http://[0-9.:]*/{name} {expected}") as raised:
        open_corpus(f"http://user:password@{server.url[7:]}/{name}?signature=secret", tmp_path)
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value) and "password" not in str(raised.value)
    assert not [*tmp_path.rglob("*.unfinished")]


def test_server_that_is_not_there(online, tmp_path):
    with pytest.raises(
        OSError, match=r"^http://127.0.0.1:9/a.jsonl cannot be read \(Cannot connect to host 127.0.0.1:9 .*: check the"
    ):
        open_corpus("http://127.0.0.1:9/a.jsonl", tmp_path)


def test_connection_that_breaks_without_an_error(memory, tmp_path, monkeypatch):
    memory.pipe("/a.jsonl", b"text")
    monkeypatch.setattr(type(memory), "info", lambda self, path: {"type": "file", "size": 10, "ETag": "1"})
    with pytest.raises(
        OSError, match=r"^memory://a.jsonl cannot be read \(the connection broke after 4 of 10 bytes\): check"
    ):
        remote.fetch_files(["memory://a.jsonl"], tmp_path)


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket/a.jsonl", "s3fs"), ("gs://bucket/a.jsonl", "gcsfs"), ("az://c/a.csv", "adlfs")]
)
def test_missing_driver_is_named(online, tmp_path, monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OSError, match=rf"^{url} needs the package {package} \(.*\): pip install {package}$"):
        open_corpus(url, tmp_path)


def test_offline_mode_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"^offline mode \(HF_HUB_OFFLINE\) forbids reading https://host/a.jsonl: unset it"
    ):
        open_corpus("https://host/a.jsonl?signature=secret", tmp_path)
