"""`UnitTokenizer`: audio columns -> unit columns.

Each distinct recording of a batch is read, resampled and run through the unit model once. This module also remembers where the
unit model folders are that this process has opened, because a pickled tokenizer holds only the digest of its model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import multiprocess.reduction
import numpy as np
import torch
from huggingface_hub import HfApi

from usdm_sft.audio.frames import TOO_LOUD, Framing, framing_of, is_too_loud
from usdm_sft.audio.reading import describe
from usdm_sft.template.streams import StreamsName, UnitStreams, read_streams
from usdm_sft.units.batches import Waveform, prepare_waveform, resample_on
from usdm_sft.units.columns import columns_by_audio, distinct_audio
from usdm_sft.units.families import check_precision, computes_batches, is_codec, refuse_streams
from usdm_sft.units.folder import (
    find_folder,
    list_additions,
    read_description,
    read_known_description,
    save_folder,
    unit_model_digest,
)
from usdm_sft.units.precision import check_cpu
from usdm_sft.units.published import describe_unit_model
from usdm_sft.units.reading import AudioReader, Source, choose_read
from usdm_sft.units.settings import make_settings
from usdm_sft.utils.hub import check_repository, create_repository, hub_errors

if TYPE_CHECKING:
    from usdm_sft.units.codecs import CodecModel
    from usdm_sft.units.model import UnitModel
    from usdm_sft.units.transformers_model import TransformersModel


logger = logging.getLogger(__name__)

# Parts of the cache key; change one whenever the code below makes other units. Half precision on the CPU rounds otherwise since
# utterances are packed there, and a few of its units are others.
VERSION = "3"
HALF_ON_CPU_VERSION = "4"

_IMPORTED_IN = os.getpid()
_folders: dict[str, Path] = {}  # digest of each unit model that this process has opened -> its folder


class UnitTokenizer:
    """Turns audio into discrete units, 50 per second with k-means. A batched `.map` callable for `Dataset` and `IterableDataset`.

    With the published unit model, the units equal `UnitExtractor("xlsr2_1b_v2", kmeans_10k).predict(waveform, 34)` of
    seamless_communication; with another unit model, they are the centroids nearest to the features that transformers
    computes. They do not depend on the rest of the batch. The model is loaded at the first call.

    A pickle, and with it the fingerprint of `.map`, contains the unit model's digest and the settings, but no weights, no
    path and no GPU number. A pickle for a process that multiprocessing or multiprocess starts contains the path and the
    GPU number as well; any other pickle opens only in a process that has opened the same unit model before.

    Attributes:
        folder: The unit model folder.
        digest: sha256 of the unit model.
        settings: Everything else that units depend on; the device appears as its kind.
        device: Where to compute, such as "cuda:1".
        fp32_fallback: Audio of the last call whose features overflowed in the precision; it has the units of fp32.
    """

    def __init__(self, folder: Path, digest: str, settings: dict[str, Any], device: str | None = None):
        self.folder = folder
        self.digest = digest
        self.settings = settings
        self.device = device or str(settings["device"])
        self.fp32_fallback: set[Source] = set()
        self._model: UnitModel | TransformersModel | CodecModel | None = None
        self._in_fp32: UnitTokenizer | None = None
        self._reader: AudioReader | None = None
        self._process = os.getpid()
        _folders[digest] = folder

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        *,
        batch_seconds: float | None = None,
        resampler: str = "soxr",
        streams: StreamsName | None = None,
        num_streams: int | None = None,
        cache_dir: str | Path | None = None,
        model_cache_dir: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Open a unit model.

        Args:
            name_or_path: A folder that `dailytalk-usdm convert` made, the folder of a codec of transformers (DAC, EnCodec, Mimi,
                NeuCodec, WavTokenizer, X-Codec, Xcodec2), or a model repository of the Hub that holds one. The files of a
                converted model are checked against the sha256 in unit_model.json.
            device: Where to compute; by default CUDA if available, else the CPU.
            precision: "fp32" (as the reference), "tf32", "fp16", "bf16", "fp16x3" or "bf16x3".
            batch_seconds: Seconds of audio, padding included, in one forward pass; a longer utterance is computed alone.
                By default 160 on the CPU and 320 on CUDA.
            resampler: "soxr" (as the reference, on the CPU) or "torchaudio" (on the device; needs the extra).
            streams: What is made of the streams of a codec: "first" or "flatten".
            num_streams: Number of streams of a codec to use, the first ones; all of them by default.
            cache_dir: This package's cache, where digests of files are remembered; by default as in `prepare`.
            model_cache_dir: Where downloads are kept; by default the Hub's own cache.
            revision: Branch, tag or commit of the repository.
            token: Token for a private repository, as `huggingface_hub.snapshot_download` takes it.

        Raises:
            FileNotFoundError: The folder, the repository's unit model or one of its files does not exist.
            OSError: The repository cannot be downloaded.
            ValueError: A file differs from what `convert` wrote, a setting is unknown, or the device lacks something.
        """
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"device is {device}, but torch finds no CUDA device: use the CPU, or install torch for CUDA"
            )
        settings = make_settings(device.type, precision, resampler, batch_seconds)
        if device.type == "cpu":
            check_cpu(precision)
        folder = find_folder(name_or_path, revision=revision, token=token, model_cache_dir=model_cache_dir)
        settings |= check_description(read_description(folder), precision, streams, num_streams)
        return cls(folder, unit_model_digest(folder, cache_dir), settings, str(device))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save the unit model folder, byte for byte, so that `from_pretrained` opens it again. Settings are not saved.

        Args:
            save_directory: A folder that does not exist or is empty.

        Raises:
            FileExistsError: The folder is not empty.
            ValueError: A file of the unit model was changed since it was opened.
        """
        save_folder(self.folder, self.digest, Path(save_directory).expanduser())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload unit model",
        create_pr: bool = False,
    ) -> str:
        """Upload the files of the unit model to the Hub in one commit; `from_pretrained(repo_id)` opens them.

        Args:
            repo_id: The model repository, such as "user/unit-model"; created if it does not exist.
            private: Create the repository private (True) or public (False); by default as in the settings of its owner. An
                existing repository keeps its visibility, but must be private if this is True.
            token: Token of the Hub; by default HF_TOKEN, or the one that `hf auth login` saved.
            revision: Branch to commit to; created if it does not exist. The main branch by default.
            commit_message: First line of the commit.
            create_pr: Open a pull request to the branch, which must exist, instead of a commit.

        Returns:
            The URL of the commit or of the pull request.

        Raises:
            ValueError: A file was changed since the unit model was opened; or the repository is public though `private` is True.
            OSError: The Hub refuses the push or cannot be reached, or offline mode is on.
        """
        check_repository(repo_id)
        additions, api = list_additions(self.folder, self.digest), HfApi(token=token)
        with hub_errors(repo_id, revision, writes=True):
            create_repository(api, repo_id, "model", private=private, branch=None if create_pr else revision)
            commit = api.create_commit(
                repo_id, additions, commit_message=commit_message, revision=revision, create_pr=create_pr
            )
        return str(commit.pr_url or commit.commit_url)

    def with_settings(self, **settings: Any) -> Self:
        """Return a tokenizer for the same unit model and device with some settings changed."""
        return type(self)(self.folder, self.digest, self.settings | settings, self.device)

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that units depend on besides the bytes of the audio file; JSON values."""
        return self._version, self.digest, self.settings

    @property
    def _version(self) -> str:
        is_half = self.settings["device"] == "cpu" and self.settings["precision"] in ("fp16", "bf16")
        return HALF_ON_CPU_VERSION if is_half else VERSION

    def __getstate__(self) -> dict[str, Any]:
        return {"digest": self.digest, "settings": self.settings, "version": self._version}

    def __setstate__(self, state: dict[str, Any]) -> None:
        digest = state["digest"]
        folder = state.get("folder") or _folders.get(digest)
        if folder is None:
            raise ValueError(
                f"this process has not opened the unit model of digest {digest}, and the pickle does not name its folder: "
                "call UnitTokenizer.from_pretrained(folder) first"
            )
        UnitTokenizer.__init__(self, Path(folder), digest, state["settings"], state.get("device"))
        self._process = _IMPORTED_IN  # another process if this one was forked, as `.map(num_proc=...)` does
        self._notice_fork()

    def _notice_fork(self) -> None:
        """Start again in a forked process, which inherits neither the reader's threads nor torch's own.

        Raises:
            RuntimeError: The device is "cuda", whose state a fork breaks.
        """
        if os.getpid() == self._process:
            return
        if self.settings["device"] == "cuda":
            raise RuntimeError(
                "CUDA does not survive a fork: call multiprocess.set_start_method('spawn') before .map with num_proc"
            )
        torch.set_num_threads(1)  # a forked process has no torch threads and would wait for them forever
        self._reader = None
        self._process = os.getpid()

    @cached_property
    def streams(self) -> UnitStreams:
        """The rate of the units, and how many there are."""
        return read_streams({"settings": self.settings, "num_units": self.description["num_units"]})

    @property
    def num_units(self) -> int:
        """Number of different units."""
        return sum(self.streams.kept)

    @cached_property
    def description(self) -> dict[str, Any]:
        """unit_model.json of the folder; an error if it is of another unit model by now."""
        return read_known_description(self.folder, self.digest)

    def describe(self) -> dict[str, Any]:
        """Return what counts.json says of the unit model, as `describe_unit_model` does."""
        return describe_unit_model(self.folder, self.description)

    @cached_property
    def normalization(self) -> str:
        """How waveforms become the input of the model, a key of `batches.NORMALIZATIONS`; a codec prepares them itself."""
        return "none" if is_codec(self.description) else str(self.description.get("normalization", "fairseq"))

    @cached_property
    def framing(self) -> Framing:
        """How the model cuts recordings into frames."""
        return framing_of(self.description)

    @property
    def in_batches(self) -> bool:
        """Whether utterances are computed together; some families, and codecs, are computed one utterance at a time."""
        return computes_batches(self.description)

    def count_units(self, num_samples: int) -> int:
        """Return the number of units of `num_samples` samples at `framing.sample_rate`."""
        return self.framing.count(num_samples) * len(self.streams.kept)

    @property
    def model(self) -> UnitModel | TransformersModel | CodecModel:
        """The unit model on its device."""
        self._notice_fork()
        if self._model is None:
            self._model = self._load_model().to(self.device)
        return self._model

    def _load_model(self) -> UnitModel | TransformersModel | CodecModel:
        if is_codec(read_known_description(self.folder, self.digest)):  # its files are those that were opened
            from usdm_sft.units.codecs import CodecModel

            return CodecModel.from_pretrained(self.folder, self.settings["precision"], self.streams)
        from usdm_sft.units.model import UnitModel  # imports transformers, a second that opening can do without
        from usdm_sft.units.transformers_model import TransformersModel

        kind: type[UnitModel | TransformersModel] = UnitModel if self.in_batches else TransformersModel
        return kind.from_pretrained(self.folder, self.settings["precision"], digest=self.digest)

    def release(self) -> None:
        """Free the model's memory; the next call loads it again."""
        self._model = self._in_fp32 = None
        if self.settings["device"] == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, list[Any]]:
        """Tokenize a batch of rows.

        Args:
            batch: Audio columns: `audio` and every column that ends in `_audio`, such as `user_audio` and `agent_audio`.
                An entry is a path, the bytes of an audio file or a `{"bytes", "path"}` dict, or a list of these, one for
                each exchange.
            rank: Number of the process, as `.map(with_rank=True, num_proc=...)` gives it; it chooses the GPU. Needs
                `multiprocess.set_start_method("spawn")`.

        Returns:
            Two columns for each audio column. For `user_audio`, they are `user_units`, a (num_units,) uint16 array per
            recording, and `user_seconds`, its length at the sample rate of the model as float32; for `audio`, `units` and `seconds`.

        Raises:
            FileNotFoundError: An audio file does not exist.
            AudioError: An audio file cannot be read or is shorter than 25 ms.
            ValueError: There is no audio column, or the features of a recording are not finite.
        """
        if rank is not None and self.settings["device"] == "cuda":
            self.device = f"cuda:{rank % torch.cuda.device_count()}"
        sources, columns = distinct_audio(batch)
        units, seconds = self.tokenize_files(sources)
        return columns_by_audio(columns, units, seconds)

    def tokenize_files(self, sources: Sequence[Source]) -> tuple[list[np.ndarray], np.ndarray]:
        """Tokenize audio files.

        Args:
            sources: Paths or file contents.

        Returns:
            Units, one (num_units,) uint16 array per file, and the lengths in seconds, (num_files,) float32.
        """
        return self.start_files(sources)()

    def start_files(
        self, sources: Sequence[Source], digests: Mapping[str, str] | None = None
    ) -> Callable[[], tuple[list[np.ndarray], np.ndarray]]:
        """Start to tokenize audio whose sha256 may be given by address; on CUDA, this returns before the device has finished.

        Returns:
            A function that waits for the device, sets `fp32_fallback`, and returns the result of `tokenize_files`.
        """
        read = self._audio_reader().take(sources, digests)
        names = [describe(source) for source in sources]
        if self.settings["resampler"] == "soxr":
            waveforms = self._prepare((torch.from_numpy(samples) for samples, _ in read), names)
        else:
            waveforms = self._prepare(
                (resample_on(self.device, *each, self.framing.sample_rate) for each in read), names
            )
        lengths = np.array([waveform.num_samples for waveform in waveforms], dtype=np.float32)
        finish_units = self._start(waveforms, names)

        def finish() -> tuple[list[np.ndarray], np.ndarray]:
            units, overflowed = finish_units()
            self.fp32_fallback = {sources[row] for row in overflowed}
            return units, lengths / np.float32(self.framing.sample_rate)

        return finish

    def read_ahead(self, sources: Sequence[Source], digests: Mapping[str, str] | None = None) -> None:
        """Start to read audio, for a later call of `start_files` with the same arguments."""
        self._audio_reader().start(sources, digests)

    def forget(self, sources: Sequence[Source]) -> None:
        """Drop audio that was read ahead and is not needed."""
        self._audio_reader().forget(sources)

    def start_reader(self, num_processes: int = 0) -> AudioReader:
        """Read audio in this number of processes until `end_reader`; in threads if it is 0, as without this call."""
        self.end_reader()
        self._reader = AudioReader(choose_read(self.settings["resampler"], self.framing.sample_rate), num_processes)
        return self._reader

    def end_reader(self) -> None:
        """Drop audio that was read ahead, and end the threads or processes that read."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _audio_reader(self) -> AudioReader:
        self._notice_fork()
        return self.start_reader() if self._reader is None else self._reader

    def tokenize_waveforms(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the units of (num_samples,) float32 mono waveforms at `framing.sample_rate`, 16 kHz but for codecs, one (num_units,) uint16 array each."""
        self._notice_fork()
        names = [f"waveform {i}" for i in range(len(waveforms))]
        arrays = [np.ascontiguousarray(waveform, dtype=np.float32) for waveform in waveforms]
        for name, array in zip(names, arrays, strict=True):
            if is_too_loud(array).any():
                raise ValueError(f"{name} {TOO_LOUD}: scale it to -1 to 1")
        return self._tokenize(self._prepare(map(torch.from_numpy, arrays), names), names)[0]

    def _prepare(self, waveforms: Iterable[torch.Tensor], names: Sequence[str]) -> list[Waveform]:
        # torchaudio resamples with a convolution, which the caller's autocast would change.
        with torch.autocast(self.settings["device"], enabled=False):
            return [
                prepare_waveform(*each, self.normalization, self.framing) for each in zip(waveforms, names, strict=True)
            ]

    def _start(
        self, waveforms: Sequence[Waveform], names: Sequence[str]
    ) -> Callable[[], tuple[list[np.ndarray], list[int]]]:
        from usdm_sft.units.model import start_units  # imports transformers, as above

        seconds = self.settings["batch_seconds"]
        return start_units(self.model, waveforms, names, seconds, self._tokenize_in_fp32, self.count_units)

    def _tokenize(self, waveforms: Sequence[Waveform], names: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        """Return the units of each waveform, and the indices of those that overflowed and have the units of fp32."""
        return self._start(waveforms, names)()

    def _tokenize_in_fp32(self, waveforms: Sequence[Waveform], names: Sequence[str]) -> list[np.ndarray]:
        precision = self.settings["precision"]
        if precision == "fp32":
            raise ValueError(
                f"{names[0]}: the features are not finite in fp32: leave out the utterance, or check the unit model"
            )
        for name in names:
            logger.warning("%s: the features are not finite in %s: its units are computed in fp32", name, precision)
        if self._in_fp32 is None:
            self._in_fp32 = self.with_settings(precision="fp32")
        return self._in_fp32._tokenize(waveforms, names)[0]


def open_for(
    device: str,
    folder: Path,
    *,
    precision: str,
    batch_seconds: float | None,
    resampler: str,
    streams: StreamsName | None = None,
    num_streams: int | None = None,
    cache_dir: str | Path | None = None,
) -> UnitTokenizer:
    """Open a unit model folder for a device that may exist on other machines only, such as "cuda" or "cuda:1".

    The other arguments are those of `UnitTokenizer.from_pretrained`.
    """
    settings = make_settings(torch.device(device).type, precision, resampler, batch_seconds)
    folder = find_folder(folder)
    settings |= check_description(read_description(folder), precision, streams, num_streams)
    return UnitTokenizer(folder, unit_model_digest(folder, cache_dir), settings, device)


def check_description(
    description: dict[str, Any], precision: str, streams: StreamsName | None, num_streams: int | None
) -> dict[str, Any]:
    """Check settings against the unit model; return those that a codec adds.

    Raises:
        ValueError: The unit model has no such precision or streams.
    """
    check_precision(description, precision)
    if is_codec(description):
        from usdm_sft.units.codecs import choose_streams

        return choose_streams(description, streams, num_streams).settings()
    refuse_streams(streams, num_streams)
    return {}


def _reduce(tokenizer: UnitTokenizer) -> tuple[Any, ...]:
    """Pickle a tokenizer for another process with the path and the GPU, which no fingerprint may depend on."""
    more = {"folder": str(tokenizer.folder), "device": tokenizer.device}
    return _open, (type(tokenizer), tokenizer.__getstate__() | more)


def _open(kind: type[UnitTokenizer], state: dict[str, Any]) -> UnitTokenizer:
    tokenizer = kind.__new__(kind)
    tokenizer.__setstate__(state)
    return tokenizer


# The picklers that start processes: torch's DataLoader and utils/processes.py use the first, `.map` the second.
ForkingPickler.register(UnitTokenizer, _reduce)
multiprocess.reduction.ForkingPickler.register(UnitTokenizer, _reduce)
