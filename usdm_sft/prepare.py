"""prepare(): from a corpus to a dataset folder, in work shards that a crash cannot take back.

    split lists -> dialogs -> examples -> units -> input_ids, labels -> dataset folder
                   corpus     builder     .map     .map                 Parquet, card

A work shard is a fixed number of whole dialogs in order. Its units and its tokens are two files of the cache, so that another
tokenizer or length limit needs no forward pass.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from usdm_sft.config.prepare_config import PrepareConfig
from usdm_sft.dataset_folder.layout import check_output, clear_unfinished, is_up_to_date, read_counts
from usdm_sft.dataset_folder.writer import write_folder
from usdm_sft.shards.rows import load_rows
from usdm_sft.shards.tokens import make_tokens
from usdm_sft.shards.units import make_units
from usdm_sft.shards.utterances import iter_utterances
from usdm_sft.stages.fit import fit_splits
from usdm_sft.stages.run import Run, describe_run, open_run
from usdm_sft.units.agreement import measure_agreement, pick_sample
from usdm_sft.units.batches import padding_share
from usdm_sft.utils.cache import path_lock
from usdm_sft.utils.processes import ProcessPool, num_cores
from usdm_sft.utils.progress import Stages, quiet

logger = logging.getLogger(__name__)

# The stages that the progress view and the summary name.
STAGES = ("tokenizer", "corpus", "unit model", "rows", "units", "tokens", "folder")

# A process takes a second to start, in which this one encodes and writes about as many rows.
ROWS_PER_PROCESS = 5_000


class Submitted(Exception):
    """Slurm makes the units; prepare continues when it is called again after the job."""


def prepare(config: PrepareConfig | None = None, /, **fields: Any) -> dict[str, Any]:
    """Make a dataset folder of examples with units, `input_ids` and `labels`.

    A script may call this without `if __name__ == "__main__":`, on several devices as well.

    Args:
        config: The options.
        fields: The fields of a `PrepareConfig`, in place of `config`.

    Returns:
        The counts, as in counts.json.

    Raises:
        Submitted: Slurm makes the units. This is not an error: call prepare again when the job has ended.
        FileNotFoundError: Data, a split list, an audio file or a model is missing.
        FileExistsError: The output folder holds something else, and `overwrite` is false.
        TypeError: Both `config` and fields are given, or a field is unknown.
        ValueError: Split lists, audio, unit model, tokenizer or an option are wrong. The message names the remedy.
    """
    if config is None:
        config = PrepareConfig(**fields)
    elif fields:
        raise TypeError(f"prepare() takes a config or fields, not both: put {', '.join(fields)} into the config")
    with Stages(STAGES) as stages:
        counts, is_new = _make(config, stages)
    if is_new and stages.shown:
        logger.info("%s", stages.summary())
    return counts


def _make(config: PrepareConfig, stages: Stages) -> tuple[dict[str, Any], bool]:
    """Run the stages.

    Returns:
        The counts, and whether this run made the folder; otherwise it was finished already.
    """
    run = open_run(config, stages)
    counts = describe_run(run)
    if (finished := _find_finished(run, counts["key"])) is not None:
        return finished, False
    stages.start("rows")
    rows, settings = load_rows(run.builder), run.unit_tokenizer.settings
    stages.start("units")
    agreement, units = _tokenize_audio(run)
    num_proc = min(config.num_proc or num_cores(), sum(map(len, rows.values())) // ROWS_PER_PROCESS)
    with ProcessPool(num_proc) as pool:
        stages.start("tokens")
        tokens = make_tokens(rows, run.plan, run.encoder, units, run.cache, pool)
        stages.start("folder")
        splits, split_counts = fit_splits(run, rows, units, tokens)
        counts |= {
            "padding_share": round(
                padding_share((shard.lengths for shard in run.plan), settings["batch_seconds"], settings["device"]), 4
            ),
            "agreement": agreement,
            "splits": split_counts,
        }
        if (finished := _find_finished(run, counts["key"])) is not None:  # another run was faster
            return finished, False
        utterances = {split: iter_utterances(run.builder, split, run.plan, units) for split in splits}
        with path_lock(run.output, run.cache), quiet():
            counts = write_folder(
                run.output,
                config.config_name,
                splits,
                run.tokenizer,
                counts,
                pool,
                num_output_shards=config.num_output_shards,
                utterances=utterances if config.keep_audio else None,
            )
    return counts, True


def _find_finished(run: Run, key: str) -> dict[str, Any] | None:
    """The counts of an output folder that the same run finished; other content is refused."""
    with path_lock(run.output, run.cache):
        if is_up_to_date(run.output, key):
            clear_unfinished(run.output)
            logger.info("%s is finished already, with the same settings and data: nothing was done", run.output)
            return read_counts(run.output)
        check_output(run.output, overwrite=run.config.overwrite, finished_too=True)
        return None


def _tokenize_audio(run: Run) -> tuple[dict[str, Any] | None, dict[str, Path]]:
    """Make the unit shards that the cache lacks.

    Returns:
        The agreement with fp32 and soxr, or None where these are in use, and the file of each unit shard by its key.
    """
    config = run.config
    if config.executor is not None:
        from usdm_sft.executors import run as executors  # datatrove is an optional dependency

        submitted = executors.run_tasks(
            config.executor,
            run.plan,
            run.unit_tokenizer,
            run.devices if run.devices[0] != "cpu" else ["cpu"] * config.tasks,
            run.cache,
            tasks=config.tasks,
            sample=pick_sample(run.builder.audio_digests, config.agreement_utterances),
            slurm=config.slurm,
        )
        if submitted:
            raise Submitted(f"{submitted}: run the same command again when it has ended")
    agreement = measure_agreement(run.unit_tokenizer, run.builder.audio_digests, run.cache, config.agreement_utterances)
    if agreement is not None:
        logger.warning(
            "%s, %s: %.2f %% of the units equal those of fp32 and soxr (%d utterances)",
            config.precision, config.resampler, 100 * agreement["share"], agreement["utterances"],
        )  # fmt: skip
    return agreement, make_units(run.plan, run.unit_tokenizer, run.devices, run.cache)
