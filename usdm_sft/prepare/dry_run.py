"""What `prepare` would do: rows, what would be left out, work in the cache, sizes and time. Nothing stays on the disk.

Only the number of units matters to the length of a row, and it follows from the length of the recording. The rows are therefore
encoded with units of the right number, by the code that `prepare` runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # a re-export

from usdm_sft.audio.addresses import disk_files
from usdm_sft.audio.frames import FRAMINGS, SAMPLE_RATE
from usdm_sft.corpus.remote import REMOTE
from usdm_sft.prepare.checks import Finding, SetUp, find_rate
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.given_units import GivenUnits, write_given_units
from usdm_sft.prepare.open_run import Run, choose_devices, load_rows, open_run
from usdm_sft.prepare.plan import Shard, list_ids
from usdm_sft.prepare.token_shards import fit_splits
from usdm_sft.template.streams import UNITS_PER_SECOND, UnitStreams
from usdm_sft.template.tokenizer import NUM_UNITS
from usdm_sft.units.families import is_codec
from usdm_sft.units.published import locate_unit_model
from usdm_sft.units.settings import PUBLISHED, make_settings
from usdm_sft.units.tokenizer import UnitTokenizer
from usdm_sft.utils.cache_keys import cache_root
from usdm_sft.utils.files import read_json
from usdm_sft.utils.processes import ProcessPool
from usdm_sft.utils.progress import Stages
from usdm_sft.utils.shard_cache import ShardCache, write_shard
from usdm_sft.utils.texts import count_noun

_STAGES = ("tokenizer", "corpus", "unit model", "rows")
_REMEMBERED = ("digests.sqlite", "split_lists")  # parts of the cache that save the first pass and a download


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run."""

    splits: dict[str, Any]  # as in counts.json
    num_shards: int  # work shards
    num_cached_units: int  # unit shards that the cache has
    num_cached_tokens: int  # token shards that the cache has
    missing_seconds: float  # of audio, in the missing unit shards
    seconds: float  # of audio, in all of them
    audio_bytes: int  # size of the files of the corpus
    has_model: bool  # the unit model is on this machine, or none is needed
    device: str  # its kind
    units_per_second: float = UNITS_PER_SECOND


def dry_run(config: PrepareConfig) -> DryRun:
    """Do what `prepare` would do without the unit model, in a temporary folder.

    The tokenizer, split lists and a corpus of the Hub are downloaded where they are not on this machine. The unit model is not.

    Raises:
        Exception: What `prepare` would raise before its first forward pass, or because no row is left.
    """
    cache = cache_root(config.cache_dir)
    is_given = config.unit_rate is not None
    folder = None if is_given else locate_unit_model(config.unit_model, config.model_cache_dir)
    has_model = is_given or folder is not None
    with TemporaryDirectory(prefix="dailytalk-usdm-") as scratch, Stages(_STAGES) as stages:
        for name in _REMEMBERED:
            if (cache / name).is_file():
                shutil.copyfile(cache / name, Path(scratch, name))
            elif (cache / name).is_dir():
                shutil.copytree(cache / name, Path(scratch, name))
        Path(scratch, REMOTE).symlink_to(
            (cache / REMOTE).resolve()
        )  # a run after this one needs the recordings as well
        run = open_run(replace(config, cache_dir=scratch), stages, None if has_model else _stand_in(config, scratch))
        stages.start("rows")
        units = _write_units(run)
        rows = load_rows(run.builder)
        with ProcessPool(1) as pool:
            _, splits, _ = fit_splits(run, rows, units, pool)
        # Unlike `ShardCache.find`, this removes no damaged file.
        has_units, has_tokens = (
            {path.name.partition(".")[0] for path in (cache / level).glob("*.arrow")} for level in ("units", "tokens")
        )
        missing = [shard for shard in run.plan if shard.units_key not in has_units]
        files = {file for address in run.builder.audio_digests for file in disk_files(address)}
        return DryRun(
            splits=splits,
            num_shards=len(run.plan),
            num_cached_units=len(run.plan) - len(missing),
            num_cached_tokens=sum(shard.tokens_key in has_tokens for shard in run.plan),
            missing_seconds=_count_seconds(missing),
            seconds=_count_seconds(run.plan),
            audio_bytes=sum(os.stat(file).st_size for file in files),
            has_model=has_model,
            device="cpu" if is_given else str(run.unit_tokenizer.settings["device"]),
            units_per_second=run.unit_tokenizer.streams.units_per_second,
        )


def _stand_in(config: PrepareConfig, scratch: str) -> UnitTokenizer:
    """A unit tokenizer with the settings of the run, and with a digest that no cached work has."""
    has_streams = (config.streams, config.num_streams) != (None, None)
    if (has_streams and str(config.unit_model) != PUBLISHED) or _is_codec_on_hub(config):
        raise ValueError(
            f"{config.unit_model} is not on this machine, and a dry run does not know the rate of a codec without its config: download it "
            f"first with 'hf download {config.unit_model}'"
        )
    device = choose_devices(config)[0]
    settings = make_settings(device.split(":")[0], config.precision, config.resampler, config.batch_seconds)
    tokenizer = UnitTokenizer(Path(scratch), "not on this machine", settings, device)
    # As the published model; one of the Hub that normalizes otherwise may differ by a unit in some recordings.
    tokenizer.framing, tokenizer.streams = FRAMINGS["fairseq"], UnitStreams(UNITS_PER_SECOND, (NUM_UNITS,))
    return tokenizer


def _is_codec_on_hub(config: PrepareConfig) -> bool:
    """Return whether the config of a repository is that of a codec; False where it cannot be asked for."""
    if str(config.unit_model) == PUBLISHED:
        return False
    with suppress(OSError, ValueError, HTTPError):
        return is_codec(
            read_json(hf_hub_download(str(config.unit_model), "config.json", cache_dir=config.model_cache_dir))
        )
    return False


def _write_units(run: Run) -> dict[str, Path]:
    """Write unit shards with units that the corpus has, or with units of the right number."""
    if isinstance(run.unit_tokenizer, GivenUnits):
        return write_given_units(run.builder, list_ids(run.plan), run.cache)
    return {shard.units_key: _make_up_units(shard, run, run.unit_tokenizer) for shard in run.plan}


def _make_up_units(shard: Shard, run: Run, units: UnitTokenizer) -> Path:
    """Write a unit shard whose utterances have the right number of units: all of them unit 0, or where units are collapsed no two equal neighbours."""
    content, framing = run.plan.content(shard), units.framing
    lengths = [framing.count_samples(*each) for each in zip(content.lengths, content.seconds, strict=True)]
    num_distinct = 1 if run.config.unit_repetition == "keep" else min(2, run.encoder.num_units)
    columns: dict[str, list[Any]] = {
        "units": [np.arange(units.count_units(length), dtype=np.uint16) % num_distinct for length in lengths],
        "seconds": [np.float32(length / framing.sample_rate) for length in lengths],
    }
    return ShardCache(run.cache / "units").make(shard.units_key, partial(write_shard, columns))


def _count_seconds(shards: Iterable[Shard]) -> float:
    return sum(shard.num_samples for shard in shards) / SAMPLE_RATE


def describe_dry_run(found: DryRun, config: PrepareConfig) -> list[str]:
    """Return the lines that tell what `prepare` would do, without the rows and the checks."""
    units, tokens = found.num_cached_units, found.num_cached_tokens
    lines = [
        f"cache: it has the units of {units} of {count_noun(found.num_shards, 'work shard')}, and the tokens of {tokens:,}"
    ]
    if config.unit_rate is not None:
        return [*lines, "time: the corpus has its units, and none are to be computed"]
    if config.unit_repetition == "collapse":
        lines.append(
            "tokens: the numbers are those of keep, an upper limit; how many units repeat shows when they are computed"
        )
    hours = found.missing_seconds / 3600
    rate = find_rate(config, found.device)
    if not hours:
        lines.append("time: no audio is left to compute")
    elif rate is None:
        missing = f"no rate was measured for this unit model, {found.device} and {config.precision}"
        lines.append(f"time: {hours:.2f} h of audio are to be computed; {missing}")
    else:
        lines.append(
            f"time: {hours:.2f} h of audio take about {hours / rate:.1f} h at {rate} s of audio per second, measured on two CPU "
            f"cores in {config.precision}"
        )
    return lines


def check_dry_run(found: DryRun, config: PrepareConfig) -> Iterator[Finding]:
    """Yield what the doctor finds of the unit model that is missing and of the disks, with the sizes of the dry run."""
    set_up = SetUp(config)
    set_up.audio_seconds, set_up.new_seconds = found.seconds, found.missing_seconds
    set_up.units_per_second = found.units_per_second
    set_up.audio_bytes = found.audio_bytes
    return set_up.examine(*([] if found.has_model else ["Hub", "unit model"]), "disk")
