"""Unit tokenization: audio seconds per second for each precision, and for the reference's way in the same run.

    python -m tests.benchmarks.units [--utterances 2000] [--baseline_utterances 60] [--rounds 3] [--precisions fp32 fp16 ...]

The reference computes all 48 layers in float32, one utterance at a time. On the CPU, fp32 runs with the matrix products of torch and of
NumPy; the package chooses one of them by the processor's vendor. The model has the shape of XLS-R 1B and random weights; the audio has
DailyTalk's distribution of lengths. Needs torch, transformers and numpy besides the project.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.common import alternate, lengths, machine, speechlike, table, timed
from tests.benchmarks.unit_models import centroids, cut, flops, matmul_rate, random_model
from usdm_sft.units import cpu
from usdm_sft.units import model as unit_model
from usdm_sft.units.batches import padding_share, prepare_waveform
from usdm_sft.units.model import UnitModel
from usdm_sft.units.precision import PRECISIONS, Precision
from usdm_sft.units.settings import BATCH_SECONDS, XLSR_LAYER
from usdm_sft.units.tokenizer import UnitTokenizer
from usdm_sft.units.transformers_folder import XLSR_1B

SHARD_UTTERANCES = 600  # 64 dialogs
# Candidates besides the precisions of the package, with TF32 in the front.
PRECISIONS |= {
    "fp16, tf32 front": Precision(torch.float16, "tf32"),
    "bf16, tf32 front": Precision(torch.bfloat16, "tf32"),
}


def tokenizer(
    config: dict, weights: dict, kmeans: np.ndarray, precision: str, device: torch.device, batch_seconds: float
):
    settings = {"device": device.type, "precision": precision, "resampler": "soxr", "batch_seconds": batch_seconds}
    made = UnitTokenizer(Path(), "benchmark", settings, str(device))
    made.normalization = "fairseq"  # this model has no folder that names it
    made._model = UnitModel(config, dict(weights), kmeans, precision).to(device)
    return made


def own_bytes(which: UnitTokenizer) -> int:
    tensors = [*which.model.parameters(), *which.model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def multiplying(*, with_numpy: bool) -> Iterator[None]:
    """Let one library multiply, whatever processor this is."""
    chosen = cpu.numpy_is_faster
    cpu.numpy_is_faster = unit_model.numpy_is_faster = lambda: with_numpy
    try:
        yield
    finally:
        cpu.numpy_is_faster = unit_model.numpy_is_faster = chosen


def numpy_rate(size: int = 2048) -> float:
    """Measure the FLOP/s of NumPy's large float32 matrix products, one thread each as in packs, the median of five."""
    a, b = (np.random.default_rng(0).standard_normal((size, size)).astype(np.float32) for _ in range(2))
    at_once = torch.get_num_threads()
    with multiplying(with_numpy=True):
        cost = alternate({"": lambda: timed(lambda: cpu.side_by_side(lambda *_: a @ b, range(at_once), at_once))}, 5)
    return at_once * 2 * size**3 / cost[""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--utterances", type=int, default=2000 if cuda else 10)
    parser.add_argument("--baseline_utterances", type=int, default=60 if cuda else 10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_seconds", type=float, default=BATCH_SECONDS["cuda" if cuda else "cpu"])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS) if cuda else ["fp32", "bf16"])
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    rng = np.random.default_rng(0)
    audio = [speechlike(int(seconds * 16_000), rng) for seconds in lengths(args.utterances)]
    waveforms = [prepare_waveform(torch.from_numpy(each), "") for each in audio]  # prepare() does this ahead in threads
    samples = [waveform.num_samples for waveform in waveforms]
    work_shards = [slice(start, start + SHARD_UTTERANCES) for start in range(0, len(waveforms), SHARD_UTTERANCES)]
    short = waveforms[: args.baseline_utterances]
    seconds, short_seconds = sum(samples) / 16_000, sum(samples[: len(short)]) / 16_000

    def tokenize(which: UnitTokenizer) -> list[np.ndarray]:
        return [
            units for part in work_shards for units in which._tokenize(waveforms[part], [""] * len(waveforms[part]))[0]
        ]

    whole, weights = random_model(device, XLSR_1B["num_hidden_layers"])
    config, needed = cut(whole, weights, XLSR_LAYER)
    kmeans = centroids(config, needed, device)
    reference = tokenizer(whole, weights, kmeans, "fp32", device, args.batch_seconds)
    ours = {name: tokenizer(config, needed, kmeans, name, device, args.batch_seconds) for name in args.precisions}
    uses_numpy = dict.fromkeys(ours, cpu.numpy_is_faster())
    if not cuda and "fp32" in ours:
        other = "fp32, product of torch" if cpu.numpy_is_faster() else "fp32, product of NumPy"
        uses_numpy[other] = not cpu.numpy_is_faster()
        with multiplying(with_numpy=uses_numpy[other]):
            ours[other] = tokenizer(config, needed, kmeans, "fp32", device, args.batch_seconds)
    expected = [unit_model._forward(ours["fp32"].model, [each])[0][0].cpu().numpy() for each in waveforms]

    agreement, memory = {}, {}
    for name, each in ours.items():  # also the warm-up
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            others = torch.cuda.memory_allocated() - own_bytes(each)
        with multiplying(with_numpy=uses_numpy[name]):
            found = tokenize(each)
        memory[name] = f"{(torch.cuda.max_memory_allocated() - others) / 2**30:.1f} GiB" if cuda else "-"
        equal = sum(int((a == b).sum()) for a, b in zip(found, expected, strict=True))
        agreement[name] = equal / sum(map(len, expected))
    unit_model._forward(reference.model, [short[0]])

    def in_batches(name: str) -> float:
        with multiplying(with_numpy=uses_numpy[name]):
            return timed(lambda: tokenize(ours[name])) / seconds

    def one_at_a_time(which: UnitTokenizer) -> float:
        return timed(lambda: [unit_model._forward(which.model, [each])[0].cpu() for each in short]) / short_seconds

    runs = {"48 layers, one at a time": lambda: one_at_a_time(reference)}
    if "fp32" in ours:
        runs["35 layers, one at a time"] = lambda: one_at_a_time(ours["fp32"])
    runs |= {name: lambda name=name: in_batches(name) for name in ours}
    cost = alternate(runs, args.rounds)  # seconds per second of audio

    rates = {}
    for name in args.precisions:
        precision = PRECISIONS[name]
        for part in (
            (precision.split or precision.layers, precision.front == "tf32"),
            (torch.float32, precision.front == "tf32"),
        ):
            rates.setdefault(part, matmul_rate(*part, device))
    if not cuda:
        rates[(torch.float32, False)] = max(rates[(torch.float32, False)], numpy_rate())
    rows = []
    baseline = cost["48 layers, one at a time"]
    for name, each in cost.items():
        row = [name, f"{1 / each:,.1f}", f"{baseline / each:.2f}"]
        if name in ours:
            precision = PRECISIONS[name.split(",")[0] if name not in PRECISIONS else name]
            front, layers = np.sum([flops(length, config) for length in samples], axis=0) / seconds
            tf32 = precision.front == "tf32"
            floor = front / rates[(torch.float32, tf32)]
            floor += (
                layers / rates[(precision.layers, tf32)]
                if precision.split is None
                else 3 * layers / rates[(precision.split, tf32)]
            )
            row += [f"{floor / each:.0%}", memory[name], f"{agreement[name]:.2%}"]
        rows.append(row + ["-"] * (6 - len(row)))

    print(f"{machine()}; torch {torch.__version__}" + (f", {torch.cuda.get_device_name()}" if cuda else ""))
    print(f"{len(waveforms)} utterances, {seconds:,.0f} s; {len(short)} of {short_seconds:,.0f} s one at a time")
    print(
        f"padding {padding_share((samples[part] for part in work_shards), args.batch_seconds, device.type):.1%} in batches of {args.batch_seconds:g} s; ",
        end="",
    )
    print("; ".join(f"{d} {'tf32 ' if t else ''}{rate / 1e12:.2f} TFLOP/s" for (d, t), rate in rates.items()))
    print(f"median of {args.rounds} alternating rounds\n")
    table(
        [
            "",
            "audio s / s",
            "speed relative to the reference's way",
            "of the roofline",
            "peak memory",
            "units equal to fp32",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
