"""The devices that compute the units."""

from __future__ import annotations

import torch

from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.units.precision import check_cpu


def choose_devices(config: PrepareConfig) -> list[str]:
    """Return the devices of a run, such as ["cuda:0", "cuda:1"]; with an executor the kind of device that their tasks have.

    Raises:
        FileNotFoundError: The executor is slurm, and this machine has no sbatch.
        ImportError: The extra executors is not installed.
        ValueError: `num_gpus` or an option of the executor does not fit this machine.
    """
    if config.executor is not None:
        from usdm_sft.prepare import unit_tasks  # datatrove is an optional dependency

        unit_tasks.check_options(config.executor, config.num_gpus, config.slurm)
        return [unit_tasks.find_device(config.executor, config.num_gpus)]
    devices = find_devices(config.num_gpus)
    if devices == ["cpu"]:
        check_cpu(config.precision)
    return devices


def find_devices(num_gpus: int | None) -> list[str]:
    """Return the GPUs of this machine, or its CPU.

    Raises:
        ValueError: This machine has fewer than `num_gpus` GPUs.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus is not None and num_gpus > available:
        raise ValueError(f"num_gpus is {num_gpus}: this machine has {available}; give {available} or fewer")
    return [f"cuda:{index}" for index in range(available if num_gpus is None else num_gpus)] or ["cpu"]
