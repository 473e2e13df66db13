"""Units of HuBERT-base on the CPU: this package, and the way of slamkit, in one run on the same weights and audio.

    python -m tests.benchmarks.peer [--utterances 100] [--batch_size 8] [--rounds 3]

slamkit (slp-rl/slamkit, hubert_feature_extractor.py and extract_features.py) sorts recordings by length, pads a batch with zeros, runs all
layers with `output_hidden_states` and without a mask, and takes the nearest centroids of one layer with scikit-learn. It also pads each
waveform by 40 samples at both ends, which is left out here so that both compute the same frames. scikit-learn's `predict` is replaced
by torch's product, which is not slower. Weights are random; the audio has DailyTalk's distribution of lengths.
"""

import argparse

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import HubertConfig, HubertModel

from tests.benchmarks.common import alternate, lengths, machine, speechlike, table, timed
from tests.benchmarks.units import tokenizer
from usdm_sft.audio.frames import num_frames
from usdm_sft.units.batches import Waveform
from usdm_sft.units.settings import BATCH_SECONDS

LAYER, NUM_UNITS = 9, 500  # of slamkit's default


class Peer:
    """Units as slamkit computes them."""

    def __init__(self, model: HubertModel, centroids: np.ndarray, batch_size: int):
        self.model, self.centroids, self.batch_size = model, torch.from_numpy(centroids), batch_size

    @torch.inference_mode()
    def features(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch, output_hidden_states=True).hidden_states[LAYER]

    @torch.inference_mode()
    def tokenize(self, rows: list[torch.Tensor]) -> list[np.ndarray]:
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        found = [np.zeros(0)] * len(rows)
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            features = self.features(pad_sequence([rows[row] for row in some], batch_first=True))
            distances = self.centroids.square().sum(1) - 2 * features @ self.centroids.T
            for row, units in zip(some, distances.argmin(-1).numpy(), strict=True):
                found[row] = units[: num_frames(len(rows[row]))]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = [torch.from_numpy(speechlike(int(seconds * 16_000), rng)) for seconds in lengths(args.utterances)]
    torch.manual_seed(0)
    model = HubertModel(HubertConfig()).eval()
    peer = Peer(model, np.zeros((1, 768), np.float32), args.batch_size)
    frames = torch.cat([peer.features(row[None])[0] for row in rows[:10]]).numpy()
    picked = frames[rng.choice(len(frames), NUM_UNITS, replace=False)]
    kmeans = (picked + 0.5 * frames.std(axis=0) * rng.standard_normal(picked.shape)).astype(np.float32)
    peer = Peer(model, kmeans, args.batch_size)
    alone = Peer(model, kmeans, 1).tokenize(rows)

    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"encoder.layers.{layer}.") for layer in range(LAYER, 12))
    }
    config = model.config.to_dict() | {"num_hidden_layers": LAYER}
    ours = tokenizer(config, weights, kmeans, "fp32", torch.device("cpu"), BATCH_SECONDS["cpu"])
    waveforms = [Waveform(row, len(row)) for row in rows]
    ours.normalization = "none"

    def tokenize() -> list[np.ndarray]:
        return ours._tokenize(waveforms, [""] * len(waveforms))[0]

    found = {"this package": tokenize(), f"slamkit's way, batches of {args.batch_size}": peer.tokenize(rows)}
    cost = alternate(
        dict(zip(found, (lambda: timed(tokenize), lambda: timed(lambda: peer.tokenize(rows))), strict=True)),
        args.rounds,
    )
    total = sum(map(len, alone))
    print(f"{machine()}; torch {torch.__version__}")
    print(
        f"{len(rows)} utterances, {sum(map(len, rows)) / 16_000:,.0f} s, {total:,} units; median of {args.rounds} alternating rounds\n"
    )
    table(
        ["", "units per second", "units that differ from those of single utterances"],
        [
            [
                name,
                f"{total / cost[name]:,.0f}",
                f"{sum(int((a != b).sum()) for a, b in zip(units, alone, strict=True)):,}",
            ]
            for name, units in found.items()
        ],
    )


if __name__ == "__main__":
    main()
