"""Forward passes on CUDA without a GPU: fake tensors check devices, shapes and the types of matrix products, and compute nothing."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.units.test_other_models import MODELS, TINY, make_model
from usdm_sft.audio.frames import num_frames
from usdm_sft.units.model import UnitModel
from usdm_sft.units.precision import PRECISIONS

# Samples of each row; an odd number gets one more. 16,079 is 79 modulo 320: the appended sample completes a masked frame.
NUM_LAYERS = 2
BATCHES = {"padded": (16_000, 15_040, 9_999), "single": (16_000,), "appended sample": (16_079,)}
LINEAR, ATTENTION = "aten.linear.default", "aten.scaled_dot_product_attention.default"
MATMUL, SPLIT = "aten.matmul.default", "aten.mm.dtype"


class Products(TorchDispatchMode):
    """Count matrix products by operator and type of their factors, which must agree; fake tensors do not check it."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if str(operator) in (LINEAR, ATTENTION, MATMUL, SPLIT):
            tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
            factors = {each.dtype for each in tensors if each.is_floating_point()}
            assert len(factors) == 1, f"factors of {operator} have the types {factors}"
            if operator is torch.ops.aten.mm.dtype:
                assert arguments[2] == torch.float32
            self.found[str(operator), *factors] += 1
        return operator(*arguments, **options or {})


class WithoutGuards(TorchFunctionMode):
    """Replace the methods of tensors that need a CUDA build of torch, even for fake tensors, by operators that do not."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        name, tensor = getattr(function, "__name__", ""), arguments[0] if arguments else None
        if isinstance(tensor, torch.Tensor):
            if name == "__getitem__":
                return self.view(tensor, arguments[1])
            if name == "__setitem__":
                return torch.ops.aten.copy(self.view(tensor, arguments[1]), arguments[2])
            if name == "copy_":
                return torch.ops.aten.copy(*arguments)
            if name == "to" and not isinstance(arguments[1], torch.dtype):
                return torch.ops.aten._to_copy(tensor, device=torch.device(arguments[1]))
            if name == "tolist":  # of the numbers of frames, which are not fake
                with _disable_current_modes():
                    return tensor.tolist()
            if name == "__invert__":
                return torch.ops.aten.bitwise_not(tensor)
            if name == "contiguous":
                return torch.ops.aten.clone(tensor, memory_format=torch.contiguous_format)
            if name == "conv1d":
                return self.convolve(*arguments)
        return function(*arguments, **options or {})

    @staticmethod
    def convolve(inputs, weight, bias, stride, padding, dilation, groups):
        tensors = [each for each in (inputs, weight, bias) if each is not None]
        assert len({(each.device, each.dtype) for each in tensors}) == 1
        assert inputs.shape[1] == weight.shape[1] * groups and dilation == (1,)
        length = (inputs.shape[2] + 2 * padding[0] - weight.shape[2]) // stride[0] + 1
        return inputs.new_empty((len(inputs), len(weight), length))

    @staticmethod
    def view(tensor, index):
        dim = 0
        for each in index if isinstance(index, tuple) else (index,):
            if each is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(each, slice):
                assert each.step is None
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, each.start, each.stop)
            else:
                tensor, dim = tensor.select(dim, each), dim - 1
            dim += 1
        return tensor


def model_on_cuda(name, precision, mode):
    kind, settings, _ = MODELS[name]
    model = make_model(kind(**TINY | {"num_hidden_layers": NUM_LAYERS}, **settings))
    made = UnitModel(
        model.config.to_dict(), model.state_dict(), np.zeros((60, TINY["hidden_size"]), np.float32), precision
    )
    with mode, WithoutGuards():
        for module in made.modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    tensors[key] = None if tensor is None else mode.from_tensor(tensor).to("cuda")
    return made


def run(model, lengths, mode):
    """Run a forward pass; return units, marks of finite rows, and the matrix products."""
    frames = torch.tensor([num_frames(n) for n in lengths])
    even = [n + n % 2 for n in lengths]
    with mode, Products() as products, WithoutGuards(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*CUDA is not available")  # of autocast
        if model.rows_alone:
            waveforms = [torch.empty(n, device="cuda") for n in even]
        else:
            waveforms = torch.empty(len(even), max(even), device="cuda")
        return *model(waveforms, frames), products.found


# Types differ by precision and layers by model; these cover each layer with each way to compute a product.
CASES = {(name, precision) for name in MODELS for precision in ("fp32", "fp16", "fp16x3")}
CASES |= {("wav2vec2 pre-norm", precision) for precision in PRECISIONS}


@pytest.mark.parametrize(("name", "precision"), sorted(CASES))
def test_forward_pass_on_cuda(name, precision):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = model_on_cuda(name, precision, mode)
    for batch, lengths in BATCHES.items():
        units, finite, products = run(model, lengths, mode)
        shape = (len(lengths), num_frames(max(n + n % 2 for n in lengths)))
        assert (units.shape, units.dtype, units.device.type) == (shape, torch.uint16, "cuda"), batch
        assert (finite.shape, finite.dtype, finite.device.type) == (shape[:1], torch.bool, "cuda"), batch
        types, in_layers = PRECISIONS[precision], 6 * NUM_LAYERS
        in_float32 = 1 + (2 * NUM_LAYERS if "adapters in the layers" in name else 0)  # the projection
        expected = Counter({(ATTENTION, types.layers): NUM_LAYERS})
        if types.split is None:
            expected += Counter({(LINEAR, types.layers): in_layers}) + Counter({(LINEAR, torch.float32): in_float32})
            expected[MATMUL, torch.float32] = 1  # k-means
        else:
            expected[SPLIT, types.split] = in_layers + in_float32 + 1
        assert products == expected, batch


def put_on_the_cpu(tensor):
    return tensor.to("cpu")


def widen(tensor):
    return tensor.float()


@pytest.mark.parametrize(
    ("precision", "change", "module", "key", "message"),
    [
        ("fp32", put_on_the_cpu, "", "centroid_norms", "found at least two devices, cuda:0 and cpu"),
        ("fp16x3", put_on_the_cpu, "layers.1.attention.k_proj", "parts", "found at least two devices, cuda:0 and cpu"),
        ("fp16", widen, "layers.1.attention.k_proj", "weight", "factors of aten.linear.default have the types"),
    ],
)
def test_wrong_device_or_type_of_a_single_tensor_is_found(precision, change, module, key, message):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = model_on_cuda("wav2vec2 pre-norm", precision, mode)
    changed = model.get_submodule(module)
    tensors = changed._buffers if key in changed._buffers else changed._parameters
    with mode, WithoutGuards():
        tensors[key] = change(tensors[key])
    with pytest.raises((RuntimeError, AssertionError), match=message):
        run(model, BATCHES["padded"], mode)
