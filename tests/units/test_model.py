"""Untrusted unit model folders are checked even if their digests fit; units depend on the folder and the audio only."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from tests.units.small_models import change_file, convert_small, edit_weights, set_keys
from usdm_sft.units import tokenizer as units
from usdm_sft.units.model import UnitModel
from usdm_sft.units.tokenizer import UnitTokenizer


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert_small(tmp_path_factory.mktemp("unit_models") / "model")


@pytest.fixture
def folder(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "model")


def set_weights(change):
    return edit_weights(lambda weights: weights.update({name: change(tensor) for name, tensor in weights.items()}))


def set_header(make):
    """Replace the JSON header of a safetensors file."""

    def change(path):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        path.write_bytes(content[:8] + make(size).ljust(size) + content[8 + size :])

    return change


@pytest.fixture(scope="module")
def many_tensors(tmp_path_factory):
    """A safetensors file of 100,000 tensors."""
    path = tmp_path_factory.mktemp("many") / "many.safetensors"
    one = torch.zeros(1).numpy().tobytes()
    header = {f"layers.{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(100_000)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + one * len(header))
    return path


def use_file(source):
    return lambda path: shutil.copyfile(source, path)


def npy(header):
    """A .npy file of 200 x 64 float32 with another header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(200 * 64 * 4)


HEADERS = [
    "[" * 200, "(" * 9_000, "{" * 60_000, "'" * 3, "-" * 5_000 + "1", "1" + "+1" * 4_000, "{[]: 1}", "\\", "\0", "{}", "[]", "1",
    *(
        f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"
        for descr, shape in (
            ("'<f4'", "(10_000_000_000, 64)"), ("'<f4'", f"({'9' * 3000}, 64)"), ("'<f4'", f"({'9' * 9000}, 64)"), ("'<f4'", "(-1, 64)"),
            ("'<f4'", "(-200, -64)"), ("'<f4'", "(201, 64)"), ("'<f4'", "200"), ("'<f4'", "(200.0, 64)"), ("'<f4'", "(64, 200)"),
            ("'<f4'", "()"), ("'|O'", "(200, 64)"), ("'>f4'", "(200, 64)"), ("'<f8'", "(200, 32)"), ("'V0'", "(10**12, 64)"),
            ("'V0'", "(1000000000000, 64)"), ("[]", "(200, 64)"), ("'nonsense'", "(200, 64)"), ("[('a', '<f4', (99999, 99999))]", "(1,)"),
            ("('<f4', (99999999999,))", "(1,)"), ("['<f4'] * 10**9", "(1,)"), ("'<f4', 'x': 1", "(200, 64)"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header[:80])
def test_npy_header_is_refused_with_little_memory(folder, tmp_path, header):
    change_file(folder, "kmeans.npy", lambda path: path.write_bytes(npy(header)))
    kmeans = tmp_path / "k.npy"
    kmeans.write_bytes(npy(header))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"model is not what convert wrote .* convert the unit model again$"):
            UnitModel.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"k\.npy (is|has) .*: (save|name) ") as raised:
            convert_small(tmp_path / "made", kmeans=kmeans)
        assert "\n" not in str(raised.value) and tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_weights_are_read_where_a_sandbox_forbids_memfd_create(folder, monkeypatch):
    expected = UnitModel.from_pretrained(folder).state_dict()

    def forbid(name):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", forbid, raising=False)
    found = UnitModel.from_pretrained(folder).state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_centroids_in_fortran_order_are_read(folder):
    model = UnitModel.from_pretrained(folder)
    change_file(folder, "kmeans.npy", lambda path: np.save(path, np.asfortranarray(np.load(path))))
    assert torch.equal(UnitModel.from_pretrained(folder).centroids, model.centroids)


TOO_MANY = r"config\.json is not of a model of 100000 layers|the config has 100,000 layers of one kind"


@pytest.mark.parametrize(
    ("layer", "config", "message"),
    [
        (100_000, {"num_hidden_layers": 100_000}, TOO_MANY),
        (5, {"conv_dim": [64] * 100_000, "conv_kernel": [1] * 100_000, "conv_stride": [1] * 100_000}, TOO_MANY),
        (5, {"num_feat_extract_layers": 100_000}, TOO_MANY),
        (5, {"add_adapter": True, "num_adapter_layers": 100_000}, TOO_MANY),
        (200, {"num_hidden_layers": 200}, r"config\.json is not of a model of 200 layers"),
        (0, {"num_hidden_layers": 0}, r"config\.json is not of a model of 0 layers"),
    ],
    ids=["layers", "convolutions", "number of convolutions", "adapters", "more layers than weights", "no layer"],
)
def test_bad_number_of_layers_is_refused_before_any_is_built(folder, many_tensors, monkeypatch, layer, config, message):
    set_keys(layer=layer)(folder / "unit_model.json")
    change_file(folder, "config.json", set_keys(**config))
    if 100_000 in (layer, *config.values()):
        change_file(folder, "model.safetensors", use_file(many_tensors))
    monkeypatch.setattr("usdm_sft.units.base.AutoModel", None)
    with pytest.raises(ValueError, match=message):
        UnitModel.from_pretrained(folder)


def test_too_many_tensors_are_refused_before_any_is_built(folder, many_tensors, monkeypatch):
    change_file(folder, "model.safetensors", use_file(many_tensors))
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    with pytest.raises(ValueError, match=r"model\.safetensors has 100,000 tensors, the model [0-9]+"):
        UnitModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", set_keys(num_hidden_layers=200), "config.json is not of a model of 5 layers"),
        ("config.json", set_keys(num_attention_heads=0), "the config is not that of a Wav2Vec2 or HuBERT model"),
        ("config.json", lambda path: path.write_text("[]"), "config.json is not of a model of 5 layers"),
        ("config.json", lambda path: path.write_text("{"), "Expecting property name"),
        ("model.safetensors", lambda path: path.write_bytes(b"x" * 100), "header too large"),
        ("model.safetensors", set_weights(torch.Tensor.half), "model.safetensors is not float32"),
        ("model.safetensors", set_weights(lambda tensor: tensor[:1].clone()), "size mismatch"),
        ("model.safetensors", lambda path: save_file({str(i): torch.ones(1) for i in range(9)}, path), "Missing key"),
        ("kmeans.npy", lambda path: np.save(path, np.zeros((200, 3), np.float32)), r"kmeans.npy is float32 of shape \(200, 3\)"),
        ("kmeans.npy", lambda path: np.save(path, np.zeros((200, 64))), "kmeans.npy is float64"),
        ("kmeans.npy", lambda path: np.save(path, np.zeros((9, 64), np.float32)), "not 200 float32 centroids"),
        ("kmeans.npy", lambda path: np.save(path, np.full((200, 64), np.nan, np.float32)), "holds NaN"),
        # An attacker would send a pickle; writing it here is safe, and reading it is refused.
        ("kmeans.npy", lambda path: np.save(path, np.array([print]), allow_pickle=True), "allow_pickle=False"),
        ("kmeans.npy", lambda path: path.write_bytes(b""), "EOF: reading magic string"),
        ("kmeans.npy", lambda path: path.write_bytes(path.read_bytes()[:-1]), "but 51,199 bytes follow"),
        ("kmeans.npy", lambda path: path.write_bytes(bytes(1 << 25)), "kmeans.npy has 33,554,432 bytes, more than the"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]), "MetadataIncompleteBuffer|incomplete metadata"),
        ("model.safetensors", set_header(lambda size: b"[" * size), "invalid JSON|InvalidHeaderDeserialization|header"),
        ("model.safetensors", set_header(lambda size: b'{"a":' * (size // 5)), "InvalidHeaderDeserialization|header"),
        ("config.json", lambda path: path.write_text("[" * 100_000), "maximum recursion depth exceeded"),
        ("config.json", lambda path: path.write_text(" " * (1 << 21)), "config.json has 2,097,152 bytes, more than the 1,048,576"),
        ("config.json", set_keys(hidden_size="64"), "config.json has hidden_size '64'"),
    ],
)  # fmt: skip
def test_untrusted_folder_with_fitting_digests_is_checked(folder, name, change, message):
    change_file(folder, name, change)
    message = f"model is not what convert wrote .*{message}.* convert the unit model again$"
    with pytest.raises(ValueError, match=message) as raised:
        UnitTokenizer.from_pretrained(folder, device="cpu").tokenize_waveforms([np.zeros(400, np.float32)])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"files": None}, {"files": []}, {"files": {}}, {"files": {"/etc/passwd": "0"}}, {"files": {"config.json": "0"}},
        {"layer": "5"}, {"num_units": None}, {"sources": []},
    ],
    ids=str,
)  # fmt: skip
def test_untrusted_description_is_checked(folder, keys):
    """A file without a digest would be opened unchecked, and would be missing from the cache key."""
    set_keys(**keys)(folder / "unit_model.json")
    with pytest.raises(ValueError, match=r"unit_model\.json is not what convert wrote: remove the folder"):
        UnitTokenizer.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    ("place", "finite"),
    [((0, 0, 3), [False, True]), ((0, 2, 0), [False, True]), ((1, 1, 0), [True, False]), ((1, 2, 5), [True, True])],
    ids=["first frame", "last frame", "last frame before the padding", "padding"],
)
def test_feature_that_is_not_finite_marks_its_row(converted, monkeypatch, place, finite):
    model = UnitModel.from_pretrained(converted)
    features = torch.zeros(2, 3, model.centroids.shape[1])
    features[place] = torch.inf
    monkeypatch.setattr(model, "features", lambda waveforms, frames: features)
    _, found = model(torch.zeros(2, 1040), torch.tensor([3, 2]))
    assert found.tolist() == finite


def test_first_of_equally_near_centroids_is_the_unit(converted):
    model = UnitModel.from_pretrained(converted)
    expected = model.nearest(model.centroids[[7, 3]])
    assert expected.tolist() == [7, 3]
    model.centroids.zero_()
    model.centroid_norms.zero_()
    assert model.nearest(torch.ones(2, model.centroids.shape[1])).tolist() == [0, 0]


def test_code_beside_a_unit_model_is_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'code-ran')!r}, 'w')")
    change_file(folder, "config.json", set_keys(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}))
    UnitTokenizer.from_pretrained(folder, device="cpu").tokenize_waveforms([np.zeros(400, np.float32)])
    assert not (tmp_path / "code-ran").exists()


@pytest.fixture
def waveforms():
    rng = np.random.default_rng(0)
    return [rng.standard_normal(n).astype(np.float32) for n in (16_000, 20_079, 24_000, 50_079)]


@contextmanager
def setting(set_value, value, default):
    set_value(value)
    try:
        yield
    finally:
        set_value(default)


def fp32_precision_of(part):
    return lambda value: setattr(part, "fp32_precision", value)


CALLERS_SETTINGS = {
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default dtype": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "deterministic algorithms": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "matmul precision high": lambda: setting(torch.set_float32_matmul_precision, "high", "highest"),
    "matmul precision medium": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "oneDNN": lambda: setting(fp32_precision_of(torch.backends.mkldnn), "bf16", "none"),
    "oneDNN matmul": lambda: setting(fp32_precision_of(torch.backends.mkldnn.matmul), "bf16", "none"),
    "oneDNN conv": lambda: setting(fp32_precision_of(torch.backends.mkldnn.conv), "bf16", "none"),
}


@pytest.mark.parametrize("name", CALLERS_SETTINGS)
def test_units_do_not_depend_on_the_callers_settings_of_torch(converted, waveforms, name):
    used = UnitTokenizer.from_pretrained(converted, device="cpu")
    expected = [units.tolist() for units in used.tokenize_waveforms(waveforms)]
    with CALLERS_SETTINGS[name]():
        opened = UnitTokenizer.from_pretrained(converted, device="cpu")
        for tokenizer in (used, opened):
            assert [units.tolist() for units in tokenizer.tokenize_waveforms(waveforms)] == expected


@pytest.mark.parametrize(
    ("precision", "front"),
    [("fp32", "ieee"), ("tf32", "tf32"), ("fp16", "ieee"), ("bf16", "ieee"), ("fp16x3", "ieee"), ("bf16x3", "ieee")],
)
def test_float32_operations_run_in_the_precision_of_the_front(converted, monkeypatch, precision, front):
    model = UnitModel.from_pretrained(converted, precision)
    operations = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)
    found = []

    def features(waveforms, frames):
        found.extend(operation.fp32_precision for operation in operations)
        return torch.zeros(1, 1, model.centroids.shape[1])

    monkeypatch.setattr(model, "features", features)
    with setting(fp32_precision_of(torch.backends.mkldnn.matmul), "bf16", "none"):
        model(torch.zeros(1, 400), torch.tensor([1]))
    assert found == [front, front, "ieee"]


def test_forward_pass_restores_the_callers_settings(converted, monkeypatch):
    """cuDNN's attention builds a graph for each shape; products in float16 could be summed in float16."""
    cublas = torch.backends.cuda.matmul
    backends = [torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.CUDNN_ATTENTION]

    def settings():
        attention = torch.backends.cuda
        flags = [attention.cudnn_sdp_enabled(), attention.flash_sdp_enabled(), attention.math_sdp_enabled()]
        return [*flags, cublas.allow_fp16_accumulation, torch.is_autocast_enabled("cpu")]

    model = UnitModel.from_pretrained(converted)
    found = []
    monkeypatch.setattr(model, "nearest", lambda features: found.append(settings()) or features)
    with (
        torch.nn.attention.sdpa_kernel(backends),
        torch.autocast("cpu"),
        setting(lambda value: setattr(cublas, "allow_fp16_accumulation", value), True, False),
    ):
        model(torch.zeros(1, 400), torch.tensor([1]))
        assert settings() == [True, False, True, True, True]
    assert found == [[False, True, True, False, False]]


def test_resampler_runs_without_the_callers_autocast(converted, monkeypatch, tmp_path):
    enabled = []

    def resample_on(device, samples, rate, sample_rate):
        enabled.append(torch.is_autocast_enabled("cpu"))
        return torch.from_numpy(samples)

    monkeypatch.setattr(units, "resample_on", resample_on)
    soundfile.write(tmp_path / "a.wav", np.zeros(400), 16_000)
    tokenizer = UnitTokenizer.from_pretrained(converted, device="cpu", resampler="torchaudio")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokenizer.tokenize_files([tmp_path / "a.wav"])
    assert enabled == [False]


@pytest.mark.slow
def test_the_mask_of_a_long_utterance_takes_no_memory(tmp_path):
    """Compare 160 s whose appended sample completes a masked frame with 160 s without one."""
    code = """
import resource, sys
import numpy as np
from usdm_sft.units.tokenizer import UnitTokenizer

tokenizer = UnitTokenizer.from_pretrained(sys.argv[1], device="cpu")
waveform = np.random.default_rng(0).standard_normal(int(sys.argv[2])).astype(np.float32)
tokenizer.tokenize_waveforms([waveform])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    folder = convert_small(tmp_path / "one_layer", layer=1)
    assert (2_560_079 % 320, 2_560_080 % 320) == (79, 80)
    masked, plain = (
        int(subprocess.run([sys.executable, "-c", code, folder, n], capture_output=True, check=True).stdout)
        for n in ("2560079", "2560080")
    )
    assert masked < 1.05 * plain
