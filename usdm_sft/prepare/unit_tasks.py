"""Unit shards that the tasks of an executor make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from usdm_sft.audio.digests import AudioDigest
from usdm_sft.executors import slurm
from usdm_sft.executors.ray_tasks import find_ray_device
from usdm_sft.executors.tasks import TaskPool
from usdm_sft.prepare.unit_shards import UnitShard, make_units
from usdm_sft.units.agreement import agreement_file, measure_agreement
from usdm_sft.units.tokenizer import UnitTokenizer
from usdm_sft.utils.shard_cache import ShardCache


@dataclass(frozen=True)
class UnitTask:
    """Makes the unit shards of one task in one process."""

    folder: str  # the unit model
    key: tuple[Any, ...]  # `UnitTokenizer.key` when the tasks were planned
    settings: Mapping[str, Any]  # of the unit tokenizer
    cache: Path
    sample: Mapping[str, AudioDigest]  # on which the first task measures the agreement; empty if none is to be measured

    def __call__(self, items: Iterator[UnitShard], rank: int) -> Iterator[Any]:
        """Make the shards of task `rank`. If the process sees several GPUs, it takes number `rank` modulo their number.

        Raises:
            ValueError: The unit model or its code changed after the tasks were planned.
        """
        device = self.settings["device"]
        if device == "cuda" and torch.cuda.is_available():
            device = f"cuda:{rank % torch.cuda.device_count()}"
            torch.cuda.set_device(device)
        unit_tokenizer = UnitTokenizer.from_pretrained(
            self.folder,
            device,
            self.settings["precision"],
            batch_seconds=self.settings["batch_seconds"],
            resampler=self.settings["resampler"],
            streams=self.settings.get("streams"),
            num_streams=len(self.settings["num_units"]) if "num_units" in self.settings else None,
            cache_dir=self.cache,
        )
        if unit_tokenizer.key != self.key:
            raise ValueError(
                f"the unit model {self.folder} or the code changed after the tasks were planned: run again"
            )
        if rank == 0 and self.sample:
            measure_agreement(unit_tokenizer, self.sample, self.cache)
        make_units(list(items), unit_tokenizer, [unit_tokenizer.device], self.cache)
        return iter(())  # the shards are in the cache


def check_options(executor: str, num_gpus: int | None, options: Mapping[str, Any] | None) -> None:
    """Check the options of an executor against each other, against datatrove, and against this machine.

    Raises:
        ValueError: An option contradicts the executor, or datatrove does not know it.
        FileNotFoundError: The executor is slurm, and this machine has no sbatch.
    """
    if num_gpus not in (None, 0):
        raise ValueError(
            f"num_gpus is {num_gpus}, but with --executor {executor} each task has one GPU: set their number with "
            "--tasks, or use --num_gpus 0 for the CPU"
        )
    if executor == "slurm":
        slurm.check_options(options or {})
    elif options is not None:
        raise ValueError(f"slurm is given, but the executor is {executor}: leave it out, or use --executor slurm")


def find_device(executor: str, num_gpus: int | None) -> str:
    """Choose the kind of device, "cuda" or "cpu", for tasks that ray or slurm runs on other machines.

    Raises:
        ValueError: The user's Ray cluster has no GPU, and `num_gpus` is not 0.
    """
    if num_gpus == 0:
        return "cpu"
    return find_ray_device() if executor == "ray" else "cuda"


def run_tasks(
    pool: TaskPool, shards: Sequence[UnitShard], unit_tokenizer: UnitTokenizer, *, sample: Mapping[str, AudioDigest]
) -> None:
    """Make the unit shards that the cache lacks, and measure the agreement, in tasks.

    Whether a task is finished follows from the cache, because another run may have filled it or a user may have emptied it.

    Args:
        pool: Runs the tasks.
        shards: All unit shards.
        unit_tokenizer: Its folder and settings; each task opens the folder itself.
        sample: Audio on which the first task measures the agreement.

    Raises:
        Submitted: Slurm runs the tasks.
        RuntimeError: Tasks or sbatch failed. Finished shards are kept.
    """
    keys = [shard.key for shard in shards]
    agreement = agreement_file(unit_tokenizer, sample, pool.cache)
    finished = ShardCache(pool.cache / "units").find_all(keys)

    def is_finished(folder: Path, rank: int, indices: range) -> bool:
        is_measured = rank > 0 or agreement is None or agreement.is_file()
        return is_measured and all(keys[index] in finished for index in indices)

    task = UnitTask(
        str(unit_tokenizer.folder),
        unit_tokenizer.key,
        unit_tokenizer.settings,
        pool.cache,
        {} if agreement is None else dict(sample),
    )
    pool.run(task, shards, name="units", keys=keys, is_finished=is_finished, device=unit_tokenizer.settings["device"])
