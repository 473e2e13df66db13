"""`show --serve` and `--space`: what the server answers, and the page of a whole folder in a real browser."""

import contextlib
import http.client
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken

from tests.bases import byte_level
from tests.chat_templates import THINKING
from tests.helpers import content, edit_counts, options, page_data, reuse_units
from usdm_sft.audio.reading import read_waveform
from usdm_sft.cli.main import main
from usdm_sft.folder import serve as serving
from usdm_sft.folder.page import CorpusRecordings, find_peaks, write_page
from usdm_sft.folder.serve import FolderServer, write_space
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.config import Template
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.parts import ROW_PARTS, find_parts
from usdm_sft.template.tokenizer import build_tokenizer

CHAT_TOKENS = ["<|im_end|>", "<think>", "</think>"]
FILE = "single_turn/train-00000-of-00010.parquet"
SPACE, HUB = "https://user-rows.static.hf.space/", "https://huggingface.co/datasets/user/rows/resolve/main/"
EXAMPLES = "async () => Promise.all(source.rows.map((_, i) => source.example(i)))"
RECORDING = "async ([i, turn]) => [...(await source.recording(await source.example(i), turn)).peaks]"


@contextlib.contextmanager
def serving_folder(folder, **more):
    with FolderServer(folder, "train", port=0, **more) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def server(dataset_folder, mini):
    with serving_folder(dataset_folder, data_dir=mini / "corpus") as server:
        yield server


def test_files_that_vanish_and_pages_that_close_give_no_traceback(folder_copy, caplog, capfd):
    file = next((folder_copy / "single_turn").iterdir())
    with serving_folder(folder_copy) as server:
        file.unlink()
        status, _, body = ask(server, f"/single_turn/{file.name}")
        assert (status, body) == (404, b"The file is gone.\n")
        for error in (ConnectionResetError(), PermissionError(13, "Permission denied", "a.parquet")):
            try:
                raise error
            except OSError:
                server.handle_error(None, None)
    assert caplog.messages == [
        f"{file} is gone: put it back, or start again with another folder",
        "a request of the page failed: [Errno 13] Permission denied: 'a.parquet'",
    ]
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def conversations(mini, unit_model, finished, tmp_path_factory):
    """Conversations of collapsed units, with their recordings."""
    root = tmp_path_factory.mktemp("conversations")
    reuse_units(finished, root)
    more = {"config_name": "multi_turn", "unit_repetition": "collapse", "keep_audio": True}
    prepare(**options(mini, unit_model, root, **more))
    return root / "out"


def ask(server, path, **headers):
    """Send a path as it is; return the status, the headers and the body of the answer."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in ({"Host": f"127.0.0.1:{server.server_port}"} | headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.headers), answer.read()
    connection.close()
    return found


def test_server_is_on_loopback_and_answers_to_its_own_names_only(server):
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_port
    for host, status in {
        f"127.0.0.1:{port}": 200, f"localhost:{port}": 200, f"evil.example:{port}": 403, "127.0.0.1": 403, "": 403,
        f"localhost:{port}.evil.example": 403,
    }.items():  # fmt: skip
        assert ask(server, "/", Host=host)[0] == status, host
    status, headers, body = ask(server, "/counts.json", Host="evil.example")
    assert body == b"This server answers to 127.0.0.1 and localhost only.\n"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/../cache/digests.sqlite", "/%2e%2e/cache/digests.sqlite", "/single_turn/../counts.json", "//etc/passwd", "/etc/passwd",
        "/..%2f..%2fetc%2fpasswd", "/tokenizer/tokenizer.json", "/single_turn", "/hyparquet/../page.js", "/page.js", "/.lock",
        "/counts.json%00", "/..\\counts.json", "http://127.0.0.1/etc/passwd",
    ],
)  # fmt: skip
def test_other_paths_are_not_found(server, path):
    assert ask(server, path)[::2] == (404, b"There is no such file.\n")


@pytest.mark.parametrize(
    ("given", "status", "found", "part"),
    [
        ("bytes=0-3", 206, "0-3", slice(0, 4)),
        ("bytes=5-", 206, "5-", slice(5, None)),
        ("bytes=-4", 206, "-4", slice(-4, None)),
        ("bytes=4-99999999", 206, "4-", slice(4, None)),
        ("bytes=-99999999", 206, "0-", slice(0, None)),
        ("bytes=99999999-", 416, "*", slice(0, 0)),
        ("bytes=3-2", 416, "*", slice(0, 0)),
        ("bytes=0-1,3-4", 200, None, slice(0, None)),
        ("bytes=-", 200, None, slice(0, None)),
        ("units=0-3", 200, None, slice(0, None)),
    ],
)
def test_ranges_of_a_file(server, dataset_folder, given, status, found, part):
    data = (dataset_folder / FILE).read_bytes()
    size = len(data)
    answer, headers, body = ask(server, f"/{FILE}", Range=given)
    assert (answer, body) == (status, data[part])
    ranges = {"5-": f"5-{size - 1}", "-4": f"{size - 4}-{size - 1}", "4-": f"4-{size - 1}", "0-": f"0-{size - 1}"}
    assert headers.get("Content-Range") == (found and f"bytes {ranges.get(found, found)}/{size}")


def test_link_out_of_the_folder_is_refused_but_not_those_of_the_cache_of_the_hub(dataset_folder, folder_copy, tmp_path):
    (tmp_path / "secret").write_bytes((folder_copy / FILE).read_bytes())
    (folder_copy / FILE).unlink()
    (folder_copy / FILE).symlink_to(tmp_path / "secret")
    with pytest.raises(
        ValueError, match=f"{FILE} is a link out of the folder, and only files of the folder are served"
    ):
        FolderServer(folder_copy, "train", port=0)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(content(dataset_folder).items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(number))
    with serving_folder(snapshot) as server:
        assert ask(server, f"/{FILE}", Range="bytes=0-3")[2] == b"PAR1"


def test_recordings_are_those_of_the_corpus(server, dataset_folder, mini):
    status, _, body = ask(server, "/recordings?split=train&dialog=d3&turn=1&turns=2")
    corpus = CorpusRecordings(mini / "corpus", "train", json.loads((dataset_folder / "counts.json").read_text()))
    expected = [corpus.encode(str(mini / "corpus" / "data" / "3" / f"{name}_d3.wav")) for name in ("1_1", "2_0")]
    assert (status, json.loads(body)) == (200, expected)
    status, _, body = ask(server, "/recordings?split=train&dialog=..%2f..&turn=1&turns=2")
    assert (status, body.decode().partition(": ")[2]) == (404, "name the corpus that the folder was made from\n")
    for query in ("split=none&dialog=d3&turn=1&turns=2", "split=train&dialog=d3&turn=x&turns=2", "split=train"):
        assert ask(server, f"/recordings?{query}")[0] == 404


def test_wrong_options_name_the_remedy(server, dataset_folder, tmp_path, refused):
    def show(*more):
        return refused("show", dataset_folder, *more).removeprefix("dailytalk-usdm show: ")

    port = str(server.server_port)
    assert show("--serve", "--port", port).endswith(
        "cannot be used ([Errno 98] Address already in use): name another one with --port"
    )
    assert show("--serve", "--split", "dev") == f"{dataset_folder} has no split 'dev': name one of train, test"
    assert show("--serve", "--html", "x.html") == "html, serve and space exclude each other: give one of them"
    assert show("--serve", "--index", "3").startswith("index, num_examples, ids and expand are not for --serve")
    for wrong in (["--port", "1"], ["--repo_id", "a/b"], ["--space", tmp_path], ["--space", tmp_path, "--port", "1"]):
        assert show(*wrong).startswith("port is for --serve, and --repo_id goes with --space: add it, or leave the")
    space = ("--space", tmp_path, "--repo_id")
    assert show(*space, "a/b", "--data_dir", tmp_path).startswith(
        "data_dir is not for a Space, whose sound is that of "
    )
    assert show(*space, "a b").startswith("'a b' is not the name of a repository (")
    error = show("--space", dataset_folder, "--repo_id", "user/rows")
    assert error == f"{dataset_folder / 'README.md'} is not that of a static Space: name another folder"


@contextlib.contextmanager
def opened(browser, address, route=None, **more):
    """The page of a folder in a tab, when its rows are read. Fails if it raises an error or violates its policy."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True, **more)
    tab = context.new_page()
    problems = []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    if route is not None:
        context.route("**", route)
    tab.goto(address)
    tab.locator("main :is(h2, [role=alert])").first.wait_for()
    wait_for_rows(tab)
    yield tab
    context.close()
    assert problems == []


def wait_for_rows(tab):
    tab.locator("#filter option, main [role=alert]").first.wait_for(state="attached")


def as_shown(examples):
    """The examples without what only one form of the page has."""
    turn = ("role", "left_out", "speaker", "text", "emotion", "units", "seconds")
    return [
        {name: example[name] for name in ("id", "ids", "labels", "parts")}
        | {"turns": [{name: each[name] for name in turn} for each in example["turns"]]}
        for example in examples
    ]


def test_page_of_a_folder_has_the_rows_of_a_page_of_examples(browser, server, dataset_folder, tmp_path):
    write_page(dataset_folder, tmp_path / "page.html", num_examples=100)
    expected = page_data(tmp_path / "page.html")
    with opened(browser, server.url) as tab:
        found = tab.evaluate(EXAMPLES)
        assert as_shown(found) == as_shown(expected["examples"])
        pieces = tab.evaluate("data.pieces")
        assert {name: pieces[name] for name in expected["pieces"]} == expected["pieces"]
        tab.get_by_label("Show").select_option("repeated")
        assert tab.locator("#list .name").all_inner_texts() == ["d20_0"]
        tab.get_by_role("link", name="split test").click()
        wait_for_rows(tab)
        assert tab.locator("#found").inner_text() == "3 examples of 3"


def test_first_file_is_shown_while_the_others_are_read(browser, server):
    """Each of the ten files has one row."""
    tab, held, shown = browser.new_page(), [], False
    tab.route(re.compile("train-0000[1-9]"), lambda route: route.continue_() if shown else held.append(route))
    tab.goto(server.url)
    tab.get_by_role("heading", name="d3_0").wait_for()
    step = tab.get_by_role("button", name="Next")
    assert tab.locator("#list .name").all_inner_texts() == ["d3_0"] and step.is_disabled()
    shown = True
    for route in held:
        route.continue_()
    wait_for_rows(tab)
    step.click()
    tab.get_by_role("heading", name="d3_1").wait_for()
    assert tab.evaluate("document.activeElement.textContent") == "Next"
    assert tab.locator("#found").inner_text() == "10 examples of 10"
    tab.close()


def test_recordings_of_the_corpus_play(browser, server, mini):
    samples = read_waveform(mini / "corpus" / "data" / "3" / "1_1_d3.wav")
    with opened(browser, server.url) as tab:
        tab.get_by_role("button", name="Play the agent's turn").click()
        tab.get_by_role("button", name="Pause the agent's turn").wait_for()
        seconds = tab.evaluate("sound.playing.timeline.recording.seconds")
    assert seconds == pytest.approx(len(samples) / 16_000, abs=1e-4)


@pytest.mark.slow
def test_conversations_show_every_frame_and_play_the_kept_recordings(browser, conversations, mini, tmp_path):
    write_page(conversations, tmp_path / "page.html", num_examples=100)
    with serving_folder(conversations) as server, opened(browser, server.url) as tab:
        found = tab.evaluate(EXAMPLES)
        assert as_shown(found) == as_shown(page_data(tmp_path / "page.html")["examples"])
        number = [row["id"] for row in found].index("d8_1")
        for turn, name in enumerate(("1_0", "2_1", "3_0")):
            peaks = find_peaks(read_waveform(mini / "corpus" / "data" / "8" / f"{name}_d8.wav"), 50)
            shown = tab.evaluate(RECORDING, [number, turn])
            assert len(shown) == len(peaks) and np.corrcoef(shown, peaks)[0, 1] > 0.99
        tab.get_by_role("button", name="Play the user's turn").first.click()
        tab.get_by_role("button", name="Pause the user's turn").first.wait_for()


def test_parts_of_every_form_are_those_of_python(browser, server, small_tokenizer, tmp_path):
    base = byte_level()
    base.add_tokens([AddedToken(token, normalized=False, special=True) for token in CHAT_TOKENS], special_tokens=True)
    base.chat_template = THINKING
    base.save_pretrained(tmp_path)
    other = build_tokenizer(tmp_path, 100)
    recognition = Template(parts=("user_units", "user_text"), tokenization="separate")
    encoders = [TemplateEncoder(other, Template(tokenization="chat")), TemplateEncoder(other, recognition)]
    row = {"user_text": "hello you", "agent_text": "good day", "user_units": [1, 2, 2], "agent_units": [3]}
    call = "async ([ids, layout]) => (await import('./folder.js')).findParts(ids, layout)"
    with opened(browser, server.url) as tab:
        for encoder in (*encoders, TemplateEncoder(small_tokenizer)):
            for number in (1, 2, 3):
                ids = encoder({name: [[value] * number] for name, value in row.items()})["input_ids"][0]
                parts = [[*ROW_PARTS][part] for part in find_parts(ids, encoder.layout)]
                found = tab.evaluate(call, [ids.tolist(), serving._describe_layout(encoder.layout)])
                assert [part for part, _, length in found for _ in range(length)] == parts
    assert {*parts} == {*ROW_PARTS}


def test_flags_are_kept_and_saved(browser, server, dataset_folder):
    with opened(browser, server.url) as tab:
        for row in ("d8_0", "d3_1"):
            tab.get_by_role("button", name=row).click()
            tab.get_by_role("heading", name=row).wait_for()
            tab.get_by_role("button", name="⚑ Flag", exact=True).click()
        tab.get_by_role("button", name="d3_0").click()
        tab.reload()
        wait_for_rows(tab)
        tab.get_by_label("Show").select_option("flagged")
        assert sorted(tab.locator("#list .name").all_inner_texts()) == ["d3_1", "d8_0"]
        with tab.expect_download() as download:
            tab.get_by_role("button", name="Save flags.json (2 rows)").click()
        saved = json.loads(Path(download.value.path()).read_text())
        assert saved == {
            "key": json.loads((dataset_folder / "counts.json").read_text())["key"],
            "rows": ["d3_1", "d8_0"],
        }
        tab.get_by_role("button", name="⚑ Flag", exact=True).click()  # the first of the two, once more
        assert tab.locator("#save").inner_text() == "Save flags.json (1 row)"


def make_route(space, folder):
    """Answer for a static Space and for the Hub with the files of two folders."""

    def route(request):
        url, headers = request.request.url, {"Access-Control-Allow-Origin": "*"}
        base, root = (HUB, folder) if url.startswith(HUB) else (SPACE, space)
        path = root / (url.removeprefix(base) or "index.html")
        data, part = path.read_bytes(), request.request.headers.get("range")
        if part:
            start, stop = map(int, part.removeprefix("bytes=").split("-"))
            return request.fulfill(status=206, body=data[start : stop + 1], headers=headers)
        kind = {".html": "text/html", ".js": "text/javascript"}.get(path.suffix, "application/json")
        return request.fulfill(body=data, content_type=kind, headers=headers)

    return route


def test_space_reads_the_pushed_dataset(browser, dataset_folder, folder_copy, tmp_path, capsys):
    space = tmp_path / "space"
    main(["show", str(dataset_folder), "--space", str(space), "--repo_id", "user/rows"])
    assert capsys.readouterr().out.startswith(f"{space} has the files of a static Space: hf upload USER/SPACE ")
    assert "sdk: static\ndatasets:\n- user/rows\n" in (space / "README.md").read_text()
    assert "The MIT License" in (space / "hyparquet" / "LICENSE").read_text()
    with opened(browser, SPACE, make_route(space, dataset_folder)) as tab:
        assert tab.locator("#found").inner_text() == "10 examples of 10"
        assert tab.get_by_role("link", name="dataset card").get_attribute("href") == f"{HUB}README.md"
    write_space(dataset_folder, space, "user/rows", "test")  # once more
    edit_counts(folder_copy, lambda counts: counts.update(key="0" * 64))
    with opened(browser, SPACE, make_route(space, folder_copy)) as tab:
        assert tab.get_by_role("alert").inner_text().startswith("The dataset was pushed again since")


@pytest.mark.slow
def test_twenty_thousand_rows_open_at_once(browser, dataset_folder, folder_copy):
    rows = pa.concat_tables(pq.read_table(path) for path in sorted(dataset_folder.glob("single_turn/train*")))
    for path in folder_copy.glob("single_turn/train*"):
        path.unlink()
    names = [f"single_turn/train-{number:05d}-of-00064.parquet" for number in range(64)]
    for number, name in enumerate(names):
        ids = range(number, 20_000, 64)
        table = rows.take([each % 10 for each in ids])
        column = table.schema.get_field_index("id")
        table = table.set_column(column, table.schema.field("id"), pa.array([f"d{each}_0" for each in ids]))
        pq.write_table(table, folder_copy / name, use_content_defined_chunking=True, write_page_index=True)
    test = {path.relative_to(folder_copy).as_posix(): "" for path in folder_copy.glob("single_turn/test*")}
    edit_counts(folder_copy, lambda counts: counts.update(files=dict.fromkeys(names, "") | test))
    with serving_folder(folder_copy) as server:
        start = time.monotonic()
        with opened(browser, server.url) as tab:
            seconds = time.monotonic() - start
            assert tab.locator("#found").inner_text() == "20,000 examples of 20,000"
            assert tab.locator("#list .name").count() == 200
            tab.get_by_role("button", name="19,800 after these").click()
            assert (
                tab.locator("#list .name").first.inner_text() == "d12800_0"
            )  # the 201st row of the first file is d12800
            tab.get_by_label("Search").fill("d19999_0")
            assert tab.locator("#list .name").all_inner_texts() == ["d19999_0"]
            tab.get_by_role("heading", name="d19999_0").wait_for()
            tab.get_by_label("Search").fill("")
            tab.get_by_label("Show").select_option("repeated")
            tab.get_by_text("2,000 examples of 20,000").wait_for()
    assert seconds < 8  # 1 to 2 on two idle cores, until all rows are read
