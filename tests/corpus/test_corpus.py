import http.server
import re
import socket
import threading

import pytest

from tests.helpers import FIXTURES
from usdm_sft.corpus import dailytalk
from usdm_sft.corpus.problems import CorpusError
from usdm_sft.corpus.read import SAME_SPEAKER, SINGLE_TURN, read_corpus
from usdm_sft.utils import download
from usdm_sft.utils.texts import text_problem


def write(path, *lines, end="\n", newline=""):
    with open(path, "w", encoding="utf-8", newline=newline) as file:
        file.write(end.join(lines) + end)
    return path


def line(utterance_id, text="hello.", speaker=None):
    return f"{utterance_id}|{utterance_id.split('_')[1] if speaker is None else speaker}|{{P}}|{text}|none"


GOOD = [line("0_0_d1"), line("1_1_d1", "yes.")]


def pairs(split):
    return [(user.id, agent.id) for dialog in split.dialogs for user, agent in dialog.pairs()]


@pytest.mark.oracle
def test_real_split_lists(shared):
    splits = read_corpus({split: shared / "dailytalk" / f"{split}.txt" for split in ("train", "test")})
    train, test = splits["train"], splits["test"]
    assert (len(train.dialogs), train.num_pairs) == (2400, 20_042)
    assert (len(test.dialogs), test.num_pairs) == (127, 1_058)
    assert sorted(train.left_out) == ["d1118", "d1187", "d2300", "d604"]
    assert dict(test.left_out) == {"d1023": SAME_SPEAKER}


def test_mini_dialogs_in_order_of_number(mini):
    splits = read_corpus({split: mini / "corpus" / f"{split}.txt" for split in ("train", "test")})
    assert [dialog.id for dialog in splits["train"].dialogs] == ["d3", "d8", "d20", "d77"]
    assert dict(splits["train"].left_out) == {"d11": SAME_SPEAKER, "d42": SINGLE_TURN}
    assert pairs(splits["test"]) == [
        ("0_1_d105", "1_0_d105"),
        ("1_0_d105", "2_1_d105"),
        ("0_0_d2001", "1_1_d2001"),
    ]
    user = splits["test"].dialogs[1].utterances[0]
    assert (user.speaker, user.turn, user.text) == ("0", 0, "The Café on Main Street is closed.")
    assert user.audio == "2001/0_0_d2001.wav"


def test_unicode_separators_do_not_end_a_line(tmp_path):
    path = write(tmp_path / "l.txt", line("0_0_d1", "line\u2028sep\u2029arated"), GOOD[1])
    assert read_corpus({"train": path})["train"].dialogs[0].utterances[0].text == "line\u2028sep\u2029arated"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*GOOD, "1_1_d2|1|hi|none"], r"l\.txt:3: 4 fields instead of 5 .*complete the line"),
        ([*GOOD, line("0_0_d2", "left|right")], r"l\.txt:3: 6 fields instead of 5 .*take '\|' out"),
        ([*GOOD, ""], r"l\.txt:3: blank line: delete it"),
        ([line("x_0_d1"), GOOD[1]], r"l\.txt:1: id 'x_0_d1' is not <turn>_<speaker>_d<dialog>"),
        ([line("0_0_d١"), GOOD[1]], r"l\.txt:1: id '0_0_d١' is not <turn>"),
        ([line("0_0_d1", speaker="1"), GOOD[1]], r"l\.txt:1: speaker '1' is not the speaker of id 0_0_d1"),
        ([GOOD[0], line("2_0_d1")], r"l\.txt:2: dialog d1 has no turn 1: add the line"),
        ([line("1_0_d1"), line("2_1_d1")], r"l\.txt:1: dialog d1 has no turn 0"),
        ([*GOOD, line("1_0_d1")], r"l\.txt:3: dialog d1 has turn 1 twice"),
        ([*GOOD, GOOD[0]], r"l\.txt:3: id 0_0_d1 stands already at line 1"),
        ([line("0_0_d1", " \u3000"), GOOD[1]], r"l\.txt:1: text ' \\u3000' of 0_0_d1 is empty or white space only"),
        ([line("0_0_d1", "tab\there"), GOOD[1]], r"l\.txt:1: .*control character '\\t': correct the text"),
        ([line("0_0_d1", "a <S> b"), GOOD[1]], r"l\.txt:1: .*holds '<s>', which is part of a special token"),
    ],
)
def test_bad_line(tmp_path, lines, message):
    with pytest.raises(CorpusError, match=message) as caught:
        read_corpus({"train": write(tmp_path / "l.txt", *lines)})
    assert len(caught.value.problems) == 1 + ("is not <turn>" in message)  # whose dialog then lacks a turn


@pytest.mark.parametrize(
    "text", ["  ", "a\x0bb", "a\x85b", "a\x00b", "<|unit5|>", "a|>", "</S>", "<Unk>", "<PAD>", "\ud800"]
)
def test_text_that_the_template_cannot_hold(text):
    assert text_problem(text)


@pytest.mark.parametrize(
    "text", ["a", " . ", "nbsp\xa0here", "zero\u200bwidth", "a\u2028b", "▁", "İstanbul", "<s", "| >"]
)
def test_text_that_the_template_can_hold(text):
    assert text_problem(text) is None


def test_dialog_in_both_splits(tmp_path):
    lists = {split: write(tmp_path / f"{split}.txt", *GOOD) for split in ("train", "test")}
    with pytest.raises(CorpusError, match=r"test\.txt:1: dialog d1 is in two splits, first at .*train\.txt:1"):
        read_corpus(lists)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine -> (its folder, its URL)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_offline_mode_fetches_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="offline mode"):
        dailytalk.fetch_split_lists(tmp_path, url=server[1])


def test_a_wrong_split_list_is_refused(server, tmp_path):
    folder, url = server
    (folder / "train_phone.txt").write_text("not DailyTalk's")
    with pytest.raises(ValueError, match=r"train_phone\.txt has sha256 .* not defdf666"):
        dailytalk.fetch_split_lists(tmp_path, url=url)


@pytest.mark.parametrize(
    "answer", [b"hello\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\nhalf"], ids=["no HTTP", "breaks off"]
)
def test_broken_answers_of_a_server_are_an_error(tmp_path, monkeypatch, answer):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download, "FIRST_WAIT", 0)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            for _ in range(download.TRIES):
                connection, _ = listening.accept()
                connection.recv(1000)
                connection.sendall(answer)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(OSError, match="could not fetch"):
            download.download(f"http://127.0.0.1:{listening.getsockname()[1]}/x", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.oracle
def test_split_lists_are_fetched_once(server, tmp_path, shared):
    folder, url = server
    for split, (name, _) in dailytalk.SPLIT_LISTS.items():
        (folder / name).write_bytes((shared / "dailytalk" / f"{split}.txt").read_bytes())
    lists = dailytalk.fetch_split_lists(tmp_path, url=url)
    assert read_corpus(lists)["train"].num_pairs == 20_042
    assert dailytalk.fetch_split_lists(tmp_path, url="http://127.0.0.1:9/never-asked") == lists


def test_edge_lists_are_refused_whole():
    folder = FIXTURES / "tokens-edge" / "raw"
    with pytest.raises(CorpusError) as caught:
        read_corpus({split: folder / f"{split}.txt" for split in ("train", "test")})
    dialogs = {re.search(r"d90\d\d", problem).group() for problem in caught.value.problems}
    assert dialogs == {"d9006", "d9007", "d9008", "d9010", "d9016", "d9017", "d9018"}
