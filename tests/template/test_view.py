import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from usdm_sft.cli.main import main
from usdm_sft.dataset_folder.page import write_page
from usdm_sft.dataset_folder.rows import read_rows
from usdm_sft.template.view import BLUE, PLAIN, format_example, split_parts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def encode(encoder, **texts):
    row = {
        "id": "d1_0",
        "user_units": [5, 6, 7, 8, 9, 10],
        "user_text": "Hi",
        "agent_text": "Yes.",
        "agent_units": [1],
    } | texts
    encoded = encoder({name: [value] for name, value in row.items()})
    return row | {name: values[0].tolist() for name, values in encoded.items()}


def test_parts_follow_the_labels(encoder, tokenizer):
    row = encode(encoder)
    parts = split_parts(row["input_ids"], row["labels"], tokenizer.backend_tokenizer)
    assert [(part.labelled, part.text) for part in parts[1:]] == [
        (True, " hi⏎\n"),
        (False, "### Agent⏎\n"),
        (True, "yes.<|correspond|><|unit1|>▁"),
        (False, "⏎\n</s>"),
    ]
    assert parts[0].text.endswith("### User⏎\n<|unit5|><|unit6|> … 2 units … <|unit9|><|unit10|><|correspond|>")
    assert [token_id for part in parts for token_id in part.ids] == row["input_ids"]


def test_lines_for_the_terminal(encoder, tokenizer):
    row = encode(encoder)
    lines = format_example(row, tokenizer.backend_tokenizer, color=False).splitlines()
    assert lines[0] == f"d1_0: {len(row['input_ids'])} tokens, 7 labelled"
    assert [line for line in lines if line.startswith("loss")] == ["loss   hi⏎", "loss  yes.<|correspond|><|unit1|>▁"]
    colored = format_example(row, tokenizer.backend_tokenizer, color=True).splitlines()
    assert f"loss  {BLUE}yes.<|correspond|><|unit1|>▁{PLAIN}" in colored
    assert "      ### Agent⏎" in colored
    ids = format_example(row, tokenizer.backend_tokenizer, color=False, ids=True)
    numbers = [line for line in ids.splitlines() if line.startswith(" " * 8)]
    assert [int(number) for line in numbers for number in line.split()] == row["input_ids"]
    assert "        12014 13" in ids.splitlines()  # " hi" and the newline


def test_invisible_characters_are_escaped(encoder, tokenizer):
    row = encode(encoder, user_text="a\u202eb\u200bc 🙂")
    shown = format_example(row, tokenizer.backend_tokenizer, color=False)
    assert "loss   a\\u202eb\\u200bc 🙂⏎" in shown.splitlines()


def test_show_on_the_command_line(dataset_folder, capsys):
    main(["show", str(dataset_folder), "--split", "test", "--index", "1", "--num_examples", "5"])
    out = capsys.readouterr().out
    assert re.findall(r"^(d\w+): ", out, re.MULTILINE) == ["d105_1", "d2001_0"]
    for args, message in (
        (["--split", "dev"], "has no split 'dev': name one of train, test"),
        (["--index", "10"], "has 10 rows and no row 10: name one from 0 to 9"),
        (["--index", "-1"], "and no row -1"),
        (["--data_dir", "."], "name the page with --html"),
    ):
        with pytest.raises(SystemExit, match="1"):
            main(["show", str(dataset_folder), *args])
        assert message in capsys.readouterr().err


def test_rows_are_read_across_files(dataset_folder):
    everything = [row["id"] for row in read_rows(dataset_folder, "train", 0, 100)]
    assert [row["id"] for row in read_rows(dataset_folder, "train", 3, 4)] == everything[3:7]
    assert len(everything) == len(list((dataset_folder / "single_turn").glob("train-*.parquet"))) == 10


def test_page_is_self_contained_and_escaped(dataset_folder, folder_copy, tmp_path):
    path = folder_copy / "single_turn" / "train-00000-of-00010.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, table.schema.field("id"), [["<script>alert(1)</script>"]]), path)
    assert write_page(folder_copy, tmp_path / "page.html", num_examples=3) == 3
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "http" not in page and "<audio" not in page


def test_page_contains_the_recordings(dataset_folder, mini, tmp_path):
    write_page(dataset_folder, tmp_path / "page.html", num_examples=1, data_dir=mini / "corpus")
    sounds = re.findall(r'src="data:audio/x?-?wav;base64,([^"]+)"', (tmp_path / "page.html").read_text())
    data = mini / "corpus" / "data" / "3"
    assert [base64.b64decode(sound) for sound in sounds] == [
        (data / name).read_bytes() for name in ("0_0_d3.wav", "1_1_d3.wav")
    ]


def test_rows_cannot_name_audio_outside_the_corpus(folder_copy, mini, tmp_path):
    """The dialog and speaker of a row are looked up in the corpus and never become a path."""
    path = folder_copy / "single_turn" / "train-00000-of-00010.parquet"
    table = pq.read_table(path)
    (tmp_path / "0_0_d1.wav").write_bytes(b"secret")
    column = table.schema.get_field_index("dialog_id")
    pq.write_table(table.set_column(column, table.schema.field(column), [[f"d../../../../../..{tmp_path}"]]), path)
    with pytest.raises(FileNotFoundError, match="has no turn d3_0: name the corpus that the folder was made from"):
        write_page(folder_copy, tmp_path / "page.html", num_examples=1, data_dir=mini / "corpus")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
def test_browser_shows_and_plays_the_page(dataset_folder, mini, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    write_page(dataset_folder, page, data_dir=mini / "corpus")
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    script = (
        "<script>addEventListener('load', () => { const counts = [...document.querySelectorAll('section')].map(section => "
        "[...section.querySelectorAll('mark[data-tokens]')].reduce((sum, mark) => sum + +mark.dataset.tokens, 0));"
        "const sounds = [...document.querySelectorAll('audio')].map(audio => new Promise(done => { "
        "audio.onloadedmetadata = () => done(audio.duration); audio.onerror = () => done(null); audio.load(); }));"
        "Promise.all(sounds).then(durations => "
        "document.body.dataset.found = JSON.stringify([counts, durations])); });</script>"
    )
    (tmp_path / "probe.html").write_text(page.read_text().replace("</html>", script + "</html>"))
    dom = subprocess.run(
        [*browser, "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    counts, durations = json.loads(re.search(r'data-found="([^"]+)"', dom)[1].replace("&quot;", '"'))
    rows = read_rows(dataset_folder, "train", 0, 20)
    assert counts == [sum(label != -100 for label in row["labels"]) for row in rows]
    seconds = [row[f"{role}_seconds"] for row in rows for role in ("user", "agent")]
    assert np.allclose(durations, seconds, atol=0.01)

    subprocess.run(
        [*browser, "--window-size=1000,1200", f"--screenshot={picture}", page.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3).astype(int)
    blue = (pixels[:, 2] > pixels[:, 0] + 60) & (pixels[:, 2] > pixels[:, 1] + 40)
    assert pixels.std() > 10 and blue.sum() > 500


def test_long_runs_of_units_are_abbreviated(encoder, tokenizer):
    row = encode(encoder, agent_units=list(range(5000)))
    assert "<|unit0|><|unit1|> … 4996 units … <|unit4998|><|unit4999|>▁" in format_example(
        row, tokenizer.backend_tokenizer, color=False
    )
