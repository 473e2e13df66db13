"""The dataset card: YAML for `load_dataset` and the Hub, and a description for people, filled in from the counts."""

from __future__ import annotations

import html
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import UndefinedError
from tokenizers import Tokenizer

from usdm_sft.corpus.dailytalk import DAILYTALK
from usdm_sft.corpus.examples import MULTI_TURN, config_has_lists
from usdm_sft.corpus.features import (
    COLLAPSED_SPEECH,
    ROLES,
    SPEECH,
    TEXTS,
    are_collapsed,
    dataset_info,
    folder_features,
    further_columns,
)
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.folder.example_picture import EXAMPLE, read_example
from usdm_sft.folder.layout import CAPTIONS, data_files, read_columns
from usdm_sft.folder.own_parts import (
    BLOCKS,
    CARD,
    DAILYTALK_METADATA,
    FILL_IN,
    OTHER_METADATA,
    WRITE_HERE,
    plain_card,
    read_card,
)
from usdm_sft.folder.statistics import count_dropped, count_too_long
from usdm_sft.template.config import OFFLINE, PARTS, REFERENCE
from usdm_sft.template.parts import ROW_PARTS
from usdm_sft.template.special_tokens import CORRESPOND_TOKEN
from usdm_sft.template.streams import UnitStreams, read_streams
from usdm_sft.template.tokenizer import NUM_UNITS, load_tokenizer
from usdm_sft.template.view import format_example
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.texts import count_noun, format_hours, quote

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
LARGEST = "10M<n<100M"
TASKS = {  # labelled part -> the Hub's name of the task that it trains
    "agent_text": "text-generation",
    "user_text": "automatic-speech-recognition",
    "agent_units": "text-to-speech",
}
TAGS = ["spoken-dialog", "speech-units", "usdm"]
SHOWN_REASONS = 20  # left-out dialogs, pairs and rows; counts.json has all of them

LENGTHS_OF_TURNS = "Length of the rows in tokens and of the turns in seconds."

MEANINGS = {
    "id": "dialog and turn, such as d23_0",
    "dialog_id": "the dialog",
    "turn": "number of the user's turn in its dialog",
    "input_ids": "the row in the template, with the special tokens at its ends",
    "labels": "the id of each labelled token, -100 for all others; not shifted",
    "attention_mask": "1 for every token, for trainers that require the column",
    "length": "number of tokens, for sampling by length",
}


def make_card(
    config_name: str,
    num_bytes: Mapping[str, int],
    counts: Mapping[str, Any],
    files: Mapping[str, Sequence[Path]],
    tokenizer: Tokenizer,
    other_info: Sequence[Mapping[str, Any]] = (),
) -> str:
    """README.md of a dataset folder.

    Args:
        config_name: Name of the config, such as "single_turn".
        num_bytes: Size of each split in memory.
        counts: The content of counts.json, with the statistics and the digests of the data files.
        files: The Parquet files of each split.
        tokenizer: Spells the ids of the example.
        other_info: Entries of `dataset_info` for other configs of the folder.
    """
    settings, template = counts["settings"], counts["settings"]["template"]
    lists = config_has_lists(config_name, settings["history"])
    collapsed = settings.get("unit_repetition") == "collapse"
    features = folder_features(lists=lists, collapsed=collapsed, columns=read_columns(settings))
    infos = [_make_info(config_name, features, num_bytes, counts, files), *other_info]
    num_rows = sum(counts["splits"][split]["rows"] for split in num_bytes)
    metadata: dict[str, Any] = {
        **(DAILYTALK_METADATA if counts["corpus"] == DAILYTALK else OTHER_METADATA),
        "task_categories": [task for part, task in TASKS.items() if part in template["loss"]],
        "tags": TAGS,
        "size_categories": next((name for limit, name in SIZES.items() if num_rows < limit), LARGEST),
        "configs": data_configs(counts),
        "dataset_info": infos if other_info else infos[0],
    }
    given = counts.get("unit_model") is None
    parts, tokenizer_counts, streams = template.get("parts", PARTS), counts["tokenizer"], read_streams(counts)
    card = DatasetCard.from_template(
        DatasetCardData(**metadata),
        template_str=(importlib.resources.files("usdm_sft.dataset_card") / "template.md").read_text(encoding="utf-8"),
        config_name=config_name,
        columns=_columns(features, config_name, streams, given, lists=lists, lowercase=template.get("lowercase", True)),
        streams=streams,
        given=given,
        counts=counts,
        settings=settings,
        utterances=counts.get(UTTERANCES),
        agent=_plain(_describe_agent(str(settings["agent"]))),
        is_dailytalk=counts["corpus"] == DAILYTALK,
        lists={DAILYTALK: "split lists", "split list": "split lists", "manifest": "manifests"}.get(
            counts["corpus"], "files of the corpus"
        ),
        template_parts=parts,
        collapsed=collapsed,
        row_parts="both" if len(parts) == len(PARTS) else _list_parts(parts),
        has_reference_words=template | {"loss": None} == REFERENCE.settings() | {"loss": None},
        # The units and the ids of naver-ai/USTM.
        fits_ustm=not given
        and counts["unit_model"]["name"] is not None
        and tokenizer_counts["num_units"] == NUM_UNITS
        and "ids" not in tokenizer_counts,
        is_offline_tokenizer=tokenizer_counts["name"] == OFFLINE,
        vocabulary=tokenizer.get_vocab_size(),
        base_model=tokenizer_counts.get("base_model"),
        first_new=_find_first_new(tokenizer),
        has_emotions=any(emotion for summary in counts["statistics"].values() for emotion in summary["emotions"]),
        shown_reasons=SHOWN_REASONS,
        blocks=BLOCKS,
        fill_in=FILL_IN,
        write_here=WRITE_HERE,
        number=_number,
        hours=format_hours,
        plural=count_noun,
        count_too_long=count_too_long,
        count_dropped=count_dropped,
        plain=_plain,
        example=format_example(read_example(files), tokenizer, color=False),
        pictures=CAPTIONS if not given else CAPTIONS | {"lengths.png": LENGTHS_OF_TURNS},
        parts=ROW_PARTS,
        example_picture=EXAMPLE,
    )
    return f"{card}\n"


CARD_ERRORS = (LookupError, TypeError, AttributeError, ValueError, UndefinedError)  # of `find_edits`, for forged counts


def describe_edits(folder: Path, counts: Mapping[str, Any]) -> str:
    """Name the places of the card of a finished folder that were edited, as `find_edits`, or "its text" if they cannot be told."""
    try:
        tokenizer = load_tokenizer(folder / "tokenizer").backend_tokenizer
        return find_edits(folder, counts, tokenizer) or "its text"
    except (*CARD_ERRORS, OSError, yaml.YAMLError):
        return "its text"


def find_edits(
    folder: Path, counts: Mapping[str, Any], tokenizer: Tokenizer, num_bytes: Mapping[str, int] | None = None
) -> str:
    """Compare the card of a folder with one rendered again from counts.json and the files.

    A version of huggingface_hub may write YAML in another form, so that its values are compared. Not derived again is the size of recordings
    in memory, nor that of rows unless `num_bytes` has it.

    Returns:
        The places that differ, such as "its YAML (tags), its section 'Contents'"; "" if there are none.
    """
    corpus = counts.get("corpus", "")
    values, text = _split_card(plain_card(read_card(folder / CARD), corpus))
    infos = values["dataset_info"]
    [rows, *others] = infos if isinstance(infos, list) else [infos]
    sizes = num_bytes or {split["name"]: split["num_bytes"] for split in rows["splits"]}
    made = make_card(counts["config"], sizes, counts, data_files(folder, counts), tokenizer, others)
    expected, expected_text = _split_card(plain_card(made, corpus))
    keys = [name for name in sorted({*values, *expected}) if values.get(name) != expected.get(name)]
    sections, expected_sections = map(_split_text, (text, expected_text))
    titles = [name for name in sections | expected_sections if sections.get(name) != expected_sections.get(name)]
    places = [f"its YAML ({', '.join(keys)})"] * bool(keys) + [f"its section {quote(title)}" for title in titles[:3]]
    return ", ".join([*places, "..."] if titles[3:] else places) or "its text" * (text != expected_text)


def _split_card(card: str) -> tuple[dict[str, Any], str]:
    """Return the values of a card's YAML, and the text below it."""
    match = REGEX_YAML_BLOCK.search(card)
    if match is None:
        raise ValueError("the card has no YAML")
    return yaml.safe_load(match.group(2)), card[match.end() :]


def _split_text(text: str) -> dict[str, str]:
    """Return the text of each section by its heading."""
    titles = re.split(r"^## (.*)\n", f"## introduction\n{text}", flags=re.MULTILINE)[1:]
    return dict(zip(titles[::2], titles[1::2], strict=True))


def _find_first_new(tokenizer: Tokenizer) -> int | None:
    """Return the first id that `add_units` added: padding and newline come before `<|correspond|>`, where the base has neither."""
    first: int | None = tokenizer.token_to_id(CORRESPOND_TOKEN)
    while first and tokenizer.id_to_token(first - 1) in ("<pad>", "\n"):
        first -= 1
    return first


def _make_info(
    config_name: str,
    features: Features,
    num_bytes: Mapping[str, int],
    counts: Mapping[str, Any],
    files: Mapping[str, Sequence[Path]],
) -> dict[str, Any]:
    """The entry of the rows in `dataset_info` of the YAML."""
    splits = SplitDict()
    for split, size in num_bytes.items():
        splits.add(SplitInfo(split, size, counts["splits"][split]["rows"]))
    download_size = sum(path.stat().st_size for paths in files.values() for path in paths)
    info = DatasetInfo(
        features=features, splits=splits, download_size=download_size, dataset_size=sum(num_bytes.values())
    )
    return dataset_info(config_name, info)


def data_configs(counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `configs` of the YAML: the data files of this folder and no others.

    `load_dataset` finds the rows of a local folder in its cache by the last name of the folder and by this YAML alone. The description
    makes it read the folder again when a data file has other bytes.
    """
    names = [counts["config"], *([UTTERANCES] if UTTERANCES in counts else [])]
    digests = {
        name: cache_key({file: sha256 for file, sha256 in counts["files"].items() if file.startswith(f"{name}/")})
        for name in names
    }
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in counts["splits"]],
            "description": f"data files with sha256 {digests[name]}",
        }
        for name in names
    ]
    return [configs[0] | {"default": True}, *configs[1:]]


def read_info(folder: Path, config: str) -> DatasetInfo:
    """Read the features and splits of a config from the card. `load_dataset_builder` takes the folder's path for a glob pattern.

    Raises:
        ValueError: The card has no features or splits of the config.
    """
    info = DatasetInfosDict.from_directory(str(folder)).get(config)
    if info is None or info.features is None or info.splits is None:
        raise ValueError("its dataset_info names no features or splits")
    return info


def _columns(
    features: Features, config_name: str, streams: UnitStreams, given: bool, *, lists: bool, lowercase: bool
) -> list[tuple[str, str, str]]:
    """Name, type and meaning of every column."""
    which = "first user turn of the row" if config_name == MULTI_TURN else "last user turn of the row"
    columns = TEXTS | (COLLAPSED_SPEECH if are_collapsed(features) else SPEECH)
    meanings = MEANINGS | {name: column.meaning for name, column in columns.items()}
    length, restored = f"{1000 / streams.rate:g} ms", streams.describe()
    meanings["durations"] = f"number of {length} frames of each unit; repeating each unit as often restores {restored}"
    if not are_collapsed(features):
        meanings["units"] = f"the speech as discrete units, {restored}"
    further = {f"{role}_{name}" for role in ROLES for name in further_columns(features)}
    if given:
        meanings["seconds"] = "length of the speech in seconds, which follows from its units"
    if not lowercase:
        meanings["text"] = "transcript as in the corpus; the template keeps it as it is"
    if lists:
        meanings["turn"] = f"number of the {which} in its dialog"

    def describe(feature: Any) -> str:
        if isinstance(feature, list):
            return f"list of {describe(feature[0])}"
        return f"list of {describe(feature.feature)}" if hasattr(feature, "feature") else feature.dtype

    def meaning(name: str) -> str:
        if name in meanings:
            return meanings[name]
        if name in further:
            return "as in the manifest" + ("; one entry per exchange" if lists else "")
        return meanings[name.split("_")[-1]] + ("; one entry per exchange" if lists else "")

    return [(_code(name), describe(feature), meaning(name)) for name, feature in features.items()]


def _describe_agent(agent: str) -> str:
    """Name the agent, from the option."""
    kind, _, name = agent.partition("=")
    by_kind = {"channel": f"the speaker on channel {name}", "column": f"the speaker whom the column {name} names"}
    return by_kind.get(kind, f"speaker {agent}")


def _list_parts(parts: Sequence[str]) -> str:
    """The parts of a template as words, such as "two parts of them (user's speech, transcript)"."""
    numbers = {2: "two", 3: "three"}
    return f"{numbers[len(parts)]} parts of them ({', '.join(ROW_PARTS[part] for part in parts)})"


def _number(value: float) -> str:
    """A number with thousands separators and at most two decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}".rstrip("0").rstrip(".")


def _plain(text: Any) -> str:
    """Untrusted text as Markdown that shows it unchanged on one line, also as an item of a list and in a table cell."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    text = re.sub(r"([\\`*\[\]|~]|^[#+-]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)
    return re.sub(r"^(\d+)(?=[.)] )", r"\1\\", text)


def _code(name: str) -> str:
    """The name of a column as code. A manifest may name columns as it likes."""
    return f"`{name}`" if re.fullmatch(r"\w+", name) else f"<code>{_plain(name)}</code>"
