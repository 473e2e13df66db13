"""`fit`: centroids for features of a corpus, compared with transformers and scikit-learn."""

import hashlib
import json
import math
import re
import shutil
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits
from transformers import HubertConfig

from dailytalk_usdm import fit_unit_model
from tests.forked import Fork
from tests.helpers import content, inodes, options, stop_run
from tests.units import test_encoders as encoders
from tests.units.test_other_models import (
    FLOAT_ROUNDING,
    POST,
    TINY,
    WIDTH,
    make_model,
    nearest,
    run_transformers,
    save,
)
from usdm_sft.audio.digests import AudioDigest, audio_digests
from usdm_sft.audio.frames import FRAMINGS
from usdm_sft.audio.reading import AudioError, read_waveform
from usdm_sft.cli.main import main
from usdm_sft.prepare import fit_unit_model as module
from usdm_sft.prepare.fit_unit_model import choose_sample
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units import features as features_module
from usdm_sft.units.convert import convert
from usdm_sft.units.features import FeatureModel
from usdm_sft.units.folder import unit_model_digest
from usdm_sft.units.kmeans import describe_units, fit_kmeans
from usdm_sft.units.tokenizer import UnitTokenizer

LAYER, NUM_UNITS = 2, 20


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save(make_model(HubertConfig(**TINY, **POST)), tmp_path_factory.mktemp("encoder") / "model")


@pytest.fixture(scope="module")
def lists(mini):
    """The recordings of the utterances of each split, by path."""
    found = {}
    for split in ("train", "test"):
        names = [line.split("|")[0] for line in (mini / "corpus" / f"{split}.txt").read_text().splitlines()]
        found[split] = [str(mini / "corpus" / "data" / name.split("_d")[1] / f"{name}.wav") for name in names]
    return found


@pytest.fixture(scope="module")
def features(encoder, lists):
    """The features of every recording by path, (num_frames, WIDTH), as transformers computes them alone."""
    model = make_model(HubertConfig(**TINY, **POST))
    return {
        path: run_transformers(encoder, model, read_waveform(path))[1].hidden_states[LAYER][0].numpy()
        for paths in lists.values()
        for path in paths
    }


def fit(encoder, mini, folder, **changes):
    """Fit in a folder with a cache of its own, and return the unit model folder and the report."""
    given = {"num_units": NUM_UNITS, "layer": LAYER, "device": "cpu", "cache_dir": folder / "cache"} | changes
    data_dir = given.pop("data_dir", mini / "corpus")
    report = fit_unit_model(encoder, data_dir, folder / "unit_model", **given)
    return folder / "unit_model", report


@pytest.fixture(scope="module")
def fitted(encoder, mini, tmp_path_factory):
    """A unit model that was fit to 900 frames, and its report; copy the folder to change it."""
    return fit(encoder, mini, tmp_path_factory.mktemp("fitted"), num_frames=900)


def used(paths):
    """Those of the paths whose dialogs have a pair: one speaker speaks twice in a row in d11, and d42 has a single turn."""
    return [path for path in paths if path.split("/")[-2] not in ("11", "42")]


def sample_of(paths, features, num_frames, seed=0):
    """The frames of the sample, from the features of transformers."""
    digests = audio_digests(paths, None)
    sample = choose_sample(digests, num_frames, seed, FRAMINGS["transformers"])
    return np.concatenate([features[each.address] for each in sample.recordings])[: sample.num_frames]


def test_centroids_are_those_of_scikit_learn(fitted, lists, features):
    folder, _ = fitted
    sample = sample_of(used(lists["train"]), features, 900)
    assert sample.shape == (900, WIDTH)
    expected = MiniBatchKMeans(
        NUM_UNITS, init="k-means++", n_init=1, batch_size=10_000, max_iter=10, max_no_improvement=None, reassignment_ratio=0, random_state=0
    ).fit(sample)  # fmt: skip
    centroids = np.load(folder / "kmeans.npy")
    assert centroids.dtype == np.float32 and centroids.shape == (NUM_UNITS, WIDTH)
    np.testing.assert_allclose(centroids, expected.cluster_centers_, atol=1e-4 * np.abs(sample).max())


@pytest.mark.parametrize("name", encoders.ONE_OF_EACH)
def test_encoder_that_transformers_computes(mini, lists, tmp_path, name):
    encoder = encoders.save(encoders.MODELS[name], tmp_path / "encoder")
    folder, report = fit(encoder, mini, tmp_path)
    paths = used(lists["train"])
    features = {path: encoders.run_transformers(encoder, read_waveform(path), LAYER)[0] for path in paths}
    assert report["num_frames"] == sum(map(len, features.values()))
    centroids = np.load(folder / "kmeans.npy").astype(np.float64)
    counts = np.zeros(NUM_UNITS, np.int64)
    for path, units in zip(paths, UnitTokenizer.from_pretrained(folder, "cpu").tokenize_files(paths)[0], strict=True):
        expected, is_tie = encoders.nearest(features[path], centroids)
        assert ((units == expected) | is_tie).all()
        counts += np.bincount(units, minlength=NUM_UNITS)
    assert report["sample"]["most_frequent"][0][1] == counts.max() > counts.mean()


def test_report_describes_the_units(fitted, lists, features):
    """The numbers follow from float64 distances between the centroids and the features of transformers."""
    folder, report = fitted
    centroids = np.load(folder / "kmeans.npy")
    for name, split, num_frames in (("sample", "train", 900), ("held_out", "test", 45)):
        sample = torch.from_numpy(sample_of(used(lists[split]), features, num_frames))
        units, margin = nearest(sample[None], centroids)
        assert margin > FLOAT_ROUNDING
        numbers, counts = report[name], Counter(units)
        assert numbers["num_frames"] == num_frames == len(units)
        assert numbers["empty_clusters"] == NUM_UNITS - len(counts)
        distances = (sample.double() - torch.from_numpy(centroids).double()[units]).square().sum()
        assert numbers["inertia"] == pytest.approx(distances.item(), rel=1e-4)
        assert numbers["inertia_per_frame"] == pytest.approx(distances.item() / num_frames, rel=1e-4)
        entropy = sum(count / num_frames * math.log2(num_frames / count) for count in counts.values())
        assert numbers["entropy"] == pytest.approx(entropy)
        assert numbers["perplexity"] == pytest.approx(2**entropy)
        order = sorted(range(NUM_UNITS), key=lambda unit: (-counts[unit], unit))
        assert numbers["most_frequent"] == [[unit, counts[unit]] for unit in order[:10]]
        assert numbers["least_frequent"] == [[unit, counts[unit]] for unit in order[:-11:-1]]
    assert report["held_out"]["empty_clusters"] > 0  # so that the number is not 0 everywhere


def test_unit_model_gives_the_nearest_centroids(fitted, lists, features):
    folder, _ = fitted
    paths = lists["train"]
    found, _ = UnitTokenizer.from_pretrained(folder, device="cpu").tokenize_files(paths)
    for path, units in zip(paths, found, strict=True):
        expected, margin = nearest(torch.from_numpy(features[path])[None], np.load(folder / "kmeans.npy"))
        assert margin > FLOAT_ROUNDING
        assert units.tolist() == expected


def test_folder_is_one_that_convert_makes(encoder, fitted, tmp_path):
    """unit_model.json has one key more, which no digest contains."""
    folder, report = fitted
    converted = convert(encoder, folder / "kmeans.npy", tmp_path / "m", layer=LAYER)
    files = content(folder)
    assert not re.search(rb"/tmp|\.wav|\.npy\b(?!\": \")", files["unit_model.json"])  # no path
    description = json.loads(files["unit_model.json"])
    assert description.pop("fit") == report
    assert description == json.loads((converted / "unit_model.json").read_text())
    assert content(converted) == files | {"unit_model.json": (converted / "unit_model.json").read_bytes()}
    assert unit_model_digest(folder) == unit_model_digest(converted)
    assert (report["num_units"], report["seed"], report["num_frames"], report["num_passes"]) == (NUM_UNITS, 0, 900, 10)
    assert report["versions"]["scikit-learn"] == __import__("sklearn").__version__


@pytest.mark.slow
def test_prepare_takes_the_unit_model(fitted, mini, tmp_path):
    counts = prepare(**options(mini, fitted[0], tmp_path))
    assert counts["num_units"] == NUM_UNITS
    assert counts["splits"]["train"]["rows"] == 10
    main(["verify", str(tmp_path / "out")])


def test_command_prints_the_report(mini, tmp_path, capsys):
    """The checkpoint is a .pt file, whose waveforms are normalized in another way."""
    source = mini / "unit_model"
    words = ["fit", source / "checkpoint.pt", mini / "corpus", tmp_path / "m", "--model_config", source / "config.json"]
    words += ["--layer", 3, "--num_units", 30, "--device", "cpu", "--cache_dir", tmp_path / "cache"]
    main([*map(str, words)])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "m" / "unit_model.json").read_text())["fit"]
    assert lines[0] == f"{tmp_path / 'm'} is a unit model folder with 30 units"
    sample = report["sample"]
    assert lines[1].startswith(f"sample: {sample['num_frames']:,} frames, inertia {sample['inertia']:.6g} (")
    assert f"most frequent {sample['most_frequent'][0][0]} ({sample['most_frequent'][0][1]:,})" in lines[1]
    assert lines[2].startswith("held out: ")
    assert len(lines) == 3
    main([*map(str, [*words, "--json"])])
    assert json.loads(capsys.readouterr().out) == report
    units, _ = UnitTokenizer.from_pretrained(tmp_path / "m", device="cpu").tokenize_files(
        [str(mini / "corpus" / "data" / "3" / "0_0_d3.wav")]
    )
    assert len(set(units[0].tolist())) > 1


def count_passes(monkeypatch):
    """Count the recordings whose features are computed."""
    computed = []
    forward = FeatureModel.forward_pack

    def counting(self, rows, frames, stopped):
        computed.extend(hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in rows)
        return forward(self, rows, frames, stopped)

    monkeypatch.setattr(FeatureModel, "forward_pack", counting)
    return computed


@pytest.mark.slow
def test_killed_run_is_resumed(encoder, mini, lists, tmp_path, monkeypatch):
    """No features of a finished shard are computed again, and the bytes are those of a run without a fault."""
    arguments = [str(each) for each in (encoder, mini / "corpus", tmp_path / "unit_model", "--layer", LAYER)]
    arguments += ["--num_units", str(NUM_UNITS), "--device", "cpu", "--cache_dir", str(tmp_path / "cache")]
    code = (
        "from usdm_sft.units import features\nfrom usdm_sft.cli.main import main\n"
        f"features.SHARD_SECONDS = 3\nmain({['fit', *arguments]!r})"
    )
    stop_run(Fork(code, start_new_session=True), tmp_path, "cache/features/*.arrow", signal.SIGKILL)
    finished = inodes(tmp_path, "cache/features/*.arrow")
    assert finished and not (tmp_path / "unit_model").exists()

    monkeypatch.setattr(features_module, "SHARD_SECONDS", 3)
    computed = count_passes(monkeypatch)
    folder, _ = fit(encoder, mini, tmp_path)
    rest, _ = computed.copy(), computed.clear()
    assert finished.items() <= inodes(tmp_path, "cache/features/*.arrow").items()

    (tmp_path / "other").mkdir()
    undisturbed, _ = fit(encoder, mini, tmp_path / "other")
    assert len(computed) == len(set(computed)) == len(used(lists["train"]) + used(lists["test"]))
    assert 0 < len(rest) < len(computed) and set(rest) < set(computed)
    assert content(folder) == content(undisturbed)


def test_other_number_of_units_needs_no_forward_pass(encoder, fitted, mini, tmp_path, monkeypatch):
    shutil.copytree(fitted[0].parent / "cache", tmp_path / "cache")
    computed = count_passes(monkeypatch)
    folder, _ = fit(encoder, mini, tmp_path, num_frames=900, num_units=7)
    assert np.load(folder / "kmeans.npy").shape == (7, WIDTH)
    assert computed == []


def test_finished_folder_is_left_unchanged(encoder, fitted, mini, monkeypatch):
    folder, report = fitted
    before = inodes(folder, "*")
    monkeypatch.setattr(module, "_fit", None)
    assert fit(encoder, mini, folder.parent, num_frames=900) == (folder, report)
    assert inodes(folder, "*") == before
    assert not [*folder.parent.rglob("*.unfinished"), *folder.parent.glob("cache/kmeans/*.npy")]


def test_two_runs_at_once_make_the_folder_once(encoder, fitted, mini, lists, tmp_path, monkeypatch):
    computed = count_passes(monkeypatch)
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(fit, encoder, mini, tmp_path, num_frames=900) for _ in range(2)]
        (folder, report), (_, other) = [run.result() for run in runs]
    assert report == other == fitted[1]
    assert content(folder) == content(fitted[0])
    assert len(computed) == len(set(computed)) < len(lists["train"] + lists["test"])


def test_same_seed_gives_the_same_bytes(encoder, fitted, mini, tmp_path):
    """Wherever the corpus and the cache are, and in whatever order its files are."""
    shutil.copytree(mini / "corpus", tmp_path / "corpus")
    lines = (tmp_path / "corpus" / "train.txt").read_text().splitlines()
    (tmp_path / "corpus" / "train.txt").write_text("".join(f"{line}\n" for line in reversed(lines)))
    again, report = fit(encoder, mini, tmp_path, num_frames=900, data_dir=tmp_path / "corpus")
    assert (again / "kmeans.npy").read_bytes() == (fitted[0] / "kmeans.npy").read_bytes()
    assert (report["sample"], report["held_out"]) == (fitted[1]["sample"], fitted[1]["held_out"])
    (tmp_path / "seed").mkdir()
    other, _ = fit(encoder, mini, tmp_path / "seed", num_frames=900, seed=1)
    assert (other / "kmeans.npy").read_bytes() != (fitted[0] / "kmeans.npy").read_bytes()


def test_threads_change_no_centroid():
    features = np.random.default_rng(0).standard_normal((12_000, 24)).astype(np.float32)
    found = []
    for num_threads in (1, 2, 4):
        with threadpool_limits(limits=num_threads):
            fitted = fit_kmeans(features, 50, seed=3, num_passes=3)
            found.append(
                [each.tobytes() for each in (fitted.cluster_centers_, fitted.labels_, fitted.predict(features))]
            )
    assert found[0] == found[1] == found[2]
    assert found[0][1] == found[0][2]


def test_empty_clusters_are_counted():
    """Three different frames give three units, however many are asked for."""
    frames = np.repeat(np.eye(3, 4, dtype=np.float32), 5, axis=0)
    fitted = fit_kmeans(frames, 5, seed=0, num_passes=1)
    numbers = describe_units(frames, fitted.labels_, fitted.cluster_centers_)
    assert (numbers["empty_clusters"], numbers["inertia"]) == (2, 0)
    assert numbers["perplexity"] == pytest.approx(3)


def test_sample_does_not_depend_on_names_or_order():
    audio = {f"{i}.wav": AudioDigest(f"{i:064}", 16_000, 1.0) for i in range(20)}  # 49 frames each
    renamed = {f"other/{name}": digest for name, digest in reversed(audio.items())} | {"copy": audio["3.wav"]}
    small = choose_sample(audio, 100, 0, FRAMINGS["transformers"])
    large = choose_sample(audio, 300, 0, FRAMINGS["transformers"])
    assert (len(small.recordings), small.num_frames, len(large.recordings), large.num_frames) == (3, 100, 7, 300)
    assert large.recordings[:3] == small.recordings
    everything = choose_sample(renamed, 10**6, 0, FRAMINGS["transformers"])
    assert [each.sha256 for each in everything.recordings[:7]] == [each.sha256 for each in large.recordings]
    assert (len(everything.recordings), everything.num_frames) == (20, 20 * 49)
    assert choose_sample(audio, 100, 1, FRAMINGS["transformers"]) != small


def test_recording_without_a_frame_is_not_in_the_sample():
    """w2v-BERT 2.0 makes its first unit of 35 ms."""
    audio = {f"{length}.wav": AudioDigest(f"{length:064}", length, length / 16_000) for length in (450, 559, 560)}
    assert [each.num_samples for each in choose_sample(audio, 1000, 0, FRAMINGS["seamless_m4t"]).recordings] == [560]
    assert len(choose_sample(audio, 1000, 0, FRAMINGS["transformers"]).recordings) == 3


def test_recording_of_the_train_split_is_not_held_out(encoder, mini, tmp_path):
    """A corpus in another layout, of which the test split holds a recording of the train split and one of its own."""
    speech = sorted(str(path) for path in mini.glob("corpus/data/3/*.wav"))
    for split, paths in (("train", speech[:3]), ("test", [speech[0], speech[3]])):
        rows = [
            {"dialog": split, "turn": turn, "speaker": "AB"[turn % 2], "text": "hello", "audio": path}
            for turn, path in enumerate(paths)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    _, report = fit(encoder, mini, tmp_path, data_dir=tmp_path, num_frames=10_000)
    digests = audio_digests(speech, tmp_path / "cache")
    frames = [(digests[path].num_samples - 400) // 320 + 1 for path in speech]
    assert report["num_recordings"] == 3
    assert report["sample"]["num_frames"] == sum(frames[:3])
    assert report["held_out"]["num_frames"] == frames[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_units": 0}, "num_units is 0: give 1 to 65,536"),
        ({"num_units": 65_537}, "num_units is 65,537: give 1 to 65,536"),
        ({"num_frames": 19}, "num_frames is 19, fewer than num_units, 20: give at least one frame for each unit"),
        ({"seed": -1}, "seed is -1: give 0 to 4294967295"),
        ({"num_passes": 0}, "num_passes is 0: give a positive number"),
        ({"layer": 9}, "layer 9 does not exist: the model has 4 layers"),
        ({"final_norm": True}, r"final_norm needs the last layer \(4\) of a model with pre-norm layers"),
        ({"num_units": 60_000}, r"num_units is 60,000, but the train split has only [\d,]+ frames \([\d.]+ s of audio\): give [\d,]+ or less"),
        ({"on_bad_audio": "ask"}, "on_bad_audio 'ask' is unknown"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_options_are_refused(encoder, mini, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(encoder, mini, tmp_path, **changes)
    assert not (tmp_path / "unit_model").exists()


def test_missing_train_split_is_named(encoder, mini, tmp_path):
    (tmp_path / "corpus").mkdir()
    shutil.copytree(mini / "corpus" / "data", tmp_path / "corpus" / "data")
    with pytest.raises(
        ValueError, match="the corpus has no train split, only test: name its list with --train_metadata_path"
    ):
        fit(encoder, mini, tmp_path, data_dir=tmp_path / "corpus", test_metadata_path=mini / "corpus" / "test.txt")


def test_missing_scikit_learn_is_named(mini, encoder, tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    error = refused("fit", encoder, mini / "corpus", tmp_path / "m", "--layer", LAYER)
    assert error.startswith("dailytalk-usdm fit: fit needs scikit-learn (")
    assert error.endswith("): pip install 'dailytalk-usdm[fit]'")


def test_bad_audio_is_listed_or_skipped(encoder, mini, tmp_path):
    """As in `prepare`, before any forward pass."""
    shutil.copytree(mini / "corpus", tmp_path / "corpus")
    for name in ("0_0_d3", "1_1_d3"):
        (tmp_path / "corpus" / "data" / "3" / f"{name}.wav").write_bytes(b"RIFF")
    with pytest.raises(AudioError) as raised:
        fit(encoder, mini, tmp_path, data_dir=tmp_path / "corpus")
    lines = str(raised.value).splitlines()
    assert [re.match(r"utterance (\w+): audio file .*\.wav .*: replace the file", line)[1] for line in lines] == [
        "0_0_d3",
        "1_1_d3",
    ]
    assert not (tmp_path / "cache" / "features").exists()
    _, report = fit(encoder, mini, tmp_path, data_dir=tmp_path / "corpus", on_bad_audio="skip")
    assert report["num_frames"] > NUM_UNITS


def test_features_that_are_not_finite_name_the_recording(mini, tmp_path):
    model = make_model(HubertConfig(**TINY, **POST))
    with torch.no_grad():
        model.encoder.layers[1].final_layer_norm.weight.fill_(3e38)
    save(model, tmp_path / "encoder")
    with pytest.raises(
        ValueError, match=r"audio file .*\.wav: the features are not finite in fp32: leave out the utterance"
    ):
        fit(tmp_path / "encoder", mini, tmp_path)
    assert not (tmp_path / "unit_model").exists() and not list(tmp_path.glob("cache/features/*.arrow"))


def test_other_folders_are_refused(encoder, fitted, mini, unit_model, tmp_path):
    message = "exists and was not fit with this corpus and these settings: remove it or name another folder"
    shutil.copytree(unit_model, tmp_path / "converted")
    shutil.copytree(fitted[0], tmp_path / "fitted")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    before = content(tmp_path)
    for name in ("converted", "fitted", "notes"):
        with pytest.raises(FileExistsError, match=message):
            fit_unit_model(encoder, mini / "corpus", tmp_path / name, num_units=NUM_UNITS, layer=LAYER, num_frames=800, device="cpu", cache_dir=fitted[0].parent / "cache")  # fmt: skip
    assert content(tmp_path) == before


def test_finished_folder_that_was_changed_is_refused(encoder, fitted, mini, tmp_path):
    shutil.copytree(fitted[0], tmp_path / "unit_model")
    shutil.copytree(fitted[0].parent / "cache", tmp_path / "cache")
    with open(tmp_path / "unit_model" / "kmeans.npy", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"kmeans\.npy is not the file that was converted: remove the folder"):
        fit(encoder, mini, tmp_path, num_frames=900)


def test_encoder_that_changes_during_the_run_is_refused(encoder, fitted, mini, tmp_path, monkeypatch):
    """The centroids would be those of other features."""
    shutil.copytree(encoder, tmp_path / "encoder")
    shutil.copytree(fitted[0].parent / "cache", tmp_path / "cache")
    real = module._fit

    def fit_and_change(*args):
        save(make_model(HubertConfig(**TINY, **POST), seed=1), tmp_path / "encoder")
        return real(*args)

    monkeypatch.setattr(module, "_fit", fit_and_change)
    with pytest.raises(ValueError, match="encoder was changed during the run: let nothing write to it, and run again"):
        fit(tmp_path / "encoder", mini, tmp_path, num_frames=900)
    assert not (tmp_path / "unit_model").exists()


def test_damaged_feature_shard_is_made_again(encoder, fitted, mini, tmp_path, caplog):
    shutil.copytree(fitted[0].parent / "cache", tmp_path / "cache")
    for path in tmp_path.glob("cache/features/*.arrow"):
        with open(path, "r+b") as file:
            file.seek(-100, 2)
            file.write(b"damage")
    again, _ = fit(encoder, mini, tmp_path, num_frames=900)
    assert content(again) == content(fitted[0])
    assert "was damaged after it was written: making it again" in caplog.text
