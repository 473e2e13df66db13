"""The plan of work shards: whole dialogs in order, each with the keys of its two cache files."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from usdm_sft.corpus.examples import has_lists, make_examples
from usdm_sft.utils.cache import cache_key

if TYPE_CHECKING:
    from dailytalk_usdm import DailyTalkUSDM
    from usdm_sft.template.encoder import TemplateEncoder
    from usdm_sft.units.tokenizer import UnitTokenizer


class Shard(NamedTuple):
    """A work shard: rows `start` to `stop` of a split, the utterances in them, and the keys of its two files."""

    split: str
    start: int
    stop: int
    audio: list[str]  # path of each utterance's recording, in order
    lengths: list[int]  # samples at 16 kHz of each utterance
    digests: list[str]  # sha256 of each recording
    rows: list[list[tuple[int, int]]]  # of each row its exchanges: the user's and the agent's utterance
    lists: bool  # the user and agent columns hold lists, one entry an exchange
    units_key: str
    tokens_key: str


def plan_shards(
    builder: DailyTalkUSDM, unit_tokenizer: UnitTokenizer, encoder: TemplateEncoder, shard_dialogs: int
) -> list[Shard]:
    """Whole dialogs in order, `shard_dialogs` at a time; those left out for bad audio are counted, lest all shards shift."""
    name, history = builder.config.name, builder.config.history
    lists = has_lists(name, history)
    shards = []
    for split in builder.corpus.values():
        start = 0
        numbers = {dialog_id: number for number, dialog_id in enumerate(split.dialog_ids)}
        for _, group in groupby(split.dialogs, key=lambda dialog, numbers=numbers: numbers[dialog.id] // shard_dialogs):
            dialogs = list(group)
            utterances = [utterance for dialog in dialogs for utterance in dialog.utterances]
            audio = [utterance.audio for utterance in utterances]
            digests = [builder.audio_digests[address].sha256 for address in audio]
            lengths = [builder.audio_digests[address].num_samples for address in audio]
            ids = [utterance.id for utterance in utterances]
            units_key = cache_key("utterances", *unit_tokenizer.key, ids, digests)
            places = {utterance: place for place, utterance in enumerate(ids)}
            examples = [example for dialog in dialogs for example in make_examples(dialog, name, history)]
            its_rows = [
                [(places[user.id], places[agent.id]) for user, agent in example.exchanges] for example in examples
            ]
            texts = [utterance.text for utterance in utterances]
            tokens_key = cache_key("rows", *encoder.key, units_key, texts, its_rows, lists)
            stop = start + len(its_rows)
            shards.append(
                Shard(split.name, start, stop, audio, lengths, digests, its_rows, lists, units_key, tokens_key)
            )
            start = stop
    return shards
