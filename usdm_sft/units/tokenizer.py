"""Audio columns -> unit columns. Each distinct audio of a batch is read, resampled and run through the unit model once."""

from __future__ import annotations

import copyreg
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import multiprocess.reduction  # what `.map(num_proc=...)` pickles with
import numpy as np

from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.audio.reading import describe, read_audio
from usdm_sft.units.batches import BATCH_SECONDS, Waveform, prepare_waveform
from usdm_sft.units.columns import distinct_audio
from usdm_sft.units.folder import read_description, unit_model_digest
from usdm_sft.units.reading import AudioReader, read_and_prepare
from usdm_sft.units.resample import resample_on

if TYPE_CHECKING:
    import torch

    from usdm_sft.units.model import UnitModel

logger = logging.getLogger(__name__)

VERSION = "2"  # of the units below: change it when they change, and cached ones are made anew

RESAMPLERS = ("soxr", "torchaudio")

_FOLDER_VARIABLE = "USDM_UNIT_MODEL_"
_IMPORTED_IN = os.getpid()


class UnitTokenizer:
    """Audio -> discrete units, 50 a second. A batched `.map` callable, for `Dataset` and `IterableDataset` alike.

    The units are those of `UnitExtractor("xlsr2_1b_v2", kmeans_10k).predict(waveform, 34)` of seamless_communication, or of
    another unit model those that transformers gives, whatever else is in the batch. The model is loaded at the first call,
    in the process that needs it.

    A pickle, and so the fingerprint of `.map`, holds the unit model's digest and the settings, not weights, paths or the
    number of the GPU; a process started by this one finds the folder through its environment, and is told the GPU.

    Attributes:
        fp32_fallback: Audio of the last call that overflowed in the precision; its units were computed in fp32.
    """

    def __init__(self, folder: Path, digest: str, settings: dict[str, Any], device: str | None = None):
        self.folder = folder
        self.digest = digest
        self.settings = settings  # what units depend on; of the device its kind
        self.device = device or settings["device"]
        self.fp32_fallback: set[str | Path | bytes] = set()
        self._model: UnitModel | None = None
        self._in_fp32: UnitTokenizer | None = None
        self._reader: AudioReader | None = None
        self._process = os.getpid()
        os.environ[_FOLDER_VARIABLE + digest[:16]] = str(folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        *,
        batch_seconds: float = BATCH_SECONDS,
        resampler: str = "soxr",
        cache_dir: str | Path | None = None,
        elsewhere: bool = False,
    ) -> UnitTokenizer:
        """Open a unit model folder.

        Args:
            folder: What `dailytalk-usdm convert` made.
            device: Where to compute; CUDA where there is one, else the CPU.
            precision: "fp32" (the reference's), "tf32", "fp16" or "bf16".
            batch_seconds: Seconds of audio, padding included, that one forward pass takes at most; a longer utterance
                goes alone.
            resampler: "soxr" (the reference's, on the CPU) or "torchaudio" (on the device; needs the extra).
            cache_dir: Where digests of files are remembered.
            elsewhere: The device is another machine's, and is not looked for on this one.

        Raises:
            FileNotFoundError: The folder or one of its files does not exist.
            ValueError: The folder was changed after it was made, or a setting is unknown.
        """
        import torch

        from usdm_sft.units.precision import PRECISIONS

        folder = Path(folder).expanduser().resolve()
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}")
        if resampler not in RESAMPLERS:
            raise ValueError(f"resampler {resampler!r} is unknown: choose one of {', '.join(RESAMPLERS)}")
        if not batch_seconds > 0:
            raise ValueError(f"batch_seconds is {batch_seconds}: give a positive number of seconds")
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        if device.type == "cuda" and not elsewhere and not torch.cuda.is_available():
            raise ValueError(
                f"device is {device}, but torch finds no CUDA device: use the CPU, or install torch for CUDA"
            )
        if device.type == "cpu" and precision == "tf32":
            raise ValueError("precision tf32 exists on CUDA only: use fp32 or bf16 on the CPU")
        settings = {
            "device": device.type,
            "precision": precision,
            "resampler": resampler,
            "batch_seconds": float(batch_seconds),
        }
        return cls(folder, unit_model_digest(folder, cache_dir), settings, str(device))

    def with_settings(self, **settings: Any) -> UnitTokenizer:
        """The same unit model on the same device with some settings changed."""
        return UnitTokenizer(self.folder, self.digest, self.settings | settings, self.device)

    @property
    def key(self) -> tuple[Any, ...]:
        """All that the units of an audio file depend on beside its bytes; JSON values."""
        return VERSION, self.digest, self.settings

    def __getstate__(self) -> dict[str, Any]:
        return {"digest": self.digest, "settings": self.settings, "version": VERSION}

    def __setstate__(self, state: dict[str, Any]) -> None:
        variable = _FOLDER_VARIABLE + state["digest"][:16]
        if variable not in os.environ:
            raise ValueError(
                f"this process does not know where the unit model of digest {state['digest']} lies: "
                "call UnitTokenizer.from_pretrained(folder) in it first"
            )
        device = state.get("device")  # only where it comes from another process
        self.__init__(Path(os.environ[variable]), state["digest"], state["settings"], device)
        self._process = _IMPORTED_IN  # another one where this one was forked, as `.map(num_proc=...)` does
        self._notice_fork()

    def _notice_fork(self) -> None:
        """In a forked process, start afresh: it inherits no threads, neither those that read audio nor torch's own."""
        if os.getpid() == self._process:
            return
        if self.settings["device"] == "cuda":
            raise RuntimeError(
                "CUDA does not survive a fork: call multiprocess.set_start_method('spawn') before .map with num_proc"
            )
        import torch

        torch.set_num_threads(1)  # torch would wait for the parent's threads for ever
        self._reader = None
        self._process = os.getpid()

    @property
    def num_units(self) -> int:
        return read_description(self.folder)["num_units"]

    @cached_property
    def normalization(self) -> str:
        """How waveforms are made ready, a name of `batches.NORMALIZATIONS`."""
        return read_description(self.folder).get("normalization", "fairseq")

    @property
    def model(self) -> UnitModel:
        """The unit model on its device."""
        self._notice_fork()
        if self._model is None:
            from usdm_sft.units.model import UnitModel

            self._model = UnitModel.from_pretrained(self.folder, self.settings["precision"]).to(self.device)
        return self._model

    def release(self) -> None:
        """Give the model's memory back; the next call loads it again."""
        import torch

        self._model = self._in_fp32 = None
        if self.settings["device"] == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, batch: Mapping[str, Sequence], rank: int | None = None) -> dict[str, Sequence]:
        """Tokenize a batch of rows.

        Args:
            batch: Audio columns, which are `audio` and whatever ends in `_audio`, such as `user_audio` and `agent_audio`:
                paths, bytes of audio files, or `{"bytes", "path"}` dicts. A row holds one audio, or a list of as many as it
                has exchanges.
            rank: Number of the process, as `.map(with_rank=True, num_proc=...)` gives it: each takes a GPU of its own. Needs
                `multiprocess.set_start_method("spawn")`.

        Returns:
            For each audio column, such as `user_audio`, two: `user_units`, one (num_frames,) uint16 array an audio, and
            `user_seconds`, float32, the length of the audio at 16 kHz. `audio` gives `units` and `seconds`.

        Raises:
            FileNotFoundError: An audio file does not exist.
            AudioError: An audio file cannot be read or is shorter than 25 ms.
            ValueError: There is no audio column, or the features of an audio are not finite.
        """
        if rank is not None and self.settings["device"] == "cuda":
            import torch

            self.device = f"cuda:{rank % torch.cuda.device_count()}"
        sources, columns = distinct_audio(batch)
        units, seconds = self.tokenize_files(sources)

        def pick(values: Sequence, index: int | list[int]) -> Any:
            return [values[i] for i in index] if isinstance(index, list) else values[index]

        out: dict[str, Sequence] = {}
        for name, indices in columns.items():
            prefix = name.removesuffix("audio")
            out[f"{prefix}units"] = [pick(units, index) for index in indices]
            out[f"{prefix}seconds"] = [pick(seconds, index) for index in indices]
        return out

    def tokenize_files(self, sources: Sequence[str | Path | bytes]) -> tuple[list[np.ndarray], np.ndarray]:
        """Paths or file contents -> units, one (num_frames,) uint16 array each, and (num_files,) float32 seconds."""
        self._notice_fork()
        read = self._audio_reader().take(sources)
        names = [describe(source) for source in sources]
        if self.settings["resampler"] == "soxr":
            waveforms = list(read)
        else:
            waveforms = self._prepare((resample_on(self.device, *each) for each in read), names)
        lengths = np.array([waveform.num_samples for waveform in waveforms], dtype=np.float32)
        units, overflowed = self._tokenize(waveforms, names)
        self.fp32_fallback = {sources[row] for row in overflowed}
        return units, lengths / np.float32(SAMPLE_RATE)

    def read_ahead(self, sources: Sequence[str | Path | bytes]) -> None:
        """Start to read audio in threads; a later `tokenize_files` or call with these sources takes what is ready."""
        self._notice_fork()
        self._audio_reader().start(sources)

    def forget(self, sources: Sequence[str | Path | bytes]) -> None:
        """Give up what was read ahead of audio that no call will get."""
        if self._reader is not None:
            self._reader.forget(sources)

    def read_ahead_rows(self, batch: Mapping[str, Sequence]) -> None:
        """Start to read the audio of rows that a later call will get."""
        self.read_ahead(distinct_audio(batch)[0])

    def forget_rows(self, batch: Mapping[str, Sequence]) -> None:
        """Give up what was read ahead of rows that no call will get."""
        self.forget(distinct_audio(batch)[0])

    def _audio_reader(self) -> AudioReader:
        if self._reader is None:
            prepare = partial(read_and_prepare, normalization=self.normalization)
            self._reader = AudioReader(prepare if self.settings["resampler"] == "soxr" else read_audio)
        return self._reader

    def tokenize_waveforms(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(num_samples,) float32 waveforms at 16 kHz, mono -> units, one (num_frames,) uint16 array each."""
        import torch

        self._notice_fork()
        names = [f"waveform {i}" for i in range(len(waveforms))]
        tensors = (torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32)) for waveform in waveforms)
        return self._tokenize(self._prepare(tensors, names), names)[0]

    def _prepare(self, waveforms: Iterable[torch.Tensor], names: Sequence[str]) -> list[Waveform]:
        import torch

        with torch.autocast(self.settings["device"], enabled=False):  # of the caller's; the resampler is a convolution
            return [prepare_waveform(*each, self.normalization) for each in zip(waveforms, names, strict=True)]

    def _tokenize(self, waveforms: Sequence[Waveform], names: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        """-> units, one (num_frames,) uint16 array a waveform, and which of them overflowed and fell back to fp32."""
        from usdm_sft.units.forward import compute_units

        units, overflowed = compute_units(self.model, waveforms, names, self.settings["batch_seconds"])
        if not overflowed:
            return units, overflowed
        names, precision = [names[row] for row in overflowed], self.settings["precision"]
        if precision == "fp32":
            raise ValueError(
                f"{names[0]}: the features are not finite in fp32: leave out the utterance, or check the unit model"
            )
        for name in names:
            logger.warning("%s: the features are not finite in %s: its units are computed in fp32", name, precision)
        if self._in_fp32 is None:
            self._in_fp32 = self.with_settings(precision="fp32")
        again, _ = self._in_fp32._tokenize([waveforms[row] for row in overflowed], names)
        for row, row_units in zip(overflowed, again, strict=True):
            units[row] = row_units
        return units, overflowed


def _reduce_for_process(tokenizer: UnitTokenizer) -> tuple:
    """The pickle that goes to another process. The GPU's number is only here, so that no fingerprint depends on it."""
    return copyreg.__newobj__, (UnitTokenizer,), tokenizer.__getstate__() | {"device": tokenizer.device}


# The two picklers that start processes: torch's DataLoader and ours use the first, `.map` the second.
ForkingPickler.register(UnitTokenizer, _reduce_for_process)
multiprocess.reduction.ForkingPickler.register(UnitTokenizer, _reduce_for_process)
