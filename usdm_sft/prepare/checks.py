"""The checks of a set-up before a run, which `doctor` and `prepare --dry_run` share. Every request to the Hub ends after ten seconds at most."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from huggingface_hub import HfApi, constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from packaging.requirements import Requirement

from usdm_sft.audio.digests import check_audio
from usdm_sft.corpus.dailytalk import SPLIT_LISTS, SPLIT_LISTS_URL, check_not_swapped
from usdm_sft.corpus.dialogs import Split
from usdm_sft.corpus.find import describe_corpus, digest_list, find_lists
from usdm_sft.corpus.hub_corpus import is_hub_corpus, split_name
from usdm_sft.corpus.left_out import find_bad_rows, find_outcome, leave_out, list_addresses, measure_segments
from usdm_sft.corpus.problems import CorpusError, count_reasons
from usdm_sft.corpus.read import describe_ignored, find_large_share, find_merge_remedy, read_corpus, take_validation
from usdm_sft.corpus.remote import fetch_addresses
from usdm_sft.corpus.saved_dataset import is_saved_dataset
from usdm_sft.corpus.unit_reader import make_reader
from usdm_sft.folder.layout import check_output
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.open_run import check_num_units, choose_devices
from usdm_sft.template.config import OFFLINE, USTM
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.streams import UNITS_PER_SECOND, UnitStreams
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.units.families import is_codec
from usdm_sft.units.folder import CODEC_FILES, FILES
from usdm_sft.units.published import (
    CONVERTED_BYTES,
    PUBLISHED_FILES,
    PUBLISHED_URL,
    locate_unit_model,
    model_cache,
)
from usdm_sft.units.settings import DESCRIPTION, PUBLISHED, PrecisionName, make_settings
from usdm_sft.units.tokenizer import open_for
from usdm_sft.utils.cache_keys import cache_root
from usdm_sft.utils.download import remote_size
from usdm_sft.utils.files import read_json
from usdm_sft.utils.hub import hub_errors, size_on_hub
from usdm_sft.utils.locks import find_local_locks, require_locks
from usdm_sft.utils.texts import count_noun, first_line, format_bytes

PACKAGE = "dailytalk-usdm"
_NAMED = ("torch", "transformers", "datasets", "huggingface_hub")  # named with their versions
_CAPABILITY = {"tf32": 8, "bf16": 8, "bf16x3": 8}  # the first one of CUDA whose tensor cores have the type
TIMEOUT = 5.0  # seconds
MAX_PROBLEMS = 5  # problems that are shown
NUM_SAMPLES = 32  # recordings that are opened

# Measured for DailyTalk (docs/scale-out.md): 102 + 1,115 B/s in the cache and 472 B/s in the dataset folder, and a margin. Both are
# of 50 units per second.
CACHE_BYTES = 1_400  # per second of recording
FOLDER_BYTES = 600  # per second of recording
TOKENIZER_BYTES = 10_000_000  # the tokenizer and the pictures of a dataset folder

# Seconds of audio per second with the published unit model, as measured on two cores (docs/performance.md). No rate of a GPU is
# known.
RATES = {("cpu", "fp32"): 2.6, ("cpu", "bf16"): 7.4}
DAILYTALK_HOURS = 20  # of audio

Level = Literal["ok", "warning", "error"]
Lines = Iterator[tuple[Level, str]]


class Finding(NamedTuple):
    """One line of the doctor. The message of a warning or an error ends with the remedy."""

    level: Level
    subject: str
    message: str

    def __str__(self) -> str:
        return f"{self.level:<9}{self.subject}: {self.message}"


def run_check(subject: str, check: Callable[[], Lines]) -> Iterator[Finding]:
    """Yield the findings of a check. An error that the check raises becomes a finding, with the remedy of its message."""
    try:
        yield from (Finding(level, subject, message) for level, message in check())
    except (OSError, ValueError, ImportError, RuntimeError, MemoryError) as error:
        yield Finding("error", subject, first_line(error))


class SetUp:
    """What a run of `prepare` needs, checked. Nothing is downloaded, and no audio but a sample is read.

    Args:
        config: The options of the run.
        has_corpus: Whether the user named `data_dir`; otherwise no corpus is read.
        has_output: Whether the user named `output_path`; otherwise it is not looked at.

    Attributes:
        is_online: Whether files can be fetched; the check of the Hub finds out.
        model_bytes: Bytes that the model cache must hold at once.
        audio_seconds: Seconds of all recordings of the corpus; 0 if it was not read.
        new_seconds: Seconds of the recordings that the cache has no work for.
        audio_bytes: Size of the recordings; by `check_recordings` as mono of 16 bits.
        units_per_second: Number of units in a second of a row.
    """

    def __init__(self, config: PrepareConfig, *, has_corpus: bool = True, has_output: bool = True):
        self.config, self.has_corpus, self.has_output = config, has_corpus, has_output
        self.is_online = False
        self.model_bytes = 0
        self.audio_seconds = self.new_seconds = self.audio_bytes = 0.0
        self.units_per_second: float = UNITS_PER_SECOND
        self._rate: float | None = None  # seconds of audio whose units two CPU cores compute in a second
        self._streams: UnitStreams | None = None
        self._num_tokens: int | None = None  # of the tokenizer, for units
        self._splits: dict[str, Split] = {}

    def examine(self, *subjects: str) -> Iterator[Finding]:
        """Yield the findings of the checks of some subjects, or of all, one check after the other."""
        checks = {
            "packages": self.check_packages,
            "device": self.check_devices,
            "Hub": self.check_hub,
            "tokenizer": self.check_tokenizer,
            "unit model": self.check_unit_model,
            "corpus": self.check_corpus,
            "recordings": self.check_recordings,
            "disk": self.check_disks,
            "locks": self.check_locks,
        }
        for subject in subjects or checks:
            yield from run_check(subject, checks[subject])

    def check_packages(self) -> Lines:
        """Compare the versions of the required packages with those that this package asks for."""
        wrong = []
        for line in importlib.metadata.requires(PACKAGE) or ():
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                version = None
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                found = "is not installed" if version is None else f"has version {version}"
                wrong.append(f"{requirement.name} {found}: pip install '{requirement.name}{requirement.specifier}'")
        yield from (("error", each) for each in wrong)
        if not wrong:
            versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (PACKAGE, *_NAMED))
            yield "ok", f"Python {platform.python_version()}, {versions}"

    def check_devices(self) -> Lines:
        """Find the devices that compute the units, and the precisions that each has."""
        config = self.config
        devices = choose_devices(config)
        if config.unit_rate is not None:
            yield "ok", "none is needed: the corpus has its units (--unit_rate)"
            return
        kind = torch.device(devices[0]).type
        make_settings(kind, config.precision, config.resampler, config.batch_seconds)
        if config.executor is not None:
            yield "ok", f"the tasks of {config.executor} compute the units on other machines ({kind})"
            return
        for device in devices:
            precisions = find_precisions(device)
            text = f"{describe_device(device)}; precisions {', '.join(precisions)}"
            if config.precision in precisions:
                yield "ok", text
            else:
                yield "error", f"{text}: choose one of these with --precision"
        if kind == "cpu" and config.num_gpus != 0:
            remedy = "use a machine with a GPU for a large corpus (docs/performance.md)"
            if shutil.which("nvidia-smi") is not None:
                remedy = "install torch for CUDA (pytorch.org), because this machine has NVIDIA's driver"
            text = f"torch {torch.__version__} finds no GPU"
            self._rate = find_rate(config, kind)
            if self._rate is not None and not self.has_corpus:
                text += f", and two CPU cores take about {DAILYTALK_HOURS / self._rate:.0f} hours for DailyTalk"
            yield "warning", f"{text}: {remedy}"

    def check_hub(self) -> Lines:
        """Find out whether files can be fetched, and whether the user is logged in. No request is sent in offline mode."""
        if constants.HF_HUB_OFFLINE:
            yield "ok", "offline mode is on (HF_HUB_OFFLINE), so that nothing is fetched"
            return
        try:
            with hub_errors(USTM):
                _ask_for_any_answer()
        except OSError as error:
            yield "warning", f"{error}, or set HF_HUB_OFFLINE=1 if all files are here"
            return
        self.is_online = True
        if (token := get_token()) is None:
            needed = "'hf auth login' is needed for push and for private repositories"
            yield "ok", f"reachable; nobody is logged in ({needed})"
            return
        try:
            with hub_errors("your account"):
                name = HfApi().whoami(token)["name"]
        except OSError as error:
            yield "warning", f"reachable, but {error}"
        else:
            yield "ok", f"reachable; {name} is logged in"

    def check_tokenizer(self) -> Lines:
        """Load the tokenizer if it is on this machine, or find out how large its download is."""
        config = self.config
        name = str(config.pretrained_model_name_or_path)
        folder = name
        if name != OFFLINE and not Path(name).is_dir():
            cached = try_to_load_from_cache(name, "tokenizer.json", cache_dir=config.model_cache_dir)
            folder = str(Path(cached).parent) if isinstance(cached, str) else ""
        if folder:
            encoder = TemplateEncoder(load_tokenizer(folder), config.template)
            is_reference = config.template.tokenization == "reference"
            ids = "gives the ids of the reference, for" if is_reference else "has tokens for"
            self._num_tokens = encoder.num_units
            yield "ok", f"{name} {ids} {encoder.num_units:,} units"
        elif not self.is_online:
            yield _unreachable(name, f"--pretrained_model_name_or_path and a folder, or {OFFLINE}")
        elif (size := _size_on_hub(name, "tokenizer.json")) is not None:
            yield _to_download(name, size)
        else:
            yield "error", f"the repository {name} holds no tokenizer.json: name one with a fast tokenizer"

    def check_unit_model(self) -> Lines:
        """Check the files of the unit model, or find out how large its download is."""
        if self.config.unit_rate is not None:
            yield "ok", "none is needed: the corpus has its units (--unit_rate)"
            return
        name = str(self.config.unit_model)
        folder = locate_unit_model(name, self.config.model_cache_dir)
        if folder is not None:
            units = open_for(
                "cuda", folder, precision=self.config.precision, batch_seconds=None, resampler="soxr", streams=self.config.streams,
                num_streams=self.config.num_streams, cache_dir=self.config.cache_dir,
            )  # fmt: skip  # another machine may have the device
            self.units_per_second = units.streams.units_per_second
            if self._num_tokens is not None:
                check_num_units(units, self._num_tokens)
            is_kmeans = "layer" in units.description
            made = f"layer {units.description['layer']}" if is_kmeans else units.streams.describe()
            yield "ok", f"{folder} is complete: {made}, {units.num_units:,} units"
        elif name == PUBLISHED:
            size = sum(remote_size(f"{PUBLISHED_URL}/{file}", timeout=TIMEOUT) for file in PUBLISHED_FILES)
            self.model_bytes = size + CONVERTED_BYTES
            yield _to_download(name, size)
        elif not self.is_online:
            yield _unreachable(name, "--unit_model and a folder")
        else:
            for files in ((DESCRIPTION, *FILES), ("config.json", "model.safetensors", CODEC_FILES[0])):
                sizes = [_size_on_hub(name, file) for file in files]
                if None not in sizes and (DESCRIPTION in files or self._is_codec(name)):
                    self.model_bytes = sum(filter(None, sizes))
                    yield _to_download(name, self.model_bytes)
                    return
            remedy = "upload a folder that 'dailytalk-usdm convert' made"
            yield "error", f"the repository {name} holds no {DESCRIPTION} and is not one of a codec: {remedy}"

    def _is_codec(self, name: str) -> bool:
        with hub_errors(name):
            return is_codec(read_json(hf_hub_download(name, "config.json", cache_dir=self.config.model_cache_dir)))

    def check_corpus(self) -> Lines:
        """Find and read the lists of the corpus."""
        config, name = self.config, str(self.config.data_dir)
        if not self.has_corpus:
            return
        if is_hub_corpus(name):
            if self.is_online:
                repository, revision = split_name(name)
                with hub_errors(repository, revision, repo_type="dataset"):
                    size_on_hub(repository, "README.md", "dataset", revision=revision, timeout=TIMEOUT)
                yield "ok", f"{name} is on the Hub; prepare downloads and checks it"
            else:
                yield "warning", f"{name} cannot be looked at without the Hub: check the network"
            return
        lists = find_lists(
            name, config.data_files, corpus=config.corpus, cache_dir=config.cache_dir, may_download=False
        )
        if not lists and is_saved_dataset(name):
            yield (
                "ok",
                f"{name} is a dataset with its recordings in it; prepare unpacks them to the cache and checks them",
            )
            return
        if not lists:
            size = sum(remote_size(f"{SPLIT_LISTS_URL}/{file}", timeout=TIMEOUT) for file, _ in SPLIT_LISTS.values())
            yield "ok", f"{name} has no split lists: prepare downloads DailyTalk's own ({format_bytes(size)})"
            return
        reader = make_reader(config.unit_rate, config.num_units, config.streams)
        try:
            splits = read_corpus(lists, config.rules, data_dir=name, units=reader, corpus=config.corpus)
        except CorpusError as error:
            yield from (("error", problem) for problem in error.problems[:MAX_PROBLEMS])
            if more := error.problems[MAX_PROBLEMS:]:
                remedy = "correct these first, prepare then lists 20 at once"
                yield "error", f"{count_noun(len(more), 'problem')} more: {remedy}"
            return
        digests = {split: digest_list(path, name, config.corpus) for split, path in lists.items()}
        check_not_swapped(lists, digests)
        kind = describe_corpus(lists, digests, config.corpus)
        if reader is not None and any(split.dialogs for split in splits.values()):
            self._streams = reader.streams
        if config.val_dialogs is not None:
            splits = take_validation(splits, config.val_dialogs, config.val_seed)
        rows = find_bad_rows(splits, measure_segments(list_addresses(splits)), config.rules, self._streams)
        self._splits = {split: leave_out(each, {}, rows) for split, each in splits.items()}
        for split in self._splits.values():
            place = lists.get(split.name) or f"{split.name} of {lists['train']}"
            text = f"{place} ({kind}): {self._describe_split(split)}"
            if split.dialogs:
                yield "ok", text
            else:
                remedy = "correct the rows, or name" if split.turns_left_out else "name"
                yield "error", f"{text}: {find_merge_remedy(split) or f'{remedy} another list for {split.name}'}"
            if split.dialogs and (warning := find_large_share(split)) is not None:
                yield "warning", warning
        if self._streams is not None:
            self.units_per_second = self._streams.units_per_second
            yield "ok", f"its units: {self._streams.describe()}, {sum(self._streams.kept):,} different ones in the rows"

    def _describe_split(self, split: Split) -> str:
        """Count the pairs that prepare finds, and what it leaves out."""
        num_dialogs = len(
            {dialog.id for dialog in split.dialogs if any(dialog.pairs())}
        )  # a turn that is left out divides one
        text = f"{count_noun(num_dialogs, 'dialog')}, {count_noun(split.num_pairs, 'pair')}"
        if split.turns_left_out:
            pairs, turns = count_noun(len(split.pairs_left_out), "pair"), count_reasons(split.turns_left_out)
            text += f"; {pairs} left out for their turns ({turns})"
        if split.left_out:
            text += f"; {count_noun(len(split.left_out), 'dialog')} left out, as counts.json will say"
        reads = {"on_bad_rows", "min_seconds", "max_seconds"} & self.config.rules.changes().keys()
        if (reads or self.config.on_bad_audio == "skip") and any(each.audio for each in split.utterances()):
            text += "; prepare --dry_run also counts what is left out for its recording"
        return f"{text}; {describe_ignored(split)}" if split.ignored else text

    def check_recordings(self) -> Lines:
        """Open recordings that are spread over the corpus; their mean length gives the size of the run."""
        utterances = [each for split in self._splits.values() for each in split.utterances()]
        addresses = [each.audio for each in utterances if each.audio]
        if (streams := self._streams) is not None:
            lengths = [streams.count_seconds(len(each.units)) for each in utterances if each.units is not None]
            self.audio_seconds = self.new_seconds = sum(lengths)
        if not addresses:
            if utterances:
                yield (
                    "ok",
                    f"none: the corpus has the units of {count_noun(len(utterances), 'turn')}, {self.audio_seconds / 3600:.2g} hours",
                )
            return
        sample = addresses[:: max(1, len(addresses) // NUM_SAMPLES)][:NUM_SAMPLES]
        local = fetch_addresses(sample, self.config.cache_dir)
        checks = [check_audio(local.get(address, address)) for address in sample]
        good = [check for check in checks if check.problem is None]
        for path, check in [(path, check) for path, check in zip(sample, checks, strict=True) if check.problem][
            :MAX_PROBLEMS
        ]:
            is_settled, remedy = find_outcome(check.problem or "", self.config.rules, self.config.on_bad_audio)
            yield "warning" if is_settled else "error", f"{path} {check.problem}: {remedy}; prepare lists every one"
        text = f"{len(good)} of {len(sample)} that were opened are good; the corpus has {len(addresses):,}"
        if good:
            seconds = sum(check.frames / check.rate for check in good)
            if streams is None:
                self.audio_seconds = self.new_seconds = seconds / len(good) * len(addresses)
            self.audio_bytes = sum(2 * check.frames for check in good) / len(good) * len(addresses)
            text += f", about {self.audio_seconds / 3600:.2g} hours"
            if self._rate is not None:
                text += (
                    f", whose units two CPU cores compute in about {self.audio_seconds / 3600 / self._rate:.2g} hours"
                )
        yield "ok" if good else "error", text

    def check_disks(self) -> Lines:
        """Compare the free space of each disk with what the run writes there."""
        config = self.config
        output = Path(config.output_path).expanduser()
        density = self.units_per_second / UNITS_PER_SECOND
        places = [
            ("the cache", cache_root(config.cache_dir), CACHE_BYTES * density * self.new_seconds),
            ("the models", model_cache(config.model_cache_dir), self.model_bytes),
        ]
        if self.has_output:
            check_output(output, overwrite=config.overwrite, finished_too=False)
            size = FOLDER_BYTES * density * self.audio_seconds + TOKENIZER_BYTES if self.audio_seconds else 0
            places.append(("the dataset folder", output, size + self.audio_bytes * config.keep_audio))
        disks: dict[int, list[tuple[str, Path, float]]] = {}
        for name, folder, size in places:
            existing = _find_existing(folder)
            disks.setdefault(os.stat(existing).st_dev, []).append((name, existing, size))
        for on_disk in disks.values():
            names, folders, sizes = zip(*on_disk, strict=True)
            free, need = shutil.disk_usage(folders[0]).free, sum(sizes)
            text = f"{format_bytes(free)} are free at {folders[0]} for {', '.join(names)}"
            if need:
                text += f", which take about {format_bytes(need)}"
            options = "--cache_dir, --model_cache_dir or --output_path"
            remedy = f"make room, or name a folder on another disk with {options}"
            yield ("error", f"{text}: {remedy}") if free < need else ("ok", text)

    def check_locks(self) -> Lines:
        """Check that locks of files work where the cache is, and whether they hold among machines."""
        existing = _find_existing(cache_root(self.config.cache_dir))
        require_locks(existing)
        if (local := find_local_locks(existing)) is None:
            yield "ok", f"file locks work in {existing}"
        else:
            text = f"file locks in {existing} hold on this machine only, because it is mounted with {local}"
            yield "warning", f"{text}: let no two machines share this cache"


def find_rate(config: PrepareConfig, device: str) -> float | None:
    """Return the seconds of audio per second of a run on a kind of device, or None where none was measured."""
    return RATES.get((device, config.precision)) if str(config.unit_model) == PUBLISHED else None


def find_precisions(device: str) -> list[str]:
    """Return the precisions that a device has."""
    kind, found = torch.device(device).type, []
    for name in get_args(PrecisionName):
        try:
            make_settings(kind, name, "soxr", 1)
        except ValueError:  # such as tf32 on the CPU
            continue
        if kind == "cpu" or torch.cuda.get_device_capability(device)[0] >= _CAPABILITY.get(name, 0):
            found.append(name)
    return found


def describe_device(device: str) -> str:
    """Return the name and the size of a device."""
    if device == "cpu":
        return f"CPU, {count_noun(torch.get_num_threads(), 'thread')}, {torch.backends.cpu.get_cpu_capability()}"
    properties = torch.cuda.get_device_properties(device)
    return f"{device}, {properties.name}, {format_bytes(properties.total_memory)}"


def _find_existing(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _ask_for_any_answer() -> None:
    """Ask the Hub for a public repository. A refusal is an answer, too; other checks ask for what the run needs."""
    try:
        HfApi().model_info(USTM, timeout=TIMEOUT)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise


def _size_on_hub(repository: str, file: str) -> int | None:
    with hub_errors(repository):
        return size_on_hub(repository, file, timeout=TIMEOUT)


def _to_download(name: str, size: int) -> tuple[Level, str]:
    return "ok", f"{name} is not on this machine yet: prepare downloads it once ({format_bytes(size)})"


def _unreachable(name: str, option: str) -> tuple[Level, str]:
    """The error for a source that is neither on this machine nor to be fetched."""
    text = f"{name} is not on this machine, and nothing can be fetched"
    return "error", f"{text}: run prepare once with a network, or give {option}"
