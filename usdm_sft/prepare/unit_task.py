"""A task: a range of work shards that one process makes. A JSON file describes it.

Each task has a file of its own, so that it reads only its own range of a plan that may cover a million hours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from usdm_sft.audio.digests import AudioDigest
from usdm_sft.executors.calls import enter
from usdm_sft.prepare.plan import Content, Plan, Shard
from usdm_sft.prepare.unit_shards import make_units
from usdm_sft.units.agreement import measure_agreement
from usdm_sft.units.tokenizer import UnitTokenizer
from usdm_sft.utils.atomic import replace_text


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
