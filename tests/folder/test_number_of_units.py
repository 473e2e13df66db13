"""The number of units of a recording, where the sample that "fairseq" appends completes a frame: in a run, verify and the dry run."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile

from tests.helpers import edit_counts, find_problems, options
from usdm_sft.audio.frames import FRAMINGS
from usdm_sft.folder.layout import read_counts
from usdm_sft.folder.verify import verify
from usdm_sft.folder.verify_rows import find_length_problems
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.dry_run import dry_run
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.streams import UnitStreams

BOTH_CHECKS = {"keep_audio": True, "unit_repetition": "collapse"}


def make_corpus(folder, lengths, rate=16_000, dialog_turns=4):
    """A manifest of dialogs whose turns have these numbers of samples."""
    rng = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(lengths):
        dialog, turn = divmod(number, dialog_turns)
        rows.append(
            {"dialog": f"c{dialog}", "turn": turn, "speaker": turn % 2, "text": "yes", "audio": f"{number}.wav"}
        )
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(length), rate)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def given(mini, corpus, unit_model, folder, **changes):
    return options(mini, unit_model, folder, data_dir=str(corpus), shard_dialogs=16) | changes


def units_of(folder):
    rows = datasets.load_dataset(str(folder), "utterances", split="train", cache_dir=str(folder.parent / "datasets"))
    rows = rows.remove_columns("audio")
    return dict(zip(zip(rows["dialog"], rows["turn"], strict=True), map(len, rows["units"]), strict=True))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """718 to 721 samples: the sample that is appended to 719 completes the second frame."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), [719, 719, 718, 719, 720, 721, 719, 719])


@pytest.fixture(scope="module")
def as_transformers(unit_model, tmp_path_factory):
    """The toy unit model, with waveforms that get no sample."""
    folder = shutil.copytree(unit_model, tmp_path_factory.mktemp("as_transformers") / "model")
    description = json.loads((folder / "unit_model.json").read_text())
    (folder / "unit_model.json").write_text(json.dumps(description | {"normalization": "transformers"}))
    return folder


@pytest.fixture(scope="module")
def made(corpus, mini, unit_model, as_transformers, tmp_path_factory):
    """The corpus with its audio, as `fairseq` and `transformers`, and with collapsed units as `collapsed`."""
    root = tmp_path_factory.mktemp("made")
    for name, model in (("fairseq", unit_model), ("transformers", as_transformers)):
        prepare(**given(mini, corpus, model, root, keep_audio=True, output_path=root / name))
    prepare(**given(mini, corpus, as_transformers, root, **BOTH_CHECKS, output_path=root / "collapsed"))
    return root


def test_number_of_units_follows_from_samples_and_normalization():
    lengths = [0, 399, 400, 718, 719, 720, 1_038, 1_039, 1_040, 16_000]
    assert [FRAMINGS["fairseq"].count(n) for n in lengths] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 49]
    for normalization in ("transformers", "none"):
        assert [FRAMINGS[normalization].count(n) for n in lengths] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 49]


def test_verify_counts_the_unit_of_the_appended_sample(made):
    assert verify(made / "fairseq") == {"train": 6}
    assert list(units_of(made / "fairseq").values()) == [2, 2, 1, 2, 2, 2, 2, 2]


def test_verify_follows_the_normalization_of_the_folder(made, tmp_path):
    folder = shutil.copytree(made / "collapsed", tmp_path / "out")
    assert verify(folder) == {"train": 6}
    assert list(units_of(folder).values()) == [1, 1, 1, 1, 2, 2, 1, 1]
    edit_counts(folder, lambda counts: counts["unit_model"].pop("normalization"))
    [problem, *_] = find_problems(folder)
    assert "user_durations add up to 1 frames, which is not the length of a" in problem


def test_verify_refuses_a_unit_too_many(made, tmp_path):
    folder = shutil.copytree(made / "fairseq", tmp_path / "out")
    edit_counts(folder, lambda counts: counts["unit_model"].update(normalization="transformers"))
    [problem, *_] = find_problems(folder)
    assert "row 0 (c0_0): user_units are of 2 frames, which is not the length" in problem


@pytest.mark.parametrize(("agent", "rows"), [(None, 150), ("1", 100)])
def test_hours_are_those_of_the_recordings(mini, unit_model, tmp_path, agent, rows):
    """At 16 kHz the 200 recordings are longer by 9 ms in all, because each length is rounded up to a sample."""
    (tmp_path / "corpus").mkdir()
    make_corpus(tmp_path / "corpus", [600 + number for number in range(200)], rate=22_050)
    prepare(**given(mini, tmp_path / "corpus", unit_model, tmp_path, agent=agent))
    assert verify(tmp_path / "out") == {"train": rows}
    counts = read_counts(tmp_path / "out")["splits"]["train"]
    edit_counts(tmp_path / "out", lambda found: found["splits"]["train"].update(hours=counts["hours"] - 1e-5))
    assert any("the rows of train have 0.0" in problem for problem in find_problems(tmp_path / "out"))


def test_durations_of_recordings_of_719_and_399_samples():
    def find(normalization, **changes):
        turn = {"text": "yes", "units": [5], "durations": [2], "seconds": 719 / 16_000}
        row = {f"{role}_{name}": value for role in ("user", "agent") for name, value in turn.items()} | changes
        return list(
            find_length_problems(pa.RecordBatch.from_pylist([row]), FRAMINGS[normalization], UnitStreams(50.0, (300,)))
        )

    assert find("fairseq") == []
    assert len(find("transformers")) == 2
    assert find("fairseq", user_durations=[1], user_seconds=399 / 16_000) == [
        "user_durations add up to 1 frames, which is not the length of a recording of 0.0249375 s"
    ]


@pytest.mark.parametrize(("name", "model"), [("fairseq", "unit_model"), ("transformers", "as_transformers")])
def test_dry_run_counts_the_units_of_the_run(request, corpus, mini, made, name, model, tmp_path):
    config = given(mini, corpus, request.getfixturevalue(model), tmp_path)
    assert dry_run(PrepareConfig(**config)).splits == read_counts(made / name)["splits"]


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "changes"), [(16_000, {"keep_audio": True}), (22_050, BOTH_CHECKS)], ids=str)
def test_folder_of_400_random_recordings_verifies(mini, unit_model, tmp_path, rate, changes):
    """Some of 400 recordings of 400 to 4,000 samples have the unit of an appended sample."""
    (tmp_path / "corpus").mkdir()
    shortest = -(-400 * rate // 16_000)
    lengths = np.random.default_rng(rate).integers(shortest, shortest * 10 + 1, 400).tolist()
    corpus = make_corpus(tmp_path / "corpus", lengths, rate)
    prepare(**given(mini, corpus, unit_model, tmp_path, **changes))
    assert verify(tmp_path / "out") == {"train": 300}
