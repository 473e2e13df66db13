"""The promise of a unit model, measured: an utterance has the same units whatever is computed beside it, and how a faster setting changes them.

Each comparison is with the units of each file alone: one file in its own call, in fp32, resampled with soxr.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from usdm_sft.audio.digests import check_audio
from usdm_sft.audio.frames import num_frames
from usdm_sft.audio.reading import read_waveform
from usdm_sft.units.base import KMeansModel
from usdm_sft.units.batches import prepare_waveform
from usdm_sft.units.families import check_precision
from usdm_sft.units.model import UnitModel
from usdm_sft.units.precision import check_cpu, own_settings
from usdm_sft.units.settings import PrecisionName, make_settings
from usdm_sft.units.tokenizer import UnitTokenizer

IN_BATCHES, BESIDE = "in batches", "beside a longer utterance"

# Two centroids are equally near if their squared distances differ by less, as a share of the squares that these are the sum of. A
# float32 sum of 1,000 products has this error; features differ by about as much.
FLOAT_ROUNDING = 5e-6


class Comparison(NamedTuple):
    """The units of all files in one setting, compared with those of each file alone.

    Attributes:
        name: The setting.
        num_units: Number of units; 0 if it was not measured.
        num_equal: Number of units that are equal.
        num_ties: Number of units that differ where the two centroids are equally near within float rounding.
        problem: Why it was not measured.
    """

    name: str
    num_units: int = 0
    num_equal: int = 0
    num_ties: int = 0
    problem: str | None = None

    @property
    def num_changed(self) -> int:
        """Number of units that differ and are no ties."""
        return self.num_units - self.num_equal - self.num_ties

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        if self.problem is not None:
            return {"name": self.name, "problem": self.problem}
        share = self.num_equal / self.num_units
        return {
            "name": self.name, "units": self.num_units, "equal_units": self.num_equal, "ties": self.num_ties, "share": share
        }  # fmt: skip


class Agreement(NamedTuple):
    """What `measure` found."""

    device: str
    num_files: int
    comparisons: list[Comparison]

    @property
    def keeps_promise(self) -> bool:
        """Whether batches change no unit but ties."""
        return all(each.num_changed == 0 for each in self.comparisons if each.name in (IN_BATCHES, BESIDE))

    def describe(self) -> dict[str, Any]:
        """Return JSON values."""
        comparisons = [each.describe() for each in self.comparisons]
        return {
            "device": self.device, "files": self.num_files, "keeps_promise": self.keeps_promise, "comparisons": comparisons
        }  # fmt: skip

    def table(self) -> list[str]:
        """Return the lines of a table, and a last one that says whether batches change units."""
        noun = "file" if self.num_files == 1 else "files"
        lines = [
            f"{self.num_files:,} {noun} on {self.device}, compared with each file alone in fp32, resampled with soxr",
            f"{'':<26}{'equal units':>22}{'share':>13}{'ties':>7}",
        ]
        for each in self.comparisons:
            if each.problem is not None:
                lines.append(f"{each.name:<26}not measured: {each.problem}")
                continue
            counts = f"{each.num_equal:,} of {each.num_units:,}"
            share = f"{100 * each.num_equal / each.num_units:.4f} %"
            lines.append(f"{each.name:<26}{counts:>22}{share:>13}{each.num_ties:>7,}")
        if self.keeps_promise:
            lines.append(
                "The model keeps its promise: batches change no unit, except where two centroids are equally near."
            )
        else:
            changed = max(each.num_changed for each in self.comparisons if each.name in (IN_BATCHES, BESIDE))
            lines.append(
                f"The model BREAKS its promise: batches change {changed:,} units that are no ties. Give prepare "
                "--batch_seconds 0.01, with which each utterance is computed alone, and report the model."
            )
        return lines


def measure(tokenizer: UnitTokenizer, sources: Sequence[str]) -> Agreement:
    """Compute the units of files in every setting that the device offers.

    Args:
        tokenizer: An open unit model, in fp32 and with soxr.
        sources: Audio files.

    Raises:
        FileNotFoundError: A file does not exist.
        AudioError: A file cannot be read or is too short.
    """
    expected = [tokenizer.tokenize_files([source])[0][0] for source in sources]
    features = lru_cache(1)(lambda index: _features(tokenizer, sources[index]))  # 0.5 MB per second of audio

    def compare(name: str, found: Sequence[np.ndarray]) -> Comparison:
        num_equal = sum(int((a == b).sum()) for a, b in zip(expected, found, strict=True))
        model, num_ties = tokenizer.model, 0
        if isinstance(model, KMeansModel):
            num_ties = sum(
                _count_ties(a, b, lambda index=index: features(index), model.centroids)  # type: ignore[misc]  # a default
                for index, (a, b) in enumerate(zip(expected, found, strict=True))
            )
        return Comparison(name, sum(map(len, expected)), num_equal, num_ties)

    comparisons = [
        Comparison(IN_BATCHES, problem="one file makes no batch: give more")
        if len(sources) == 1
        else compare(IN_BATCHES, tokenizer.tokenize_files(sources)[0]),
        compare(BESIDE, [_beside_longer(tokenizer, source) for source in sources]),
    ]
    for name, changed, problem in _other_settings(tokenizer, sources):
        if changed is None:
            comparisons.append(Comparison(name, problem=problem))
            continue
        comparisons.append(compare(name, changed.tokenize_files(sources)[0]))
        changed.release()
    return Agreement(tokenizer.device, len(sources), comparisons)


def _other_settings(
    tokenizer: UnitTokenizer, sources: Sequence[str]
) -> Iterator[tuple[str, UnitTokenizer | None, str | None]]:
    """Yield each precision but fp32, and each resampler but soxr: its name, and a tokenizer with it or why there is none."""
    device = tokenizer.settings["device"]
    for precision in get_args(PrecisionName):
        if precision == "fp32":
            continue
        try:
            check_precision(tokenizer.description, precision)
            make_settings(device, precision, "soxr", None)
            if device == "cpu":
                check_cpu(precision)
        except ValueError as error:
            yield precision, None, str(error)
        else:
            yield precision, tokenizer.with_settings(precision=precision), None
    if importlib.util.find_spec("torchaudio") is None:
        yield "torchaudio", None, "torchaudio is not installed (extra torchaudio)"
    elif all(check_audio(source).rate == (rate := tokenizer.framing.sample_rate) for source in sources):
        yield "torchaudio", None, f"all files are at {rate:,} Hz and need no resampling"
    else:
        yield "torchaudio", tokenizer.with_settings(resampler="torchaudio"), None


def _beside_longer(tokenizer: UnitTokenizer, source: str) -> np.ndarray:
    """Return the units of a file beside one that is a tenth longer, which may share a batch with it (`batches.MIN_FILL`)."""
    framing = tokenizer.framing
    waveform = read_waveform(source, sample_rate=framing.sample_rate)
    longer = np.concatenate([waveform, waveform[: max(framing.step, len(waveform) // 10)]])
    return tokenizer.tokenize_waveforms([waveform, longer])[0]


def _features(tokenizer: UnitTokenizer, source: str) -> torch.Tensor:
    """Return the (num_frames, hidden_size) features of a file alone, in float64 on the CPU."""
    model = tokenizer.model
    assert isinstance(model, KMeansModel)
    waveform = prepare_waveform(torch.from_numpy(read_waveform(source)), source, tokenizer.normalization)
    row = waveform.samples.to(model.device)
    with torch.inference_mode(), own_settings(row.device.type, model.precision.front):
        if isinstance(model, UnitModel):
            features = model.features(row[None], torch.tensor([num_frames(waveform.num_samples)], device="cpu"))[0]
        else:
            features = model.features(row)
        return features.double().cpu()


def _count_ties(
    expected: np.ndarray, found: np.ndarray, features: Callable[[], torch.Tensor], centroids: torch.Tensor
) -> int:
    """Count the units that differ although both centroids are equally near to the features."""
    [frames] = np.nonzero(expected != found)
    if not len(frames):
        return 0
    rows = features()[frames]
    pairs = torch.stack([centroids.cpu().double()[units[frames].astype(np.int64)] for units in (expected, found)])
    difference = (pairs - rows).square().sum(-1).diff(dim=0).abs()[0]
    squares = rows.square().sum(-1) + pairs.square().sum(-1).amax(dim=0)
    return int((difference <= FLOAT_ROUNDING * squares).sum())
