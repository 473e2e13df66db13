"""Split products: their accuracy, units of whole models, and the CPUs that may use them. On CPUs they run emulated in float32."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from tests.units.test_other_models import FLOAT_ROUNDING, MODELS, TINY, make_model
from usdm_sft.audio.frames import num_frames
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units import precision as precisions
from usdm_sft.units.cpu import NumpyLinear
from usdm_sft.units.model import UnitModel
from usdm_sft.units.precision import SplitLinear, check_cpu
from usdm_sft.units.tokenizer import UnitTokenizer

# Largest error of a product, as a share of the product of the absolute values: parts of 22 and of 16 bits, and float32 sums.
ERROR = {torch.float16: 2.0**-20, torch.bfloat16: 2.0**-15}
LINEAR = (nn.Linear, NumpyLinear)
SPLIT = {"fp16x3": torch.float16, "bf16x3": torch.bfloat16}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def powers(*shape, lowest, highest):
    return torch.exp2(torch.randint(lowest, highest + 1, shape, generator=torch.Generator().manual_seed(1)).float())


VALUES = {  # inputs and weight
    "of one size": (random(40, 300), random(50, 300, seed=2)),
    "tiny": (random(40, 300) * 1e-12, random(50, 300, seed=2) * 1e-9),
    "huge": (random(40, 300) * 1e12, random(50, 300, seed=2) * 1e9),
    "rows of different sizes": (random(40, 300) * powers(40, 1, lowest=-60, highest=60), random(50, 300, seed=2)),
    "a large range": (
        random(40, 300) * powers(40, 300, lowest=-14, highest=0),
        random(50, 300, seed=2) * powers(50, 300, lowest=-14, highest=0),
    ),
    "many zeros": (random(40, 300).relu(), random(50, 300, seed=2).relu()),
    "subnormals among them": (
        torch.where(random(40, 300) > 0, random(40, 300), 1e-40),
        torch.where(random(50, 300, seed=2) > 0, random(50, 300, seed=2), -1e-40),
    ),
}


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_product_has_the_bits_of_the_parts(name, dtype):
    inputs, weight = VALUES[name]
    found = SplitLinear(weight, None, dtype)(inputs)
    assert found.dtype == torch.float32
    expected = inputs.double() @ weight.double().T
    assert ((found - expected).abs() <= ERROR[dtype] * (inputs.abs().double() @ weight.abs().double().T)).all()


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_parts_are_those_of_the_definition(dtype):
    """hi is the nearest half-precision value, lo the nearest of the rest; 32 times the weight for float16."""
    weight = torch.tensor([[1000.0, 1 / 3, -0.1]])
    scaled = weight * (32 if dtype == torch.float16 else 1)
    hi = scaled.to(dtype)
    layer = SplitLinear(weight, None, dtype)
    assert layer.parts.dtype == dtype
    assert layer.parts.tolist() == [[*hi[0].tolist(), *(scaled - hi.float()).to(dtype)[0].tolist(), *hi[0].tolist()]]
    assert layer.weight_scale == (1 / 32 if dtype == torch.float16 else 1)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_zeros_give_the_bias_exactly(dtype):
    bias = random(5)
    assert torch.equal(SplitLinear(random(5, 8), bias, dtype)(torch.zeros(2, 3, 8)), bias.expand(2, 3, 5))
    assert torch.equal(SplitLinear(torch.zeros(5, 8), bias, dtype)(random(2, 3, 8)), bias.expand(2, 3, 5))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_row_does_not_depend_on_the_rows_beside_it(dtype):
    rows, layer = random(8, 64), SplitLinear(random(16, 64, seed=2), None, dtype)
    beside = rows.clone()
    beside[1], beside[3, 5], beside[5, 7] = 1e30, torch.inf, torch.nan
    found, expected = layer(beside), layer(rows)
    assert found.isfinite().all(dim=1).tolist() == [True, True, True, False, True, False, True, True]
    assert torch.equal(found[[0, 2, 4, 6, 7]], expected[[0, 2, 4, 6, 7]])


def make_unit_model(name, precision, centroids=None):
    kind, settings, _ = MODELS[name]
    model = make_model(kind(**TINY, **settings))
    centroids = np.zeros((1, TINY["hidden_size"]), np.float32) if centroids is None else centroids
    return UnitModel(model.config.to_dict(), model.state_dict(), centroids, precision)


@pytest.mark.parametrize("precision", SPLIT)
@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_is_split(name, precision):
    linear = [key for key, module in make_unit_model(name, "fp32").named_modules() if isinstance(module, LINEAR)]
    modules = dict(make_unit_model(name, precision).named_modules())
    split = [key for key, module in modules.items() if isinstance(module, SplitLinear)]
    assert split == [*linear, "products"] and len(linear) >= 25
    assert {modules[key].parts.dtype for key in split} == {SPLIT[precision]}
    assert not any(isinstance(module, LINEAR) for module in modules.values())


@pytest.fixture(scope="module", params=["wav2vec2 pre-norm", "hubert pre-norm"])
def many_frames(request):
    """3,340 frames of noise, their float64 features and units, and how clear each unit is, as a share of the squares."""
    waveforms = random(2, 1669 * 320 + 400)
    waveforms *= torch.linspace(0.2, 1, waveforms.shape[1])
    frames = torch.full((2,), num_frames(waveforms.shape[1]))
    with torch.inference_mode():
        features = make_unit_model(request.param, "fp32").double().features(waveforms.double(), frames)
    rows = features.reshape(-1, features.shape[-1])
    rng = np.random.default_rng(0)
    picked = rows.numpy()[rng.integers(len(rows), size=60)]
    noise = 0.5 * rows.std(dim=0).numpy() * rng.standard_normal(picked.shape)
    centroids = (picked + noise).astype(np.float32)
    nearest = torch.cdist(rows, torch.from_numpy(centroids).double()).topk(2, largest=False)
    best, second = nearest.values.square().unbind(-1)
    margins = (second - best) / rows.square().sum(-1)
    return request.param, waveforms, frames, features, centroids, nearest.indices[:, 0], margins


# Float32 decides by its own rounding where the two distances are this close; parts of 16 bits leave four times as many such frames.
@pytest.mark.parametrize(
    ("precision", "error", "rounding"), [("fp16x3", 1e-6, FLOAT_ROUNDING), ("bf16x3", 1e-5, 4 * FLOAT_ROUNDING)]
)
def test_features_and_units_are_those_of_float64(many_frames, precision, error, rounding):
    name, waveforms, frames, expected, centroids, units, margins = many_frames
    model = make_unit_model(name, precision, centroids)
    features = []
    model.nearest = lambda found: features.append(found) or UnitModel.nearest(model, found)
    found, finite = model(waveforms, frames)
    assert finite.all()
    assert (features[0] - expected).norm() < error * expected.norm()
    clear = margins > rounding
    assert clear.sum() >= 0.96 * len(units) and len(units) == 3340
    assert torch.equal(found.reshape(-1)[clear].long(), units[clear])


@pytest.mark.parametrize("precision", SPLIT)
def test_precision_is_in_the_key_and_its_agreement_measured(unit_model, mini, tmp_path, monkeypatch, precision):
    from usdm_sft.audio.digests import audio_digests
    from usdm_sft.units.agreement import measure_agreement

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    fp32 = UnitTokenizer.from_pretrained(unit_model, device="cpu")
    tokenizer = fp32.with_settings(precision=precision)
    assert tokenizer.key == (*fp32.key[:2], fp32.settings | {"precision": precision})
    paths = [str(path) for path in sorted(mini.glob("corpus/data/*/*.wav"))][:10]
    found = measure_agreement(tokenizer, audio_digests(paths, tmp_path), tmp_path)
    assert (found["utterances"], found["share"]) == (10, 1.0) and found["equal_units"] == found["units"] > 100


@pytest.fixture
def cpu_with(monkeypatch):
    def set_capabilities(*names):
        capabilities = {name: name in names for name in ("avx2", "avx512_bf16", "amx_bf16", "avx512_fp16", "bf16")}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        check_cpu.cache_clear()

    yield set_capabilities
    check_cpu.cache_clear()


def test_bf16x3_is_refused_on_a_cpu_without_bf16_instructions(cpu_with, unit_model, monkeypatch):
    cpu_with("avx2")
    message = "precision bf16x3 needs bf16 instructions, which this CPU does not have: use fp32"
    with pytest.raises(ValueError, match=message):
        UnitTokenizer.from_pretrained(unit_model, device="cpu", precision="bf16x3")
    with pytest.raises(ValueError, match=message):
        prepare(data_dir="none", unit_model="none", output_path="none", precision="bf16x3", num_gpus=0)
    cpu_with("amx_bf16")
    assert UnitTokenizer.from_pretrained(unit_model, device="cpu", precision="bf16x3").settings["precision"] == "bf16x3"
    cpu_with()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    with pytest.raises(
        ValueError, match=r"needs a CPU with bf16 instructions, which torch .* does not report: use fp32"
    ):
        UnitTokenizer.from_pretrained(unit_model, device="cpu", precision="bf16x3")
    UnitTokenizer.from_pretrained(unit_model, device="cpu", precision="bf16")


EMULATED = "this CPU has no {0} instructions, so {0} is slower than fp32: use fp32"
WITHOUT_AMX = "precision bf16x3 is slower than fp32 on this CPU, which has no AMX: use fp32"


@pytest.mark.parametrize(
    ("names", "precision", "warnings"),
    [
        (["avx2"], "bf16", [EMULATED.format("bf16")]),
        (["avx512_bf16"], "bf16", []),
        (["bf16"], "bf16", []),
        (["avx512_bf16"], "fp16", [EMULATED.format("fp16")]),
        (["avx512_fp16"], "fp16", []),
        (["avx2"], "fp32", []),
        (["avx512_bf16"], "bf16x3", [WITHOUT_AMX]),
        (["avx512_bf16", "amx_bf16"], "bf16x3", []),
        (["bf16"], "bf16x3", []),
    ],
)
def test_one_warning_about_a_precision_that_is_slower_than_fp32(
    cpu_with, unit_model, caplog, names, precision, warnings
):
    cpu_with(*names)
    with caplog.at_level(logging.WARNING, precisions.__name__):
        for _ in range(2):
            UnitTokenizer.from_pretrained(unit_model, device="cpu", precision=precision)
    assert [record.getMessage() for record in caplog.records] == warnings
