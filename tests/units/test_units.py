"""`UnitTokenizer` against the reference, as a `.map` callable, in pickles and with bad input."""

import copy
import json
import multiprocessing
import operator
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import multiprocess
import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from soxr import resample
from torch.nn.utils.rnn import pad_sequence

from tests.helpers import SHARED
from tests.units.small_models import UNITS, convert_small
from usdm_sft.audio.frames import FRAMINGS, num_frames
from usdm_sft.audio.reading import AudioError
from usdm_sft.units import reading
from usdm_sft.units import tokenizer as module
from usdm_sft.units.batches import normalize, padding_share, plan_batches
from usdm_sft.units.columns import distinct_audio
from usdm_sft.units.model import UnitModel
from usdm_sft.units.precision import fp32_precision
from usdm_sft.units.tokenizer import UnitTokenizer

sys.path.insert(0, str(UNITS))
from load import load


@pytest.fixture(scope="module")
def fairseq(tmp_path_factory):
    return convert_small(tmp_path_factory.mktemp("unit_models") / "fairseq")


@pytest.fixture(scope="module")
def fairseq2(tmp_path_factory):
    return convert_small(tmp_path_factory.mktemp("unit_models") / "fairseq2", UNITS / "model_fairseq2.pt")


@pytest.fixture(scope="module")
def tokenizer(fairseq):
    return UnitTokenizer.from_pretrained(fairseq, device="cpu")


@pytest.fixture(scope="module", params=[UNITS, pytest.param(SHARED / "oracle" / "units", marks=pytest.mark.oracle)])
def golden(request):
    """Output of the real UnitExtractor: cases, waveforms and padded batches."""
    expected, waveforms = load(request.param)
    cases = {name: case for name, case in expected["cases"].items() if case["kind"] != "too_short"}
    return cases, waveforms, expected["padded_batches"]


def assert_units(found, case, name):
    """Check that units are equal, except where float rounding decides between the two nearest centroids."""
    assert len(found) == len(case["units"]), name
    for frame, (unit, expected) in enumerate(zip(found.tolist(), case["units"], strict=True)):
        assert unit == expected or unit in case["close"].get(str(frame), ()), (name, frame)


def assert_batch(tokenizer, golden, names):
    """Check the units of several waveforms that are tokenized in one call."""
    cases, waveforms, _ = golden
    for name, found in zip(names, tokenizer.tokenize_waveforms([waveforms[name] for name in names]), strict=True):
        assert_units(found, cases[name], name)


@pytest.mark.parametrize("layout", ["fairseq", "fairseq2"])
def test_units_of_each_waveform_alone_equal_the_reference(request, golden, layout):
    tokenizer = UnitTokenizer.from_pretrained(request.getfixturevalue(layout), device="cpu")
    cases, waveforms, _ = golden
    assert len(cases) >= 38
    for name, case in cases.items():
        [found] = tokenizer.tokenize_waveforms([waveforms[name]])
        assert found.dtype == np.uint16
        assert_units(found, case, name)


def test_units_in_packs_equal_the_reference(tokenizer, golden):
    for names in golden[2]:
        assert_batch(tokenizer, golden, names)


def test_units_in_padded_batches_equal_the_reference(tokenizer, golden):
    """A GPU gets padded batches."""
    cases, waveforms, batches = golden
    for names in batches:
        rows = [normalize(torch.from_numpy(waveforms[name])) for name in names]
        frames = torch.tensor([num_frames(len(waveforms[name])) for name in names])
        units, finite = tokenizer.model.forward(pad_sequence(rows, batch_first=True), frames)
        assert finite.all()
        for name, found in zip(names, units.numpy(), strict=True):
            assert_units(found[: len(cases[name]["units"])], cases[name], name)


@pytest.mark.parametrize("precision", ["fp16x3", "bf16x3"])
def test_units_of_split_products_equal_the_reference(tokenizer, golden, precision):
    assert_batch(tokenizer.with_settings(precision=precision), golden, list(golden[0]))


@pytest.mark.parametrize("batch_seconds", [0.5, 4, 1000])
def test_units_do_not_depend_on_batch_and_order(fairseq, golden, batch_seconds):
    names = list(golden[0])
    random.Random(batch_seconds).shuffle(names)
    tokenizer = UnitTokenizer.from_pretrained(fairseq, device="cpu", batch_seconds=batch_seconds)
    assert_batch(tokenizer, golden, names)


def test_features_equal_the_reference(fairseq):
    model = UnitModel.from_pretrained(fairseq)
    _, waveforms = load(UNITS)
    expected = np.load(UNITS / "features.npz")
    for name in ("len_719", "len_16079", "mix_0_16000"):
        waveform = normalize(torch.from_numpy(waveforms[name]))
        assert np.abs(waveform[:64].numpy() - expected[f"{name}/normalised_head"]).max() < 1e-6
        with torch.inference_mode():
            features = model.features(waveform[None], torch.tensor([num_frames(len(waveforms[name]))]))
        assert np.abs(features[0].numpy() - expected[f"{name}/features"]).max() < 1e-4


def test_an_odd_number_of_samples_gets_a_sample_of_value_one():
    odd = torch.full((401,), 0.5)
    even = torch.cat([odd, torch.ones(1)])
    assert torch.equal(normalize(odd), normalize(even))
    assert len(normalize(odd)) == 402


def test_frame_completed_by_the_appended_sample_is_output(tokenizer):
    assert [len(tokenizer.tokenize_waveforms([np.ones(n, np.float32)])[0]) for n in (718, 719, 720)] == [1, 2, 2]


@pytest.mark.parametrize("num_samples", [0, 1, 398, 399])
def test_waveform_that_is_too_short_is_named(tokenizer, num_samples):
    with pytest.raises(AudioError, match=rf"waveform 1 has {num_samples} samples at 16 kHz, fewer than the 400"):
        tokenizer.tokenize_waveforms([np.zeros(400, np.float32), np.zeros(num_samples, np.float32)])


def test_units_of_the_mini_corpus_equal_the_reference(unit_model, mini):
    expected = json.loads((mini / "expected" / "units.json").read_text())
    paths = sorted(mini.glob("corpus/data/*/*.wav"))
    found, seconds = UnitTokenizer.from_pretrained(unit_model, device="cpu").tokenize_files(paths)
    units = {path.stem: file_units.tolist() for path, file_units in zip(paths, found, strict=True)}
    assert {name: units[name] for name in expected} == expected
    assert seconds.dtype == np.float32
    info = soundfile.info(paths[0])
    assert seconds[0] == np.float32(np.ceil(info.frames * 16_000 / info.samplerate) / 16_000)


@pytest.mark.oracle
def test_units_of_a_clip_of_dailytalk_equal_the_reference(tokenizer, shared):
    expected = json.loads((shared / "oracle" / "units" / "golden.json").read_text())["files"]
    for name, case in expected.items():
        [found], _ = tokenizer.tokenize_files([shared / "oracle" / "units" / "files" / name])
        assert_units(found, case, name)


@pytest.fixture
def rows(mini):
    audio = sorted(str(path) for path in mini.glob("corpus/data/3/*.wav"))
    return {"user_audio": [audio[0], audio[1], audio[2]], "agent_audio": [audio[1], audio[2], audio[3]]}


def test_each_audio_of_a_batch_is_tokenized_once(tokenizer, rows, monkeypatch):
    read = []
    real = reading.read_waveform
    monkeypatch.setattr(reading, "read_waveform", lambda source, *given: read.append(source) or real(source, *given))
    out = tokenizer(
        {"user_audio": rows["user_audio"], "agent_audio": [{"bytes": None, "path": p} for p in rows["agent_audio"]]}
    )
    assert len(read) == 4
    assert np.array_equal(out["agent_units"][0], out["user_units"][1])


def test_bytes_and_lists_give_the_units_of_the_paths(tokenizer, rows):
    plain = tokenizer(rows)
    content = {role: [Path(path).read_bytes() for path in paths] for role, paths in rows.items()}
    lists = tokenizer({role: [[{"bytes": each, "path": None}] for each in audio] for role, audio in content.items()})
    for role in ("user", "agent"):
        for one, many in zip(plain[f"{role}_units"], lists[f"{role}_units"], strict=True):
            assert np.array_equal(one, many[0]) and len(many) == 1
        assert list(plain[f"{role}_seconds"]) == [seconds for [seconds] in lists[f"{role}_seconds"]]


def test_every_audio_column_gives_units_and_seconds(tokenizer, rows):
    first, second = rows["user_audio"][:2]
    out = tokenizer({"id": ["a"], "audio": [first], "other_audio": [second], "audio_name": ["b"]})
    assert list(out) == ["units", "seconds", "other_units", "other_seconds"]
    expected, seconds = tokenizer.tokenize_files([first, second])
    assert [out["units"][0].tolist(), out["other_units"][0].tolist()] == [units.tolist() for units in expected]
    assert [out["seconds"][0], out["other_seconds"][0]] == seconds.tolist()


@pytest.mark.parametrize(("batch", "among"), [({"id": ["a"], "user_text": ["b"]}, "id, user_text"), ({}, "no columns")])
def test_rows_without_an_audio_column_are_refused(tokenizer, batch, among):
    with pytest.raises(ValueError, match=f"there is no audio column among {among}: name it audio, or let it end in"):
        tokenizer(batch)


def test_audio_that_was_read_ahead_is_used_or_forgotten(tokenizer, rows):
    sources, _ = distinct_audio(rows)
    tokenizer.read_ahead(sources)
    assert len(tokenizer._reader) == 4
    tokenizer.forget(sources)
    assert len(tokenizer._reader) == 0
    tokenizer.read_ahead(sources)
    tokenizer(rows)
    assert len(tokenizer._reader) == 0


def test_map_in_processes_after_a_call_in_this_one(tokenizer, rows):
    """Forked processes inherit torch without its threads."""
    dataset = Dataset.from_dict(rows)
    expected = dataset.map(tokenizer, batched=True, load_from_cache_file=False)
    found = dataset.map(tokenizer, batched=True, load_from_cache_file=False, num_proc=2)
    assert found["user_units"][:] == expected["user_units"][:]


@pytest.mark.parametrize("streaming", [False, True])
def test_map_adds_the_columns(tokenizer, rows, streaming):
    dataset = Dataset.from_dict(rows)
    mapped = (dataset.to_iterable_dataset() if streaming else dataset).map(tokenizer, batched=True)
    expected = tokenizer(rows)
    assert [list(row["agent_units"]) for row in mapped] == [list(units) for units in expected["agent_units"]]
    if not streaming:
        assert mapped.features["user_units"].feature.dtype == "uint16"
        assert mapped.features["user_seconds"].dtype == "float32"


def test_fingerprint_depends_on_digest_and_settings_only(tokenizer, fairseq, fairseq2, tmp_path):
    assert str(fairseq).encode() not in pickle.dumps(tokenizer)
    assert len(pickle.dumps(tokenizer)) < 1000
    (tmp_path / "elsewhere").symlink_to(fairseq)
    before = Hasher.hash(tokenizer)
    assert Hasher.hash(UnitTokenizer.from_pretrained(tmp_path / "elsewhere", device="cpu")) == before
    tokenizer.tokenize_waveforms([np.zeros(400, np.float32)])
    assert Hasher.hash(tokenizer) == before
    assert Hasher.hash(UnitTokenizer.from_pretrained(fairseq, device="cpu", precision="bf16")) != before
    assert Hasher.hash(UnitTokenizer.from_pretrained(fairseq, device="cpu", batch_seconds=1)) != before


@pytest.mark.parametrize("package", [multiprocessing, multiprocess], ids=lambda package: package.__name__)
def test_process_finds_folder_and_gpu_in_the_pickle(fairseq, package, monkeypatch):
    """In the pickle that starts it; a plain pickle and the fingerprint know no GPU number."""
    assert not [name for name in os.environ if name.startswith("USDM_UNIT_MODEL_")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    first, second = (UnitTokenizer.from_pretrained(fairseq, device=f"cuda:{index}") for index in (0, 1))
    assert Hasher.hash(first) == Hasher.hash(second)
    assert pickle.dumps(first) == pickle.dumps(second)
    with package.get_context("spawn").Pool(1) as pool:
        assert pool.apply(operator.attrgetter("folder", "device"), (second,)) == (fairseq.resolve(), "cuda:1")


def test_other_pickles_need_a_unit_model_that_is_open(tokenizer, fairseq, monkeypatch):
    pickled = pickle.dumps(tokenizer)
    assert pickle.loads(pickled).folder == copy.deepcopy(tokenizer).folder == fairseq.resolve()
    monkeypatch.setattr(module, "_folders", {})
    with pytest.raises(
        ValueError,
        match=rf"has not opened the unit model of digest {tokenizer.digest}, .* call UnitTokenizer\.from_pretrained",
    ):
        pickle.loads(pickled)


def test_bad_settings_and_folders_are_refused(fairseq, tmp_path):
    with pytest.raises(ValueError, match="precision 'fp8' is unknown: choose one of fp32"):
        UnitTokenizer.from_pretrained(fairseq, precision="fp8")
    with pytest.raises(ValueError, match="resampler 'sinc' is unknown: choose one of soxr, torchaudio"):
        UnitTokenizer.from_pretrained(fairseq, resampler="sinc")
    for precision in ("tf32", "fp16x3"):
        with pytest.raises(ValueError, match=f"precision {precision} exists on CUDA only: use fp32 or bf16 on the CPU"):
            UnitTokenizer.from_pretrained(fairseq, device="cpu", precision=precision)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is cuda:1, but torch finds no CUDA device"):
            UnitTokenizer.from_pretrained(fairseq, device="cuda:1")
    with pytest.raises(ValueError, match="batch_seconds is 0: give a positive"):
        UnitTokenizer.from_pretrained(fairseq, batch_seconds=0)
    with pytest.raises(FileNotFoundError, match=r"it holds no unit_model\.json"):
        UnitTokenizer.from_pretrained(tmp_path)


def test_changed_folder_is_refused(fairseq, tmp_path):
    folder = shutil.copytree(fairseq, tmp_path / "model")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that was converted"):
        UnitTokenizer.from_pretrained(folder, cache_dir=tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        UnitTokenizer.from_pretrained(folder, cache_dir=tmp_path)


def test_out_of_memory_names_the_setting_to_change(fairseq, monkeypatch):
    tokenizer = UnitTokenizer.from_pretrained(fairseq, device="cpu", batch_seconds=10)

    def fail(self, rows, frames, stopped):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(UnitModel, "forward_pack", fail)
    waveforms = [np.zeros(num_samples, np.float32) for num_samples in (64_000, 63_999)]
    message = r"out of memory on cpu with a batch of 2 utterances and 8 s of audio: set --batch_seconds \(now 10\) to 4 or less"
    with pytest.raises(MemoryError, match=message):
        tokenizer.tokenize_waveforms(waveforms)
    with pytest.raises(MemoryError, match="leave out waveform 0, or use a device with more memory"):
        tokenizer.tokenize_waveforms(waveforms[:1])


def test_a_minute_of_audio_alone_and_in_a_batch(tokenizer):
    waveform = np.random.default_rng(0).standard_normal(60 * 16_000).astype(np.float32)
    [alone], [beside, _] = (
        tokenizer.tokenize_waveforms([waveform]),
        tokenizer.tokenize_waveforms([waveform, waveform[:400]]),
    )
    assert len(alone) == 2999
    assert np.mean(alone == beside) > 0.999  # ties


def test_waveforms_pass_the_resampler_on_the_device(rows, fairseq, monkeypatch):
    """A stand-in for torchaudio resamples with soxr."""
    monkeypatch.setattr(
        module, "resample_on", lambda device, samples, *rates: torch.from_numpy(resample(samples, *rates))
    )
    plain = UnitTokenizer.from_pretrained(fairseq, device="cpu")(rows)
    tokenizer = UnitTokenizer.from_pretrained(fairseq, device="cpu", resampler="torchaudio")
    assert [len(units) for units in tokenizer(rows)["user_units"]] == [len(units) for units in plain["user_units"]]
    assert tokenizer.key != UnitTokenizer.from_pretrained(fairseq, device="cpu").key


def test_rank_chooses_the_gpu(fairseq, rows, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    tokenizer = UnitTokenizer.from_pretrained(fairseq, device="cuda")
    monkeypatch.setattr(
        tokenizer, "tokenize_files", lambda sources: ([np.zeros(1)] * len(sources), np.zeros(len(sources)))
    )
    before = Hasher.hash(tokenizer)
    tokenizer(rows, 6)
    assert tokenizer.device == "cuda:2"
    assert Hasher.hash(tokenizer) == before


def test_plan_on_cuda_is_by_length_and_fills_batches():
    lengths = [16_000 * seconds for seconds in (1, 5, 2, 2, 30, 1)]
    assert plan_batches(lengths, 10, "cuda") == [[4], [1], [2, 3], [0, 5]]
    assert plan_batches([16_000] * 5, 2, "cuda") == [[0, 1], [2, 3], [4]]
    assert plan_batches([], 10, "cuda") == []
    assert padding_share([[720], [400, 400]], 10, "cuda") == padding_share([], 10, "cuda") == 0


def test_packs_on_the_cpu_hold_rows_of_any_length():
    lengths = [16_000 * seconds for seconds in (1, 5, 2, 2, 30, 1)]
    assert plan_batches(lengths, 10, "cpu") == [[4], [1, 2, 3, 0], [5]]
    assert plan_batches(lengths, 160, "cpu") == [[4], [1, 2, 3, 0, 5]]  # 16 s at most
    assert plan_batches([16_000 * seconds for seconds in (15, 9, 7, 1)], 160, "cpu") == [[0, 3], [1, 2]]
    assert plan_batches([], 10, "cpu") == [] and padding_share([[720, 1_040]], 10, "cpu") == 0


def test_batch_on_cuda_holds_rows_of_similar_length():
    assert plan_batches([9_000, 10_000, 8_600, 8_400, 10_000], 100, "cuda") == [[1, 4, 0, 2], [3]]
    assert plan_batches([10_000, 8_500], 100, "cuda") == [[0, 1]]
    assert plan_batches([10_000, 8_499], 100, "cuda") == [[0], [1]]
    assert padding_share([[7_120, 6_800, 6_480]], 10, "cuda") == 1 - (22 + 21 + 20) / 66


def test_padding_is_counted_in_units():
    """1,039 samples make 3 units, because 1,039 become 1,040; without an appended sample they make 2."""
    assert padding_share([[1_039, 1_000]], 100, "cuda") == 1 - 5 / 6
    assert padding_share([[1_039, 1_000]], 100, "cuda", FRAMINGS["none"]) == 0


def test_seconds_of_a_batch_depend_on_the_device(fairseq, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, seconds in (("cpu", 160.0), ("cuda", 320.0), ("cuda:1", 320.0)):
        tokenizers = (
            UnitTokenizer.from_pretrained(fairseq, device=device),
            module.open_for(device, fairseq, precision="fp32", batch_seconds=None, resampler="soxr"),
        )
        assert [each.settings["batch_seconds"] for each in tokenizers] == [seconds, seconds]


def test_fp32_precision_restores_the_callers_settings():
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    with pytest.raises(KeyError), fp32_precision("ieee"):
        assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
        raise KeyError
    assert [setting.fp32_precision for setting in settings] == before


# Printed for LJSpeech's LJ003-0001.wav in facebookresearch/seamless_communication pull requests 17 and 61.
KNOWN_ANSWER = """5884 2411 5280 1803 5932 3421 3992 1867 1867 4783 772 2781 2103 1839 6327 5579 9121 3375 7563 5932 3421 9014
4783 925 8528 3254 6466 3254 6394 6394 1838 3380 3407 4085 5682 2386 5510 4678 7990 5957 5116 111 114 7400 4216 9320 4671 2231 2231
469 469 3796 3382 5687 319 7804 1829 3549 1030 337 337 1600 8975 8834 3214 3397 9403 6297 5956 7350 7350 9917 6800 8316 296 3661 296
7296 7296 3254 2213 856 3294 1677 6507 2258 1232 2231 9448 9936 6176"""


@pytest.mark.skipif(
    not (os.environ.get("USDM_UNIT_MODEL") and os.environ.get("USDM_LJ003_0001")),
    reason="needs the published unit model (USDM_UNIT_MODEL, a converted folder) and LJ003-0001.wav (USDM_LJ003_0001)",
)
def test_public_known_answer():
    """A few frames may differ: the printed run used TF32 and an unknown resampler."""
    expected = np.array(KNOWN_ANSWER.split(), dtype=np.uint16)
    [found], _ = UnitTokenizer.from_pretrained(os.environ["USDM_UNIT_MODEL"]).tokenize_files(
        [os.environ["USDM_LJ003_0001"]]
    )
    assert np.mean(found[: len(expected)] == expected) > 0.95
