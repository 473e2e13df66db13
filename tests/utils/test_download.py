"""Downloads from a local server that breaks connections, changes its file, or ignores ranges."""

import errno
import hashlib
import http.server
import re
import threading

import pytest

from tests.forked import Fork
from tests.helpers import wait_for
from usdm_sft.utils import download

CONTENT = bytes(range(256)) * 40  # 10,240 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ETAG = '"first"'


class Server:
    """The file of the server, the faults of its next answers, and the requests it received."""

    def __init__(self):
        self.content, self.etag = CONTENT, ETAG
        self.knows_ranges = self.knows_if_range = True
        self.shift = 0  # bytes by which the sent range differs from the requested one
        self.breaks = []  # for each answer: number of bytes before the connection breaks, or the status of a refusal
        self.asked = []  # (Range, If-Range) of each request
        self.pause = threading.Event()
        self.pause.set()

    def answer(self, handler):
        asked = handler.headers.get("Range"), handler.headers.get("If-Range")
        self.asked.append(asked)
        self.pause.wait(20)
        length = self.breaks.pop(0) if self.breaks else None
        if isinstance(length, str):
            handler.send_error(int(length))
            return
        begin, status, size = 0, 200, len(self.content)
        if asked[0] and self.knows_ranges and (asked[1] == self.etag or not self.knows_if_range):
            begin, status = int(re.fullmatch(r"bytes=(\d+)-", asked[0])[1]), 206
            if begin >= size:
                handler.send_error(416)
                return
        body = self.content[begin + self.shift if begin else 0 :]
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        if self.etag:
            handler.send_header("ETag", self.etag)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {begin + self.shift}-{size - 1}/{size}")
        handler.end_headers()
        handler.wfile.write(body[:length])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.answer(self)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        server.url = f"http://127.0.0.1:{httpd.server_port}/model.pt"
        yield server
        httpd.shutdown()


@pytest.fixture
def waits(monkeypatch):
    """Seconds between tries, recorded instead of waited."""
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    return waits


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def names(path):
    return sorted(each.name for each in path.parent.iterdir())


def break_off(server, path, at):
    """Make a run that receives `at` bytes and then fails."""
    server.breaks = [at, *["503"] * download.TRIES]
    with pytest.raises(OSError, match="could not fetch"):
        download.download(server.url, path, sha256=SHA256)
    server.breaks.clear()
    server.asked.clear()


def test_broken_connections_are_resumed_in_one_run(server, path, waits):
    server.breaks = [4000, 3000, 1000]
    assert download.download(server.url, path, sha256=SHA256) == SHA256
    assert path.read_bytes() == CONTENT
    # The last byte on disk is requested again.
    assert server.asked == [
        (None, None),
        ("bytes=3999-", ETAG),
        ("bytes=6998-", ETAG),
        ("bytes=7997-", ETAG),
    ]
    assert waits == [1, 1, 1]  # each try brought new bytes
    assert names(path) == ["model.pt"]


def test_next_run_resumes_the_part_on_disk(server, path, waits):
    server.breaks = [4000, *["503"] * (download.TRIES - 1)]
    with pytest.raises(
        OSError, match=r"HTTP Error 503.*try again \(the 4,000 bytes that have arrived are kept\), or put"
    ):
        download.download(server.url, path, sha256=SHA256)
    assert names(path) == ["model.pt.unfinished", "model.pt.unfinished.etag"]
    server.asked.clear()
    assert download.download(server.url, path, sha256=SHA256) == SHA256
    assert server.asked == [("bytes=3999-", ETAG)]
    assert path.read_bytes() == CONTENT
    assert names(path) == ["model.pt"]


def test_number_of_tries_is_limited_and_the_waits_double(server, path, waits, caplog):
    server.breaks = ["503"] * 100
    with pytest.raises(OSError, match=r"could not fetch .*503.*: try again, or put the file at .*model\.pt by hand"):
        download.download(server.url, path)
    assert (len(server.asked), waits) == (5, [1, 2, 4, 8])
    assert names(path) == []
    assert len(caplog.records) == 4 and "resuming from byte 0 in 8 s" in caplog.text


def test_tries_are_counted_from_the_last_new_byte(server, path, waits):
    server.breaks = ["503", "503", 4000, "503", 1, "503", "503", "503"]
    # The answer of one byte repeats the last byte on disk.
    with pytest.raises(OSError, match="could not fetch"):
        download.download(server.url, path)
    assert waits == [1, 2, 1, 2, 4, 8]
    assert len(server.asked) == 7


def test_refusal_is_not_tried_again(server, path, waits):
    server.breaks = ["403"]
    with pytest.raises(OSError, match=r"could not fetch .*HTTP Error 403.*put the file at .*model\.pt by hand"):
        download.download(server.url, path)
    assert (len(server.asked), waits) == (1, [])


def test_server_that_ignores_ranges_sends_the_whole_file(server, path, waits):
    break_off(server, path, 4000)
    server.knows_ranges = False
    assert download.download(server.url, path, sha256=SHA256) == SHA256
    assert server.asked == [("bytes=3999-", ETAG)]
    assert path.read_bytes() == CONTENT


def test_server_that_ignores_ranges_and_breaks_is_given_up(server, path, waits):
    server.knows_ranges = False
    server.breaks = [4000] * 100
    with pytest.raises(OSError, match="the connection broke after 4,000 of 10,240 bytes"):
        download.download(server.url, path, sha256=SHA256)
    assert len(server.asked) == 5  # the first brought bytes, the four after it no new one
    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_other_version_of_the_file_is_fetched_whole(server, path, waits, knows_if_range):
    break_off(server, path, 4000)
    server.content, server.etag, server.knows_if_range = CONTENT[::-1], '"second"', knows_if_range
    assert download.download(server.url, path) == hashlib.sha256(CONTENT[::-1]).hexdigest()
    assert path.read_bytes() == CONTENT[::-1]
    assert server.asked == [("bytes=3999-", ETAG), *([] if knows_if_range else [(None, None)])]


def test_range_other_than_the_requested_one_is_not_written(server, path, waits):
    break_off(server, path, 4000)
    server.shift = 7
    assert download.download(server.url, path, sha256=SHA256) == SHA256
    assert server.asked == [("bytes=3999-", ETAG), (None, None)]


@pytest.mark.parametrize("etag", [None, 'W/"first"'], ids=["none", "weak"])
def test_nothing_is_resumed_without_a_strong_etag(server, path, waits, etag):
    server.etag = etag
    server.breaks = [4000]
    assert download.download(server.url, path, sha256=SHA256) == SHA256
    assert server.asked == [(None, None), (None, None)]
    server.breaks = [4000, *["503"] * 4]
    with pytest.raises(OSError, match="could not fetch"):
        download.download(server.url, path.with_name("other"))
    assert names(path) == ["model.pt"]


def test_part_of_another_address_is_not_resumed(server, path, waits):
    break_off(server, path, 4000)
    assert download.download(f"{server.url}?other", path, sha256=SHA256) == SHA256
    assert server.asked == [(None, None)]


def test_part_with_a_wrong_digest_is_deleted(server, path, waits):
    break_off(server, path, 4000)
    unfinished = path.with_name("model.pt.unfinished")
    unfinished.write_bytes(b"x" + unfinished.read_bytes()[1:])
    with pytest.raises(ValueError, match=f"not {SHA256}: it is not the known file and was deleted"):
        download.download(server.url, path, sha256=SHA256)
    assert names(path) == []
    server.asked.clear()
    assert download.download(server.url, path, sha256=SHA256) == SHA256
    assert server.asked == [(None, None)]


def test_complete_part_requests_one_byte(server, path, waits):
    break_off(server, path, len(CONTENT) - 1)
    path.with_name("model.pt.unfinished").write_bytes(CONTENT)  # a crash before the rename
    assert download.download(server.url, path, sha256=SHA256) == SHA256
    assert server.asked == [("bytes=10239-", ETAG)]


def test_part_longer_than_the_file_is_discarded(server, path, waits):
    break_off(server, path, 4000)
    path.with_name("model.pt.unfinished").write_bytes(CONTENT + b"more")
    assert download.download(server.url, path, sha256=SHA256) == SHA256
    assert server.asked == [("bytes=10243-", ETAG), (None, None)]


def test_record_that_was_cut_short_is_ignored(server, path, waits):
    for length in range(len(f"{server.url}\n{ETAG}")):
        break_off(server, path, 4000)
        record = path.with_name("model.pt.unfinished.etag")
        record.write_text(record.read_text()[:length])
        assert download.download(server.url, path, sha256=SHA256) == SHA256
        assert path.read_bytes() == CONTENT
        path.unlink()


def test_full_disk_is_not_tried_again(server, path, waits, monkeypatch):
    class FullBar:
        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def update(self, num):  # instead of the write right before it
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "progress_bar", FullBar)
    with pytest.raises(OSError, match=r"No space left on device.*the 10,240 bytes that have arrived are kept"):
        download.download(server.url, path)
    assert (len(server.asked), waits) == (1, [])


DOWNLOAD = """
from huggingface_hub import constants
from usdm_sft.utils.download import download
constants.HF_HUB_OFFLINE = False
download({url!r}, {path!r})
"""


def test_part_survives_a_kill(server, path, waits):
    server.content = CONTENT * 1000  # 10 MB: more than the buffers hold
    server.breaks = [6_000_000, *["503"] * 100]
    sha256 = hashlib.sha256(server.content).hexdigest()
    running = Fork(DOWNLOAD.format(url=server.url, path=str(path)))
    wait_for(lambda: len(server.asked) > 1, running)
    running.kill()
    running.wait()
    server.breaks.clear()
    server.asked.clear()
    assert download.download(server.url, path, sha256=sha256) == sha256
    assert server.asked == [("bytes=5999999-", ETAG)]


TWO_AT_ONCE = """
from pathlib import Path
from huggingface_hub import constants
from usdm_sft.corpus import dailytalk
constants.HF_HUB_OFFLINE = False
dailytalk.SPLIT_LISTS = {{"train": ("train_phone.txt", {sha256!r})}}
Path({folder!r}, "ready-{number}").touch()
print(dailytalk.fetch_split_lists({folder!r}, url={url!r})["train"].stat().st_size)
"""


def test_two_processes_download_a_split_list_once(server, tmp_path):
    server.pause.clear()
    given = {"url": server.url, "folder": str(tmp_path), "sha256": SHA256}
    both = [Fork(TWO_AT_ONCE.format(number=number, **given)) for number in range(2)]
    for number, each in enumerate(both):
        wait_for((tmp_path / f"ready-{number}").exists, each)
    server.pause.set()
    assert [each.communicate(timeout=60)[1] for each in both] == ["10240\n", "10240\n"]
    assert server.asked == [(None, None)]
    assert sorted(each.name for each in (tmp_path / "split_lists").iterdir()) == ["lock", "train_phone.txt"]


def test_links_in_place_of_the_part_are_not_followed(server, path, tmp_path):
    (tmp_path / "precious").write_bytes(CONTENT[:100])
    (tmp_path / "model.pt.unfinished").symlink_to(tmp_path / "precious")
    (tmp_path / "model.pt.unfinished.etag").write_text(f"{server.url}\n{ETAG}")
    assert download.download(server.url, path, sha256=SHA256) == SHA256
    assert (tmp_path / "precious").read_bytes() == CONTENT[:100]
    assert not path.is_symlink() and server.asked == [(None, None)]
