"""prepare(): from a corpus to a dataset folder, in work shards that a crash cannot take back.

    split lists -> dialogs -> examples -> units -> input_ids, labels -> dataset folder
                   corpus     builder     .map     .map                 Parquet, card

A work shard is a fixed number of whole dialogs in order. Its units and its tokens are two files of the cache, so that another
tokenizer or length limit needs no forward pass.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.folder.finished import find_finished
from usdm_sft.folder.layout import lock_output
from usdm_sft.folder.own_parts import check_options, update_card
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.given_units import GivenUnits, write_given_units
from usdm_sft.prepare.open_run import Run, describe_run, load_rows, open_run
from usdm_sft.prepare.plan import list_ids
from usdm_sft.prepare.token_shards import fit_splits
from usdm_sft.prepare.unit_shards import describe_shards, make_units, name_versions
from usdm_sft.prepare.utterance_files import UtteranceFiles
from usdm_sft.units.agreement import measure_agreement, pick_sample
from usdm_sft.units.batches import padding_share
from usdm_sft.utils.cache_keys import cache_key, cache_root
from usdm_sft.utils.locks import warn_of_local_locks
from usdm_sft.utils.memory import give_back_memory
from usdm_sft.utils.pool import Submission, Submitted
from usdm_sft.utils.processes import ProcessPool, num_cores
from usdm_sft.utils.progress import Stages, quiet

if TYPE_CHECKING:
    from usdm_sft.executors.tasks import TaskPool

__all__ = ["Submission", "prepare"]

logger = logging.getLogger(__name__)

# The stages that the progress view and the summary name.
STAGES = ("tokenizer", "corpus", "unit model", "rows", "units", "tokens", "folder")

# What the processes need for token shards and Parquet files; they import it while this process reads the corpus.
_MODULES = ("usdm_sft.prepare.token_shards", "usdm_sft.folder.parquet", "usdm_sft.template.encoder")


def prepare(config: PrepareConfig | None = None, /, **fields: Any) -> dict[str, Any] | Submission:
    """Make a dataset folder of examples with units, `input_ids` and `labels`.

    A script may call this without `if __name__ == "__main__":`, on several devices as well.

    Args:
        config: The options.
        fields: The fields of a `PrepareConfig`, in place of `config`.

    Returns:
        The counts, as in counts.json; with the executor slurm a `Submission`, if Slurm makes a stage. Its jobs go on until the folder is
        finished.

    Raises:
        FileNotFoundError: Data, a split list, an audio file or a model is missing.
        FileExistsError: The output folder holds something else, and `overwrite` is false.
        TypeError: Both `config` and fields are given, or a field is unknown.
        ValueError: Split lists, audio, unit model, tokenizer or an option are wrong. The message names the remedy.
    """
    if config is None:
        config = PrepareConfig(**fields)
    elif fields:
        raise TypeError(f"prepare() takes a config or fields, not both: put {', '.join(fields)} into the config")
    try:
        with Stages(STAGES) as stages, _open_pool(config) as pool:
            counts, is_new = _make(config, stages, pool)
    except Submitted as submitted:
        submission: Submission = submitted.args[0]
        return submission
    if is_new and stages.shown:
        logger.info("%s", stages.summary())
    return counts


def _open_pool(config: PrepareConfig) -> ProcessPool | TaskPool:
    """Return the processes or the tasks that share out the work. Its context ends them."""
    if config.executor is None:
        return ProcessPool(config.num_proc or num_cores(), _MODULES)
    from usdm_sft.executors.tasks import TaskPool  # datatrove is an optional dependency

    go_on = partial(_go_on, config=config, directory=os.getcwd())
    cache = cache_root(config.cache_dir)
    warn_of_local_locks(cache)
    return TaskPool(config.executor, config.tasks, cache, slurm=config.slurm, go_on=go_on)


def _go_on(data: Any, rank: int, world_size: int, *, config: PrepareConfig, directory: str) -> None:
    """Call prepare again, in a job that Slurm starts when the tasks of a stage have ended.

    datatrove calls this as the only step of its pipeline.
    """
    os.chdir(directory)
    prepare(config)


def _make(config: PrepareConfig, stages: Stages, pool: ProcessPool | TaskPool) -> tuple[dict[str, Any], bool]:
    """Run the stages.

    Returns:
        The counts, and whether this run made the folder; otherwise it was finished already.
    """
    run = open_run(config, stages, pool=pool)
    counts = describe_run(run)
    check_options(config.card, counts["corpus"])
    with lock_output(run.output):
        if (finished := find_finished(run.output, counts, overwrite=config.overwrite)) is not None:
            update_card(run.output, config.card)
            return finished, False
    stages.start("rows")
    rows = load_rows(run.builder)
    stages.start("units")
    agreement, units = _tokenize_audio(run, pool)
    give_back_memory()
    stages.start("tokens")
    splits, split_counts, tokens = fit_splits(run, rows, units, pool)
    give_back_memory()
    stages.start("folder")
    counts |= {
        **_describe_units(run, counts["versions"], units.values()),
        "agreement": agreement,
        "splits": split_counts,
    }
    from usdm_sft.folder.writer import write_folder  # imports matplotlib, which a finished folder does not need

    utterances = {split: UtteranceFiles(run.builder, split, run.plan, units) for split in splits}
    with lock_output(run.output), quiet():
        # Another run may have finished the folder meanwhile, and is replaced only with `overwrite`.
        if (finished := find_finished(run.output, counts, overwrite=config.overwrite)) is not None:
            update_card(run.output, config.card)
            return finished, False
        counts = write_folder(
            run.output,
            config.config_name,
            splits,
            run.tokenizer,
            counts,
            pool,
            key=cache_key(counts["key"], sorted(shard.path.name for shard in tokens)),
            num_output_shards=config.num_output_shards,
            utterances=utterances if config.keep_audio else None,
            card_options=config.card,
        )
    return counts, True


def _describe_units(run: Run, versions: Mapping[str, str], files: Iterable[Path]) -> dict[str, Any]:
    """Return the part of counts.json that tells how the units were computed; nothing where the corpus has them."""
    units = run.unit_tokenizer
    if isinstance(units, GivenUnits):
        return {}
    lengths = (run.plan.content(shard).lengths for shard in run.plan)
    settings = units.settings
    batch_seconds = settings["batch_seconds"] if units.in_batches else 0  # each utterance is a batch of its own
    share = padding_share(lengths, batch_seconds, settings["device"], units.framing)
    return {"padding_share": round(share, 4), "versions": name_versions(versions, files)}


def _tokenize_audio(run: Run, pool: ProcessPool | TaskPool) -> tuple[dict[str, Any] | None, dict[str, Path]]:
    """Make the unit shards that the cache lacks, or write those of units that the corpus has.

    Returns:
        The agreement with fp32 and soxr, or None where these are in use, and the file of each unit shard by its key.
    """
    config = run.config
    if isinstance(run.unit_tokenizer, GivenUnits):
        return None, write_given_units(run.builder, list_ids(run.plan), run.cache)
    shards = describe_shards(run.plan)
    sample = pick_sample(run.builder.audio_digests, config.agreement_utterances)
    if not isinstance(pool, ProcessPool):
        from usdm_sft.prepare.unit_tasks import run_tasks

        run_tasks(pool, shards, run.unit_tokenizer, sample=sample)
    agreement = measure_agreement(run.unit_tokenizer, sample, run.cache)
    if agreement is not None:
        logger.warning(
            "%s, %s: %.2f %% of the units equal those of fp32 and soxr (%d utterances)",
            config.precision, config.resampler, 100 * agreement["share"], agreement["utterances"],
        )  # fmt: skip
    return agreement, make_units(shards, run.unit_tokenizer, run.devices, run.cache)
