"""The unit model on the CPU: packs side by side give the features of utterances alone, with either library's matrix product."""

import threading
import time
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from threadpoolctl import ThreadpoolController
from transformers import HubertConfig

from tests.units.test_other_models import LENGTHS, MODELS, TINY, make_model, make_waveforms, save
from usdm_sft.audio.frames import FRAMINGS, SAMPLE_RATE, num_frames
from usdm_sft.units import cpu
from usdm_sft.units.batches import Waveform, normalize
from usdm_sft.units.convert import convert
from usdm_sft.units.cpu import FrontEnd, NumpyLinear, side_by_side
from usdm_sft.units.model import UnitModel, start_units
from usdm_sft.units.precision import PRECISIONS
from usdm_sft.units.tokenizer import UnitTokenizer


def make_unit_model(name, centroids=None):
    kind, settings, _ = MODELS[name]
    model = make_model(kind(**TINY, **settings))
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((60, TINY["hidden_size"])).astype(np.float32) if centroids is None else centroids
    return UnitModel(model.config.to_dict(), model.state_dict(), centroids)


@pytest.fixture
def numpy_products(monkeypatch):
    """Let NumPy multiply on any processor, and count its products."""
    products = []

    def matmul(left, right, out):
        products.append(left.shape)
        return np.matmul(left, right, out=out)

    monkeypatch.setattr(cpu, "np", SimpleNamespace(matmul=matmul, errstate=np.errstate))
    monkeypatch.setattr(cpu, "numpy_is_faster", lambda: True)
    monkeypatch.setattr("usdm_sft.units.model.numpy_is_faster", lambda: True)
    return products


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@torch.inference_mode()
def features_of_a_pack(model, rows):
    """Return the features of rows in one pack and, in float64, of each row alone."""
    frames = [num_frames(length) for length in LENGTHS]  # of which an appended sample completes none
    pack = model.packed_features([model.front_end(row) for row in rows], frames)
    model = model.double()
    alone = [
        model.features(row.double()[None], torch.tensor([count]))[0] for row, count in zip(rows, frames, strict=True)
    ]
    return pack, alone


@pytest.mark.parametrize("product", ["torch", "numpy"])
@pytest.mark.parametrize("name", MODELS)
def test_features_of_a_pack_are_those_of_float64(request, name, product):
    if product == "numpy":
        products = request.getfixturevalue("numpy_products")
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        request.addfinalizer(lambda: torch.set_num_threads(before))
    rows = [normalize(torch.from_numpy(waveform)) for waveform in make_waveforms()]
    model = make_unit_model(name)
    for found, expected in zip(*features_of_a_pack(model, rows), strict=True):
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    if product == "numpy":
        layers = [module for module in model.modules() if isinstance(module, NumpyLinear)]
        assert len(products) == (1 + len(LENGTHS)) * len(layers) and len(layers) >= 1 + 6 * TINY["num_hidden_layers"]


def test_pack_needs_no_layer_that_passes_arguments_on(monkeypatch):
    """As those of transformers 5.0, whose attention gets the mask alone."""
    rows = [normalize(torch.from_numpy(waveform)) for waveform in make_waveforms()]
    model = make_unit_model("wav2vec2 pre-norm")
    for layer in model.layers:
        monkeypatch.setattr(
            layer,
            "forward",
            partial(lambda whole, hidden, attention_mask: whole(hidden, attention_mask), layer.forward),
        )
    for found, expected in zip(*features_of_a_pack(model, rows), strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize(
    ("kernel", "stride"), [((10, 3), (5, 2)), ((4, 5), (4, 2)), ((5, 2), (2, 1)), ((3, 7), (1, 3))]
)
def test_front_end_equals_that_of_transformers(kernel, stride, norm):
    shape = {"conv_dim": [6, 10], "conv_kernel": kernel, "conv_stride": stride, "num_feat_extract_layers": 2}
    config = HubertConfig(**TINY | shape, feat_extract_norm=norm, conv_bias=norm == "layer")
    extractor = make_model(config).feature_extractor
    samples = torch.from_numpy(make_waveforms()[-1])
    with torch.inference_mode():
        found = FrontEnd(extractor)(samples)
        expected = extractor.double()(samples.double()[None])[0].T
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_units_do_not_depend_on_threads_and_product(tmp_path, two_threads, request):
    kind, settings, _ = MODELS["wav2vec2 pre-norm"]
    folder = save(make_model(kind(**TINY, **settings)), tmp_path / "model")
    np.save(tmp_path / "kmeans.npy", np.random.default_rng(0).standard_normal((60, TINY["hidden_size"])).astype("f4"))
    made = convert(folder, tmp_path / "kmeans.npy", tmp_path / "unit_model", layer=2)
    waveforms = [waveform for seed in range(5) for waveform in make_waveforms(seed)]

    def tokenize():
        tokenizer = UnitTokenizer.from_pretrained(made, device="cpu", batch_seconds=2)
        return [units.tolist() for units in tokenizer.tokenize_waveforms(waveforms)]

    side_by_side = tokenize()
    assert torch.get_num_threads() == 2
    products = request.getfixturevalue("numpy_products")
    assert tokenize() == side_by_side and len(products) > 13
    torch.set_num_threads(1)
    assert tokenize() == side_by_side


@pytest.mark.parametrize(
    ("cpuinfo", "libraries", "expected"),
    [("AuthenticAMD", 1, True), ("AuthenticAMD", 0, False), ("GenuineIntel", 1, False), (None, 1, False)],
)
def test_vendor_decides_which_library_multiplies(monkeypatch, cpuinfo, libraries, expected):
    def read_text(path):
        assert str(path) == "/proc/cpuinfo"
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nvendor_id\t: {cpuinfo}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    controller = SimpleNamespace(select=lambda internal_api: [None] * libraries * (internal_api == "openblas"))
    monkeypatch.setattr(cpu, "ThreadpoolController", lambda: controller)
    assert cpu.numpy_is_faster.__wrapped__() is expected


def test_products_that_are_not_finite_warn_of_nothing(numpy_products, two_threads, recwarn):
    torch.set_num_threads(1)
    found = cpu.multiply(torch.tensor([[torch.inf, -torch.inf], [3e38, 3e38]]), torch.tensor([[1.0, 1.0]]))
    assert found[0].isnan().all() and found[1].isinf().all() and numpy_products == [(2, 2)]
    assert not recwarn.list


def num_openblas_threads():
    return {each["num_threads"] for each in ThreadpoolController().select(internal_api="openblas").info()}


@pytest.mark.parametrize("num_threads", [1, 2])
def test_numpy_has_its_threads_back_after_callers_that_overlap(numpy_products, two_threads, num_threads):
    before, seen = num_openblas_threads(), []
    assert before, "NumPy's wheels have OpenBLAS"

    def compute():
        torch.set_num_threads(num_threads)
        side_by_side(
            lambda item, stopped: seen.append(num_openblas_threads()) or time.sleep(0.01), range(4), num_threads
        )

    callers = [threading.Thread(target=compute) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert seen == [{1}] * 12 and num_openblas_threads() == before


def test_utterances_longer_than_a_pack_are_computed_one_at_a_time(two_threads):
    seconds, at_once = [40, 3, 17, 2, 16], []

    class Model(UnitModel):  # the other models compute each utterance alone
        device, precision = torch.device("cpu"), PRECISIONS["fp32"]

        def __init__(self):
            pass

        def forward_pack(self, rows, frames, stopped):
            at_once.append(([len(row) // SAMPLE_RATE for row in rows], torch.get_num_threads()))
            return [torch.zeros(count, dtype=torch.uint16) for count in frames], torch.ones(len(rows), dtype=torch.bool)

    waveforms = [Waveform(torch.zeros(length * SAMPLE_RATE), length * SAMPLE_RATE) for length in seconds]
    found, _ = start_units(Model(), waveforms, [""] * len(seconds), 60, in_fp32=None)()
    assert [len(units) for units in found] == [FRAMINGS["fairseq"].count(length * SAMPLE_RATE) for length in seconds]
    assert at_once[:2] == [([40], 2), ([17], 2)]
    assert sorted(at_once[2:]) == [([3, 2], 1), ([16], 1)]


def test_calls_side_by_side_have_one_thread_each(two_threads):
    barrier = threading.Barrier(2, timeout=60)

    def work(item, stopped):
        if item < 2:
            barrier.wait()  # both are at work
        return item, torch.get_num_threads(), threading.get_ident()

    results = side_by_side(work, range(4), at_once=2)
    assert [result[:2] for result in results] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert len({thread for _, _, thread in results}) == 2 and torch.get_num_threads() == 2
    [alone] = side_by_side(work, [5], at_once=2)
    assert alone == (5, 2, threading.get_ident())


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_failed_call_stops_the_others(two_threads, error):
    begun = []

    def work(item, stopped):
        begun.append(item)
        if item == 0:
            raise error
        assert stopped.wait(60)

    with pytest.raises(error):
        side_by_side(work, range(10), at_once=2)
    assert set(begun) <= {0, 1, 2} and torch.get_num_threads() == 2


def test_stopped_pack_ends_before_its_next_layer():
    model, stopped = make_unit_model("hubert post-norm"), threading.Event()
    begun = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *args: (begun.append(args), stopped.set())[0])
    with pytest.raises(CancelledError):
        model.forward_pack([torch.zeros(400)], [1], stopped)
    assert len(begun) == 1
