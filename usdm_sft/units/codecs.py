"""Codecs of transformers, whose codes are the units. Their folders and repositories are opened as they are published.

A codec makes one code of each frame of audio, or one for each of its streams. An utterance is encoded alone, as the codec encodes a
single one: beside a longer neighbour Xcodec2, whose attention reads the padding, gives other codes at the end.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, FeatureExtractionMixin

from usdm_sft.audio.digests import file_digest
from usdm_sft.audio.frames import MIN_SAMPLES, SAMPLE_RATE, framing_of
from usdm_sft.template.config import MAX_UNITS
from usdm_sft.template.streams import StreamsName, UnitStreams, flatten_units
from usdm_sft.units.families import CODECS
from usdm_sft.units.precision import PRECISIONS, own_settings
from usdm_sft.units.transformers_folder import open_checkpoint, weight_files
from usdm_sft.utils.files import read_json
from usdm_sft.utils.texts import count_noun, first_line

_OTHER_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json")
_LOG_MEL = ("neucodec", "xcodec2")  # they take log-mel features beside the waveform
_SMALL = 1 << 24  # bytes
_MEL_BINS = 80
_MEL_EPS = 1e-7  # added to the variance of each mel bin by their feature extractors
_MEL_PADDING = 1.0  # their `padding_value`


def describe_codec(folder: Path) -> dict[str, Any]:
    """Describe a folder of a codec as unit_model.json describes a converted unit model.

    Returns:
        `model_type`; `num_units`, a list with the number of codes of each stream; `frames`, as `framing_of` reads them; `files` and
        `sources`, the sha256 of all files and of the weights.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The installed transformers does not know the codec, its config is invalid, or it is not one for single mono utterances.
    """
    values = read_json(folder / "config.json")
    kind = values["model_type"]
    codec = CODECS[kind]
    try:
        config = AutoConfig.for_model(**values)
        num_streams = 1 if codec.streams is None else getattr(config, codec.streams)
        levels = getattr(config, "quantization_levels", None)
        num_units = config.codebook_size if levels is None else math.prod(levels)
        rate, step = getattr(config, codec.sample_rate), getattr(config, codec.step)
        if min(num_streams, num_units, rate, step, *(levels or ())) < 1 or levels == []:
            raise ValueError(f"{num_streams} streams of {num_units} codes, each of {step} samples at {rate} Hz")
    except Exception as error:  # transformers raises many kinds of errors
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} cannot read this {kind} config ({first_line(error)}): install the newest "
            "transformers, or correct config.json"
        ) from error
    if "quantization_config" in values:
        raise ValueError(f"{folder}: the weights are quantized: name the checkpoint they were made from")
    if getattr(config, "audio_channels", 1) != 1 or getattr(config, "chunk_length_s", None) is not None:
        raise ValueError(f"{folder} is a codec for stereo or for chunks of audio: name one for whole mono recordings")
    if max(num_units, num_streams) > MAX_UNITS:
        has = f"{num_units:,} codes" if num_units > MAX_UNITS else f"{num_streams:,} streams"
        raise ValueError(f"{folder} has {has}, more than the {MAX_UNITS:,} that are stored: use another codec")
    frames = {"sample_rate": rate, "step": step, "window": codec.window}
    extractor = _read_extractor(folder, codec.extractor)
    for name, expected in (("sampling_rate", frames["sample_rate"]), ("hop_length", frames["step"])):
        if (found := extractor.get(name, expected)) != expected:
            raise ValueError(
                f"{folder}: {name} of the feature extractor is {found}, of the codec {expected}: correct the folder"
            )
    weights = weight_files(folder)
    others = [folder / name for name in _OTHER_FILES if (folder / name).is_file()]
    files = {path.name: file_digest(path) for path in (*others, *weights)}
    return {
        "model_type": kind,
        "num_units": [num_units] * num_streams,
        "frames": frames,
        "files": files,
        "sources": {path.name: files[path.name] for path in weights},
    }


def _read_extractor(folder: Path, expected: str) -> dict[str, Any]:
    try:
        values, _ = FeatureExtractionMixin.get_feature_extractor_dict(folder, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{folder} holds no preprocessor_config.json that can be read: download the codec again"
        ) from error
    if (kind := values.get("feature_extractor_type") if isinstance(values, dict) else values) != expected:
        raise ValueError(
            f"{folder}: the feature extractor is a {kind}, not a {expected}: name the folder that the codec was published in"
        )
    return dict(values)


def choose_streams(description: Mapping[str, Any], streams: StreamsName | None, num_streams: int | None) -> UnitStreams:
    """Return the units that rows keep of a codec.

    Args:
        description: As `describe_codec` returns it.
        streams: "first" or "flatten"; required for several streams.
        num_streams: Number of streams to use, the first ones; all of them by default.

    Raises:
        ValueError: An option is missing or wrong, or there are more than 65,536 units in all.
    """
    sizes, name, framing = tuple(description["num_units"]), description["model_type"], framing_of(description)
    rate = framing.sample_rate / framing.step
    if num_streams is not None and not 1 <= num_streams <= len(sizes):
        raise ValueError(
            f"num_streams is {num_streams}, but the codec ({name}) has {count_noun(len(sizes), 'stream')}: give {len(sizes)} or fewer"
        )
    sizes = sizes[:num_streams]
    if len(sizes) == 1:
        if streams is not None:
            raise ValueError(f"streams is {streams}, but one stream of the codec ({name}) is used: leave it out")
        return UnitStreams(rate, sizes)
    if streams is None:
        raise ValueError(
            f"the codec ({name}) has {len(sizes)} streams: choose with --streams first (stream 0 alone) or flatten (all streams, frame by "
            "frame), and with --num_streams how many of them are used"
        )
    chosen = UnitStreams(rate, sizes, streams)
    if (total := sum(chosen.kept)) > MAX_UNITS:
        raise ValueError(
            f"{len(sizes)} streams have {total:,} units in all, more than the {MAX_UNITS:,} that are stored: give a smaller --num_streams"
        )
    return chosen


class CodecModel(nn.Module):
    """One utterance -> units, by a codec.

    Args:
        model: The codec of transformers.
        extractor: The values of its feature extractor.
        streams: The units that rows keep.
        precision: "fp32" or "tf32".
    """

    def __init__(self, model: Any, extractor: Mapping[str, Any], streams: UnitStreams, precision: str = "fp32"):
        super().__init__()
        self.kind: str = model.config.model_type
        self.precision = PRECISIONS[precision]
        self.streams = streams
        self.model = model.requires_grad_(False).eval()
        self.sample_rate = int(getattr(model.config, CODECS[self.kind].sample_rate))
        self.step = int(getattr(model.config, CODECS[self.kind].step))
        self.extractor: Any = None
        if self.kind in _LOG_MEL:
            _import_fbank()  # so that a missing extra is named before any work
        else:
            self.extractor = getattr(transformers, CODECS[self.kind].extractor).from_dict(dict(extractor))

    @classmethod
    def from_pretrained(cls, folder: Path, precision: str, streams: UnitStreams) -> Self:
        """Open the folder of a codec.

        Raises:
            ImportError: It needs an extra that is not installed.
            ValueError: Weights are missing, of another shape, or not finite.
        """
        values = read_json(folder / "config.json")
        _check_size(folder, values)
        extractor = _read_extractor(folder, CODECS[values["model_type"]].extractor)
        return cls(open_checkpoint(folder, values), extractor, streams, precision)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        found: torch.device = next(self.model.parameters()).device
        return found

    @torch.inference_mode()
    def forward(self, row: torch.Tensor, stopped: threading.Event | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the units of an utterance.

        Args:
            row: (num_samples,) float32 at `sample_rate`.
            stopped: As in `TransformersModel.forward`.

        Returns:
            (1, num_units) uint16 units on the CPU, frame by frame, and (1,) bool: True, because codes are always numbers.
        """
        if stopped is not None and stopped.is_set():
            raise CancelledError  # another utterance failed, or Ctrl-C was pressed
        inputs = {name: value.to(self.device) for name, value in self._extract(row.cpu().numpy()).items()}
        with own_settings(self.device.type, self.precision.front) if stopped is None else nullcontext():
            codes = self.model.encode(**inputs, **self._arguments()).audio_codes
        kept = self.streams.kept
        frames = codes.reshape(-1, codes.shape[-1])[: len(kept)].T.cpu().numpy()  # (num_frames, num_streams)
        return torch.from_numpy(flatten_units(frames, kept))[None], torch.ones(1, dtype=torch.bool)

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of `encode` that make it compute the streams that are kept, or as many as it can."""
        if (name := CODECS[self.kind].argument) is not None:
            return {name: len(self.streams.kept)}
        # The first streams are the same at each bandwidth.
        return (
            {"bandwidth": max(self.model.config.target_bandwidths)}
            if hasattr(self.model.config, "target_bandwidths")
            else {}
        )

    def _extract(self, samples: np.ndarray) -> dict[str, torch.Tensor]:
        if self.extractor is None:
            return self._extract_log_mel(samples)
        values = self.extractor(samples, sampling_rate=self.sample_rate, return_tensors="pt")
        return {"input_values": values["input_values"]}

    def _extract_log_mel(self, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """Return what the feature extractors of Xcodec2 and NeuCodec return, which need torchaudio.

        Source: the two classes in transformers. The waveform gets a sample and is padded to whole frames. Xcodec2 computes its log-mel
        features with half a frame of zeros at both ends.
        """
        padded = np.pad(samples, (0, self.step - len(samples) % self.step))
        mel = kaldi_fbank(np.pad(padded, self.step // 2) if self.kind == "xcodec2" else padded)
        mel = (mel - mel.mean(0)) / np.sqrt(mel.var(0, ddof=1) + _MEL_EPS)
        mel = np.pad(mel, ((0, len(mel) % 2), (0, 0)), constant_values=_MEL_PADDING).reshape(-1, 2 * _MEL_BINS)
        return {"input_values": torch.from_numpy(padded)[None, None], "input_features": torch.from_numpy(mel)[None]}


def _check_size(folder: Path, values: dict[str, Any]) -> None:
    """Check that the config of an untrusted folder does not describe a much larger model than its weights are."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**values))  # type: ignore[no-untyped-call]  # transformers
    needed, there = (
        sum(each.nbytes for each in model.state_dict().values()),
        sum(path.stat().st_size for path in weight_files(folder)),
    )
    if needed > 4 * there + _SMALL:  # in float32, from weights of 8 bits or more
        raise ValueError(
            f"{folder}: config.json describes a model of {needed:,} bytes, its weights have {there:,}: download it again"
        )


def kaldi_fbank(samples: np.ndarray) -> np.ndarray:
    """Return (num_frames, 80) float32 log-mel features of (num_samples,) float32 at 16 kHz, as `torchaudio.compliance.kaldi.fbank` does.

    Frames are 25 ms long, 10 ms apart, and whole; the waveform is scaled to 16 bits.

    Raises:
        ImportError: The extra codecs is not installed.
    """
    fbank = _import_fbank()
    options = fbank.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.frame_length_ms = 1000 * MIN_SAMPLES / SAMPLE_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "povey"
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = _MEL_BINS
    options.mel_opts.low_freq = 20.0
    options.mel_opts.high_freq = SAMPLE_RATE / 2
    computer = fbank.OnlineFbank(options)
    computer.accept_waveform(SAMPLE_RATE, (samples * np.float32(2**15)).tolist())
    computer.input_finished()
    return np.stack([computer.get_frame(index) for index in range(computer.num_frames_ready)])


def _import_fbank() -> Any:
    try:
        import kaldi_native_fbank  # type: ignore[import-untyped]  # an optional extra
    except ImportError as error:
        raise ImportError(
            "Xcodec2 and NeuCodec need log-mel features of kaldi-native-fbank: pip install 'dailytalk-usdm[codecs]'"
        ) from error
    return kaldi_native_fbank
