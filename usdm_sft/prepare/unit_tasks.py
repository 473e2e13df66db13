"""Unit shards that the tasks of an executor make.

A task is a range of work shards that one process makes. A JSON file of its own describes it, so that it reads only its own range
of the plan.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from usdm_sft.audio.digests import AudioDigest
from usdm_sft.executors.calls import enter
from usdm_sft.executors.engine import Engine, Stage
from usdm_sft.executors.extras import SlurmPipelineExecutor
from usdm_sft.executors.launchers import find_ray_device
from usdm_sft.executors.slurm import convert_text
from usdm_sft.prepare.plan import Content, Plan, Shard
from usdm_sft.prepare.unit_shards import make_units
from usdm_sft.units.agreement import agreement_file, measure_agreement
from usdm_sft.units.tokenizer import UnitTokenizer
from usdm_sft.utils.atomic import replace_text
from usdm_sft.utils.locks import file_lock
from usdm_sft.utils.shard_cache import ShardCache

if TYPE_CHECKING:
    from usdm_sft.audio.digests import AudioDigest
    from usdm_sft.prepare.plan import Plan
    from usdm_sft.units.tokenizer import UnitTokenizer


def task_file(folder: str | Path, rank: int) -> Path:
    """Return the path of the file that describes task `rank`."""
    return Path(folder, "tasks", f"{rank:05d}.json")


def write_task(
    folder: Path,
    rank: int,
    shards: Sequence[tuple[Shard, Content]],
    unit_tokenizer: UnitTokenizer,
    cache: Path,
    sample: Mapping[str, AudioDigest],
) -> None:
    """Write the file of a task.

    Args:
        folder: Folder of the task files, marks and logs.
        rank: Number of the task.
        shards: Its work shards and their contents.
        unit_tokenizer: The task opens its folder with the same settings.
        cache: Folder of the cache.
        sample: Audio on which the task measures the agreement first; empty if it measures none.
    """
    work = {
        "unit_model": str(unit_tokenizer.folder),
        "key": unit_tokenizer.key,
        "settings": unit_tokenizer.settings,
        "cache": str(cache),
        "shards": [(shard, content._replace(ids=[], seconds=[], dialogs=[], rows=[])) for shard, content in shards],
        "sample": dict(sample),
        "directory": os.getcwd(),
    }
    replace_text(task_file(folder, rank), json.dumps(work))


def run_task(data: Any, rank: int, world_size: int, *, folder: str) -> None:
    """Make the work shards of one task; datatrove calls this as the only step of its pipeline.

    If the process sees several GPUs, the task takes number `rank` modulo their number.

    Args:
        data: Output of an earlier step; unused.
        rank: Number of the task.
        world_size: Number of all tasks; unused.
        folder: Folder of the task files, marks and logs.

    Raises:
        ValueError: The unit model or its code changed after the task file was written.
    """
    work = json.loads(task_file(folder, rank).read_text(encoding="utf-8"))
    enter(work["directory"])
    settings = work["settings"]
    device = settings["device"]
    if device == "cuda" and torch.cuda.is_available():
        device = f"cuda:{rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    unit_tokenizer = UnitTokenizer.from_pretrained(
        work["unit_model"],
        device,
        settings["precision"],
        batch_seconds=settings["batch_seconds"],
        resampler=settings["resampler"],
        cache_dir=work["cache"],
    )
    if list(unit_tokenizer.key) != work["key"]:
        raise ValueError(
            f"the unit model {work['unit_model']} or the code changed after the tasks were planned: run again"
        )
    cache = Path(work["cache"])
    if sample := {path: AudioDigest(*digest) for path, digest in work["sample"].items()}:
        measure_agreement(unit_tokenizer, sample, cache, len(sample))
    plan = Plan()
    for number, (shard, content) in enumerate(work["shards"]):
        plan.append(Shard(*shard)._replace(number=number), Content(*content))
    make_units(plan, unit_tokenizer, [unit_tokenizer.device], cache)


_OURS = {"pipeline", "tasks", "logging_dir", "skip_completed", "depends"}  # options of datatrove that we set


def check_options(executor: str, num_gpus: int | None, slurm: Mapping[str, Any] | None) -> None:
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
    engine: Engine,
    plan: Plan,
    unit_tokenizer: UnitTokenizer,
    *,
    sample: Mapping[str, AudioDigest],
) -> None:
    """Make the unit shards that the cache lacks, and measure the agreement, in tasks.

    Args:
        engine: Runs the tasks.
        plan: All work shards.
        unit_tokenizer: Its folder and settings; each task opens the folder itself.
        sample: Audio on which the first task measures the agreement.

    Raises:
        Submitted: Slurm runs the tasks.
        RuntimeError: Tasks or sbatch failed. Finished shards are kept.
    """
    stage = engine.open_stage(len(plan), "units", *(shard.units_key for shard in plan))
    _plan_tasks(stage, plan, unit_tokenizer, engine.cache, sample)
    engine.run(stage, run_task, device=unit_tokenizer.settings["device"])


def _plan_tasks(
    stage: Stage, plan: Plan, unit_tokenizer: UnitTokenizer, cache: Path, sample: Mapping[str, AudioDigest]
) -> None:
    """Mark the tasks whose shards are in the cache as completed; write a file for each of the others.

    The marks follow the cache, because another run may have filled it or a user may have emptied it.
    """
    agreement = agreement_file(unit_tokenizer, sample, cache)
    with file_lock(stage.folder / "locks" / "plan"):
        finished = ShardCache(cache / "units").find_all(shard.units_key for shard in plan)
        for rank, indices in enumerate(stage.ranges):
            task_shards = [plan[index] for index in indices]
            measured = rank > 0 or agreement is None or agreement.is_file()
            if measured and all(shard.units_key in finished for shard in task_shards):
                stage.mark(rank)
            else:
                stage.unmark(rank)
                task_sample = {} if rank > 0 or agreement is None else sample
                work = [(shard, plan.content(shard)) for shard in task_shards]
                write_task(stage.folder, rank, work, unit_tokenizer, cache, task_sample)
