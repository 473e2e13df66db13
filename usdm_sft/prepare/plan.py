"""The plan of work shards: whole dialogs in order, each shard with the keys of its two cache files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from usdm_sft.corpus.examples import config_has_lists, make_examples
from usdm_sft.prepare.given_units import measure_units
from usdm_sft.utils.cache_keys import cache_key

if TYPE_CHECKING:
    from usdm_sft.corpus.builder import DailyTalkUSDM
    from usdm_sft.corpus.dialogs import Dialog
    from usdm_sft.template.encoder import TemplateEncoder
    from usdm_sft.units.source import UnitSource


class Shard(NamedTuple):
    """A work shard: rows `start` to `stop` of a split, and the keys of its two cache files. `Plan.content` has the rest."""

    number: int  # in the plan, from 0
    split: str
    dialogs: tuple[int, int]  # the range that it covers of the dialogs of the split before bad audio was left out
    start: int
    stop: int
    num_samples: int  # at 16 kHz, of all its utterances
    longest: int  # samples of its longest utterance
    units_key: str
    tokens_key: str


class ShardContents(NamedTuple):
    """The utterances and the rows of a work shard."""

    ids: list[str]  # of each utterance, in order
    audio: list[str]  # path of its recording
    digests: list[str]  # sha256 of its recording; "" without one
    lengths: list[int]  # its samples at 16 kHz, or as many as its given units would take
    seconds: list[float]
    dialogs: list[tuple[str, int]]  # id and number of utterances of each dialog; bad audio cuts some into several parts
    num_pairs: int
    rows: list[list[tuple[int, int]]]  # for each row its exchanges: indices of the user's and the agent's utterance
    lists: bool  # the user and agent columns are lists with one entry per exchange


class Plan(list[Shard]):
    """All work shards in order. Their contents are apart, so that they travel to a process only with the shard that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self._contents: list[ShardContents] = []

    def add(self, shard: Shard, content: ShardContents) -> None:
        """Add a work shard at the end."""
        self.append(shard)
        self._contents.append(content)

    def content(self, shard: Shard) -> ShardContents:
        """Return the content of a work shard."""
        return self._contents[shard.number]

    def of_split(self, split: str) -> list[Shard]:
        """Return the work shards of a split, in order."""
        return [shard for shard in self if shard.split == split]


def plan_shards(
    builder: DailyTalkUSDM,
    unit_source: UnitSource,
    encoder: TemplateEncoder,
    shard_dialogs: int,
) -> Plan:
    """Divide each split into work shards of `shard_dialogs` whole dialogs, in order."""
    plan = Plan()
    for split in builder.corpus.values():
        # Dialogs left out for bad audio are counted, so that later shards keep their keys.
        number_of = {dialog_id: position // shard_dialogs for position, dialog_id in enumerate(split.dialog_ids)}
        start = 0
        for number, group in groupby(split.dialogs, key=lambda dialog: number_of[dialog.id]):
            dialogs = list(group)
            content, digests = _describe_dialogs(dialogs, builder)
            units_key = cache_key("utterances", *unit_source.key, content.ids, digests)
            texts = [utterance.text for dialog in dialogs for utterance in dialog.utterances]
            stop = start + len(content.rows)
            shard = Shard(
                number=len(plan),
                split=split.name,
                dialogs=(number * shard_dialogs, (number + 1) * shard_dialogs),
                start=start,
                stop=stop,
                num_samples=sum(content.lengths),
                longest=max(content.lengths),
                units_key=units_key,
                tokens_key=cache_key("rows", *encoder.key, units_key, texts, content.rows, content.lists),
            )
            plan.add(shard, content)
            start = stop
    return plan


def list_ids(plan: Plan) -> dict[str, list[str]]:
    """Return the ids of the utterances of each unit shard, in order, by its key."""
    return {shard.units_key: plan.content(shard).ids for shard in plan}


def _describe_dialogs(dialogs: Sequence[Dialog], builder: DailyTalkUSDM) -> tuple[ShardContents, list[str]]:
    """Return the content of a work shard, and the sha256 of what the units of each utterance follow from: its recording or given units."""
    name, history = builder.config.name, builder.config.history
    utterances = [utterance for dialog in dialogs for utterance in dialog.utterances]
    ids = [utterance.id for utterance in utterances]
    audio = [utterance.audio for utterance in utterances]
    recordings = [builder.audio_digests[address].sha256 if address else "" for address in audio]
    if (streams := builder.unit_streams) is None:
        found = [builder.audio_digests[address] for address in audio]
    else:
        found = [measure_units(utterance, streams) for utterance in utterances]
    positions = {utterance_id: position for position, utterance_id in enumerate(ids)}
    content = ShardContents(
        ids=ids,
        audio=audio,
        digests=recordings,
        lengths=[digest.num_samples for digest in found],
        seconds=[digest.seconds for digest in found],
        dialogs=[(dialog.id, len(dialog.utterances)) for dialog in dialogs],
        num_pairs=sum(1 for dialog in dialogs for _ in dialog.pairs()),
        rows=[
            [(positions[user.id], positions[agent.id]) for user, agent in example.exchanges]
            for dialog in dialogs
            for example in make_examples(dialog, name, history)
        ],
        lists=config_has_lists(name, history),
    )
    return content, [digest.sha256 for digest in found]
