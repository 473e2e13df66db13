"""Every option of `prepare`: the one definition that the Python API, the command line, YAML files and `--help` share.

The base classes are the groups that `--help` and the documentation show. This module imports nothing heavy, so that `--help`
answers at once.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from usdm_sft.audio.addresses import is_remote
from usdm_sft.corpus.dialogs import CorpusName
from usdm_sft.corpus.examples import SINGLE_TURN, check_config, config_has_lists
from usdm_sft.corpus.find import find_lists
from usdm_sft.corpus.hub_corpus import is_hub_corpus
from usdm_sft.corpus.read import Rules, check_kinds, check_rules
from usdm_sft.folder.own_parts import EMPTY_CARD, Card
from usdm_sft.template.config import (
    EXPECTED_LOSS,
    EXPECTED_PARTS,
    MAX_LENGTH,
    REFERENCE,
    USTM,
    Template,
    UnitRepetition,
)
from usdm_sft.template.streams import EXPECTED_NUM_UNITS, StreamsName, check_unit_options
from usdm_sft.units.families import refuse_streams
from usdm_sft.units.settings import DESCRIPTION, PUBLISHED, PrecisionName, ResamplerName

OVERFLOWS = ("drop", "truncate", "split")

# The least value of settings that are whole numbers.
MINIMUM = {
    "max_length": 1,
    "shard_dialogs": 1,
    "num_output_shards": 1,
    "num_proc": 1,
    "agreement_utterances": 1,
    "tasks": 1,
    "num_gpus": 0,
    "shuffle_seed": 0,
    "val_seed": 0,
}
_EXPECTED = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    dict: 'names and values, such as {partition: NAME, time: "04:00:00"}',
    tuple: EXPECTED_LOSS,
    Template: "a dailytalk_usdm.Template, such as Template(loss=('user_text',))",
    Card: "a dailytalk_usdm.Card, such as Card(license='cc-by-4.0')",
}


def describe_type(hint: Any, name: str = "") -> str:
    """Say what a type hint asks for, such as "a whole number" for `int | None`.

    Args:
        hint: The type hint of a setting.
        name: The setting, of which several lists have the same type.
    """
    if name == "template.parts":
        return EXPECTED_PARTS
    if name == "num_units":
        return EXPECTED_NUM_UNITS
    if name == "val_dialogs":
        return "a whole number of dialogs, such as 100, or a share below 1, such as 0.05"
    hint = _alternatives(hint)[0]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return _EXPECTED[get_origin(hint) or hint]


def _check_setting(name: str, value: Any, hint: Any) -> None:
    """Check the type and the range of a setting, and raise a ValueError if one is wrong."""
    first, *others = _alternatives(hint)
    if value is None and NoneType in others:
        return
    if get_origin(first) is Literal and isinstance(value, str):
        if value not in get_args(first):
            raise ValueError(f"{name} {value!r} is unknown: choose {describe_type(hint)}")
    elif not any(_is_instance(value, kind) for kind in (first, *others)):
        kind = "" if value is None else f", a value of type {type(value).__name__}"
        raise ValueError(f"{name} is {value!r}{kind}: give {describe_type(hint, name)}")
    if first is float and not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}: give a positive number")
    if name in MINIMUM and value < MINIMUM[name]:
        raise ValueError(f"{name} is {value}: give {'0 or more' if MINIMUM[name] == 0 else 'a positive number'}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone; `int | None` -> (int, NoneType)."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_instance(value: Any, kind: Any) -> bool:
    if kind in (int, float):  # True is an int for Python
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, (str, os.PathLike))
    return get_origin(kind) is not Literal and isinstance(value, get_origin(kind) or kind)


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """Corpus"""

    data_dir: str | Path
    """DailyTalk's folder (with data/), its data folder, or its zip archive; or the folder of another corpus (a manifest, Lhotse, NeMo,
    Kaldi, ...) or one of its files; or hub:USER/NAME. A folder with manifests may be remote (s3://, gs://, hf://, https://)."""

    corpus: CorpusName | None = None
    """The kind of the corpus, which its files tell by default: dailytalk, manifest, lhotse, nemo, kaldi, rttm (with ctm), alignments (of words),
    segments (a table), or dataset (of datasets, with the recordings in it)."""

    config_name: Literal["single_turn", "multi_turn"] = SINGLE_TURN
    """single_turn (as the reference: one exchange per row) or multi_turn (one conversation per row)."""

    history: int = 0
    """single_turn only: number of earlier exchanges that each row brings along as context, without loss."""

    agent: str | int | None = None
    """The speaker who is the agent in every pair; a number is the speaker of this name. channel=1 is the one on this channel in each dialog,
    and column=NAME the one that this column of the manifest names. By default each side is the agent in
    turn, as in the reference. Required for dialogs of a manifest with more than two speakers."""

    merge_speaker_turns: bool = False
    """Join neighbouring turns of one speaker. By default a dialog with such turns is left out, as in the reference."""

    merge: Literal["join", "span"] = "join"
    """How merge_speaker_turns joins: join puts the recordings one after the other, and segments of one channel with the pause between them;
    span takes one channel from the first start to the last end, and refuses turns of several channels or recordings."""

    max_gap: float | None = None
    """Seconds of the longest pause over which merge_speaker_turns joins two turns of one speaker. A longer one divides the dialog there."""

    train_metadata_path: str | Path | None = None
    """Split list or manifest of the train split (of Kaldi, its wav.scp). By default the lists beside the data, or else DailyTalk's own, which are
    downloaded once."""

    test_metadata_path: str | Path | None = None
    """Split list or manifest of the test split."""

    val_dialogs: int | float | None = None
    """Number of dialogs of the train split, or a share of them such as 0.05, that become a split validation. Whole dialogs are chosen with a
    seed. By default there is none, as in the reference."""

    val_seed: int = 0
    """Seed that chooses the dialogs of val_dialogs."""

    on_bad_audio: Literal["error", "skip"] = "error"
    """What to do with audio that cannot become units: error stops before any work and names every file; skip leaves out
    the pairs that use it and lists them in counts.json and in the card."""

    on_bad_rows: Literal["error", "skip", "clip"] = "error"
    """What to do with rows of a manifest that cannot be used (no text, special tokens or control characters in it, no length, an end past the recording):
    error names them; skip leaves out the pairs that use it and counts them by reason; clip is skip, but cuts segments at the end of their recording."""

    min_seconds: float | None = None
    """Leave out turns that are shorter, with the pairs that use them."""

    max_seconds: float | None = None
    """Leave out turns that are longer, with the pairs that use them."""

    keep_columns: str | None = None
    """Further columns of a manifest to keep in the rows as user_NAME and agent_NAME, separated by commas, or all. By default they are
    ignored, and named in a message."""


@dataclass(frozen=True, kw_only=True)
class GivenUnitOptions:
    """Units that exist already"""

    unit_rate: float | None = None
    """Take the units from the column units of the manifests, and open no unit model; the units per second, or frames of several units per
    second, such as 12.5. By default a column units is ignored, and units are made from the recordings."""

    num_units: int | tuple[int, ...] | None = None
    """Number of different units, such as 2048; for several streams of different sizes a list, such as [4096, 1024]."""

    streams: StreamsName | None = None
    """What becomes of frames of several units, of the corpus or of a codec: first (stream 0 alone) or flatten (all streams, frame by frame,
    each with unit numbers of its own). Required for such frames."""


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Tokenizer and template"""

    pretrained_model_name_or_path: str | Path = USTM
    """The speech-text tokenizer: a Hub repository, a folder, or mistral-common for the one that is built offline."""

    template: Template = REFERENCE
    """The words of the template, and the parts that are labelled."""

    unit_repetition: UnitRepetition = "keep"
    """keep (as the reference: one unit per 20 ms frame) or collapse (one unit per run of equal units; the columns user_durations and
    agent_durations restore the frames)."""

    max_length: int = MAX_LENGTH
    """Largest number of tokens in a row, BOS and EOS included."""

    overflow: Literal["drop", "truncate", "split"] | None = None
    """What to do with longer rows: drop leaves them out; truncate keeps the leading exchanges that fit (with history: the
    latest); split puts the rest into further rows (multi_turn). An exchange that is too long by itself is left out. By default drop where a row is one exchange, else truncate."""


@dataclass(frozen=True, kw_only=True)
class UnitModelOptions:
    """Unit model"""

    unit_model: str | Path = PUBLISHED
    """A unit model folder, the folder of a codec of transformers, a model repository of the Hub that holds one of both, or xlsr2_1b_v2 to
    download and convert the published one."""

    num_streams: int | None = None
    """Number of streams of a codec to use, the first ones; by default all of them."""

    precision: PrecisionName = "fp32"
    """fp32 (as the reference), tf32, fp16, bf16, fp16x3 or bf16x3."""

    resampler: ResamplerName = "soxr"
    """soxr (as the reference) or torchaudio (on the device; needs the extra torchaudio)."""

    batch_seconds: float | None = None
    """Seconds of audio, padding included, in one forward pass. By default 320 on CUDA and 160 on the CPU, where a pass
    holds at most 16 s."""

    agreement_utterances: int = 64
    """Number of utterances on which the share of units equal to those of fp32 and soxr is measured, where precision or
    resampler differ from these."""


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Compute and cache"""

    num_gpus: int | None = None
    """GPUs to use, one process each; all of them by default. 0 means the CPU. With an executor each task has one GPU,
    unless this is 0."""

    num_proc: int | None = None
    """Largest number of processes that read recordings and make token shards and Parquet files. By default one per core that this process may use. A small corpus needs none."""

    shard_dialogs: int = 64
    """Number of dialogs in a work shard. A crash loses at most the work shards in progress."""

    cache_dir: str | Path | None = None
    """Where finished work is kept. By default the folder dailytalk_usdm in HF_HOME."""

    model_cache_dir: str | Path | None = None
    """Where the downloaded unit model and tokenizer are kept. By default dailytalk_usdm/unit_models in HF_HOME, whatever
    cache_dir is, and the cache of the Hub."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Output"""

    output_path: str | Path
    """The dataset folder to make."""

    num_output_shards: int | None = None
    """Parquet files per split, never more than rows. By default 64 for train and 8 for other splits, or more if these would have over
    20 million tokens each."""

    shuffle_seed: int | None = None
    """Shuffle the rows of each split with this seed. By default rows are in order of dialog and turn."""

    keep_audio: bool = False
    """Put the recordings into the folder as well, as a second config named utterances: one row for each turn, with text, audio and
    units. The pushed folder is then a corpus (data_dir hub:USER/NAME), and the viewer of the Hub plays it. It has the size of
    the audio. The card says what publishing it means."""

    card: Card = EMPTY_CARD
    """What the publisher says in the dataset card. It changes no digest, and a later run with other values writes only the card again."""

    overwrite: bool = False
    """Write into an output folder that holds something else. Its README.md, counts.json, pictures, tokenizer, utterances, the folder
    of the config, and that of the config it was made with, are replaced."""


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """Executor"""

    executor: Literal["slurm", "ray"] | None = None
    """Read recordings, and make units, token shards and Parquet files in datatrove tasks (extra executors): ray
    uses the cluster of RAY_ADDRESS or starts one; slurm submits an array job for each stage, and a job after it that submits
    the next. All machines must see data, unit model, cache, output and
    environment under the same paths. By default there is no executor: processes of this machine do the work."""

    tasks: int = 1
    """Number of tasks that the work of each stage is divided into; as many as GPUs are available at once."""

    slurm: dict | None = None  # type: ignore[type-arg]  # with dict[str, Any] jsonargparse reads 04:00:00 as a number
    """Options of datatrove's SlurmPipelineExecutor: partition and time, and optionally cpus_per_task (4),
    mem_per_cpu_gb (4), gpus_per_task (1), qos, sbatch_args, env_command, ..."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(
    CorpusOptions,
    GivenUnitOptions,
    TokenizerOptions,
    UnitModelOptions,
    ComputeOptions,
    OutputOptions,
    ExecutorOptions,
):
    """Options of `prepare`, validated when the config is made.

    Raises:
        ValueError: A value is of another type or out of range, or two options contradict each other.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        if isinstance(self.num_units, list):
            object.__setattr__(self, "num_units", tuple(self.num_units))
        for field in fields(self):
            _check_setting(field.name, getattr(self, field.name), hints[field.name])
        if self.agent is not None:
            object.__setattr__(self, "agent", str(self.agent))  # speakers are texts, also those that are numbers
        check_config(self.config_name, self.history)
        choose_overflow(self.overflow, self.config_name, self.history)
        if self.val_dialogs is not None and not 0 < self.val_dialogs < (
            1 if isinstance(self.val_dialogs, float) else math.inf
        ):
            raise ValueError(f"val_dialogs is {self.val_dialogs}: give {describe_type(int, 'val_dialogs')}")
        check_rules(self.rules)
        if self.keep_audio and self.max_gap is not None:
            raise ValueError(
                "keep_audio stores turns without their times, so that max_gap would divide no dialog of the folder again: leave out one of the two"
            )
        self._check_given_units()
        if self.executor is None and (self.tasks != 1 or self.slurm is not None):
            raise ValueError("tasks and slurm are options of an executor: name one with --executor")
        if self.data_files and is_hub_corpus(self.data_dir):
            raise ValueError(
                f"data_dir is {self.data_dir}, a dataset of the Hub with splits of its own: leave out the metadata paths"
            )

    def _check_given_units(self) -> None:
        """Check the options for units that exist already, and that no option of the unit model stands beside them."""
        is_given = self.unit_rate is not None or self.num_units is not None  # otherwise streams are those of a codec
        check_unit_options(self.unit_rate, self.num_units, self.streams if is_given else None)
        if self.streams == "flatten" and self.unit_repetition == "collapse":
            raise ValueError(
                "unit_repetition is collapse, but neighbours in flattened streams are units of different streams, and no run of equal units is "
                "a longer sound: use keep, or streams first"
            )
        if self.unit_rate is None:
            return
        defaults = {field.name: field.default for field in fields(UnitModelOptions)}
        if unread := [name for name, default in defaults.items() if getattr(self, name) != default]:
            raise ValueError(
                f"{', '.join(unread)} {'is' if len(unread) == 1 else 'are'} of the unit model, but with unit_rate the units are read from the "
                "manifest: leave out one of the two"
            )

    def check_kinds(self) -> None:
        """Check that the kinds of corpus and unit model have what the options ask for, from the names of files. Nothing is downloaded but
        remote manifests that are named.

        Raises:
            FileNotFoundError: `data_dir` is no corpus, or a split list does not exist.
            ValueError: The corpus or the unit model is of another kind.
        """
        lists = find_lists(
            self.data_dir, self.data_files, corpus=self.corpus, cache_dir=self.cache_dir, may_download=False
        )
        check_kinds(lists, self.rules, with_units=self.unit_rate is not None, corpus=self.corpus)
        if self.unit_rate is None and (self.unit_model == PUBLISHED or Path(self.unit_model, DESCRIPTION).is_file()):
            refuse_streams(self.streams, self.num_streams)

    @property
    def rules(self) -> Rules:
        """The rules by which the corpus is read."""
        has_text = any(part.endswith("_text") for part in self.template.parts)
        return Rules.of({field.name: getattr(self, field.name) for field in fields(self)} | {"needs_text": has_text})

    @property
    def data_files(self) -> dict[str, str] | None:
        """The absolute path of each split list or manifest that is named, or None if none is."""
        lists = {"train": self.train_metadata_path, "test": self.test_metadata_path}
        named = {
            split: str(path) if is_remote(path) else str(Path(path).expanduser().resolve())
            for split, path in lists.items()
            if path is not None
        }
        return named or None


def choose_overflow(overflow: str | None, config_name: str, history: int) -> str:
    """Choose what to do with rows that are too long, and check that the config allows it.

    Args:
        overflow: One of `OVERFLOWS`, or None: drop where a row is one pair, truncate where it has several exchanges.
        config_name: Such as "single_turn".
        history: Number of earlier exchanges in a row.

    Raises:
        ValueError: The value is unknown, or the rows of this config cannot be truncated or split.
    """
    if overflow is None:
        return "truncate" if config_has_lists(config_name, history) else "drop"
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow {overflow!r} is unknown: choose one of {', '.join(OVERFLOWS)}")
    if overflow != "drop" and not config_has_lists(config_name, history):
        raise ValueError(f"overflow is {overflow}, but a row of {config_name} is one pair and cannot be cut: use drop")
    if overflow == "split" and history:
        raise ValueError(
            "overflow is split, but with history only the last pair of a row is labelled: use truncate or drop"
        )
    return overflow
