"""Units that the corpus has already: they take the place of a unit model, and become the same unit shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from usdm_sft.audio.digests import AudioDigest
from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.template.streams import UnitStreams
from usdm_sft.utils.shard_cache import ShardCache, write_shard
from usdm_sft.utils.texts import count_noun

if TYPE_CHECKING:
    from usdm_sft.corpus.builder import DailyTalkUSDM
    from usdm_sft.corpus.dialogs import Split, Utterance

# Of the length of all recordings, to that of their units. A wrong rate or a stream too many gives more.
MAX_DIFFERENCE = 0.3
VERSION = "1"  # part of the cache key; change it whenever other units or seconds are written


@dataclass(frozen=True)
class GivenUnits:
    """What a run knows of units that the corpus has, in place of a `UnitTokenizer`."""

    streams: UnitStreams

    @property
    def num_units(self) -> int:
        """Number of different units in the rows."""
        return sum(self.streams.kept)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that units and seconds depend on beside the corpus; JSON values."""
        return self.streams.settings()

    @property
    def digest(self) -> None:
        """No unit model made them."""
        return None

    def describe(self) -> None:
        """Return what counts.json says of the unit model: that there is none."""

    @property
    def key(self) -> tuple[Any, ...]:
        """As `UnitTokenizer.key`."""
        return "given units", VERSION, self.settings


def measure_units(utterance: Utterance, streams: UnitStreams) -> AudioDigest:
    """Return the sha256 and the length of the units of an utterance, as the first pass over audio returns those of a recording."""
    units = utterance.units
    assert units is not None  # the corpus was read with its units
    seconds = streams.count_seconds(len(units))
    return AudioDigest(hashlib.sha256(units.tobytes()).hexdigest(), round(seconds * SAMPLE_RATE), seconds)


def check_recordings(builder: DailyTalkUSDM, *, keep_audio: bool) -> None:
    """Check the recordings that stand beside units.

    Args:
        builder: The builder that read the corpus with its units.
        keep_audio: The dataset folder keeps the recordings, so that each utterance must have one.

    Raises:
        ValueError: A recording is missing, or the recordings do not have about the length of their units.
    """
    missing = [utterance.id for utterance in _iter_utterances(builder) if not utterance.audio]
    if keep_audio and missing:
        raise ValueError(
            f"keep_audio is given, but {count_noun(len(missing), 'turn')} of the corpus (first {missing[0]}) without a recording cannot be "
            "kept: add the column audio to the manifest, or leave out keep_audio"
        )
    streams, digests = builder.unit_streams, builder.audio_digests
    assert streams is not None
    lengths = [
        (digests[utterance.audio].seconds, measure_units(utterance, streams).seconds)
        for utterance in _iter_utterances(builder)
        if utterance.audio
    ]
    recorded, given = (sum(each) for each in zip(*lengths, strict=True)) if lengths else (0.0, 0.0)
    # Models differ by up to a frame or two at the ends. A joined turn may have the pause between its segments.
    tolerance = MAX_DIFFERENCE * recorded + 2 * len(lengths) / streams.rate
    if abs(recorded - given) > tolerance and not builder.config.merge_speaker_turns:
        raise ValueError(
            f"the recordings have {recorded:,.2f} s in all, but their units at unit_rate {streams.rate:g} last {given:,.2f} s: correct unit_rate, "
            "or the columns audio and units"
        )


def write_given_units(builder: DailyTalkUSDM, shards: Mapping[str, Sequence[str]], cache: Path) -> dict[str, Path]:
    """Write the unit shards that the cache lacks.

    Args:
        builder: The builder that read the corpus with its units.
        shards: The ids of the utterances of each unit shard, in order, by its key.
        cache: Folder of the cache.

    Returns:
        The file of each unit shard, by its key, as `make_units` returns it.
    """
    level, streams = ShardCache(cache / "units"), builder.unit_streams
    files = level.find_all(shards)
    given = {utterance.id: utterance.units for utterance in _iter_utterances(builder)}
    assert streams is not None
    for key in shards.keys() - files.keys():
        units = [given[utterance_id] for utterance_id in shards[key]]
        seconds = [np.float32(streams.count_seconds(len(each))) for each in units if each is not None]
        files[key] = level.make(key, partial(write_shard, {"units": units, "seconds": seconds}))
    return files


def _iter_utterances(builder: DailyTalkUSDM) -> Iterator[Utterance]:
    splits: dict[str, Split] = builder.corpus
    return (utterance for split in splits.values() for utterance in split.utterances())
