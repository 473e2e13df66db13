"""The number of units of a recording, where the sample that "fairseq" appends completes a frame: in a run, verify and the dry run."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile

from tests.helpers import options
from usdm_sft.audio.frames import count_units
from usdm_sft.folder.layout import read_counts
from usdm_sft.folder.verify import VerificationError, verify
from usdm_sft.folder.verify_rows import find_length_problems
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.dry_run import dry_run
from usdm_sft.prepare.prepare import prepare

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


@pytest.fixture
def corpus(tmp_path):
    """718 to 721 samples: the sample that is appended to 719 completes the second frame."""
    (tmp_path / "corpus").mkdir()
    return make_corpus(tmp_path / "corpus", [719, 719, 718, 719, 720, 721, 719, 719])


@pytest.fixture
def as_transformers(unit_model, tmp_path):
    """The toy unit model, with waveforms that get no sample."""
    folder = shutil.copytree(unit_model, tmp_path / "as_transformers")
    description = json.loads((folder / "unit_model.json").read_text())
    (folder / "unit_model.json").write_text(json.dumps(description | {"normalization": "transformers"}))
    return folder


def test_number_of_units_follows_from_samples_and_normalization():
    lengths = [0, 399, 400, 718, 719, 720, 1_038, 1_039, 1_040, 16_000]
    assert [count_units(n, "fairseq") for n in lengths] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 49]
    for normalization in ("transformers", "none"):
        assert [count_units(n, normalization) for n in lengths] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 49]


@pytest.mark.parametrize("changes", [{"keep_audio": True}, {"unit_repetition": "collapse"}, BOTH_CHECKS], ids=str)
def test_verify_counts_the_unit_of_the_appended_sample(corpus, mini, unit_model, tmp_path, changes):
    prepare(**given(mini, corpus, unit_model, tmp_path, **changes))
    assert verify(tmp_path / "out") == {"train": 6}
    if "keep_audio" in changes:
        assert list(units_of(tmp_path / "out").values()) == [2, 2, 1, 2, 2, 2, 2, 2]


def test_verify_follows_the_normalization_of_the_folder(corpus, mini, as_transformers, tmp_path):
    prepare(**given(mini, corpus, as_transformers, tmp_path, **BOTH_CHECKS))
    assert verify(tmp_path / "out") == {"train": 6}
    assert list(units_of(tmp_path / "out").values()) == [1, 1, 1, 1, 2, 2, 1, 1]
    counts = read_counts(tmp_path / "out")
    del counts["unit_model"]["normalization"]
    (tmp_path / "out" / "counts.json").write_text(json.dumps(counts))
    with pytest.raises(VerificationError, match=r"user_durations add up to 1 frames, which is not the length of a"):
        verify(tmp_path / "out")


def test_verify_refuses_a_unit_too_many(corpus, mini, as_transformers, unit_model, tmp_path):
    prepare(**given(mini, corpus, unit_model, tmp_path, keep_audio=True))
    counts = read_counts(tmp_path / "out")
    counts["unit_model"]["normalization"] = "transformers"
    (tmp_path / "out" / "counts.json").write_text(json.dumps(counts))
    with pytest.raises(VerificationError, match=r"row 0 \(c0_0\): user_units are of 2 frames, which is not the length"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("agent", [None, "1"])
def test_hours_are_those_of_the_recordings(mini, unit_model, tmp_path, agent):
    """At 16 kHz the 400 recordings are longer by 18 ms in all, because each length is rounded up to a sample."""
    (tmp_path / "corpus").mkdir()
    make_corpus(tmp_path / "corpus", [600 + number for number in range(400)], rate=22_050)
    prepare(**given(mini, tmp_path / "corpus", unit_model, tmp_path, agent=agent))
    assert verify(tmp_path / "out") == {"train": 300 if agent is None else 200}
    counts = read_counts(tmp_path / "out")
    counts["splits"]["train"]["hours"] -= 1e-5
    (tmp_path / "out" / "counts.json").write_text(json.dumps(counts))
    with pytest.raises(VerificationError, match=r"the rows of train have 0\.\d+ hours, not "):
        verify(tmp_path / "out")


def test_durations_of_recordings_of_719_and_399_samples():
    def find(normalization, **changes):
        turn = {"text": "yes", "units": [5], "durations": [2], "seconds": 719 / 16_000}
        row = {f"{role}_{name}": value for role in ("user", "agent") for name, value in turn.items()} | changes
        return list(find_length_problems(pa.RecordBatch.from_pylist([row]), normalization))

    assert find("fairseq") == []
    assert len(find("transformers")) == 2
    assert find("fairseq", user_durations=[1], user_seconds=399 / 16_000) == [
        "user_durations add up to 1 frames, which is not the length of a recording of 0.0249375 s"
    ]


@pytest.mark.parametrize("model", ["unit_model", "as_transformers"])
def test_dry_run_counts_the_units_of_the_run(request, corpus, mini, model, tmp_path):
    config = given(mini, corpus, request.getfixturevalue(model), tmp_path)
    assert dry_run(PrepareConfig(**config)).splits == prepare(**config)["splits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "changes"),
    [(16_000, {"keep_audio": True}), (16_000, {"unit_repetition": "collapse"}), (22_050, BOTH_CHECKS)],
    ids=str,
)
def test_folder_of_400_random_recordings_verifies(mini, unit_model, tmp_path, rate, changes):
    """Some of 400 recordings of 400 to 4,000 samples have the unit of an appended sample."""
    (tmp_path / "corpus").mkdir()
    shortest = -(-400 * rate // 16_000)
    lengths = np.random.default_rng(rate).integers(shortest, shortest * 10 + 1, 400).tolist()
    corpus = make_corpus(tmp_path / "corpus", lengths, rate)
    prepare(**given(mini, corpus, unit_model, tmp_path, **changes))
    assert verify(tmp_path / "out") == {"train": 300}
