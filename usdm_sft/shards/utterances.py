"""The utterances of a corpus with their recordings and units, as the dataset folder keeps them with `--keep_audio`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from usdm_sft.audio.digests import read_file, read_unchanged
from usdm_sft.audio.playable import make_playable
from usdm_sft.shards.plan import Plan
from usdm_sft.utils.once import once_per_key

if TYPE_CHECKING:
    from dailytalk_usdm import DailyTalkUSDM
    from usdm_sft.corpus.dialogs import Utterance


def iter_utterances(
    builder: DailyTalkUSDM, split: str, plan: Plan, units: Mapping[str, Path]
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
    spoken = _iter_spoken(plan, split, units)
    dialogs = builder.corpus[split].dialogs
    kept = {utterance.id for dialog in dialogs for utterance in dialog.utterances}
    dialog_ids = {dialog.id for dialog in dialogs}
    for dialog in builder.whole_corpus[split].dialogs:
        for utterance in dialog.utterances if dialog.id in dialog_ids else ():
            yield _make_row(utterance, next(spoken) if utterance.id in kept else None)


def _iter_spoken(plan: Plan, split: str, units: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """Yield `audio`, `units` and `seconds` of each utterance of the work shards of a split."""
    read_shared = once_per_key(read_file, maxsize=1)  # the turns of a telephone call follow each other
    for shard in plan.of_split(split):
        content = plan.content(shard)
        table = Dataset.from_file(str(units[shard.units_key])).data.table
        columns = (table["units"].to_pylist(), table["seconds"].to_pylist())
        for address, sha256, *values in zip(content.audio, content.digests, *columns, strict=True):
            recording = make_playable(address, read_unchanged(address, sha256, read_shared))
            yield {"audio": recording, "units": values[0], "seconds": values[1]}


def _make_row(utterance: Utterance, spoken: Mapping[str, Any] | None) -> dict[str, Any]:
    row = {
        "dialog": utterance.dialog_id,
        "turn": utterance.turn,
        "speaker": utterance.speaker,
        "text": utterance.text,
        "emotion": utterance.emotion,
    }
    if spoken is None:
        return row | {"audio": None, "units": None, "seconds": None}
    recording = spoken["audio"]
    name = re.sub(r"[^\w.-]", "_", f"{utterance.dialog_id}_{utterance.turn}") + recording.suffix
    return {**row, **spoken, "audio": {"bytes": recording.content, "path": name}}
