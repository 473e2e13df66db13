"""Unit models with random weights for the benchmarks, and their cost. Needs torch, transformers and numpy only."""

import numpy as np
import torch
from transformers import AutoModel, Wav2Vec2Config

from tests.benchmarks.common import alternate, speechlike, timed
from usdm_sft.audio.frames import num_frames
from usdm_sft.units.model import UnitModel
from usdm_sft.units.precision import fp32_precision
from usdm_sft.units.transformers_folder import XLSR_1B

NUM_UNITS = 10_000


def random_model(device: torch.device, layers: int, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """Make config and weights of a model with the shape of XLS-R 1B."""
    config = XLSR_1B | {"num_hidden_layers": layers, "apply_spec_augment": False, "mask_time_prob": 0.0} | changes
    torch.manual_seed(0)
    with device:
        return config, AutoModel.from_config(Wav2Vec2Config(**config)).state_dict()


def cut(config: dict, weights: dict, layers: int) -> tuple[dict, dict]:
    dropped = {f"encoder.layers.{layer}." for layer in range(layers, config["num_hidden_layers"])}
    kept = {key: tensor for key, tensor in weights.items() if not any(key.startswith(prefix) for prefix in dropped)}
    return config | {"num_hidden_layers": layers}, kept


def centroids(config: dict, weights: dict, device: torch.device) -> np.ndarray:
    """Make centroids among the features: frames of the model itself with noise of half their spread."""
    rng = np.random.default_rng(1)
    model = UnitModel(config, dict(weights), np.zeros((1, config["hidden_size"]), np.float32)).to(device)
    audio = torch.from_numpy(speechlike(20 * 16_000, rng))[None].to(device)
    with torch.inference_mode():
        features = model.features(audio, torch.tensor([num_frames(audio.shape[1])]))[0].cpu().numpy()
    picked = features[rng.integers(len(features), size=NUM_UNITS)]
    return (picked + 0.5 * features.std(axis=0) * rng.standard_normal(picked.shape)).astype(np.float32)


def flops(num_samples: int, config: dict) -> tuple[float, float]:
    """Return the number of multiplications and additions in the front with k-means, and in the layers."""
    width, frames = config["hidden_size"], num_frames(num_samples)
    front, length, channels = 0.0, num_samples, 1
    for out, kernel, stride in zip(config["conv_dim"], config["conv_kernel"], config["conv_stride"], strict=True):
        length = (length - kernel) // stride + 1
        front += 2 * length * out * channels * kernel
        channels = out
    groups, kernel = config["num_conv_pos_embedding_groups"], config["num_conv_pos_embeddings"]
    front += 2 * frames * (channels * width + width * (width // groups) * kernel + width * NUM_UNITS)
    layer = 2 * frames * (4 * width * width + 2 * width * config["intermediate_size"]) + 4 * frames * frames * width
    return front, layer * config["num_hidden_layers"]


def matmul_rate(dtype: torch.dtype, tf32: bool, device: torch.device, size: int | None = None) -> float:
    """Measure the FLOP/s of a large matrix product, the median of five."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def run():
        with fp32_precision("tf32" if tf32 else "ieee"):
            a @ b
        synchronize(device)

    run()
    return 2 * size**3 / alternate({"": lambda: timed(run)}, 5)[""]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
