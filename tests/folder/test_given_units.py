"""Dataset folders of units that the corpus had: nothing names a unit model, 20 ms or 50 units per second."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from tests.helpers import content, edit_rows, find_problems, page_data
from tests.mini_hub import serve
from usdm_sft.cli.main import main
from usdm_sft.corpus.hub_corpus import fetch_corpus
from usdm_sft.corpus.read import read_corpus
from usdm_sft.corpus.unit_reader import UnitReader
from usdm_sft.folder import page as page_module
from usdm_sft.folder.layout import read_counts
from usdm_sft.folder.page import find_peaks, write_page
from usdm_sft.folder.pictures import UnitAxes
from usdm_sft.folder.push import push
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.streams import UnitStreams
from usdm_sft.template.tokenizer import save_tokenizer

SIZES = [40, 30, 20, 10]  # 100 units
FRAMES = [5, 6, 7, 8, 9, 10]  # of each turn
CASES = {"one": None, "first": "first", "flatten": "flatten"}


@pytest.fixture(scope="module")
def root(small_tokenizer, tmp_path_factory):
    """A corpus of two dialogs with recordings, and its folders: one stream of 12.5 per second, and four, as the first and flattened."""
    root = tmp_path_factory.mktemp("given")
    save_tokenizer(small_tokenizer, root / "tokenizer")
    rng = np.random.default_rng(0)
    for name in ("one", "four"):
        (root / name).mkdir()
        rows = []
        for number, frames in enumerate(FRAMES):
            dialog, turn = divmod(number, 3)
            units = rng.integers(0, SIZES, (frames, 4)) if name == "four" else rng.integers(0, 90, frames) // 30
            row = {"dialog": f"c{dialog}", "turn": turn, "speaker": "AB"[turn % 2], "text": f"turn {number}"}
            rows.append(row | {"units": units.tolist(), "audio": f"{number}.wav"})
            samples = 0.2 * np.sin(np.arange(frames * 1280) / 9)
            samples[640:1280] = 0  # the second half of the first frame is silent
            soundfile.write(root / name / f"{number}.wav", samples, 16_000)
        (root / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for case, streams in CASES.items():
        prepare(
            data_dir=root / ("four" if streams else "one"), output_path=root / f"{case}-folder", cache_dir=root / "cache",
            pretrained_model_name_or_path=root / "tokenizer", keep_audio=case != "one", num_output_shards=1,
            unit_rate=12.5, num_units=SIZES if streams else 100, streams=streams,
        )  # fmt: skip
    return root


def rows_of(root, case):
    return pq.read_table(root / f"{case}-folder" / "single_turn" / "train-00000-of-00001.parquet").to_pylist()


@pytest.mark.parametrize("case", CASES)
def test_verify_passes(root, case):
    assert verify(root / f"{case}-folder") == {"train": 4}


@pytest.mark.parametrize(
    ("case", "rate"),
    [("one", "12.5 per second"), ("first", "12.5 per second, the first of 4 streams"), ("flatten", "12.5 frames of 4 units per second")],
)  # fmt: skip
def test_card_tells_the_units_and_no_unit_model(root, case, rate):
    card = (root / f"{case}-folder" / "README.md").read_text()
    for wrong in (
        "50 per second",
        "20 ms",
        "centroids",
        "k-means",
        "XLS-R",
        "naver-ai/USTM",
        "fp32",
        "layer",
        "16 kHz",
        "None",
    ):
        assert wrong not in card
    assert f"their speech as discrete units ({rate})," in card
    assert f"| `user_units` | list of uint16 | the speech as discrete units, {rate} |" in card
    assert f"The units were part of the corpus: {rate}" in card
    assert ("dailytalk_usdm.unflatten_units(units, [40, 30, 20, 10])" in card) == (case == "flatten")
    assert (
        f"| the model that made the units ({rate}): <!-- publisher: units -->to be filled in by the publisher<!-- end --> |"
        in card
    )


def test_card_of_a_unit_model_stays(dataset_folder):
    card = (dataset_folder / "README.md").read_text()
    assert (
        "Every 20 ms of it became one unit: the nearest of 100 k-means centroids" in card and "(50 per second)," in card
    )


@pytest.mark.parametrize(
    ("case", "rate", "data"), [("one", 12.5, "one"), ("first", 12.5, "four"), ("flatten", 50.0, "four")]
)
def test_page_has_the_rate_of_the_folder(root, tmp_path, case, rate, data):
    write_page(root / f"{case}-folder", tmp_path / "page.html", data_dir=root / data)
    page = page_data(tmp_path / "page.html")
    assert page["units_per_second"] == rate
    turns = page["examples"][0]["turns"]
    assert [turn["recording"] for turn in turns] == [0, 1]
    assert turns[0]["units"] == rows_of(root, case)[0]["user_units"]
    peaks = np.frombuffer(base64.b64decode(page["recordings"][0]["peaks"]), np.uint8)
    assert len(peaks) == 2 * len(turns[0]["units"])  # two for each unit
    first = len(turns[0]["units"]) // 5  # units of the first of five frames
    assert (peaks[:first] > 200).all() and (peaks[first : 2 * first] == 0).all() and (peaks[2 * first :] > 200).all()


def test_peaks_of_a_rate_that_divides_no_samples():
    samples = np.zeros(1000, np.float32)
    samples[[0, 107, 999]] = 0.5, 0.25, 1  # 75 units per second: 106.7 samples per peak
    assert find_peaks(samples, 75).tolist() == [128, 64, 0, 0, 0, 0, 0, 0, 0, 255]


def test_page_without_recordings(root, tmp_path):
    rows = [json.loads(line) for line in (root / "one" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        del row["audio"]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(FileNotFoundError, match="has no recordings of these rows: leave out data_dir"):
        write_page(root / "one-folder", tmp_path / "page.html", data_dir=tmp_path)
    write_page(root / "one-folder", tmp_path / "page.html")
    assert page_data(tmp_path / "page.html")["recordings"] == []


def test_axes_of_the_pictures():
    streams = [UnitStreams(50.0, (100,)), UnitStreams(12.5, (100,)), UnitStreams(12.5, (60, 40), "flatten")]
    axes = [UnitAxes(100, each, given) for each, given in zip(streams, (False, True, True), strict=True)]
    assert [each.run for each in axes] == [
        "equal units in a row (20 ms each)", "equal units in a row (80 ms each)", "equal units in a row (2 streams, flattened)"
    ]  # fmt: skip
    assert [each.speech for each in axes] == ["recording", "turn", "turn"]


def test_show_names_rate_and_streams(root, capsys):
    main(["show", str(root / "flatten-folder"), "--expand"])
    expanded = capsys.readouterr().out
    assert expanded.startswith("units: 12.5 frames of 4 units per second, 100 different ones\n\nc0_0: ")
    main(["show", str(root / "flatten-folder")])
    assert capsys.readouterr().out == expanded  # flattened streams have every unit already
    main(["show", str(root / "first-folder")])
    assert capsys.readouterr().out.startswith("units: 12.5 per second, the first of 4 streams, 40 different ones\n")
    with pytest.raises(SystemExit, match="1"):
        main(["show", str(root / "one-folder"), "--expand"])
    assert "the units of this folder are not collapsed: leave out --expand" in capsys.readouterr().err


def test_stats_draws_the_pictures_of_the_card(root, tmp_path, capsys):
    main(["stats", str(root / "flatten-folder"), "--out", str(tmp_path / "plots")])
    out = capsys.readouterr().out
    units = sum(len(row[f"{role}_units"]) for row in rows_of(root, "flatten") for role in ("user", "agent"))
    assert re.search(rf"^units +{units}$", out, re.MULTILINE) and "distinct units of 100" in out
    pictures = content(root / "flatten-folder" / "pictures")
    assert content(tmp_path / "plots").items() <= pictures.items()


def test_utterances_hold_units_and_recordings(root, tmp_path):
    name = "utterances/train-00000-of-00001.parquet"
    rows = pq.read_table(root / "flatten-folder" / name).to_pylist()
    assert [row["seconds"] for row in rows] == [np.float32(frames / 12.5) for frames in FRAMES]
    assert [len(row["units"]) for row in rows] == [4 * frames for frames in FRAMES]
    folder = shutil.copytree(root / "flatten-folder", tmp_path / "folder")
    edit_rows(folder, name, lambda rows: rows[1].update(seconds=0.5, audio=rows[0]["audio"]))
    problems = find_problems(folder)
    assert f"{folder / name}: c0_1: 24 units (12.5 frames of 4 units per second) last 0.48 s, not 0.5 s" in problems


PUSH_AND_PREPARE = """
import sys
from usdm_sft.cli.main import main
folder, output, cache = sys.argv[1:]
main(["push", folder, "tester/codes"])
main(["prepare", "--data_dir", "hub:tester/codes", "--unit_rate", "50", "--num_units", "100", "--output_path", output,
      "--cache_dir", cache, "--pretrained_model_name_or_path", folder + "/tokenizer", "--num_output_shards", "1", "--keep_audio"])
import datasets
print(sum(map(sum, datasets.load_dataset("tester/codes", split="train")["input_ids"])))
"""


@pytest.mark.slow
def test_pushed_folder_is_a_corpus_with_units(root, tmp_path):
    """Its flattened streams are one stream, with as many units per second."""
    folder = root / "flatten-folder"
    server, hub, url = serve()
    environment = os.environ | {
        "HF_ENDPOINT": url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", PUSH_AND_PREPARE, *map(str, (folder, tmp_path / "again", tmp_path / "cache"))]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    repo = hub.repos["datasets", "tester/codes"]
    pushed = repo["commits"][repo["refs"]["main"]]["files"]
    assert {*pushed} - {".gitattributes"} == {*content(folder)} - {".lock"}
    rows = rows_of(root, "flatten")
    assert int(done.stdout.splitlines()[-1]) == sum(sum(row["input_ids"]) for row in rows)
    assert read_counts(tmp_path / "again")["settings"]["num_units"] == [100]
    assert pq.read_table(tmp_path / "again" / "single_turn" / "train-00000-of-00001.parquet").to_pylist() == rows
    assert verify(tmp_path / "again") == {"train": 4}


def test_push_sends_every_file(served_hub, root, monkeypatch):
    served_hub.token = "hf_token"
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    push(root / "one-folder", "tester/codes")
    repo = served_hub.repos["datasets", "tester/codes"]
    pushed = repo["commits"][repo["refs"]["main"]]["files"]
    found = {name: served_hub.blob(entry) for name, entry in pushed.items() if name != ".gitattributes"}
    assert b'"tester/codes"' in found.pop("README.md")  # the card names the repository
    assert found == {n: data for n, data in content(root / "one-folder").items() if n not in (".lock", "README.md")}


def test_corpus_of_the_hub_without_recordings(root, tmp_path, monkeypatch):
    """A manifest with units alone; a folder of the cache holds it as read with units."""
    rows = datasets.Dataset.from_list(
        [{"dialog": "c", "turn": turn, "speaker": "AB"[turn], "text": "yes", "units": [turn, 2]} for turn in range(2)]
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **kwargs: Loaded(rows))
    [(split, path)] = fetch_corpus("hub:user/codes", tmp_path, with_units=True).items()
    [dialog] = read_corpus({split: path}, units=UnitReader(12.5, 3, None))[split].dialogs
    assert [each.units.tolist() for each in dialog.utterances] == [[0, 2], [1, 2]]
    with pytest.raises(ValueError, match="user/codes, split train has no column audio: rename its columns"):
        fetch_corpus("hub:user/codes", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **kwargs: Loaded(rows.remove_columns("units")))
    with pytest.raises(ValueError, match="user/codes, split train has no column units: rename its columns"):
        fetch_corpus("hub:user/codes", tmp_path, with_units=True)


def test_page_asks_the_hub_for_a_corpus_with_units(root, monkeypatch):
    asked = []
    monkeypatch.setattr(page_module, "find_lists", lambda data_dir, **options: asked.append((data_dir, options)) or {})
    given = read_counts(root / "flatten-folder")
    made = {"settings": {"history": 0}, "num_units": 100, "unit_model": {}}
    for counts, with_units in ((given, True), (made, False)):
        with pytest.raises(FileNotFoundError, match="hub:user/codes has no list of train"):
            page_module.CorpusRecordings("hub:user/codes", "train", counts)
        assert asked.pop() == ("hub:user/codes", {"corpus": None, "with_units": with_units})


class Loaded:
    """Takes the place of a builder of a dataset on the Hub."""

    builder_configs: ClassVar = {}
    config = SimpleNamespace(data_files=None)

    def __init__(self, rows):
        self.rows = rows

    def download_and_prepare(self):
        pass

    def as_dataset(self):
        return {"train": self.rows}
