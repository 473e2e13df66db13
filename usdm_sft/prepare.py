"""prepare(): from a corpus to a dataset folder, in work shards that a crash cannot take back.

    split lists -> dialogs -> examples -> units -> input_ids, labels -> dataset folder
                   corpus     builder     .map     .map                 Parquet, card

A work shard is a fixed number of whole dialogs in order. Its units and its tokens are two files of the cache, so that another
tokenizer or length limit needs no forward pass.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from dailytalk_usdm import DailyTalkUSDM
from usdm_sft import __version__
from usdm_sft.config.prepare_config import PrepareConfig
from usdm_sft.convert.published import describe_unit_model, find_unit_model
from usdm_sft.corpus.hub import is_hub_corpus
from usdm_sft.corpus.published_lists import describe_corpus, list_kind
from usdm_sft.dataset_folder.layout import check_output, clear_unfinished, is_up_to_date, read_counts
from usdm_sft.dataset_folder.writer import write_folder
from usdm_sft.shards.counts import count_rows
from usdm_sft.shards.overflow import choose_overflow, fit_rows
from usdm_sft.shards.plan import Shard, plan_shards
from usdm_sft.shards.rows import load_rows
from usdm_sft.shards.tokens import join_shards, make_tokens
from usdm_sft.shards.units import find_fp32_fallback, make_units
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import describe_tokenizer, load_tokenizer
from usdm_sft.units.agreement import measure_agreement, pick_sample
from usdm_sft.units.batches import padding_share
from usdm_sft.units.tokenizer import UnitTokenizer, open_for
from usdm_sft.utils.cache import cache_key, cache_root, path_lock
from usdm_sft.utils.progress import quiet

logger = logging.getLogger(__name__)

# counts.json names the versions of the packages that decide the content of the folder.
_VERSIONED = (
    "datasets",
    "matplotlib",
    "numpy",
    "pyarrow",
    "soundfile",
    "soxr",
    "tokenizers",
    "torch",
    "transformers",
)


class Submitted(Exception):
    """Slurm makes the units; prepare continues when it is called again after the job."""


@dataclass(frozen=True)
class _Run:
    """Everything that the steps of one run share."""

    config: PrepareConfig
    overflow: str
    output: Path
    cache: Path
    devices: list[str]  # such as ["cuda:0", "cuda:1"]
    builder: DailyTalkUSDM
    tokenizer: PreTrainedTokenizerFast
    encoder: TemplateEncoder
    unit_tokenizer: UnitTokenizer
    plan: list[Shard]


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
    run = _open_run(config)
    counts = _describe_run(run)
    if (finished := _find_finished(run, counts["key"])) is not None:
        return finished
    rows = load_rows(run.builder)
    agreement, units = _tokenize_audio(run)
    tokens = make_tokens(rows, run.plan, run.encoder, units, run.cache)
    splits, split_counts = _fit_splits(run, rows, units, tokens)
    counts |= {
        "padding_share": round(padding_share((shard.lengths for shard in run.plan), config.batch_seconds), 4),
        "agreement": agreement,
        "splits": split_counts,
    }
    if (finished := _find_finished(run, counts["key"])) is not None:  # another run was faster
        return finished
    with path_lock(run.output, run.cache), quiet():
        return write_folder(
            run.output, config.config_name, splits, run.tokenizer, counts, num_output_shards=config.num_output_shards
        )


def _open_run(config: PrepareConfig) -> _Run:
    """Open corpus, tokenizer and unit model, and plan the work shards; everything that can be refused is refused here."""
    overflow = choose_overflow(config.overflow, config.config_name, config.history)
    devices = _choose_devices(config)
    output = Path(config.output_path).expanduser()
    check_output(output, overwrite=config.overwrite, finished_too=False)
    cache = cache_root(config.cache_dir)
    tokenizer = load_tokenizer(config.pretrained_model_name_or_path, config.model_cache_dir)
    encoder = TemplateEncoder(tokenizer, config.template, last_exchange_only=config.history > 0)
    builder = _open_corpus(config, cache)
    unit_tokenizer = open_for(
        devices[0],
        find_unit_model(config.unit_model, config.model_cache_dir),
        precision=config.precision,
        batch_seconds=config.batch_seconds,
        resampler=config.resampler,
        cache_dir=cache,
    )
    if unit_tokenizer.num_units > encoder.num_units:
        raise ValueError(
            f"the unit model has {unit_tokenizer.num_units} units, the tokenizer only {encoder.num_units}: "
            "use the unit model and the tokenizer that belong together"
        )
    plan = plan_shards(builder, unit_tokenizer, encoder, config.shard_dialogs)
    return _Run(config, overflow, output, cache, devices, builder, tokenizer, encoder, unit_tokenizer, plan)


def _open_corpus(config: PrepareConfig, cache: Path) -> DailyTalkUSDM:
    """Read the split lists or manifests, and check all audio."""
    lists = {"train": config.train_metadata_path, "test": config.test_metadata_path}
    data_files = {split: str(Path(path).expanduser().resolve()) for split, path in lists.items() if path is not None}
    if data_files and is_hub_corpus(config.data_dir):
        raise ValueError(
            f"data_dir is {config.data_dir}, a dataset of the Hub with splits of its own: leave out the metadata paths"
        )
    return DailyTalkUSDM(
        config_name=config.config_name,
        history=config.history,
        agent=config.agent,
        merge_speaker_turns=config.merge_speaker_turns,
        data_dir=config.data_dir,
        data_files=data_files or None,
        cache_dir=str(cache / "builder"),
        digest_cache_dir=cache,
        on_bad_audio=config.on_bad_audio,
    )


def _runs_elsewhere(config: PrepareConfig) -> bool:
    """Whether other machines compute the units."""
    return config.executor in ("slurm", "ray")


def _choose_devices(config: PrepareConfig) -> list[str]:
    if config.executor is not None:
        from usdm_sft.executors import run as executors  # datatrove is an optional dependency

        executors.check_options(config.executor, config.num_gpus, config.slurm)
        if _runs_elsewhere(config):
            return [executors.find_device(config.executor, config.num_gpus)]
    return _find_devices(config.num_gpus)


def _find_devices(num_gpus: int | None) -> list[str]:
    """The GPUs of this machine, or its CPU."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus is not None and num_gpus > available:
        raise ValueError(f"num_gpus is {num_gpus}: this machine has {available}; give {available} or fewer")
    return [f"cuda:{index}" for index in range(available if num_gpus is None else num_gpus)] or ["cpu"]


def _describe_run(run: _Run) -> dict[str, Any]:
    """The part of counts.json that is known before any work, with the key of the run."""
    config, builder = run.config, run.builder
    is_reference = (config.precision, config.resampler) == ("fp32", "soxr")
    lists = {f"{split} {list_kind(builder.split_lists[split])}": sha for split, sha in builder.list_digests.items()}
    counts: dict[str, Any] = {
        "format_version": 1,
        "config": config.config_name,
        "corpus": describe_corpus(builder.split_lists, builder.list_digests),
        "unit_model": describe_unit_model(run.unit_tokenizer.folder),
        "tokenizer": describe_tokenizer(str(config.pretrained_model_name_or_path), run.encoder.num_units),
        "num_units": run.unit_tokenizer.num_units,
        "settings": {
            "history": config.history,
            "agent": config.agent,
            "merge_speaker_turns": config.merge_speaker_turns,
            "template": config.template.settings(),
            "max_length": config.max_length,
            "overflow": run.overflow,
            "shuffle_seed": config.shuffle_seed,
            "num_output_shards": config.num_output_shards,
            "shard_dialogs": config.shard_dialogs,
            **run.unit_tokenizer.settings,
            **({} if is_reference else {"agreement_utterances": config.agreement_utterances}),
        },
        "digests": {
            **lists,
            "lists and audio": builder.config.corpus_digest,
            "unit model": run.unit_tokenizer.digest,
            "tokenizer": run.encoder.tokenizer_digest,
        },
        "versions": {"dailytalk-usdm": __version__} | {name: importlib.metadata.version(name) for name in _VERSIONED},
    }
    return counts | {"key": cache_key(counts, [shard.tokens_key for shard in run.plan])}


def _find_finished(run: _Run, key: str) -> dict[str, Any] | None:
    """The counts of an output folder that the same run finished; other content is refused."""
    with path_lock(run.output, run.cache):
        if is_up_to_date(run.output, key):
            clear_unfinished(run.output)
            logger.info("%s is finished already, with the same settings and data: nothing was done", run.output)
            return read_counts(run.output)
        check_output(run.output, overwrite=run.config.overwrite, finished_too=True)
        return None


def _tokenize_audio(run: _Run) -> tuple[dict[str, Any] | None, dict[str, Path]]:
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


def _fit_splits(
    run: _Run, rows: Mapping[str, Dataset], units: dict[str, Path], tokens: Mapping[str, Path]
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Join the token shards of each split, apply `max_length`, and count the rows."""
    config = run.config
    splits, counts = {}, {}
    for split, split_rows in rows.items():
        shards: Sequence[Shard] = [shard for shard in run.plan if shard.split == split]
        joined = join_shards(split_rows, [tokens[shard.tokens_key] for shard in shards])
        fitted = fit_rows(joined, run.encoder, config.max_length, run.overflow)
        counts[split] = count_rows(joined, fitted, run.builder, split, config.max_length)
        counts[split]["fp32_fallback"] = find_fp32_fallback(shards, units, run.builder.corpus[split])
        shuffle = config.shuffle_seed is not None
        splits[split] = fitted.rows.shuffle(seed=config.shuffle_seed) if shuffle else fitted.rows
    return splits, counts
