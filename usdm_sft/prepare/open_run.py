"""One run of `prepare`: its devices, corpus, rows, tokenizer, unit model and work shards, opened and described."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerFast

from usdm_sft import __version__
from usdm_sft.audio.digests import AudioDigest
from usdm_sft.audio.reading import AudioError
from usdm_sft.corpus.builder import DailyTalkUSDM
from usdm_sft.corpus.features import ROLES, SPEECH
from usdm_sft.corpus.find import describe_corpus, recipe_of
from usdm_sft.corpus.problems import join_problems
from usdm_sft.corpus.read import describe_ignored, find_large_share
from usdm_sft.folder.layout import ROW_PACKAGES, check_output
from usdm_sft.prepare.config import PrepareConfig, choose_overflow
from usdm_sft.prepare.given_units import GivenUnits, check_recordings
from usdm_sft.prepare.plan import Plan, plan_shards
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import describe_tokenizer, load_tokenizer, read_base_model
from usdm_sft.units.batches import import_resample
from usdm_sft.units.folder import read_description
from usdm_sft.units.precision import check_cpu
from usdm_sft.units.published import find_unit_model, locate_unit_model
from usdm_sft.units.settings import make_settings
from usdm_sft.units.source import UnitSource
from usdm_sft.units.tokenizer import UnitTokenizer, check_description, open_for
from usdm_sft.utils.cache_keys import cache_key, cache_root
from usdm_sft.utils.locks import require_locks
from usdm_sft.utils.pool import Pool
from usdm_sft.utils.progress import Stages, quiet

logger = logging.getLogger(__name__)

_BATCH = 1_000  # rows that are compared with the corpus at a time

# counts.json names the versions of the packages that write the folder. The key of the folder holds those of `ROW_PACKAGES`.
_VERSIONED = (
    "datasets", "matplotlib", "numpy", "pyarrow", "soundfile", "soxr", "tokenizers", "torch", "transformers",
)  # fmt: skip


def choose_devices(config: PrepareConfig) -> list[str]:
    """Return the devices of a run, such as ["cuda:0", "cuda:1"]; with an executor the kind of device that their tasks have.

    Raises:
        FileNotFoundError: The executor is slurm, and this machine has no sbatch.
        ImportError: The extra executors or torchaudio is not installed.
        ValueError: `num_gpus`, the precision or an option of the executor does not fit this machine.
    """
    if config.executor is not None:
        from usdm_sft.prepare import unit_tasks  # datatrove is an optional dependency

        unit_tasks.check_options(config.executor, config.num_gpus, config.slurm)
        if config.unit_rate is None:
            return [unit_tasks.find_device(config.executor, config.num_gpus)]
    if config.unit_rate is not None:  # nothing is computed
        return ["cpu"]
    devices = find_devices(config.num_gpus)
    make_settings(torch.device(devices[0]).type, config.precision, config.resampler, config.batch_seconds)
    if devices == ["cpu"]:
        check_cpu(config.precision)
    if config.resampler == "torchaudio":
        import_resample()
    return devices


def find_devices(num_gpus: int | None) -> list[str]:
    """Return the GPUs of this machine, or its CPU; a ValueError if it has fewer than `num_gpus` GPUs."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus is not None and num_gpus > available:
        raise ValueError(f"num_gpus is {num_gpus}: this machine has {available}; give {available} or fewer")
    return [f"cuda:{index}" for index in range(available if num_gpus is None else num_gpus)] or ["cpu"]


# A process takes two seconds to start, in which this one encodes and writes the rows of about 10,000 utterances. It starts as soon
# as the corpus is read, so that it is ready when there is work.
UTTERANCES_PER_PROCESS = 5_000


@dataclass(frozen=True)
class Run:
    """Everything that the steps of one run share."""

    config: PrepareConfig
    overflow: str
    output: Path
    cache: Path
    devices: list[str]  # such as ["cuda:0", "cuda:1"]
    builder: DailyTalkUSDM
    tokenizer: PreTrainedTokenizerFast
    encoder: TemplateEncoder
    unit_tokenizer: UnitTokenizer | GivenUnits
    plan: Plan


def open_run(
    config: PrepareConfig, stages: Stages, unit_tokenizer: UnitTokenizer | None = None, *, pool: Pool | None = None
) -> Run:
    """Open corpus, tokenizer and unit model, and plan the work shards; everything that can be refused is refused here.

    Args:
        config: The options.
        stages: Learns when a stage begins.
        unit_tokenizer: Takes the place of the unit model of the config, which is then not looked for.
        pool: Shares out recordings that are read for the first time.

    Raises:
        Submitted: Slurm reads the recordings.
    """
    overflow = choose_overflow(config.overflow, config.config_name, config.history)
    devices = choose_devices(config)
    output = Path(config.output_path).expanduser()
    check_output(output, overwrite=config.overwrite, finished_too=False)
    output = output.resolve()  # a link to the folder is followed once
    cache = cache_root(config.cache_dir)
    require_locks(cache / "locks")
    config.check_kinds()  # before anything is downloaded
    if config.unit_rate is None and unit_tokenizer is None:
        _check_unit_model(config)
    stages.start("tokenizer")
    tokenizer = load_tokenizer(config.pretrained_model_name_or_path, config.model_cache_dir)
    encoder = TemplateEncoder(
        tokenizer,
        config.template,
        last_exchange_only=config.history > 0,
        unit_repetition=config.unit_repetition,
    )
    stages.start("corpus")
    builder = open_corpus(config, cache)
    builder.screen_audio(pool)
    _warn(builder)
    if pool is not None:
        pool.start(_count_utterances(builder) // UTTERANCES_PER_PROCESS)
    stages.start("unit model")
    units = _take_units(config, builder, encoder) or unit_tokenizer
    if units is None:
        units = _open_unit_model(config, devices[0], cache)
        check_num_units(units, encoder.num_units)
        _check_lengths(builder.audio_digests, units)
    plan = plan_shards(builder, units, encoder, config.shard_dialogs)
    return Run(config, overflow, output, cache, devices, builder, tokenizer, encoder, units, plan)


def _check_unit_model(config: PrepareConfig) -> None:
    """Check options against a unit model that needs no download before the corpus is read."""
    folder = locate_unit_model(config.unit_model, config.model_cache_dir)
    if folder is not None:
        check_description(read_description(folder), config.precision, config.streams, config.num_streams)


def _warn(builder: DailyTalkUSDM) -> None:
    """Name the columns that are ignored, and the reasons if many dialogs are left out."""
    for split in builder.corpus.values():
        if split.ignored:
            logger.warning("%s", describe_ignored(split))
        if (warning := find_large_share(split)) is not None:
            logger.warning("%s", warning)


def _count_utterances(builder: DailyTalkUSDM) -> int:
    if builder.unit_streams is None:
        return len(builder.audio_digests)
    return sum(len(dialog.utterances) for split in builder.corpus.values() for dialog in split.dialogs)


def _take_units(config: PrepareConfig, builder: DailyTalkUSDM, encoder: TemplateEncoder) -> GivenUnits | None:
    """Return the units that the corpus has, or None if a unit model makes them.

    Raises:
        ValueError: The tokenizer has fewer units, or the recordings to keep are not there.
    """
    if (streams := builder.unit_streams) is None:
        return None
    units = GivenUnits(streams)
    check_num_units(units, encoder.num_units)
    check_recordings(builder, keep_audio=config.keep_audio)
    return units


def check_num_units(units: UnitSource, num_tokens: int) -> None:
    """Check that the tokenizer has a token for each unit; a ValueError if it has fewer."""
    if units.num_units <= num_tokens:
        return
    source = "corpus" if units.digest is None else "unit model"
    streams = f" in {len(units.streams.kept)} streams" if len(units.streams.kept) > 1 else ""
    raise ValueError(
        f"the {source} has {units.num_units:,} different units{streams}, the tokenizer only {num_tokens:,}: use the tokenizer that belongs to "
        f"it, or make one with 'dailytalk-usdm tokenizer BASE FOLDER --num_units {units.num_units}'"
    )


def _check_lengths(audio: Mapping[str, AudioDigest], unit_tokenizer: UnitTokenizer) -> None:
    """Check that each recording makes a unit. Any unit model needs `MIN_SAMPLES`, which the first pass has checked; some need more."""
    fewest = unit_tokenizer.framing.min_samples
    problems = [
        f"audio file {path} has {digest.num_samples} samples at 16 kHz, fewer than the {fewest} ({fewest / 16:g} ms) that make a unit "
        "of this unit model: leave out its pairs"
        for path, digest in audio.items()
        if unit_tokenizer.framing.count_samples(digest.num_samples, digest.seconds) < fewest
    ]
    if problems:
        raise AudioError(join_problems(problems))


def _open_unit_model(config: PrepareConfig, device: str, cache: Path) -> UnitTokenizer:
    return open_for(
        device,
        find_unit_model(config.unit_model, config.model_cache_dir),
        precision=config.precision,
        batch_seconds=config.batch_seconds,
        resampler=config.resampler,
        streams=config.streams,
        num_streams=config.num_streams,
        cache_dir=cache,
    )


def open_corpus(config: PrepareConfig, cache: Path) -> DailyTalkUSDM:
    """Read the split lists or manifests."""
    given: dict[str, Any] = {
        "unit_rate": config.unit_rate, "num_units": config.num_units, "corpus": config.corpus
    }  # fmt: skip
    if config.unit_rate is not None:  # otherwise the streams are those of a codec
        given["streams"] = config.streams
    given |= _describe_validation(config)
    return DailyTalkUSDM(
        **{name: value for name, value in given.items() if value is not None},
        config_name=config.config_name,
        history=config.history,
        **config.rules.changes(),
        data_dir=config.data_dir,
        data_files=config.data_files,
        cache_dir=str(cache / "builder"),
        digest_cache_dir=cache,
        on_bad_audio=config.on_bad_audio,
    )


def _describe_validation(config: PrepareConfig) -> dict[str, Any]:
    """Return the options of a split that is taken from train; nothing if there is none."""
    return {} if config.val_dialogs is None else {"val_dialogs": config.val_dialogs, "val_seed": config.val_seed}


def describe_run(run: Run) -> dict[str, Any]:
    """The part of counts.json that is known before any work, with the key of the run."""
    config, builder, units = run.config, run.builder, run.unit_tokenizer
    is_reference = (config.precision, config.resampler) == ("fp32", "soxr")
    lists = builder.split_lists
    named = ("merge", "max_gap", "on_bad_rows", "min_seconds", "max_seconds")
    rules = {name: value for name, value in config.rules.changes().items() if name in named}
    if builder.further_columns:
        rules["keep_columns"] = list(builder.further_columns)
    counts: dict[str, Any] = {
        "format_version": 2,
        "config": config.config_name,
        "corpus": describe_corpus(lists, builder.list_digests, config.corpus),
        "unit_model": units.describe(),
        "tokenizer": describe_tokenizer(
            str(config.pretrained_model_name_or_path),
            run.encoder.tokens,
            run.encoder.layout.chat,
            read_base_model(run.tokenizer),
        ),
        "num_units": units.num_units,
        "settings": {
            "history": config.history,
            "agent": config.agent,
            "merge_speaker_turns": config.merge_speaker_turns,
            **_describe_validation(config),
            "template": config.template.settings(),
            "max_length": config.max_length,
            "overflow": run.overflow,
            "shuffle_seed": config.shuffle_seed,
            "num_output_shards": config.num_output_shards,
            "shard_dialogs": config.shard_dialogs,
            **({} if config.unit_repetition == "keep" else {"unit_repetition": config.unit_repetition}),
            **({"keep_audio": True} if config.keep_audio else {}),
            **({"corpus": config.corpus} if config.corpus else {}),
            **rules,
            **units.settings,
            **({} if is_reference else {"agreement_utterances": config.agreement_utterances}),
        },
        "digests": {
            **{
                f"{split} {recipe_of(lists[split], config.corpus).kind}": sha
                for split, sha in builder.list_digests.items()
            },
            "lists and audio" if builder.audio_digests else "lists": builder.content_digest,
            **({} if units.digest is None else {"unit model": units.digest}),
            "tokenizer": run.encoder.tokenizer_digest,
        },
        "versions": {"dailytalk-usdm": __version__} | {name: importlib.metadata.version(name) for name in _VERSIONED},
    }
    decisive = counts | {"versions": {name: counts["versions"][name] for name in ROW_PACKAGES}}
    return counts | {"key": cache_key(decisive, [shard.tokens_key for shard in run.plan])}


def text_columns(names: Iterable[str]) -> list[str]:
    """Return the columns of the builder that rows keep. Units and seconds come from unit shards, also where the corpus has them."""
    others = {f"{role}_{name}" for role in ROLES for name in ("audio", *SPEECH)}
    return [name for name in names if name not in others]


def load_rows(builder: DailyTalkUSDM) -> dict[str, Dataset]:
    """Load the builder's examples by split. A damaged cache of the builder is made again, once.

    Raises:
        OSError: The examples differ from the corpus after they were made again, or cannot be read or written.
        pyarrow.ArrowInvalid: The new files are damaged too.
    """
    try:
        return _load(builder, "reuse_dataset_if_exists")
    except (pa.ArrowInvalid, OSError, DatasetGenerationError) as error:
        if isinstance(error, DatasetGenerationError) and not isinstance(error.__cause__, OSError):
            raise  # such as an error of the builder, which another try would repeat
        logger.warning("%s was damaged (%s): making it again", builder.cache_dir, error)
    return _load(builder, "force_redownload")


def _load(builder: DailyTalkUSDM, download_mode: str) -> dict[str, Dataset]:
    with quiet():
        builder.download_and_prepare(download_mode=download_mode)
        rows = {split: builder.as_dataset(split=split) for split in builder.corpus}
        for split, split_rows in rows.items():
            split_rows.data.validate(full=True)
            _check_rows(split_rows, builder, split)
    return rows


def _check_rows(rows: Dataset, builder: DailyTalkUSDM, split: str) -> None:
    """Compare every column with the corpus, but for audio and given units; this takes one second for DailyTalk.

    A flipped byte in a text leaves a valid Arrow file, which `validate` cannot find.

    Raises:
        OSError: A column or the number of rows differs.
    """
    rows = rows.select_columns(text_columns(rows.column_names))
    dialogs = list(range(len(builder.corpus[split].dialogs)))
    examples = (example for _, example in builder._generate_examples(split, dialogs))
    start = 0
    while batch := list(islice(examples, _BATCH)):
        found = rows[start : start + len(batch)]
        for column in rows.column_names:
            if found[column] != [example[column] for example in batch]:
                raise OSError(f"column {column} of {split} differs from the corpus")
        start += len(batch)
    if start != len(rows):
        raise OSError(f"{split} has {len(rows):,} rows, but the corpus makes {start:,}")
