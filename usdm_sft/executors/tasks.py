"""A task: a range of work shards that one process makes, with a file that holds all it needs to know.

Plain data in a file of its own, rather than a pickled plan: a task reads its own range, not a million hours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.audio.digests import AudioDigest
from usdm_sft.shards.make import make_units
from usdm_sft.shards.plan import Shard
from usdm_sft.units.agreement import measure_agreement

if TYPE_CHECKING:
    from usdm_sft.units.tokenizer import UnitTokenizer


def write_task(
    folder: Path, rank: int, shards: Sequence[Shard], unit_tokenizer: UnitTokenizer, cache: Path, sample: Mapping
) -> None:
    def absolute(path: str) -> str:  # the machines share paths, not the working folder
        return os.path.abspath(path) if os.path.exists(path) else path

    work = {
        "unit_model": str(unit_tokenizer.folder),
        "key": unit_tokenizer.key,
        "settings": unit_tokenizer.settings,
        "cache": str(cache),
        "shards": [shard._replace(audio=[absolute(path) for path in shard.audio], rows=[]) for shard in shards],
        "sample": {absolute(path): digest for path, digest in sample.items()},
    }
    path = folder / "tasks" / f"{rank:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(work))
    os.replace(unfinished, path)


def run_task(data: Any, rank: int, world_size: int, *, folder: str, device: str | None = None) -> None:
    """The step of the pipeline: make the work shards of one task, in the process that datatrove calls it in.

    Args:
        data: Of an earlier step; there is none.
        rank: Number of the task.
        world_size: How many there are.
        folder: Where the files of the tasks lie.
        device: By default the CPU or, of the GPUs that this process sees, the one numbered `rank` modulo their number.
    """
    import torch

    from usdm_sft.units.tokenizer import UnitTokenizer

    work = json.loads(Path(folder, "tasks", f"{rank:05d}.json").read_text())
    settings = work["settings"]
    if settings["device"] == "cuda" and torch.cuda.is_available():
        device = device or f"cuda:{rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    unit_tokenizer = UnitTokenizer.from_pretrained(
        work["unit_model"],
        device or settings["device"],
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
    make_units([Shard(*shard) for shard in work["shards"]], unit_tokenizer, [unit_tokenizer.device], cache)
