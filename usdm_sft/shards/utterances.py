"""The utterances of a corpus with their recordings and units, as the dataset folder keeps them with `--keep_audio`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset

from usdm_sft.audio.addresses import AddressError
from usdm_sft.audio.digests import check_unchanged
from usdm_sft.audio.playable import make_playable
from usdm_sft.audio.reading import AudioError
from usdm_sft.shards.plan import Shard

if TYPE_CHECKING:
    from dailytalk_usdm import DailyTalkUSDM
    from usdm_sft.corpus.dialogs import Utterance


class _Spoken(NamedTuple):
    """The recording of an utterance."""

    address: str
    sha256: str
    units: list[int]
    seconds: float


def iter_utterances(
    builder: DailyTalkUSDM, split: str, plan: Sequence[Shard], units: Mapping[str, Path]
) -> Iterator[dict[str, Any]]:
    """Yield the utterances of a split as rows of `usdm_sft.corpus.features.utterance_features`, one recording in memory at a time.

    A dialog has all its turns, so that the rows are a corpus again. `audio`, `units` and `seconds` of a turn are None if its audio
    is bad, or if bad audio leaves it in no pair. A dialog without a pair is left out.

    Args:
        builder: Read the corpus.
        split: Such as "train".
        plan: All work shards.
        units: The file of each unit shard, by its key.

    Raises:
        AudioError: A recording was changed during the run, or cannot be stored.
    """
    spoken = _iter_spoken([shard for shard in plan if shard.split == split], units)
    dialogs = builder.corpus[split].dialogs
    kept = {utterance.id for dialog in dialogs for utterance in dialog.utterances}
    dialog_ids = {dialog.id for dialog in dialogs}
    for dialog in builder.whole_corpus[split].dialogs:
        for utterance in dialog.utterances if dialog.id in dialog_ids else ():
            yield _make_row(utterance, next(spoken) if utterance.id in kept else None)
    assert next(spoken, None) is None  # and the audio of the last shard is compared with its digests


def _iter_spoken(shards: Sequence[Shard], units: Mapping[str, Path]) -> Iterator[_Spoken]:
    for shard in shards:
        table = Dataset.from_file(str(units[shard.units_key])).data.table
        columns = (table["units"].to_pylist(), table["seconds"].to_pylist())
        yield from map(_Spoken, shard.audio, shard.digests, *columns)
        check_unchanged(dict(zip(shard.audio, shard.digests, strict=True)))


def _make_row(utterance: Utterance, spoken: _Spoken | None) -> dict[str, Any]:
    row = {
        "dialog": utterance.dialog_id,
        "turn": utterance.turn,
        "speaker": utterance.speaker,
        "text": utterance.text,
        "emotion": utterance.emotion,
    }
    if spoken is None:
        return row | {"audio": None, "units": None, "seconds": None}
    try:
        recording = make_playable(spoken.address)
    except (OSError, AddressError, AudioError):
        check_unchanged({spoken.address: spoken.sha256})
        raise
    name = re.sub(r"[^\w.-]", "_", f"{utterance.dialog_id}_{utterance.turn}") + recording.suffix
    return row | {
        "audio": {"bytes": recording.content, "path": name},
        "units": spoken.units,
        "seconds": spoken.seconds,
    }
