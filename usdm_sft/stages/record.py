"""The record of a run in the cache: its corpus and unit model, and the work shards that it uses."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from usdm_sft.cache.locks import warn_of_local_locks
from usdm_sft.cache.runs import KEY_LENGTH, RunRecord, running
from usdm_sft.corpus.hub import is_hub_corpus
from usdm_sft.stages.run import Run


def mark_in_use(run: Run) -> AbstractContextManager[None]:
    """Record a run in its cache, and keep `dailytalk-usdm cache remove` from what it uses until the context ends."""
    if run.config.executor in ("ray", "slurm"):
        warn_of_local_locks(run.cache)
    return running(run.cache, _describe(run))


def _describe(run: Run) -> RunRecord:
    cache = run.cache.resolve()
    lists = next(iter(run.builder.split_lists.values())).resolve()
    folders = (Path(run.builder.cache_dir).resolve(), lists.parent)
    keys = {key[:KEY_LENGTH] for shard in run.plan for key in (shard.units_key, shard.tokens_key)}
    return RunRecord(
        corpus=_name(run.config.data_dir) if run.config.data_dir else str(lists.parent),
        unit_model=_name(run.config.unit_model),
        unit_model_digest=run.unit_tokenizer.digest,
        keys=tuple(sorted(keys)),
        folders=tuple(path.relative_to(cache).as_posix() for path in folders if path.is_relative_to(cache)),
    )


def _name(place: str | Path) -> str:
    """Return the absolute path of a folder, or the name of what is not on this disk."""
    path = Path(place).expanduser()
    return str(path.resolve()) if not is_hub_corpus(place) and path.exists() else str(place)
