"""The page of examples: its data, and its behaviour in a real browser."""

import base64
import contextlib
import io
import math
import re

import numpy as np
import pytest
import soundfile

from tests.helpers import edit_rows, page_data
from usdm_sft.audio.reading import read_waveform
from usdm_sft.folder.page import find_peaks, write_page
from usdm_sft.folder.rows import read_rows

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def page_path(dataset_folder, mini, tmp_path_factory):
    """A page with sound, beside its dataset folder."""
    path = dataset_folder.parent / "page.html"
    assert write_page(dataset_folder, path, data_dir=mini / "corpus") == 10
    return path


def change_column(folder, name, value):
    """Replace a value of the first row."""
    edit_rows(folder, "single_turn/train-00000-of-00010.parquet", lambda rows: rows[0].update({name: value}))


def test_data_is_that_of_the_rows(page_path, dataset_folder):
    data = page_data(page_path)
    rows = read_rows(dataset_folder, "train", 0, 100)
    for example, row in zip(data["examples"], rows, strict=True):
        assert (example["id"], example["ids"], example["labels"]) == (row["id"], row["input_ids"], row["labels"])
        for turn in example["turns"]:
            for name in ("speaker", "text", "emotion", "units", "seconds"):
                assert turn[name] == row[f"{turn['role']}_{name}"]
        assert sum(length for _, _, length in example["parts"]) == len(row["input_ids"])
    assert data["left_out"] == [["d11", "one speaker speaks twice in a row"], ["d42", "a single turn makes no pair"]]
    assert data["pieces"]["13"] == "⏎" and data["pieces"]["32001"] == "<|correspond|>"


def test_each_recording_is_stored_once_and_compressed(page_path, mini):
    """Dialog d3 has four turns in three rows."""
    data = page_data(page_path)
    first = [turn["recording"] for example in data["examples"][:3] for turn in example["turns"]]
    assert first == [0, 1, 1, 2, 2, 3]
    for recording, name in zip(data["recordings"], ("0_0", "1_1", "2_0", "3_1"), strict=False):
        original = read_waveform(mini / "corpus" / "data" / "3" / f"{name}_d3.wav")
        compressed, rate = soundfile.read(io.BytesIO(base64.b64decode(recording["audio"])), dtype="float32")
        assert (rate, len(compressed)) == (16_000, len(original))
        assert np.corrcoef(original, compressed)[0, 1] > 0.97  # a shift by one unit gives less than 0.5
        assert recording["seconds"] == pytest.approx(len(original) / 16_000, abs=1e-4)
        assert len(recording["audio"]) < 0.7 * len(original)  # 2.7 in 16 bits


def test_peaks_are_relative_to_the_loudest():
    samples = np.zeros(400, np.float32)
    samples[[5, 399]] = -0.25, 0.5
    assert find_peaks(samples, 50).tolist() == [128, 0, 255]
    assert find_peaks(np.zeros(320, np.float32), 50).tolist() == [0, 0]


def test_rows_cannot_name_audio_outside_the_corpus(folder_copy, mini, tmp_path):
    """The dialog and speaker of a row are looked up in the corpus and never become a path."""
    (tmp_path / "0_0_d1.wav").write_bytes(b"secret")
    change_column(folder_copy, "dialog_id", f"d../../../../../..{tmp_path}")
    with pytest.raises(FileNotFoundError, match="has no turn d3_0: name the corpus that the folder was made from"):
        write_page(folder_copy, tmp_path / "page.html", num_examples=1, data_dir=mini / "corpus")
    assert not (tmp_path / "page.html").exists()


def test_corpus_without_the_split_is_refused(dataset_folder, mini, tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="has no list of test: name the corpus that the folder was made from"):
        write_page(dataset_folder, tmp_path / "page.html", split="test", data_dir=tmp_path)


def test_row_with_other_numbers_of_ids_and_labels_is_refused(folder_copy, tmp_path):
    change_column(folder_copy, "labels", [-100, 5])
    with pytest.raises(ValueError, match="a row has 305 input_ids, but 2 labels: verify its folder"):
        write_page(folder_copy, tmp_path / "page.html", num_examples=1)


def test_links_lead_to_files_below_the_page_only(page_path, dataset_folder, tmp_path):
    addresses = re.findall(r'<a href="([^"#]+)"', page_path.read_text())
    assert addresses == ["dataset/README.md", "dataset/counts.json"]
    assert all((page_path.parent / address).is_file() for address in addresses)
    write_page(dataset_folder, tmp_path / "page.html", num_examples=1)
    assert re.findall(r'<a href="([^"#]+)"', (tmp_path / "page.html").read_text()) == []


@contextlib.contextmanager
def opened(browser, path, *, width=1280, dark=False):
    """The page in a tab. Fails if the page raises an error, violates its policy, or requests anything."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    tab = context.new_page()
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri())
    yield tab
    context.close()
    assert problems == [] and requests == [path.as_uri()]


def wait_until(tab, happened):
    """Wait at most 10 s. `wait_for_function` evaluates a string in the page, which the page's policy forbids."""
    for _ in range(500):
        if happened():
            return
        tab.wait_for_timeout(20)
    pytest.fail("nothing happened in time")


# Where the cursor is drawn, in CSS pixels from the left; the first line of the waveform only.
FIND_CURSOR = """slider => {
    const canvas = slider.querySelector('canvas');
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, 1).data;
    const found = [];
    for (let x = 0; x < canvas.width; x++)
        if (pixels[4 * x] === 196 && pixels[4 * x + 1] === 0 && pixels[4 * x + 2] === 61) found.push(x);
    return [+slider.dataset.seconds, +slider.getAttribute('aria-valuenow'), found[0], slider.getAttribute('aria-valuetext')];
}"""


def test_cursor_and_highlighted_unit_follow_the_sound(browser, page_path, dataset_folder):
    [row] = read_rows(dataset_folder, "train", 0, 1)
    units = row["user_units"]
    with opened(browser, page_path) as tab:
        slider = tab.get_by_role("slider").first
        tab.get_by_role("button", name="Play the user's turn").click()
        wait_until(tab, lambda: float(slider.get_attribute("data-seconds")) > 0.1)
        moments = []
        for _ in range(5):
            moments.append(slider.evaluate(FIND_CURSOR))
            tab.wait_for_timeout(60)
        for seconds, unit, pixel, spoken in moments:
            assert unit == math.floor(seconds * 50)
            assert pixel == pytest.approx(seconds * 50 * 5 - 1, abs=1.01)
            assert spoken.startswith(f"unit {unit + 1} of {len(units)}: {units[unit]}, ")
        times = [seconds for seconds, *_ in moments]
        assert times == sorted(set(times)) and times[-1] - times[0] > 0.15

        slider.click(position={"x": 5 * 70 + 2, "y": 20})  # unit 70
        seconds, unit, *_ = slider.evaluate(FIND_CURSOR)
        assert 70 <= unit < 95 and unit == math.floor(seconds * 50)
        tab.get_by_role("button", name="Pause the user's turn").click()
        stopped = slider.evaluate(FIND_CURSOR)
        tab.wait_for_timeout(100)
        assert slider.evaluate(FIND_CURSOR) == stopped

        for key, expected in {"Home": 0, "ArrowRight": 1, "PageUp": 51, "ArrowLeft": 50, "End": len(units) - 1}.items():
            slider.press(key)
            assert slider.get_attribute("aria-valuenow") == str(expected), key
        slider.press("Space")  # the last 20 ms; then it returns to the start
        wait_until(tab, lambda: slider.get_attribute("data-seconds") == "0")


def test_labelled_counts_search_filters_and_keys(browser, page_path, dataset_folder):
    rows = read_rows(dataset_folder, "train", 0, 100)
    with opened(browser, page_path) as tab:

        def names():
            return tab.locator("#list .name").all_inner_texts()

        heading = tab.locator("main h2")
        assert names() == [row["id"] for row in rows]
        for row in rows:
            assert heading.inner_text() == row["id"]
            labelled = tab.locator("[data-labelled]").all_inner_texts()
            assert sum(map(int, labelled)) == sum(label != -100 for label in row["labels"])
            assert labelled[-1] == str(len(row["agent_units"]) + 1)
            tab.keyboard.press("Alt+ArrowDown")
        tab.get_by_role("button", name=rows[1]["id"]).click()
        tab.keyboard.press("ArrowDown")
        assert heading.inner_text() == rows[2]["id"]
        assert tab.evaluate("document.activeElement.getAttribute('aria-current')") == "true"

        for button in tab.locator("main .more button").all()[::-1]:
            button.click()
        chips = [text.split("\n") for text in tab.locator(".tokens li").all_inner_texts()]
        assert [(int(id_), int(label)) for _, id_, label in chips] == [
            *zip(rows[2]["input_ids"], rows[2]["labels"], strict=True)
        ]

        tab.get_by_label("Search").fill("TRAIN leaves")
        assert names() == ["d8_0"] and heading.inner_text() == "d8_0"
        tab.get_by_label("Search").fill("no such words")
        assert names() == [] and tab.locator("#found").inner_text() == "0 examples of 10"
        tab.get_by_label("Search").fill("")
        sizes = [len(row["input_ids"]) for row in rows]
        repeated = [np.mean(np.diff(np.concatenate([row["user_units"], row["agent_units"]])) == 0) for row in rows]
        for name, values in (("long", sizes), ("short", [-size for size in sizes]), ("repeated", repeated)):
            tab.get_by_label("Show").select_option(name)
            assert names() == [rows[int(np.argmax(values))]["id"]], name
        tab.get_by_label("Show").select_option("left_out")
        assert names() == ["d11", "d42"]
        assert "one speaker speaks twice in a row" in tab.locator("#list").inner_text()


def test_untrusted_text_stays_text(browser, folder_copy, tmp_path):
    markup = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    for name in ("id", "user_text", "agent_emotion", "user_speaker"):
        change_column(folder_copy, name, f"{name}{markup}{'w' * 200}")
    write_page(folder_copy, tmp_path / "page.html", num_examples=1)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == 2 and "<img" not in page and "http" not in page.replace("http-equiv", "")
    with opened(browser, tmp_path / "page.html") as tab:
        tab.on("dialog", lambda dialog: pytest.fail("a script of the row ran"))
        shown = tab.locator("main").inner_text()
        for name in ("id", "user_text", "agent_emotion"):
            assert f"{name}{markup}" in shown
        assert tab.locator("img").count() == 0 and tab.get_by_role("button", name="Play").count() == 0
        for width in WIDTHS:
            tab.set_viewport_size({"width": width, "height": 900})
            assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_long_text_is_folded(browser, folder_copy, tmp_path):
    [row] = read_rows(folder_copy, "train", 0, 1)
    start = row["labels"].index(next(label for label in row["labels"] if label != -100))
    word = row["labels"][start]
    for name in ("input_ids", "labels"):
        change_column(folder_copy, name, [*row[name][:start], *[word] * 400, *row[name][start:]])
    write_page(folder_copy, tmp_path / "page.html", num_examples=1)
    with opened(browser, tmp_path / "page.html") as tab:
        # Eleven tokens of the transcript are those of the row; two at each end are shown.
        tab.get_by_role("button", name="… 407 tokens …").click()
        assert tab.locator(".piece", has_text="▁did").count() == 402  # 401 of the user, and one of the agent


@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_accessible_and_fits_the_window(browser, page_path, width):
    """axe-core reports nothing in light and dark. It runs in a world of its own, which the page's policy does not bind."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for dark in (False, True):
        with opened(browser, page_path, width=width, dark=dark) as tab:
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.locator("summary").first.click()
            found = axe.run(tab).response["violations"]
            assert [(violation["id"], violation["impact"], violation["nodes"][0]["html"]) for violation in found] == []
