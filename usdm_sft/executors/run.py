"""Unit shards on more than this machine: as tasks of datatrove, run here, on a Ray cluster, or by Slurm.

A task is a contiguous range of all work shards, never of those that are missing, so that a completion mark means the same in
every run.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.executors.launchers import (
    LocalPipelineExecutor,
    SlurmPipelineExecutor,
    find_ray_device,
    run_here,
    run_on_ray,
    submit,
)
from usdm_sft.executors.tasks import write_task
from usdm_sft.units.agreement import agreement_file
from usdm_sft.utils.cache import ShardCache, cache_key

if TYPE_CHECKING:
    from usdm_sft.audio.digests import AudioDigest
    from usdm_sft.shards.plan import Shard
    from usdm_sft.units.tokenizer import UnitTokenizer

_OURS = {"pipeline", "tasks", "logging_dir", "skip_completed", "depends"}  # of datatrove's options
_SHOWN = 10


def check_options(executor: str, num_gpus: int | None, slurm: Mapping[str, Any] | None) -> None:
    """Refuse, before any work, what could not run."""
    if executor != "local" and num_gpus not in (None, 0):
        raise ValueError(
            f"num_gpus is {num_gpus}: with --executor {executor} each task has one GPU; say with --tasks how many, "
            "or give 0 for the CPU"
        )
    if executor != "slurm":
        if slurm is not None:
            raise ValueError(f"slurm is given, but the executor is {executor}: leave it out, or use --executor slurm")
        return
    if missing := [name for name in ("partition", "time") if name not in (slurm or {})]:
        raise ValueError(f"slurm lacks {' and '.join(missing)}: give --slurm '{{partition: NAME, time: \"04:00:00\"}}'")
    if not isinstance(slurm["time"], str):
        raise ValueError(f'slurm.time is {slurm["time"]!r}, a number: quote it, such as "24:00:00"')
    possible = inspect.signature(SlurmPipelineExecutor).parameters.keys() - _OURS
    if unknown := sorted(slurm.keys() - possible):
        raise ValueError(f"slurm has {', '.join(unknown)}, but takes only {', '.join(sorted(possible))}")
    if shutil.which("sbatch") is None:
        raise FileNotFoundError("sbatch is not found: start --executor slurm where Slurm jobs are submitted")


def find_device(executor: str, num_gpus: int | None) -> str:
    """Choose the kind of device, "cuda" or "cpu", for tasks that ray or slurm runs on other machines.

    Raises:
        ValueError: The user's Ray cluster has no GPU, and `num_gpus` is not 0.
    """
    if num_gpus == 0:
        return "cpu"
    return find_ray_device() if executor == "ray" else "cuda"


def run_tasks(
    executor: str,
    shards: Sequence[Shard],
    unit_tokenizer: UnitTokenizer,
    devices: Sequence[str],
    cache: Path,
    *,
    tasks: int,
    sample: Mapping[str, AudioDigest],
    slurm: Mapping[str, Any] | None = None,
) -> str | None:
    """Make the unit shards that the cache lacks, and measure the agreement, in tasks.

    Args:
        executor: local, ray or slurm.
        shards: The whole plan.
        unit_tokenizer: What makes the units; the tasks open its folder themselves.
        devices: Where local tasks run, one at a time on each.
        cache: Seen by all machines under this path.
        tasks: Into how many ranges the plan is cut; no more than it has shards.
        sample: Audio on which the first task measures the agreement.
        slurm: Options of datatrove's SlurmPipelineExecutor.

    Returns:
        None when all shards are there; else how many tasks were submitted to Slurm, in words.

    Raises:
        RuntimeError: Tasks failed, or sbatch did; what was finished stands.
    """
    cache, tasks = cache.resolve(), min(tasks, len(shards))
    folder = cache / "executor" / cache_key([shard.units_key for shard in shards], tasks)
    ranges = [shards[rank * len(shards) // tasks : (rank + 1) * len(shards) // tasks] for rank in range(tasks)]
    level, agreement = ShardCache(cache / "units"), agreement_file(unit_tokenizer, sample, cache)
    marks = LocalPipelineExecutor([], tasks=tasks, logging_dir=str(folder))
    for rank, its in enumerate(ranges):  # the cache decides; the marks follow it, whoever filled or emptied it
        measured = rank > 0 or agreement is None or agreement.is_file()
        if measured and all(level.find(shard.units_key) for shard in its):
            marks.mark_rank_as_completed(rank)
        else:
            (folder / "completions" / f"{rank:05d}").unlink(missing_ok=True)
            write_task(folder, rank, its, unit_tokenizer, cache, {} if rank or agreement is None else sample)
    if not (ranks := marks.get_incomplete_ranks()):
        return None
    if executor == "slurm":
        return submit(folder, tasks, ranks, unit_tokenizer.settings["device"], slurm or {})
    if executor == "ray":
        run_on_ray(folder, tasks, ranks, unit_tokenizer.settings["device"])
    else:
        run_here(folder, tasks, ranks, devices)
    if failed := marks.get_incomplete_ranks():
        which = ", ".join(map(str, failed[:_SHOWN])) + (", ..." if len(failed) > _SHOWN else "")
        raise RuntimeError(
            f"{len(failed)} of {tasks} tasks failed ({which}): see {folder / 'logs'}; start the run again, "
            "finished work shards are kept"
        )
    return None
