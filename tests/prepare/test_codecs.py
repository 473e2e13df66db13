"""`prepare` with a codec: units at its rate, in the folder, its checks, and after bad audio and kills."""

import json
import shutil
import signal
import subprocess

import datasets
import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from tests.folder.test_number_of_units import make_corpus
from tests.helpers import command, content, edit_counts, find_problems, inodes, options, wait_for
from tests.units.small_codecs import NUM_CODES, save_codec
from usdm_sft.audio.reading import AudioError
from usdm_sft.cli.main import main
from usdm_sft.folder.layout import read_counts
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.dry_run import dry_run
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units.tokenizer import UnitTokenizer

RATE = 22_050  # of the recordings; the codecs resample to 24 kHz
LENGTHS = [2_000 + 301 * number for number in range(8)]  # of two dialogs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("codecs")
    (root / "corpus").mkdir()
    make_corpus(root / "corpus", LENGTHS, rate=RATE)
    for kind in ("mimi", "wavtokenizer"):
        save_codec(kind, root / kind)
    return root


def given(root, folder, kind, **changes):
    return options(root, root / kind, folder, data_dir=str(root / "corpus"), shard_dialogs=1) | changes


@pytest.fixture(scope="module")
def flattened(root):
    prepare(**given(root, root, "mimi", streams="flatten", num_streams=3, keep_audio=True, output_path=root / "flat"))
    return root / "flat"


@pytest.fixture(scope="module")
def single(root):
    prepare(**given(root, root, "wavtokenizer", unit_repetition="collapse", output_path=root / "single"))
    return root / "single"


def load(folder, name="single_turn"):
    return datasets.load_dataset(str(folder), name, split="train", cache_dir=str(folder.parent / "datasets"))


def test_units_of_the_folder_are_those_of_the_codec(root, flattened):
    tokenizer = UnitTokenizer.from_pretrained(root / "mimi", device="cpu", streams="flatten", num_streams=3)
    files = [str(root / "corpus" / f"{number}.wav") for number in range(len(LENGTHS))]
    expected, seconds = tokenizer.tokenize_files(files)
    rows = load(flattened)
    assert rows["agent_units"][0] == expected[1].tolist() and rows["user_units"][0] == expected[0].tolist()
    assert rows["user_seconds"][0] == seconds[0] == np.float32(2_177 / 24_000)  # 2,000 samples at 22,050 Hz
    # 24,000 samples are 12.5 frames, of three units each; a last frame that is not whole counts.
    assert [len(units) for units in expected[:3]] == [3 * 2, 3 * 2, 3 * 2]
    offsets = [range(stream * NUM_CODES, (stream + 1) * NUM_CODES) for stream in range(3)]
    assert all(unit in offsets[position % 3] for units in expected for position, unit in enumerate(units.tolist()))
    tokenizer = AutoTokenizer.from_pretrained(flattened / "tokenizer")
    tokens = [f"<|unit{unit}|>" for units in expected[:2] for unit in units.tolist()]
    spoken = [token for token in tokenizer.convert_ids_to_tokens(rows["input_ids"][0]) if token.startswith("<|unit")]
    assert spoken == tokens


def test_counts_and_card_name_the_codec(flattened, single):
    counts = read_counts(flattened)
    assert counts["num_units"] == 3 * NUM_CODES
    assert counts["unit_model"]["model_type"] == "mimi" and counts["unit_model"]["layer"] is None
    assert counts["unit_model"]["frames"] == {"sample_rate": 24_000, "step": 1_920, "window": 1}
    settings = {name: counts["settings"][name] for name in ("unit_rate", "num_units", "streams")}
    assert settings == {"unit_rate": 12.5, "num_units": [NUM_CODES] * 3, "streams": "flatten"}
    card = (flattened / "README.md").read_text()
    assert (
        "resampled to 24 kHz mono. The units are the codes of a codec (mimi): 12.5 frames of 3 units per second. Each utterance was encoded by itself"
        in card
    )
    assert "unflatten_units(units, [64, 64, 64])` restores the frames." in card
    assert "k-means" not in card and "20 ms" not in card and "50 per second" not in card
    card = (single / "README.md").read_text()
    assert "(wavtokenizer): 40 per second." in card and "number of 25 ms frames of each unit" in card
    assert "streams" not in read_counts(single)["settings"]


def test_verify_passes(flattened, single):
    assert verify(flattened) == verify(single) == {"train": 6}


def test_verify_finds_units_of_another_length(flattened, tmp_path):
    folder = shutil.copytree(flattened, tmp_path / "out")
    edit_counts(folder, lambda counts: counts["unit_model"]["frames"].update(step=960))
    assert any(
        "user_units are of 2 frames, which is not the length of a recording" in each for each in find_problems(folder)
    )
    edit_counts(folder, lambda counts: counts["unit_model"]["frames"].update(step=0))
    with pytest.raises(ValueError, match="is not the counts of a dataset folder"):
        read_counts(folder)


def test_hours_are_those_of_the_recordings(root, tmp_path):
    """At 24 kHz the 120 recordings are longer by 2 ms in all, because each length is rounded up to a sample."""
    (tmp_path / "corpus").mkdir()
    make_corpus(tmp_path / "corpus", [2_001 + number for number in range(120)], rate=44_100)
    prepare(**given(root, tmp_path, "wavtokenizer", data_dir=str(tmp_path / "corpus"), shard_dialogs=30))
    assert verify(tmp_path / "out") == {"train": 90}
    hours = read_counts(tmp_path / "out")["splits"]["train"]["hours"]
    edit_counts(tmp_path / "out", lambda found: found["splits"]["train"].update(hours=hours - 1e-5))
    assert any("the rows of train have" in problem for problem in find_problems(tmp_path / "out"))


def test_dry_run_counts_the_tokens_of_the_run(root, flattened, single, tmp_path):
    for folder, changes in (
        (flattened, {"streams": "flatten", "num_streams": 3}),
        (single, {"unit_repetition": "keep"}),
    ):
        kind = "mimi" if folder == flattened else "wavtokenizer"
        found = dry_run(PrepareConfig(**given(root, tmp_path, kind, **changes)))
        numbers = found.splits["train"]
        assert (numbers["rows"], numbers["hours"]) == (6, read_counts(folder)["splits"]["train"]["hours"])
        if folder == flattened:
            assert numbers["tokens"] == read_counts(folder)["splits"]["train"]["tokens"]
            assert found.units_per_second == 37.5


def test_show_and_page_know_the_streams(root, flattened, tmp_path, capsys):
    main(["show", str(flattened)])
    assert capsys.readouterr().out.startswith("units: 12.5 frames of 3 units per second, 192 different ones\n")
    page = tmp_path / "page.html"
    main(["show", str(flattened), "--html", str(page), "--data_dir", str(root / "corpus")])
    assert '"units_per_second": 37.5' in page.read_text() or '"units_per_second":37.5' in page.read_text()


def test_units_command_prints_the_streams(root, capsys):
    file = str(root / "corpus" / "0.wav")
    main(["units", str(root / "mimi"), file, "--streams", "flatten", "--num_streams", "2", "--device", "cpu"])
    assert len(json.loads(capsys.readouterr().out)["units"]) == 2 * 2


def test_bad_audio_is_left_out_or_named(root, tmp_path):
    corpus = shutil.copytree(root / "corpus", tmp_path / "corpus")
    soundfile.write(corpus / "5.wav", np.full(2_000, np.nan, np.float32), RATE, "FLOAT")
    changes = {"data_dir": str(corpus), "streams": "first"}
    with pytest.raises(AudioError, match=r"5\.wav .*NaN"):
        prepare(**given(root, tmp_path, "mimi", **changes))
    prepare(**given(root, tmp_path, "mimi", **changes, on_bad_audio="skip"))
    assert verify(tmp_path / "out") == {"train": 4}


def test_streams_that_do_not_fit_are_refused_before_the_corpus_is_read(root, tmp_path, monkeypatch):
    monkeypatch.setattr("usdm_sft.prepare.open_run.open_corpus", lambda *args: pytest.fail("the corpus was read"))
    with pytest.raises(ValueError, match=r"the codec \(mimi\) has 4 streams: choose"):
        prepare(**given(root, tmp_path, "mimi"))
    with pytest.raises(
        ValueError, match=r"streams is flatten, but one stream of the codec \(mimi\) is used: leave it out"
    ):
        prepare(**given(root, tmp_path, "mimi", streams="flatten", num_streams=1))
    for run in (prepare, dry_run):
        with pytest.raises(ValueError, match="streams is given, but the unit model is not a codec: leave it out"):
            run(PrepareConfig(**options(root, "xlsr2_1b_v2", tmp_path, streams="first", model_cache_dir=str(tmp_path))))
    with pytest.raises(ValueError, match="unit_repetition is collapse, but neighbours in flattened streams"):
        PrepareConfig(**given(root, tmp_path, "mimi", streams="flatten", unit_repetition="collapse"))
    with pytest.raises(ValueError, match="num_streams is of the unit model, but with unit_rate the units are read"):
        PrepareConfig(**options(root, "xlsr2_1b_v2", tmp_path, unit_rate=50, num_units=9, num_streams=1))
    absent = given(root, tmp_path, "mimi", unit_model="user/codec", streams="first")
    with pytest.raises(ValueError, match="a dry run does not know the rate of a codec without its config: download it"):
        dry_run(PrepareConfig(**absent))


@pytest.mark.slow
def test_killed_run_keeps_finished_shards(root, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    make_corpus(corpus, [2_000 + 7 * number for number in range(40)], rate=RATE)
    more = ["--streams", "flatten", "--data_dir", str(corpus), "--pretrained_model_name_or_path", "mistral-common"]
    run = subprocess.Popen(command(root, root / "mimi", tmp_path, *more), stderr=subprocess.PIPE)
    wait_for(lambda: inodes(tmp_path, "cache/units/*.arrow"), run)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    before = inodes(tmp_path, "cache/units/*.arrow")
    changes = {"data_dir": str(corpus), "streams": "flatten"}
    prepare(**given(root, tmp_path, "mimi", **changes))
    after = inodes(tmp_path, "cache/units/*.arrow")
    assert before and all(after[path] == inode for path, inode in before.items()) and len(after) == 10
    prepare(**given(root, tmp_path / "undisturbed", "mimi", **changes))
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed" / "out")
