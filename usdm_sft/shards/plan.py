"""The plan of work shards: whole dialogs in order, each shard with the keys of its two cache files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from usdm_sft.cache.keys import cache_key
from usdm_sft.corpus.examples import has_lists, make_examples

if TYPE_CHECKING:
    from dailytalk_usdm import DailyTalkUSDM
    from usdm_sft.corpus.dialogs import Dialog, Split
    from usdm_sft.template.encoder import TemplateEncoder
    from usdm_sft.units.tokenizer import UnitTokenizer


class Shard(NamedTuple):
    """A work shard: rows `start` to `stop` of a split, their utterances, and the keys of its two cache files."""

    split: str
    start: int
    stop: int
    audio: list[str]  # path of the recording of each utterance, in order
    lengths: list[int]  # samples at 16 kHz of each utterance
    digests: list[str]  # sha256 of each recording
    rows: list[list[tuple[int, int]]]  # for each row its exchanges: indices of the user's and the agent's utterance
    lists: bool  # the user and agent columns are lists with one entry per exchange
    units_key: str
    tokens_key: str


def plan_shards(
    builder: DailyTalkUSDM, unit_tokenizer: UnitTokenizer, encoder: TemplateEncoder, shard_dialogs: int
) -> list[Shard]:
    """Divide each split into work shards of `shard_dialogs` whole dialogs, in order."""
    shards = []
    for split in builder.corpus.values():
        start = 0
        for dialogs in _group_dialogs(split, shard_dialogs):
            shards.append(_plan_shard(split.name, start, dialogs, builder, unit_tokenizer, encoder))
            start = shards[-1].stop
    return shards


def _group_dialogs(split: Split, shard_dialogs: int) -> Iterator[list[Dialog]]:
    """Group the dialogs of a split. Dialogs left out for bad audio are counted, so that later shards keep their keys."""
    positions = {dialog_id: position for position, dialog_id in enumerate(split.dialog_ids)}
    for _, group in groupby(split.dialogs, key=lambda dialog: positions[dialog.id] // shard_dialogs):
        yield list(group)


def _plan_shard(
    split: str,
    start: int,
    dialogs: Sequence[Dialog],
    builder: DailyTalkUSDM,
    unit_tokenizer: UnitTokenizer,
    encoder: TemplateEncoder,
) -> Shard:
    name, history = builder.config.name, builder.config.history
    lists = has_lists(name, history)
    utterances = [utterance for dialog in dialogs for utterance in dialog.utterances]
    ids = [utterance.id for utterance in utterances]
    texts = [utterance.text for utterance in utterances]
    audio = [utterance.audio for utterance in utterances]
    found = builder.audio_digests.find_all(audio)
    digests = [digest.sha256 for digest in found]
    lengths = [digest.num_samples for digest in found]
    positions = {utterance_id: position for position, utterance_id in enumerate(ids)}
    rows = [
        [(positions[user.id], positions[agent.id]) for user, agent in example.exchanges]
        for dialog in dialogs
        for example in make_examples(dialog, name, history)
    ]
    units_key = cache_key("utterances", *unit_tokenizer.key, ids, digests)
    tokens_key = cache_key("rows", *encoder.key, units_key, texts, rows, lists)
    return Shard(split, start, start + len(rows), audio, lengths, digests, rows, lists, units_key, tokens_key)
