"""The columns of the datasets, as `datasets.Features`: the one definition that the builder, shards, card and checks share."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from usdm_sft.corpus import saved_audio as saved_audio  # wraps what datasets stores for an `Audio` column

ROLES = ("user", "agent")


class Column(NamedTuple):
    """A column of an utterance: its type, and its meaning in the card."""

    type: Any
    meaning: str


# The columns of an utterance. A new one is added here and made where the others are: a text is a field of
# `corpus.dialogs.Utterance`, speech comes from a unit shard.
TEXTS = {
    "speaker": Column(datasets.Value("string"), "the speaker"),
    "text": Column(datasets.Value("string"), "transcript as in the corpus; only the template lower-cases it"),
    "emotion": Column(datasets.Value("string"), "emotion as in the corpus"),
}
# Sequence is the spelling that datasets 3 and 5 share; datasets 5 turns it into List.
SPEECH = {
    "units": Column(datasets.Sequence(datasets.Value("uint16")), "the speech as discrete units, 50 per second"),
    "seconds": Column(datasets.Value("float32"), "length of the audio in seconds"),
}
# Where runs of equal units are one unit each, durations follow the units.
COLLAPSED_SPEECH = {
    "units": SPEECH["units"]._replace(meaning="the speech as discrete units, one for each run of equal units"),
    "durations": Column(
        datasets.Sequence(datasets.Value("uint16")),
        "number of 20 ms frames of each unit; repeating each unit as often restores 50 per second",
    ),
    **{name: column for name, column in SPEECH.items() if name != "units"},
}
# Columns of a dataset folder that follow from `input_ids`. Some trainers require them (axolotl), others sample rows by length.
TRAINER_COLUMNS = ("attention_mask", "length")


class StoredAudio(datasets.Audio):  # type: ignore[misc]  # datasets has no types
    """`Audio(decode=False)` that is also written without decoding.

    datasets 4 and later import torchcodec (and with it FFmpeg) merely to store an audio file, and drop the bytes if `path`
    exists. This class writes `{"bytes", "path"}` to Arrow unchanged; on disk and on the Hub the column is a plain `Audio`
    (`usdm_sft.corpus.saved_audio`).
    """

    def __init__(self) -> None:
        super().__init__(decode=False)

    def encode_example(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return the `{"bytes", "path"}` dict unchanged."""
        return {"bytes": value["bytes"], "path": value["path"]}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, datasets.Audio) and not other.decode

    __hash__ = None  # type: ignore[assignment]  # datasets.Audio is a dataclass with __eq__, which has no hash either


def arrow_schema(features: datasets.Features) -> pa.Schema:
    """Return the Arrow schema of columns, with a description of them (`huggingface`) that every version of datasets reads.

    Later versions than 3 write a list as `List`, which datasets 3 does not know. All of them read `Sequence`.
    """
    schema = features.arrow_schema
    described = schema.metadata[b"huggingface"].replace(b'"_type": "List"', b'"_type": "Sequence"')
    return schema.with_metadata({b"huggingface": described})


def dataset_info(config_name: str, info: datasets.DatasetInfo) -> dict[str, Any]:
    """Return the entry of a config in `dataset_info` of a card's YAML. Lists are sequences in it, as in `arrow_schema`.

    datasets 3 reads the `list` of later versions too, but takes it for another type than its own `sequence`, and interleaves no
    two datasets that have one of each.
    """
    entry = json.dumps(info._to_yaml_dict()).replace('"list": ', '"sequence": ')
    return {"config_name": config_name, **json.loads(entry)}


def further_columns(names: Iterable[str]) -> list[str]:
    """Return the further columns of a manifest among the columns of a dataset folder or of the builder, without `user_`."""
    known = {f"user_{name}" for name in (*TEXTS, *COLLAPSED_SPEECH, "audio")}
    return [name.removeprefix("user_") for name in names if name.startswith("user_") and name not in known]


def _texts(columns: Iterable[str]) -> dict[str, Any]:
    """Return the types of `TEXTS` and of further columns, which are texts."""
    return _types(TEXTS) | {name: datasets.Value("string") for name in columns}


def example_features(*, lists: bool, units: bool = False, columns: Iterable[str] = ()) -> datasets.Features:
    """Return the columns of the builder, one example per row.

    `id`, `dialog_id` and `turn` are described at `folder_features`, as are `user_` and `agent_` `speaker`, `text` and `emotion`.
    `user_audio` and `agent_audio` hold the path or address of the recording (`usdm_sft.audio.addresses`), never its bytes.

    Args:
        lists: True if the user and agent columns are lists, one entry per exchange.
        units: True if the corpus has units already: `*_units` and `*_seconds` follow, and `*_audio` is null without a recording.
        columns: Further columns of the corpus, which follow the emotion.
    """
    return _features({**_texts(columns), "audio": StoredAudio(), **(_types(SPEECH) if units else {})}, lists=lists)


def folder_features(*, lists: bool, collapsed: bool = False, columns: Iterable[str] = ()) -> datasets.Features:
    """Return the columns of a dataset folder, in their order.

    | column | type | meaning |
    |---|---|---|
    | `id` | string | dialog and first user turn of the row, such as "d23_0"; the pair's own user turn with `history` |
    | `dialog_id` | string | the dialog, such as "d23" |
    | `turn` | int32 | the user turn in `id`, from 0 |
    | `*_speaker` | string | the speaker |
    | `*_text` | string | the text as in the split list; only the template lower-cases it |
    | `*_emotion` | string | the emotion as in the split list, "" if there is none |
    | `*_units` | list of uint16 | one unit per 20 ms frame, or the units of the corpus; `collapsed`: per run of equal units |
    | `*_durations` | list of uint16 | number of frames of each unit; only if `collapsed` |
    | `*_seconds` | float32 | duration of the recording, or of the units of the corpus |
    | `input_ids` | list of int32 | token ids of the row |
    | `labels` | list of int32 | the token id where it is labelled, otherwise -100 |
    | `attention_mask` | list of int8 | 1 for every token |
    | `length` | int32 | number of tokens |

    `*` is `user` or `agent`.

    Args:
        lists: True if the user and agent columns are lists, one entry per exchange (`usdm_sft.corpus.examples.config_has_lists`).
        collapsed: True if runs of equal units are one unit each, with a duration.
        columns: Further columns of the corpus (`keep_columns`), as texts after the emotion.
    """
    speech = COLLAPSED_SPEECH if collapsed else SPEECH
    tokens = {name: datasets.Sequence(datasets.Value("int32")) for name in ("input_ids", "labels")}
    trainer = {"attention_mask": datasets.Sequence(datasets.Value("int8")), "length": datasets.Value("int32")}
    return datasets.Features({**_features(_texts(columns) | _types(speech), lists=lists), **tokens, **trainer})


def are_collapsed(columns: Iterable[str]) -> bool:
    """True if columns hold the durations of collapsed units."""
    return not {f"{role}_durations" for role in ROLES}.isdisjoint(columns)


def utterance_features(columns: Iterable[str] = ()) -> datasets.Features:
    """Return the columns of the config `utterances` of a dataset folder: those of a manifest, with the recording, and its units.

    | column | type | meaning |
    |---|---|---|
    | `dialog` | string | the dialog, such as "d23" |
    | `turn` | int32 | the turn in its dialog |
    | `speaker`, `text`, `emotion` | string | as in the corpus; so are further columns (`keep_columns`), which follow |
    | `audio` | Audio | the recording, in a form that browsers play (`usdm_sft.audio.playable`) |
    | `units` | list of uint16 | one unit per 20 ms frame, or the units of the corpus |
    | `seconds` | float32 | duration of the recording, or of the units of the corpus |

    `audio`, `units` and `seconds` are null where bad audio was left out.
    """
    return datasets.Features(
        {
            "dialog": datasets.Value("string"),
            "turn": datasets.Value("int32"),
            **_texts(columns),
            "audio": datasets.Audio(),
            **_types(SPEECH),
        }
    )


def _types(columns: Mapping[str, Column]) -> dict[str, Any]:
    return {name: column.type for name, column in columns.items()}


def _features(per_utterance: dict[str, Any], *, lists: bool) -> datasets.Features:
    columns = {"id": datasets.Value("string"), "dialog_id": datasets.Value("string"), "turn": datasets.Value("int32")}
    for role in ROLES:
        columns |= {
            f"{role}_{name}": datasets.Sequence(value) if lists else value for name, value in per_utterance.items()
        }
    return datasets.Features(columns)
