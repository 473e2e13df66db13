"""Checks of this machine: packages, devices and disks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from packaging.requirements import Requirement

from usdm_sft.cli.doctor_findings import Finding, Needs
from usdm_sft.folder.layout import check_output
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.devices import choose_devices
from usdm_sft.prepare.dry_run import CACHE_BYTES, FOLDER_BYTES, TOKENIZER_BYTES
from usdm_sft.units.published import model_cache
from usdm_sft.units.settings import PrecisionName, make_settings
from usdm_sft.utils.cache_keys import cache_root
from usdm_sft.utils.locks import find_local_locks, lock_problem
from usdm_sft.utils.texts import count_noun, format_bytes

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
