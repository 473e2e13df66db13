"""The checks of the set-up before a run, in the order in which the doctor prints them: packages, devices, Hub, models, corpus, disks.

Every request to the Hub ends after ten seconds at most.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
)
from packaging.requirements import Requirement

from usdm_sft.audio.check import check_audio
from usdm_sft.corpus.dialogs import Split
from usdm_sft.corpus.find import check_data_dir, find_lists, find_manifests, find_split_lists
from usdm_sft.corpus.hub_corpus import PREFIX, is_hub_corpus
from usdm_sft.corpus.problems import CorpusError
from usdm_sft.corpus.published_lists import (
    SPLIT_LISTS,
    SPLIT_LISTS_URL,
    cached_split_lists,
    check_not_swapped,
    describe_corpus,
)
from usdm_sft.corpus.read import Rules, read_corpus
from usdm_sft.folder.layout import check_output
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.dry_run import CACHE_BYTES, FOLDER_BYTES, TOKENIZER_BYTES
from usdm_sft.prepare.open_run import choose_devices
from usdm_sft.template.config import OFFLINE, USTM
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.units.folder import DESCRIPTION, FILES, read_description, unit_model_digest
from usdm_sft.units.published import (
    CONVERTED_BYTES,
    PUBLISHED,
    PUBLISHED_FILES,
    PUBLISHED_URL,
    locate_unit_model,
    model_cache,
)
from usdm_sft.units.settings import PrecisionName, make_settings
from usdm_sft.utils.cache_keys import cache_root
from usdm_sft.utils.download import remote_size
from usdm_sft.utils.files import sha256_file
from usdm_sft.utils.locks import find_local_locks, lock_problem
from usdm_sft.utils.texts import count_noun, first_line, format_bytes


class Finding(NamedTuple):
    """One line of the doctor. The message of a warning or an error ends with the remedy."""

    level: Literal["ok", "warning", "error"]
    subject: str
    message: str

    def __str__(self) -> str:
        return f"{self.level:<9}{self.subject}: {self.message}"


@dataclass
class Needs:
    """What a run will fetch and write. The checks fill it in, and the check of the disk reads it.

    Attributes:
        online: Whether files can be fetched.
        model_bytes: Bytes that the model cache must hold at once.
        audio_seconds: Seconds of all recordings of the corpus; 0 if it was not read.
        audio_bytes: Size of these recordings as mono of 16 bits.
    """

    online: bool = False
    model_bytes: int = 0
    audio_seconds: float = 0.0
    audio_bytes: float = 0.0


def run_check(subject: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check. An error that the check raises becomes a finding, with the remedy of its message."""
    try:
        yield from check()
    except (OSError, ValueError, ImportError, RuntimeError, MemoryError, HTTPError) as error:
        yield Finding("error", subject, first_line(error))


TIMEOUT = 5.0  # seconds


def check_hub(needs: Needs) -> Iterator[Finding]:
    """Find out whether files can be fetched, and whether the user is logged in. No request is sent in offline mode."""
    if constants.HF_HUB_OFFLINE:
        yield Finding("ok", "Hub", "offline mode is on (HF_HUB_OFFLINE), so that nothing is fetched")
        return
    try:
        HfApi().model_info(USTM, timeout=TIMEOUT)
    except HfHubHTTPError:
        pass  # an answer of the server; the check of the tokenizer asks for the repository that is used
    except (OSError, HTTPError) as error:
        reason = first_line(error)
        text = f"{constants.ENDPOINT} cannot be reached ({reason}): check the network and the proxy"
        yield Finding("warning", "Hub", f"{text}, or set HF_HUB_OFFLINE=1 if all files are here")
        return
    needs.online = True
    yield from _check_login()


def _check_login() -> Iterator[Finding]:
    token = get_token()
    if token is None:
        text = "reachable; nobody is logged in ('hf auth login' is needed for push and for private repositories)"
        yield Finding("ok", "Hub", text)
        return
    try:
        name = HfApi().whoami(token)["name"]
    except (OSError, HTTPError) as error:
        reason = first_line(error).replace(token, "(token)")
        text = f"reachable, but it does not accept the token ({reason}): run 'hf auth login', or correct HF_TOKEN"
        yield Finding("warning", "Hub", text)
    else:
        yield Finding("ok", "Hub", f"reachable; {name} is logged in")


PACKAGE = "dailytalk-usdm"
_NAMED = ("torch", "transformers", "datasets", "huggingface_hub")  # named with their versions

# The first compute capability of CUDA whose tensor cores have the type.
_CAPABILITY = {"tf32": 8, "bf16": 8, "bf16x3": 8}


def check_packages() -> Iterator[Finding]:
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
    yield from (Finding("error", "packages", each) for each in wrong)
    if not wrong:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (PACKAGE, *_NAMED))
        yield Finding("ok", "packages", f"Python {platform.python_version()}, {versions}")


def check_devices(config: PrepareConfig) -> Iterator[Finding]:
    """Find the devices that compute the units, and the precisions that each has."""
    devices = choose_devices(config)
    kind = torch.device(devices[0]).type
    make_settings(kind, config.precision, config.resampler, config.batch_seconds)
    if config.executor is not None:
        yield Finding("ok", "device", f"the tasks of {config.executor} compute the units on other machines ({kind})")
        return
    for device in devices:
        precisions = find_precisions(device)
        text = f"{describe_device(device)}; precisions {', '.join(precisions)}"
        if config.precision in precisions:
            yield Finding("ok", "device", text)
        else:
            yield Finding("error", "device", f"{text}: choose one of these with --precision")
    if kind == "cpu" and config.num_gpus != 0:
        remedy = "use a machine with a GPU for a large corpus (docs/performance.md)"
        if shutil.which("nvidia-smi") is not None:
            remedy = "install torch for CUDA (pytorch.org), because this machine has NVIDIA's driver"
        text = f"torch {torch.__version__} finds no GPU, and two CPU cores take about 12 hours for DailyTalk: {remedy}"
        yield Finding("warning", "device", text)


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


def check_disks(config: PrepareConfig, needs: Needs, *, has_output: bool) -> Iterator[Finding]:
    """Compare the free space of each disk with what the run writes there.

    Args:
        config: The options of the run.
        needs: What the other checks found.
        has_output: Whether the user named the output folder.
    """
    output = Path(config.output_path).expanduser()
    if has_output:
        check_output(output, overwrite=config.overwrite, finished_too=False)
    places = [
        ("the cache", cache_root(config.cache_dir), CACHE_BYTES * needs.audio_seconds),
        ("the models", model_cache(config.model_cache_dir), needs.model_bytes),
    ]
    if has_output:
        size = FOLDER_BYTES * needs.audio_seconds + TOKENIZER_BYTES if needs.audio_seconds else 0
        places.append(("the dataset folder", output, size + needs.audio_bytes * config.keep_audio))
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
        if free < need:
            options = "--cache_dir, --model_cache_dir or --output_path"
            yield Finding("error", "disk", f"{text}: make room, or name a folder on another disk with {options}")
        else:
            yield Finding("ok", "disk", text)


def check_locks(config: PrepareConfig) -> Iterator[Finding]:
    """Check that locks of files work where the cache is, and whether they hold among machines."""
    existing = _find_existing(cache_root(config.cache_dir))
    try:
        problem = lock_problem(existing)
    except OSError as error:
        text = f"{existing} cannot be written ({error.strerror}): name another cache with --cache_dir"
        yield Finding("error", "locks", text)
        return
    if problem is not None:
        text = f"file locks do not work in {existing} (flock: {problem})"
        yield Finding("error", "locks", f"{text}: name a cache on another file system with --cache_dir")
    elif (local := find_local_locks(existing)) is not None:
        text = f"file locks in {existing} hold on this machine only, because it is mounted with {local}"
        yield Finding("warning", "locks", f"{text}: let no two machines share this cache")
    else:
        yield Finding("ok", "locks", f"file locks work in {existing}")


def _find_existing(folder: Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def check_unit_model(config: PrepareConfig, needs: Needs) -> Iterator[Finding]:
    """Check the files of the unit model, or find out how large its download is."""
    name = str(config.unit_model)
    folder = locate_unit_model(name, config.model_cache_dir)
    if folder is not None:
        unit_model_digest(folder, config.cache_dir)
        description = read_description(folder)
        text = f"{folder} is complete: layer {description['layer']}, {description['num_units']:,} units"
        yield Finding("ok", "unit model", text)
    elif name == PUBLISHED:
        size = sum(remote_size(f"{PUBLISHED_URL}/{file}", timeout=TIMEOUT) for file in PUBLISHED_FILES)
        needs.model_bytes = size + CONVERTED_BYTES
        yield _to_download("unit model", name, size)
    elif not needs.online:
        yield _unreachable("unit model", name, "--unit_model and a folder")
    else:
        try:
            size = needs.model_bytes = sum(_size_on_hub(name, file) for file in (DESCRIPTION, *FILES))
            yield _to_download("unit model", name, size)
        except EntryNotFoundError:
            text = f"the repository {name} holds no {DESCRIPTION}: upload a folder that 'dailytalk-usdm convert' made"
            yield Finding("error", "unit model", text)


def check_tokenizer_source(config: PrepareConfig, needs: Needs) -> Iterator[Finding]:
    """Load the tokenizer if it is on this machine, or find out how large its download is."""
    name = str(config.pretrained_model_name_or_path)
    folder: str | None = name
    if name != OFFLINE and not Path(name).is_dir():
        cached = try_to_load_from_cache(name, "tokenizer.json", cache_dir=config.model_cache_dir)
        folder = str(Path(cached).parent) if isinstance(cached, str) else None
    if folder is not None:
        encoder = TemplateEncoder(load_tokenizer(folder), config.template)
        ids = "gives the ids of the reference, for" if config.template.tokenization == "reference" else "has tokens for"
        yield Finding("ok", "tokenizer", f"{name} {ids} {encoder.num_units:,} units")
    elif not needs.online:
        yield _unreachable("tokenizer", name, f"--pretrained_model_name_or_path and a folder, or {OFFLINE}")
    else:
        yield _to_download("tokenizer", name, _size_on_hub(name, "tokenizer.json"))


def _size_on_hub(repository: str, file: str) -> int:
    metadata = get_hf_file_metadata(hf_hub_url(repository, file), token=get_token(), timeout=TIMEOUT)
    return metadata.size or 0


def _to_download(subject: str, name: str, size: int) -> Finding:
    text = f"{name} is not on this machine yet: prepare downloads it once ({format_bytes(size)})"
    return Finding("ok", subject, text)


def _unreachable(subject: str, name: str, option: str) -> Finding:
    """The error for a source that is neither on this machine nor to be fetched."""
    text = (
        f"{name} is not on this machine, and nothing can be fetched: run prepare once with a network, or give {option}"
    )
    return Finding("error", subject, text)


MAX_PROBLEMS = 5  # problems that are shown
NUM_SAMPLES = 32  # recordings that are opened


def check_corpus(config: PrepareConfig, needs: Needs) -> Iterator[Finding]:
    """Find and read the lists of the corpus, and open some of its recordings."""
    if is_hub_corpus(config.data_dir):
        yield _check_hub_corpus(str(config.data_dir), needs)
        return
    lists = find_lists(config.data_dir, config.data_files) if config.data_files else _find_lists(config)
    if lists is None:
        size = sum(remote_size(f"{SPLIT_LISTS_URL}/{name}", timeout=TIMEOUT) for name, _ in SPLIT_LISTS.values())
        text = f"{config.data_dir} has no split lists: prepare downloads DailyTalk's own ({format_bytes(size)})"
        yield Finding("ok", "corpus", text)
        return
    agent = None if config.agent is None else str(config.agent)
    try:
        splits = read_corpus(lists, Rules(agent, config.merge_speaker_turns), data_dir=config.data_dir)
    except CorpusError as error:
        yield from _list_problems(error.problems)
        return
    digests = {split: sha256_file(path) for split, path in lists.items()}
    check_not_swapped(lists, digests)
    yield from _describe_splits(splits, lists, describe_corpus(lists, digests))
    yield from _check_recordings(splits, needs, skip=config.on_bad_audio == "skip")


def _find_lists(config: PrepareConfig) -> dict[str, Path] | None:
    """Find the lists as `find_lists` does, but without a download."""
    folder = check_data_dir(config.data_dir)
    return find_manifests(folder) or find_split_lists(folder) or cached_split_lists(config.cache_dir)


def _check_hub_corpus(name: str, needs: Needs) -> Finding:
    if not needs.online:
        return Finding("warning", "corpus", f"{name} cannot be looked at without the Hub: check the network")
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    HfApi().dataset_info(repository, revision=revision or None, timeout=TIMEOUT)
    return Finding("ok", "corpus", f"{name} is on the Hub; prepare downloads and checks it")


def _list_problems(problems: list[str]) -> Iterator[Finding]:
    yield from (Finding("error", "corpus", problem) for problem in problems[:MAX_PROBLEMS])
    if (more := len(problems) - MAX_PROBLEMS) > 0:
        text = f"{count_noun(more, 'problem')} more: correct these first, prepare then lists 20 at once"
        yield Finding("error", "corpus", text)


def _describe_splits(splits: Mapping[str, Split], lists: Mapping[str, Path], kind: str) -> Iterator[Finding]:
    for name, split in splits.items():
        text = (
            f"{lists[name]} ({kind}): {count_noun(len(split.dialogs), 'dialog')}, {count_noun(split.num_pairs, 'pair')}"
        )
        if split.left_out:
            text += f"; {count_noun(len(split.left_out), 'dialog')} left out, as counts.json will say"
        if split.dialogs:
            yield Finding("ok", "corpus", text)
        else:
            yield Finding("error", "corpus", f"{text}: name another list for {name}")


def _check_recordings(splits: Mapping[str, Split], needs: Needs, *, skip: bool) -> Iterator[Finding]:
    """Open recordings that are spread over the corpus; their mean length gives the size of the run."""
    addresses = [each.audio for split in splits.values() for dialog in split.dialogs for each in dialog.utterances]
    sample = addresses[:: max(1, len(addresses) // NUM_SAMPLES)][:NUM_SAMPLES]
    checks = [check_audio(address) for address in sample]
    bad = [f"{path} {check.problem}" for path, check in zip(sample, checks, strict=True) if check.problem is not None]
    remedy = "replace the file, or leave out its pairs with --on_bad_audio skip"
    for problem in bad[:MAX_PROBLEMS]:
        yield Finding(
            "warning" if skip else "error", "recordings", f"{problem}: {remedy}; prepare lists every such file"
        )
    good = [check for check in checks if check.problem is None]
    if good:
        needs.audio_seconds = sum(check.frames / check.rate for check in good) / len(good) * len(addresses)
        needs.audio_bytes = sum(2 * check.frames for check in good) / len(good) * len(addresses)
    text = f"{len(sample) - len(bad)} of {len(sample)} that were opened are good; the corpus has {len(addresses):,}"
    if good:
        text += f", about {needs.audio_seconds / 3600:.2g} hours"
    yield Finding("ok", "recordings", text)


def examine(config: PrepareConfig, *, has_corpus: bool, has_output: bool) -> Iterator[Finding]:
    """Check everything that a run of `prepare` needs. Nothing is downloaded, and no audio but a sample is read.

    Args:
        config: The options of the run.
        has_corpus: Whether the user named `data_dir`; otherwise no corpus is read.
        has_output: Whether the user named `output_path`; otherwise it is not looked at.

    Yields:
        The findings of one check after the other.
    """
    needs = Needs()
    yield from run_check("packages", check_packages)
    yield from run_check("device", partial(check_devices, config))
    yield from run_check("Hub", partial(check_hub, needs))
    yield from run_check("tokenizer", partial(check_tokenizer_source, config, needs))
    yield from run_check("unit model", partial(check_unit_model, config, needs))
    if has_corpus:
        yield from run_check("corpus", partial(check_corpus, config, needs))
    yield from run_check("disk", partial(check_disks, config, needs, has_output=has_output))
    yield from run_check("locks", partial(check_locks, config))
