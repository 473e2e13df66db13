"""Unit shards made in datatrove tasks: on this machine, on a Ray cluster, or by Slurm.

A task is a contiguous range of all work shards, not of the missing ones, so that a completion mark means the same in every
run.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.executors.extras import LocalPipelineExecutor, SlurmPipelineExecutor
from usdm_sft.executors.launchers import convert_text, find_ray_device, run_here, run_on_ray, submit
from usdm_sft.executors.tasks import write_task
from usdm_sft.units.agreement import agreement_file
from usdm_sft.utils.cache import ShardCache, cache_key

if TYPE_CHECKING:
    from usdm_sft.audio.digests import AudioDigest
    from usdm_sft.shards.plan import Shard
    from usdm_sft.units.tokenizer import UnitTokenizer

_OURS = {"pipeline", "tasks", "logging_dir", "skip_completed", "depends"}  # options of datatrove that we set
_NUM_NAMED = 10  # failed tasks that an error lists


def check_options(executor: str, num_gpus: int | None, slurm: Mapping[str, Any] | None) -> None:
    """Check the options of an executor against each other, against datatrove, and against this machine.

    Raises:
        ValueError: An option contradicts the executor, or datatrove does not know it.
        FileNotFoundError: The executor is slurm, and this machine has no sbatch.
    """
    if executor != "local" and num_gpus not in (None, 0):
        raise ValueError(
            f"num_gpus is {num_gpus}, but with --executor {executor} each task has one GPU: set their number with "
            "--tasks, or use --num_gpus 0 for the CPU"
        )
    if executor != "slurm":
        if slurm is not None:
            raise ValueError(f"slurm is given, but the executor is {executor}: leave it out, or use --executor slurm")
        return
    slurm = slurm or {}
    if missing := [name for name in ("partition", "time") if name not in slurm]:
        raise ValueError(f"slurm lacks {' and '.join(missing)}: give --slurm '{{partition: NAME, time: \"04:00:00\"}}'")
    if not isinstance(slurm["time"], str):
        raise ValueError(f'slurm.time is {slurm["time"]!r}, a number: quote it, such as "24:00:00"')
    possible = inspect.signature(SlurmPipelineExecutor).parameters.keys() - _OURS
    if unknown := sorted(map(str, slurm.keys() - possible)):
        raise ValueError(f"slurm has {', '.join(unknown)}, but takes only {', '.join(sorted(possible))}")
    convert_text(slurm)
    if shutil.which("sbatch") is None:
        raise FileNotFoundError("sbatch is not found: use --executor slurm on a machine that submits Slurm jobs")


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
        shards: All work shards of the plan.
        unit_tokenizer: Its folder and settings; each task opens the folder itself.
        devices: Devices of local tasks, one task at a time on each.
        cache: Folder of the cache, which all machines see under this path.
        tasks: Number of ranges that the plan is divided into, at most one per shard.
        sample: Audio on which the first task measures the agreement.
        slurm: Options of datatrove's SlurmPipelineExecutor.

    Returns:
        None if all shards are finished; else a sentence on the tasks that were submitted to Slurm.

    Raises:
        RuntimeError: Tasks or sbatch failed. Finished shards are kept.
    """
    cache, tasks = cache.resolve(), min(tasks, len(shards))
    folder = cache / "executor" / cache_key([shard.units_key for shard in shards], tasks)
    marks = LocalPipelineExecutor([], tasks=tasks, logging_dir=str(folder))
    _plan_tasks(folder, marks, shards, unit_tokenizer, cache, tasks=tasks, sample=sample)
    if not (ranks := marks.get_incomplete_ranks()):
        return None
    device = unit_tokenizer.settings["device"]
    if executor == "slurm":
        return submit(folder, tasks, ranks, device, slurm or {})
    if executor == "ray":
        run_on_ray(folder, tasks, ranks, device)
    else:
        run_here(folder, tasks, ranks, devices)
    if failed := marks.get_incomplete_ranks():
        names = ", ".join(map(str, failed[:_NUM_NAMED])) + (", ..." if len(failed) > _NUM_NAMED else "")
        raise RuntimeError(
            f"{len(failed)} of {tasks} tasks failed ({names}): see {folder / 'logs'}; start the run again, "
            "finished work shards are kept"
        )
    return None


def _plan_tasks(
    folder: Path,
    marks: LocalPipelineExecutor,
    shards: Sequence[Shard],
    unit_tokenizer: UnitTokenizer,
    cache: Path,
    *,
    tasks: int,
    sample: Mapping[str, AudioDigest],
) -> None:
    """Mark the tasks whose shards are in the cache as completed; write a file for each of the others.

    The marks follow the cache, because another run may have filled it or a user may have emptied it.
    """
    finished = ShardCache(cache / "units").find_all(shard.units_key for shard in shards)
    agreement = agreement_file(unit_tokenizer, sample, cache)
    for rank in range(tasks):
        task_shards = shards[rank * len(shards) // tasks : (rank + 1) * len(shards) // tasks]
        measured = rank > 0 or agreement is None or agreement.is_file()
        if measured and all(shard.units_key in finished for shard in task_shards):
            marks.mark_rank_as_completed(rank)
        else:
            (folder / "completions" / f"{rank:05d}").unlink(missing_ok=True)
            task_sample = {} if rank > 0 or agreement is None else sample
            write_task(folder, rank, task_shards, unit_tokenizer, cache, task_sample)
