"""Audio columns -> unit columns. Each distinct audio of a batch is read, resampled and run through the unit model once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from usdm_sft.audio import SAMPLE_RATE, AudioError, audio_source, describe, read_header, read_waveform, resampled_length
from usdm_sft.digests import file_digest

if TYPE_CHECKING:
    import torch

    from usdm_sft.unit_model import UnitModel

VERSION = "1"  # of the units below: change it when they change, and cached ones are made anew

BATCH_SECONDS = 160.0
MIN_SAMPLES = 400  # 25 ms: the shortest audio that makes a frame
LAYER_NORM_EPS = (
    1e-5  # over the waveform; the feature extractor of transformers has 1e-7, which changes 7 % of the units
)
ROLES = ("user", "agent")

_FOLDER_VARIABLE = "USDM_UNIT_MODEL_"


class UnitTokenizer:
    """Audio -> discrete units, 50 a second. A batched `.map` callable, for `Dataset` and `IterableDataset` alike.

    The units are those of `UnitExtractor("xlsr2_1b_v2", kmeans_10k).predict(waveform, 34)` of seamless_communication,
    whatever else is in the batch. The model is loaded at the first call, in the process that needs it.

    Pickling, and so the fingerprint of `.map`, holds the unit model's digest and the settings, not weights or paths; a
    process started by this one finds the folder through its environment.
    """

    def __init__(self, folder: Path, digest: str, settings: dict[str, Any]):
        self.folder = folder
        self.digest = digest
        self.settings = settings
        self._model: UnitModel | None = None
        self._threads: ThreadPoolExecutor | None = None
        os.environ[_FOLDER_VARIABLE + digest[:16]] = str(folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        *,
        batch_seconds: float = BATCH_SECONDS,
        cache_dir: str | Path | None = None,
    ) -> UnitTokenizer:
        """Open a unit model folder.

        Args:
            folder: What `dailytalk-usdm convert` made.
            device: Where to compute; CUDA where there is one, else the CPU.
            precision: "fp32" (the reference's), "tf32", "fp16" or "bf16".
            batch_seconds: Seconds of audio, padding included, that one forward pass takes at most; a longer utterance
                goes alone.
            cache_dir: Where digests of files are remembered.

        Raises:
            FileNotFoundError: The folder or one of its files does not exist.
            ValueError: The folder was changed after it was made, or a setting is unknown.
        """
        import torch

        from usdm_sft.unit_model import PRECISIONS

        folder = Path(folder).expanduser().resolve()
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}")
        if batch_seconds <= 0:
            raise ValueError(f"batch_seconds is {batch_seconds}: give a positive number of seconds")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = {"device": str(device), "precision": precision, "batch_seconds": float(batch_seconds)}
        return cls(folder, unit_model_digest(folder, cache_dir), settings)

    def __getstate__(self) -> dict[str, Any]:
        return {"digest": self.digest, "settings": self.settings, "version": VERSION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        variable = _FOLDER_VARIABLE + state["digest"][:16]
        if variable not in os.environ:
            raise ValueError(
                f"this process does not know where the unit model of digest {state['digest']} lies: "
                "call UnitTokenizer.from_pretrained(folder) in it first"
            )
        self.__init__(Path(os.environ[variable]), state["digest"], state["settings"])

    @property
    def model(self) -> UnitModel:
        """The unit model on its device."""
        if self._model is None:
            from usdm_sft.unit_model import UnitModel

            self._model = UnitModel(self.folder, self.settings["precision"]).to(self.settings["device"])
        return self._model

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, Sequence]:
        """Tokenize a batch of rows.

        Args:
            batch: Columns `user_audio` and `agent_audio`: paths, bytes of audio files, or `{"bytes", "path"}` dicts. A row
                holds one audio, or a list of as many as it has exchanges.

        Returns:
            `user_units` and `agent_units`: one (num_frames,) uint16 array an audio; `user_seconds` and `agent_seconds`:
            float32, the length of the audio at 16 kHz.

        Raises:
            FileNotFoundError: An audio file does not exist.
            AudioError: An audio file cannot be read or is shorter than 25 ms.
            ValueError: The features of an audio are not finite.
        """
        order: dict[str | bytes, int] = {}

        def number(value: Any) -> int | list[int]:
            if isinstance(value, list | tuple):
                return [number(each) for each in value]
            return order.setdefault(audio_source(value), len(order))

        columns = {role: [number(value) for value in batch[f"{role}_audio"]] for role in ROLES}
        units, seconds = self.tokenize_files(list(order))

        def pick(values: Sequence, index: int | list[int]) -> Any:
            return [values[i] for i in index] if isinstance(index, list) else values[index]

        out: dict[str, Sequence] = {}
        for role in ROLES:
            out[f"{role}_units"] = [pick(units, index) for index in columns[role]]
            out[f"{role}_seconds"] = [pick(seconds, index) for index in columns[role]]
        return out

    def tokenize_files(self, sources: Sequence[str | Path | bytes]) -> tuple[list[np.ndarray], np.ndarray]:
        """Paths or file contents -> units, one (num_frames,) uint16 array each, and (num_files,) float32 seconds."""
        lengths = [resampled_length(*read_header(source)) for source in sources]
        for source, length in zip(sources, lengths, strict=True):
            _check_length(length, describe(source))
        threads = self._decoders()
        waveforms = [threads.submit(read_waveform, source) for source in sources]
        units = self._tokenize(waveforms, lengths, [describe(source) for source in sources])
        return units, np.array(lengths, dtype=np.float32) / np.float32(SAMPLE_RATE)

    def tokenize_waveforms(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(num_samples,) float32 waveforms at 16 kHz, mono -> units, one (num_frames,) uint16 array each."""
        names = [f"waveform {i}" for i in range(len(waveforms))]
        for waveform, name in zip(waveforms, names, strict=True):
            _check_length(len(waveform), name)
        done: list[Future] = [Future() for _ in waveforms]
        for future, waveform in zip(done, waveforms, strict=True):
            future.set_result(np.asarray(waveform, dtype=np.float32))
        return self._tokenize(done, [len(waveform) for waveform in waveforms], names)

    def _tokenize(self, waveforms: Sequence[Future], lengths: Sequence[int], names: Sequence[str]) -> list[np.ndarray]:
        import torch

        from usdm_sft.unit_model import num_frames

        device = torch.device(self.settings["device"])
        units: list[np.ndarray] = [np.zeros(0, np.uint16)] * len(lengths)
        for rows in plan_batches(lengths, self.settings["batch_seconds"]):
            prepared = [normalize(waveforms[row].result()) for row in rows]
            padded = torch.nn.utils.rnn.pad_sequence(prepared, batch_first=True)
            frames = torch.tensor([num_frames(lengths[row]) for row in rows])
            found, finite = self.model(padded.to(device), frames.to(device))
            found, finite = found.cpu().numpy().astype(np.uint16), finite.cpu().numpy()
            for row, its_units, its_finite, waveform in zip(rows, found, finite, prepared, strict=True):
                if not its_finite:
                    raise ValueError(
                        f"{names[row]}: the features are not finite in precision {self.settings['precision']}: use another"
                    )
                units[row] = its_units[: num_frames(len(waveform))]
        return units

    def _decoders(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(thread_name_prefix="decode")
        return self._threads


def plan_batches(lengths: Sequence[int], batch_seconds: float) -> list[list[int]]:
    """Rows of each forward pass: longest first, at most `batch_seconds` of audio with the padding counted.

    A pure function of the lengths (samples at 16 kHz): the same audio makes the same batches on every machine.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_seconds * SAMPLE_RATE:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def normalize(waveform: np.ndarray) -> torch.Tensor:
    """(num_samples,) float32 -> what the unit model was trained on: an even number of samples, mean 0, variance 1.

    The reference's collater appends one sample of value 1.0 to an odd number, before the layer norm sees the waveform.
    """
    import torch

    samples = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))
    if len(samples) % 2:
        samples = torch.cat([samples, torch.ones(1)])
    return torch.nn.functional.layer_norm(samples, samples.shape, eps=LAYER_NORM_EPS)


def unit_model_digest(folder: str | Path, cache_dir: str | Path | None = None) -> str:
    """sha256 over the digests of a unit model folder's files and its layer, after checking the files against them.

    Raises:
        FileNotFoundError: The folder is not a unit model folder.
        ValueError: A file is not the one that `convert` wrote.
    """
    folder = Path(folder)
    if not (folder / "unit_model.json").is_file():
        raise FileNotFoundError(f"{folder} holds no unit_model.json: make the folder with 'dailytalk-usdm convert'")
    description = json.loads((folder / "unit_model.json").read_text())
    for name, digest in description["files"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: convert the unit model again")
        if file_digest(folder / name, cache_dir) != digest:
            raise ValueError(f"{folder / name} is not the file that was converted: convert the unit model again")
    identity = json.dumps([description["layer"], description["files"]], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def _check_length(num_samples: int, name: str) -> None:
    if num_samples < MIN_SAMPLES:
        raise AudioError(
            f"{name} has {num_samples} samples at 16 kHz, fewer than the {MIN_SAMPLES} (25 ms) that make a unit: "
            "leave out the utterance"
        )
