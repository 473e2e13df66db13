"""prepare(): from the corpus folder to a dataset folder, in work shards that a crash cannot take back.

    split lists ─ dialogs ─ examples with audio ─ units ─ input_ids, labels ─ dataset folder
                  corpus    builder (Arrow)       .map    .map                Parquet + card

A work shard is a fixed number of whole dialogs in order, and `.map` sees it as one batch. Its units and its tokens are two
files of the cache, so that another tokenizer or length limit needs no forward pass.
"""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_type_hints

from usdm_sft import __version__
from usdm_sft.config.checks import check_settings
from usdm_sft.corpus.examples import SINGLE_TURN, check_config
from usdm_sft.template.config import REFERENCE, Template
from usdm_sft.template.tokenizer import MAX_LENGTH, USTM
from usdm_sft.units.agreement import NUM_UTTERANCES
from usdm_sft.units.settings import BATCH_SECONDS

logger = logging.getLogger(__name__)

SHARD_DIALOGS = 64
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
    """The units are being made elsewhere: prepare goes on when it is called again."""


def prepare(
    data_dir: str,
    output_path: str,
    *,
    config_name: str = SINGLE_TURN,
    history: int = 0,
    agent: str | None = None,
    merge_speaker_turns: bool = False,
    train_metadata_path: str | None = None,
    test_metadata_path: str | None = None,
    pretrained_model_name_or_path: str = USTM,
    model_cache_dir: str | None = None,
    cache_dir: str | None = None,
    unit_model: str = "xlsr2_1b_v2",
    template: Template = REFERENCE,
    max_length: int = MAX_LENGTH,
    overflow: str | None = None,
    precision: str = "fp32",
    batch_seconds: float = BATCH_SECONDS,
    shard_dialogs: int = SHARD_DIALOGS,
    num_gpus: int | None = None,
    resampler: str = "soxr",
    agreement_utterances: int = NUM_UTTERANCES,
    num_output_shards: int | None = None,
    shuffle_seed: int | None = None,
    on_bad_audio: Literal["error", "skip"] = "error",
    overwrite: bool = False,
    executor: Literal["local", "slurm", "ray"] | None = None,
    tasks: int = 1,
    slurm: dict | None = None,
) -> dict[str, Any]:
    """Make a dataset folder of examples with units, input_ids and labels.

    Several GPUs, and tasks of the local executor, are worked by spawned processes. They do not import the calling script, so it
    needs no `if __name__ == "__main__":`. A progress bar is shown where stderr is a terminal, unless
    `datasets.disable_progress_bars()` was called.

    Args:
        data_dir: DailyTalk's folder (with data/), its data folder, or its zip archive; or the folder of another corpus, with
            manifests; or hub:USER/NAME.
        output_path: The dataset folder to make.
        config_name: single_turn (the reference's: one exchange an example) or multi_turn (a conversation an example).
        history: Earlier exchanges that an example of single_turn brings along; loss falls in its last exchange only.
        agent: The speaker who is the agent in every pair; by default both sides are in turn, as in the reference.
        merge_speaker_turns: Make one turn of neighbouring ones of a speaker; by default such dialogs are left out whole, as
            in the reference.
        train_metadata_path: Split list or manifest of the train split. Where neither is named, those beside the data, or else
            DailyTalk's own, fetched once.
        test_metadata_path: Split list or manifest of the test split.
        pretrained_model_name_or_path: The speech-text tokenizer: a repository of the Hub, a folder, or "mistral-common" for
            the one that is built offline.
        model_cache_dir: Where the tokenizer and the unit model are kept when they are downloaded.
        cache_dir: Where finished work is kept; the folder dailytalk_usdm in HF_HOME by default.
        unit_model: A unit model folder, or "xlsr2_1b_v2" to download and convert the published one.
        template: What the template says and which parts bear loss.
        max_length: Tokens that an example may have, BOS and EOS counted.
        overflow: What happens to longer ones: drop leaves them out; truncate keeps the leading exchanges that fit (with
            history: drops the oldest); split makes further examples of the rest (multi_turn). By default drop where an
            example is one exchange, else truncate.
        precision: fp32 (the reference's), tf32, fp16 or bf16.
        batch_seconds: Seconds of audio, padding included, in one forward pass.
        shard_dialogs: Dialogs in a work shard, which is what a crash can lose.
        num_gpus: GPUs to use, a process each; all of them by default. 0 means the CPU. With ray and slurm each task has one
            GPU, unless this is 0; a Ray cluster that is started for the run uses the CPU where this machine has no GPU.
        resampler: soxr (the reference's) or torchaudio (on the device; needs the extra).
        agreement_utterances: Utterances on which the agreement of other precisions and resamplers with fp32 and soxr is
            measured.
        num_output_shards: Parquet files a split; 64 for train and 8 for test by default, never more than rows.
        shuffle_seed: Shuffle the rows of each split; in order of dialog and turn by default.
        on_bad_audio: Audio that cannot become units: "error" stops before any work and names every file; "skip" leaves out
            the pairs concerned, and lists them in counts.json and in the card.
        overwrite: Write into an output folder that holds something else; its README.md, counts.json, pictures,
            tokenizer and the folder of the config are replaced.
        executor: Make the units in tasks of datatrove (extra executors): local, in a process each on this machine; ray, on the
            cluster of RAY_ADDRESS or a new one; slurm, as an array job, after which the same command is given again. All
            machines must see data, unit model, cache and environment under the same paths. By default this process, or
            one for each GPU.
        tasks: Into how many tasks the work shards are cut. As many as GPUs may be had at once will do: a lost task loses
            one work shard. Local tasks on the CPU all run at once.
        slurm: Options of datatrove's SlurmPipelineExecutor: partition and time, and as wanted cpus_per_task (4),
            mem_per_cpu_gb (4), gpus_per_task (1), qos, sbatch_args, env_command, ...

    Returns:
        The counts, as in counts.json.

    Raises:
        Submitted: The units are made by Slurm; nothing else is wrong.
        FileNotFoundError: Data, a split list, an audio file or a model is missing.
        FileExistsError: The output folder holds something else and `overwrite` is false.
        ValueError: Split lists, audio, unit model, tokenizer or a setting are wrong; the message says what to do.
    """
    check_settings(get_type_hints(prepare), locals())  # the arguments: no other name is bound yet
    check_config(config_name, history)
    if executor is not None:
        from usdm_sft.executors import run as executors

        executors.check_options(executor, num_gpus, slurm)
    elif tasks != 1 or slurm is not None:
        raise ValueError("tasks and slurm are options of an executor: name one with --executor")
    from dailytalk_usdm import DailyTalkUSDM
    from usdm_sft.convert.published import describe_unit_model, find_unit_model
    from usdm_sft.corpus.published_lists import describe_corpus, list_kind
    from usdm_sft.dataset_folder import layout as folder
    from usdm_sft.dataset_folder.writer import write_folder
    from usdm_sft.shards import make as shards
    from usdm_sft.shards.counts import count_rows
    from usdm_sft.shards.overflow import choose_overflow, fit_rows
    from usdm_sft.template.encoder import TemplateEncoder
    from usdm_sft.template.tokenizer import describe_tokenizer, load_tokenizer
    from usdm_sft.units.agreement import measure_agreement, pick_sample
    from usdm_sft.units.batches import padding_share
    from usdm_sft.units.tokenizer import open_for
    from usdm_sft.utils.cache import cache_key, cache_root, path_lock
    from usdm_sft.utils.progress import quiet

    overflow = choose_overflow(overflow, config_name, history)
    elsewhere = executor in ("slurm", "ray")
    devices = [executors.find_device(executor, num_gpus)] if elsewhere else _find_devices(num_gpus)
    output = Path(output_path).expanduser()
    folder.check_output(output, overwrite=overwrite, finished_too=False)
    cache = cache_root(cache_dir)
    tokenizer = load_tokenizer(pretrained_model_name_or_path, model_cache_dir)
    encoder = TemplateEncoder(tokenizer, template, last_exchange_only=history > 0)
    lists = {"train": train_metadata_path, "test": test_metadata_path}
    named = {split: str(Path(path).expanduser().resolve()) for split, path in lists.items() if path is not None}
    builder = DailyTalkUSDM(
        config_name=config_name,
        history=history,
        agent=agent,
        merge_speaker_turns=merge_speaker_turns,
        data_dir=data_dir,
        data_files=named or None,
        cache_dir=str(cache / "builder"),
        digest_cache_dir=cache,
        on_bad_audio=on_bad_audio,
    )
    unit_tokenizer = open_for(
        devices[0],
        find_unit_model(unit_model, model_cache_dir),
        precision=precision,
        batch_seconds=batch_seconds,
        resampler=resampler,
        cache_dir=cache,
    )
    if unit_tokenizer.num_units > encoder.num_units:
        raise ValueError(
            f"the unit model has {unit_tokenizer.num_units} units, the tokenizer only {encoder.num_units}: "
            "use the two that belong together"
        )
    plan = shards.plan_shards(builder, unit_tokenizer, encoder, shard_dialogs)
    counts = {
        "format_version": 1,
        "config": builder.config.name,
        "corpus": describe_corpus(builder.split_lists, builder.list_digests),
        "unit_model": describe_unit_model(unit_tokenizer.folder),
        "tokenizer": describe_tokenizer(pretrained_model_name_or_path, encoder.num_units),
        "num_units": unit_tokenizer.num_units,
        "settings": {
            "history": history,
            "agent": agent,
            "merge_speaker_turns": merge_speaker_turns,
            "template": asdict(template) | {"loss": list(template.loss)},
            "max_length": max_length,
            "overflow": overflow,
            "shuffle_seed": shuffle_seed,
            "num_output_shards": num_output_shards,
            "shard_dialogs": shard_dialogs,
            **unit_tokenizer.settings,
            **({} if (precision, resampler) == ("fp32", "soxr") else {"agreement_utterances": agreement_utterances}),
        },
        "digests": {
            **{f"{split} {list_kind(builder.split_lists[split])}": sha for split, sha in builder.list_digests.items()},
            "lists and audio": builder.config.corpus_digest,
            "unit model": unit_tokenizer.digest,
            "tokenizer": encoder.tokenizer_digest,
        },
        "versions": {"dailytalk-usdm": __version__} | {name: importlib.metadata.version(name) for name in _VERSIONED},
    }
    counts["key"] = cache_key(counts, [shard.tokens_key for shard in plan])
    if (finished := _finished(output, counts["key"], cache, overwrite)) is not None:
        return finished

    rows = shards.load_rows(builder)
    if executor is not None:
        sample = pick_sample(builder.audio_digests, agreement_utterances)
        its_devices = devices if devices[0] != "cpu" else ["cpu"] * tasks
        submitted = executors.run_tasks(
            executor, plan, unit_tokenizer, its_devices, cache, tasks=tasks, sample=sample, slurm=slurm
        )
        if submitted:
            raise Submitted(f"{submitted}: run the same command again when it has ended")
    agreement = measure_agreement(unit_tokenizer, builder.audio_digests, cache, agreement_utterances)
    if agreement is not None:
        logger.warning(
            "%s, %s: %.2f %% of the units are those of fp32 and soxr (%d utterances)",
            precision, resampler, 100 * agreement["share"], agreement["utterances"],
        )  # fmt: skip
    units = shards.make_units(plan, unit_tokenizer, devices, cache)
    tokens = shards.make_tokens(rows, plan, encoder, units, cache)
    counts["padding_share"] = round(padding_share((shard.lengths for shard in plan), batch_seconds), 4)
    counts["agreement"] = agreement
    splits, counts["splits"] = {}, {}
    for split in rows:
        its = [shard for shard in plan if shard.split == split]
        joined = shards.join_shards(rows[split], [tokens[shard.tokens_key] for shard in its])
        fitted = fit_rows(joined, encoder, max_length, overflow)
        splits[split], counts["splits"][split] = fitted.rows, count_rows(joined, fitted, builder, split, max_length)
        counts["splits"][split]["fp32_fallback"] = shards.find_fp32_fallback(its, units, builder.corpus[split])
        if shuffle_seed is not None:
            splits[split] = fitted.rows.shuffle(seed=shuffle_seed)
    if (finished := _finished(output, counts["key"], cache, overwrite)) is not None:  # by another run, meanwhile
        return finished
    with path_lock(output, cache), quiet():
        return write_folder(output, builder.config.name, splits, tokenizer, counts, num_output_shards=num_output_shards)


def _finished(output: Path, key: str, cache: Path, overwrite: bool) -> dict[str, Any] | None:
    """The counts of a finished folder of the same run; refuses what must not be overwritten."""
    from usdm_sft.dataset_folder import layout as folder
    from usdm_sft.utils.cache import path_lock

    with path_lock(output, cache):
        if folder.is_up_to_date(output, key):
            folder.clear_unfinished(output)
            logger.info("%s is finished already, with the same settings and data: nothing was done", output)
            return folder.read_counts(output)
        folder.check_output(output, overwrite=overwrite, finished_too=True)
        return None


def _find_devices(num_gpus: int | None) -> list[str]:
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus is not None and not 0 <= num_gpus <= available:
        raise ValueError(f"num_gpus is {num_gpus}: this machine has {available}")
    return [f"cuda:{index}" for index in range(available if num_gpus is None else num_gpus)] or ["cpu"]
