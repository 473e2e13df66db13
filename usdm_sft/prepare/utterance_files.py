"""The utterances of a corpus with their recordings and units, as the dataset folder keeps them with `--keep_audio`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from usdm_sft.audio.digests import read_recording, read_unchanged
from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.audio.playable import make_playable
from usdm_sft.corpus.features import SPEECH, TEXTS
from usdm_sft.prepare.plan import Plan, Shard, ShardContents
from usdm_sft.utils.once import once_per_key
from usdm_sft.utils.shard_cache import read_shard

if TYPE_CHECKING:
    from usdm_sft.corpus.builder import DailyTalkUSDM
    from usdm_sft.corpus.dialogs import Dialog, Utterance

FILE_SECONDS = 5_400  # of recordings in an output file: 480 MB of 16 bits at 44.1 kHz; `push_to_hub` of datasets makes files of 500 MB


class ShardPart(NamedTuple):
    """Whole dialogs of one work shard."""

    dialogs: list[Dialog]  # with all their turns, also those with bad audio
    content: ShardContents  # of the work shard
    units: Path  # the file of its unit shard


class UtteranceFiles:
    """Divides the utterances of a split into output files, which follow from the lengths of the recordings alone.

    A dialog has all its turns and is never divided, so that the rows are a corpus again. A dialog without a pair is left out.

    Args:
        builder: The builder that read the corpus.
        split: Such as "train".
        plan: All work shards.
        units: The file of each unit shard, by its key.
    """

    def __init__(self, builder: DailyTalkUSDM, split: str, plan: Plan, units: Mapping[str, Path]):
        self._dialogs = builder.whole_corpus[split].dialogs
        self._plan, self._units = plan, units
        self._files = self._divide(plan.of_split(split))
        self.loader = partial(iter_utterances, columns=builder.further_columns)

    def __len__(self) -> int:
        return len(self._files)

    def part(self, index: int) -> list[ShardPart]:
        """Describe a file, for `loader`."""
        parts = []
        for shard, number, count in self._files[index]:
            content = self._plan.content(shard)
            ids = {dialog_id for dialog_id, _ in content.dialogs}
            whole = [dialog for dialog in self._dialogs[slice(*shard.dialogs)] if dialog.id in ids]
            chosen = whole[number * len(whole) // count : (number + 1) * len(whole) // count]
            parts.append(ShardPart(chosen, content._replace(rows=[]), self._units[shard.units_key]))
        return parts

    def _divide(self, shards: list[Shard]) -> list[list[tuple[Shard, int, int]]]:
        """Divide work shards into files: several short ones in one, or one of several parts of a long one (shard, number, count)."""
        files: list[list[tuple[Shard, int, int]]] = []
        room = 0
        for shard in shards:
            if shard.num_samples <= room:
                files[-1].append((shard, 0, 1))
                room -= shard.num_samples
                continue
            num_dialogs = len({dialog_id for dialog_id, _ in self._plan.content(shard).dialogs})
            count = min(num_dialogs, -(-shard.num_samples // (FILE_SECONDS * SAMPLE_RATE)))
            files += [[(shard, number, count)] for number in range(count)]
            room = FILE_SECONDS * SAMPLE_RATE - shard.num_samples
        return files


def iter_utterances(parts: list[ShardPart], columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the utterances of an output file as rows of `usdm_sft.corpus.features.utterance_features`, one recording in memory at a time.

    `audio`, `units` and `seconds` of a turn are None if its audio is bad, or if bad audio leaves it in no pair.

    Raises:
        AudioError: A recording was changed during the run, or cannot be stored.
    """
    read_shared = once_per_key(read_recording, maxsize=1)  # the turns of a telephone call follow each other
    for part in parts:
        table = read_shard(part.units)
        positions = {utterance_id: position for position, utterance_id in enumerate(part.content.ids)}
        for utterance in (utterance for dialog in part.dialogs for utterance in dialog.utterances):
            if (position := positions.get(utterance.id)) is None:
                yield _make_row(utterance, columns) | dict.fromkeys(("audio", *SPEECH))
                continue
            address = part.content.audio[position]
            recording = make_playable(address, read_unchanged(address, part.content.digests[position], read_shared))
            name = re.sub(r"[^\w.-]", "_", f"{utterance.dialog_id}_{utterance.turn}") + recording.suffix
            values = {column: table[column][position].as_py() for column in SPEECH}
            yield _make_row(utterance, columns) | values | {"audio": {"bytes": recording.content, "path": name}}


def _make_row(utterance: Utterance, columns: Sequence[str]) -> dict[str, Any]:
    return {
        "dialog": utterance.dialog_id,
        "turn": utterance.turn,
        **{column: getattr(utterance, column) for column in TEXTS},
        **{column: (utterance.more or {}).get(column, "") for column in columns},
    }
