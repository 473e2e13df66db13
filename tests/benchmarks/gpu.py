"""Everything about the unit model that needs a GPU to know, in one run: exactness, speed, memory, and the settings to choose.

    python -m tests.benchmarks.gpu [--minutes 8] [--device cuda] [--tiny]

Needs torch, transformers and numpy only. The model has the shape of XLS-R 1B and random weights; the audio has DailyTalk's
distribution of lengths. When the minutes are over, what is left is skipped and named. `--device cpu --tiny` tries the script.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.benchmarks.common import alternate, lengths, machine, speechlike, table, timed
from tests.benchmarks.unit_models import centroids, flops, matmul_rate, random_model
from usdm_sft.audio.frames import num_frames
from usdm_sft.units.batches import Waveform, padding_share, plan_batches, prepare_waveform
from usdm_sft.units.model import UnitModel, start_units
from usdm_sft.units.precision import PRECISIONS
from usdm_sft.units.settings import BATCH_SECONDS, XLSR_LAYER

SHARD_UTTERANCES = 600  # a work shard of 64 dialogs
FRAMES_FOR_DEFAULT = 100_000
TINY = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _no_units(waveforms: list[Waveform], names: list[str]) -> list[np.ndarray]:
    """Return a number that no centroid has, so that frames whose features are not finite count as different."""
    return [np.full(num_frames(len(waveform.samples)), np.iinfo(np.uint16).max, np.uint16) for waveform in waveforms]


class Run:
    """What all measurements share: the model's weights, the audio and the units of fp32."""

    def __init__(self, device: torch.device, tiny: bool):
        self.device, self.tiny, self.cuda = device, tiny, device.type == "cuda"
        self.config, self.weights = random_model(device, 2 if tiny else XLSR_LAYER, **(TINY if tiny else {}))
        self.centroids = centroids(self.config, self.weights, device)
        rng = np.random.default_rng(0)
        audio = (speechlike(int(seconds * 16_000), rng) for seconds in lengths(10 if tiny else 700))
        self.waveforms = [prepare_waveform(torch.from_numpy(each), "") for each in audio]
        self.seconds = sum(each.num_samples for each in self.waveforms) / 16_000
        self.batch_seconds = BATCH_SECONDS[device.type]
        self.exact = self.units(self.model("fp32"), self.waveforms)
        self.speeds: dict[str, float] = {}
        self.agreements: dict[str, float] = {}

    def model(self, precision: str) -> UnitModel:
        return UnitModel(self.config, dict(self.weights), self.centroids, precision).to(self.device)

    def units(
        self, model: UnitModel, waveforms: list[Waveform], batch_seconds: float | None = None
    ) -> list[np.ndarray]:
        """Compute units as a work shard does, without reading."""
        found: list[np.ndarray] = []
        for start in range(0, len(waveforms), SHARD_UTTERANCES):
            some = waveforms[start : start + SHARD_UTTERANCES]
            seconds = batch_seconds or self.batch_seconds
            found += start_units(model, some, [""] * len(some), seconds, _no_units)()[0]
        return found

    def time(self, function: Callable[[], object], rounds: int = 3) -> float:
        """Return the median seconds of a call, after one call to warm up."""

        def run() -> None:
            function()
            self.wait()

        run()
        return alternate({"": lambda: timed(run)}, 1 if self.tiny else rounds)[""]

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the `count` first waveforms as a padded batch, and their numbers of frames."""
        some = self.waveforms[:count]
        padded = torch.nn.utils.rnn.pad_sequence([each.samples for each in some], batch_first=True)
        return padded.to(self.device), torch.tensor([num_frames(each.num_samples) for each in some])


def compare_with_cpu(run: Run) -> None:
    """Are float32's features those of the CPU? The largest difference relative to the largest value; at most 1e-4."""
    batch, frames = run.batch(4)
    on_cpu = UnitModel(run.config, {k: v.cpu() for k, v in run.weights.items()}, run.centroids)
    with torch.inference_mode():
        expected = on_cpu.features(batch.cpu(), frames)
    rows = []
    for precision in available(run):
        found = []
        model = run.model(precision)
        model.nearest = lambda features, found=found: found.append(features) or features[..., 0]  # type: ignore[method-assign]
        model(batch, frames)
        pairs = [(a[:n].cpu(), b[:n]) for a, b, n in zip(found[0], expected, frames.tolist(), strict=True)]
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        rows.append([precision, f"{error:.1e}", "yes" if error <= 1e-4 else "no"])
    table(["precision", "largest difference from float32 on the CPU", "at most 1e-4"], rows)


def measure_precisions(run: Run) -> None:
    """How fast is each precision, and how many of its units equal those of fp32?"""
    audio = [each.num_samples for each in run.waveforms]
    front, layers = np.sum([flops(length, run.config) for length in audio], axis=0)
    rows = []
    size = 64 if run.tiny else None  # products in emulated float16 are 400 times slower
    for name in available(run):
        precision = PRECISIONS[name]
        own = run.cuda and torch.cuda.memory_allocated()
        if run.cuda:
            torch.cuda.reset_peak_memory_stats()
        model = run.model(name)
        found = run.units(model, run.waveforms)
        memory = f"{(torch.cuda.max_memory_allocated() - own) / 2**30:.1f} GiB" if run.cuda else "not on the CPU"
        equal = sum(int((a == b).sum()) for a, b in zip(found, run.exact, strict=True))
        run.agreements[name] = equal / sum(map(len, run.exact))
        seconds = run.time(lambda model=model: run.units(model, run.waveforms))
        run.speeds[name] = run.seconds / seconds
        tf32 = precision.front == "tf32"
        half = matmul_rate(precision.split or precision.layers, tf32, run.device, size)
        rest = matmul_rate(torch.float32, tf32, run.device, size)
        floor = front / rest + layers * (1 if precision.split is None else 3) / half
        cells = [f"{run.speeds[name]:,.0f}", f"{run.agreements[name]:.4%}", f"{floor / seconds:.0%}", memory]
        rows.append([name, *cells, f"{half / 1e12:.3g}", f"{rest / 1e12:.3g}"])
        del model
    print(f"{len(run.waveforms)} utterances, {run.seconds:,.0f} s, {sum(map(len, run.exact)):,} frames; median of 3")
    columns = ["precision", "audio s / s", "units equal to fp32", "share of the roofline", "peak memory"]
    table([*columns, "TFLOP/s of products", "of float32"], rows)


def measure_host(run: Run) -> None:
    """Can the host start batches faster than the GPU finishes them? Time to submit a batch, and until it is done."""
    rows = []
    batch, frames = run.batch(4 if run.tiny else 26)  # some 80 s
    for name in available(run):
        model = run.model(name)
        done = run.time(lambda model=model: model(batch, frames))
        run.wait()
        submitted = timed(lambda model=model: model(batch, frames))
        run.wait()
        rows.append([name, f"{1000 * submitted:.1f} ms", f"{1000 * done:.1f} ms"])
    print(f"a batch of {batch.numel() / 16_000:.0f} s")
    table(["precision", "submitted after", "done after"], rows)


def sweep_batch_seconds(run: Run) -> None:
    """Which batch_seconds is fastest?"""
    samples = [each.num_samples for each in run.waveforms]
    rows = []
    for name in [each for each in ("fp32", "fp16x3", "fp16") if each in available(run)]:
        model = run.model(name)
        for seconds in (5, 10) if run.tiny else (80, 160, 320, 640):
            took = run.time(lambda model=model, seconds=seconds: run.units(model, run.waveforms, seconds))
            shards = [samples[start : start + SHARD_UTTERANCES] for start in range(0, len(samples), SHARD_UTTERANCES)]
            padding = padding_share(shards, seconds, run.device.type)
            batches = sum(len(plan_batches(shard, seconds, run.device.type)) for shard in shards)
            rows.append([name, seconds, batches, f"{padding:.1%}", f"{run.seconds / took:,.0f}"])
    table(["precision", "batch_seconds", "batches", "padding", "audio s / s"], rows)


def compare_attention(run: Run) -> None:
    """Which attention is fastest, and does cuDNN's pay for each new shape?"""
    heads, width = run.config["num_attention_heads"], run.config["hidden_size"] // run.config["num_attention_heads"]
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if run.cuda else (torch.float32,):
        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.MATH,
        ):
            for masked in (True, False):
                label = [str(dtype).removeprefix("torch."), backend.name, "yes" if masked else "no"]
                try:
                    rows.append(label + time_attention(run, dtype, backend, masked, heads, width))
                except RuntimeError as error:
                    rows.append([*label, "not available: " + str(error).split("\n")[0][:60], "-"])
    table(["type", "backend", "mask", "ms at one shape", "ms at a new shape"], rows)


def time_attention(
    run: Run, dtype: torch.dtype, backend: SDPBackend, masked: bool, heads: int, width: int
) -> list[str]:
    def attend(frames: int) -> None:
        query = torch.randn(20, heads, frames, width, device=run.device, dtype=dtype)
        mask = (torch.arange(frames, device=run.device) < frames - 3)[None, None, None] if masked else None
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)

    same = run.time(lambda: attend(200), 5)
    shapes: Iterator[int] = iter(range(201, 300))
    return [f"{1000 * same:.2f}", f"{1000 * run.time(lambda: attend(next(shapes)), 5):.2f}"]


def compare_packed(run: Run) -> None:
    """Would packed frames pay? Linear layers over padded frames, against fewer frames and the copies around attention."""
    width, wide = run.config["hidden_size"], run.config["intermediate_size"]
    samples = [each.num_samples for each in run.waveforms]
    share = padding_share([samples], BATCH_SECONDS["cuda"], "cuda")
    padded = 200 if run.tiny else 4000
    packed = round(padded * (1 - share))
    rows = []
    for name in available(run):
        layer = run.model(name).layers[0]
        attention, feed_forward = layer.attention, layer.feed_forward
        dtype = PRECISIONS[name].layers

        def compute(frames: int, copies: bool, attention=attention, feed_forward=feed_forward, dtype=dtype) -> None:
            rows = torch.randn(1, frames, width, device=run.device, dtype=dtype)
            places = torch.arange(frames, device=run.device)
            with torch.inference_mode():
                projected = [each(rows)[0] for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
                if copies:  # into zeros for attention, and back
                    projected = [each.new_zeros(padded, width).index_copy_(0, places, each) for each in projected]
                    projected = [projected[0].index_select(0, places), *projected[1:]]
                attention.out_proj(projected[0][None])
                feed_forward(rows)

        times = [run.time(lambda: compute(padded, False), 5), run.time(lambda: compute(packed, True), 5)]
        rows.append([name, *(f"{1000 * each:.2f}" for each in times)])
    print(f"{padded} frames with {share:.1%} padding, layers of {width} and {wide}, without attention itself")
    table(["precision", "ms padded", "ms packed, with copies"], rows)


def recommend(run: Run) -> None:
    """Name the fastest precision with all units equal."""
    frames = sum(map(len, run.exact))
    exact = [name for name, share in run.agreements.items() if share == 1]
    best = max(exact, key=run.speeds.__getitem__, default=None)
    if best is None:
        print("no precision was measured")
    elif frames < FRAMES_FOR_DEFAULT or not run.cuda:
        print(
            f"{best} is the fastest with all {frames:,} units equal; a default needs CUDA and {FRAMES_FOR_DEFAULT:,} frames"
        )
    else:
        print(f"recommended default on CUDA: {best}, {run.speeds[best]:,.0f} audio s / s, all {frames:,} units equal")


def available(run: Run) -> list[str]:
    return [name for name in PRECISIONS if run.cuda or name != "tf32"]


PARTS = (
    compare_with_cpu,
    measure_precisions,
    recommend,
    measure_host,
    sweep_batch_seconds,
    compare_attention,
    compare_packed,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and little audio, to try the script")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device: use a machine with one, or try the script with --device cpu --tiny")
    end = time.monotonic() + 60 * args.minutes
    print(
        f"{machine()}; torch {torch.__version__}, {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}"
    )
    if device.type != "cuda":
        print(
            "skipped on the CPU: tf32, peak memory; precisions without instructions are emulated, so speeds mean nothing"
        )
    run = Run(device, args.tiny)
    for part in PARTS:
        title = str(part.__doc__).split("\n")[0]
        print(f"\n## {title}\n")
        if time.monotonic() > end:
            print(f"skipped: the {args.minutes:g} minutes are over")
            continue
        part(run)


if __name__ == "__main__":
    main()
