"""Waveforms prepared for the unit model, and the plan of its forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from usdm_sft.audio.frames import FRAMINGS, SAMPLE_RATE, Framing, resampled_length

# On CUDA, a batch holds no row shorter than 85 % of its longest. In a work shard with DailyTalk's lengths, 7 % of the frames are then
# padding, and a batch has 80 s of audio on average; with 70 % these are 14 % and 150 s (computed).
MIN_FILL = 0.85

# On the CPU, a pack has 800 frames. Matrix products gain nothing from more, and each thread holds the activations of one pack.
PACK_SECONDS = 16.0

# The default of torch's layer_norm, which the reference uses; `Wav2Vec2FeatureExtractor` uses 1e-7, which changes 7 % of the units.
LAYER_NORM_EPS = 1e-5
FEATURE_EXTRACTOR_EPS = 1e-7


class Waveform(NamedTuple):
    """A waveform that is prepared for the unit model.

    Attributes:
        samples: (num_samples,) float32, normalized, with the sample that fairseq's way appends; or (num_frames, 160) float32 log-mel features.
        num_samples: Number of samples, without an appended one.
    """

    samples: torch.Tensor
    num_samples: int


def plan_batches(lengths: Sequence[int], batch_seconds: float, device: str) -> list[list[int]]:
    """Group rows into forward passes, longest first.

    The plan depends on the lengths and the kind of device alone, so the same audio makes the same batches on every machine.

    Args:
        lengths: Number of samples at 16 kHz of each row.
        batch_seconds: Seconds of audio, padding included, in one batch; a longer row is a batch of its own.
        device: Kind of device. On "cuda" rows of similar length share a batch and are padded. Elsewhere a batch is a pack of up to
            `PACK_SECONDS`: rows of any length without padding, each in the first pack that has room for it.

    Returns:
        Indices of the rows of each batch.
    """
    room = (batch_seconds if device == "cuda" else min(batch_seconds, PACK_SECONDS)) * SAMPLE_RATE
    batches: list[list[int]] = []
    rooms: list[float] = []  # left in each pack
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        length = lengths[row]
        if device != "cuda":
            found = next((i for i, left in enumerate(rooms) if length <= left), None)
        else:
            longest = lengths[batches[-1][0]] if batches else 0
            fits = bool(batches) and (len(batches[-1]) + 1) * longest <= room and length >= MIN_FILL * longest
            found = len(batches) - 1 if fits else None
        if found is None:
            found = len(batches)
            batches.append([])
            rooms.append(room)
        batches[found].append(row)
        rooms[found] -= length
    return batches


def padding_share(
    shards: Iterable[Sequence[int]], batch_seconds: float, device: str, framing: Framing = FRAMINGS["fairseq"]
) -> float:
    """Return the share of padding in the frames that the batches compute; 0 on the CPU.

    Args:
        shards: For each work shard, the lengths of its utterances in samples at 16 kHz.
        batch_seconds: As in `plan_batches`.
        device: As in `plan_batches`.
        framing: How the unit model cuts recordings into frames.
    """
    if device != "cuda":
        return 0.0
    used = padded = 0
    for lengths in shards:
        used += sum(framing.count(length) for length in lengths)
        batches = plan_batches(lengths, batch_seconds, device)
        padded += sum(len(rows) * framing.count(lengths[rows[0]]) for rows in batches)
    return 1 - used / padded if padded else 0.0


def normalize(samples: torch.Tensor) -> torch.Tensor:
    """Normalize (num_samples,) float32 as in training: an even number of samples with mean 0 and variance 1.

    The reference's collater appends one sample of value 1.0 to an odd number of samples before it normalizes.
    """
    if len(samples) % 2 and samples.device.type == "cpu":
        # torch's pad would use a team of threads, and take the cores of those who read. Its layer_norm of one row does not.
        samples = torch.from_numpy(np.append(samples.numpy(), np.float32(1)))
    elif len(samples) % 2:
        samples = torch.nn.functional.pad(samples, (0, 1), value=1.0)
    return torch.nn.functional.layer_norm(samples, samples.shape, eps=LAYER_NORM_EPS)


def normalize_as_transformers(samples: torch.Tensor) -> torch.Tensor:
    """Normalize (num_samples,) float32 to mean 0 and variance 1, bit for bit as NumPy does in `Wav2Vec2FeatureExtractor`."""
    values = samples.cpu().numpy()
    return torch.from_numpy((values - values.mean()) / np.sqrt(values.var() + FEATURE_EXTRACTOR_EPS))


@cache
def _mel_extractor() -> Any:
    from transformers import SeamlessM4TFeatureExtractor  # a second that other unit models do without

    return SeamlessM4TFeatureExtractor()  # type: ignore[no-untyped-call]  # transformers


def log_mel(samples: torch.Tensor) -> torch.Tensor:
    """Return (num_frames, 160) log-mel features of (num_samples,) float32, two neighbouring frames in a row, each mel bin with mean 0 and variance 1.

    transformers computes them with NumPy. An odd last frame counts in mean and variance and is left out, as by the mask of its padding.
    """
    values = _mel_extractor()(samples.cpu().numpy(), sampling_rate=SAMPLE_RATE, padding=False, return_tensors="np")
    return torch.from_numpy(np.ascontiguousarray(values["input_features"][0], dtype=np.float32))


# Ways to make the input of a unit model from a waveform, by their names in unit_model.json.
NORMALIZATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fairseq": normalize,
    "transformers": normalize_as_transformers,
    "none": lambda samples: samples,
    "seamless_m4t": log_mel,
}


def prepare_waveform(
    samples: torch.Tensor, name: str, normalization: str = "fairseq", framing: Framing | None = None
) -> Waveform:
    """Prepare a waveform for a batch.

    Args:
        samples: (num_samples,) float32 mono, at the sample rate of the framing.
        name: Name for error messages.
        normalization: A key of `NORMALIZATIONS`.
        framing: How the unit model cuts recordings into frames; by default as speech encoders with this normalization.

    Raises:
        AudioError: The waveform is too short for a unit: shorter than 25 ms, or 35 ms for w2v-BERT 2.0.
    """
    framing = framing or FRAMINGS[normalization]
    if len(samples) < (fewest := framing.min_samples):
        from usdm_sft.audio.reading import AudioError  # imports soundfile, which tests.benchmarks.gpu does without

        raise AudioError(
            f"{name} has {len(samples)} samples at {framing.sample_rate / 1000:g} kHz, fewer than the {fewest} "
            f"({1000 * fewest / framing.sample_rate:g} ms) that make a unit: leave out the utterance"
        )
    return Waveform(NORMALIZATIONS[normalization](samples), len(samples))


# The response of soxr's "HQ" filter in torchaudio's terms. Its passband ends at 0.913 of the band, which puts the middle of the
# transition at 0.9565; width and beta are the best of a grid search. On a toy model, this filter changes 0.1 to 0.8 % of the
# units, torchaudio's default filter 14 to 30 %.
SOXR_HQ = {
    "lowpass_filter_width": 90,
    "rolloff": 0.9565,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 12.0,
}


def resample_on(device: str, samples: np.ndarray, rate: int, sample_rate: int = SAMPLE_RATE) -> torch.Tensor:
    """Resample (num_samples,) float32 mono from `rate` to `sample_rate` Hz on `device`.

    The filter's response follows soxr's HQ filter (to 4e-4 on speech) without being equal, so a few units differ. `prepare`
    measures how many.

    Returns:
        (num_samples,) float32.

    Raises:
        ImportError: torchaudio is not installed, or does not match torch.
    """
    resample = import_resample()
    waveform = torch.from_numpy(np.ascontiguousarray(samples)).to(device, non_blocking=True)
    length = resampled_length(len(samples), rate, sample_rate)
    if rate != sample_rate:
        waveform = resample(waveform, rate, sample_rate, **SOXR_HQ)
    return torch.nn.functional.pad(waveform[:length], (0, max(0, length - len(waveform))))


def import_resample() -> Any:
    """Return torchaudio's function; an ImportError if torchaudio is not installed, or does not match torch."""
    try:
        from torchaudio.functional import resample  # an optional extra
    except (ImportError, OSError) as error:
        raise ImportError(
            f"resampler torchaudio needs torchaudio built for the same device as torch ({error}): "
            "pip install 'dailytalk-usdm[torchaudio]', or use resampler soxr"
        ) from error
    return resample
