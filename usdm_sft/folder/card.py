"""The dataset card: YAML for `load_dataset` and the Hub, and a description for people, filled in from the counts."""

from __future__ import annotations

import html
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData
from tokenizers import Tokenizer

from usdm_sft.corpus.dailytalk import DAILYTALK
from usdm_sft.corpus.examples import MULTI_TURN, config_has_lists
from usdm_sft.corpus.features import (
    COLLAPSED_SPEECH,
    SPEECH,
    TEXTS,
    are_collapsed,
    dataset_info,
    folder_features,
)
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.folder.example_picture import EXAMPLE
from usdm_sft.folder.pictures import CAPTIONS
from usdm_sft.folder.statistics import count_too_long
from usdm_sft.template.config import OFFLINE, PARTS, REFERENCE
from usdm_sft.template.parts import ROW_PARTS
from usdm_sft.template.tokenizer import NUM_UNITS
from usdm_sft.template.view import format_example
from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.texts import count_noun

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
LARGEST = "10M<n<100M"
TASKS = {  # labelled part -> the Hub's name of the task that it trains
    "agent_text": "text-generation",
    "user_text": "automatic-speech-recognition",
    "agent_units": "text-to-speech",
}
TAGS = ["spoken-dialog", "speech-units", "usdm"]
SHOWN_REASONS = 20  # left-out dialogs, pairs and rows; counts.json has all of them

# The texts come from DailyDialog, whose licence is more restrictive than DailyTalk's own.
DAILYTALK_METADATA = {
    "language": "en",
    "license": "other",
    "license_name": "cc-by-sa-4.0-with-texts-from-cc-by-nc-sa-4.0",
    "license_link": "https://github.com/keonlee9420/DailyTalk",
    "pretty_name": "DailyTalk for USDM",
}
OTHER_METADATA = {"license": "unknown", "pretty_name": "Spoken dialogs for USDM"}

MEANINGS = {
    "id": "dialog and turn, such as d23_0",
    "dialog_id": "the dialog",
    "turn": "number of the user's turn in its dialog",
    "input_ids": "the row in the template, BOS and EOS included",
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
    lists = config_has_lists(config_name, counts["settings"]["history"])
    collapsed = counts["settings"].get("unit_repetition") == "collapse"
    features = folder_features(lists=lists, collapsed=collapsed)
    data = _make_metadata(config_name, features, num_bytes, counts, files)
    if other_info:
        data["dataset_info"] = [data["dataset_info"], *other_info]
    [first, *_] = files.values()
    parts = counts["settings"]["template"].get("parts", PARTS)
    template = importlib.resources.files("usdm_sft.dataset_card") / "template.md"
    card = DatasetCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        config_name=config_name,
        columns=_columns(
            features, config_name, lists=lists, lowercase=counts["settings"]["template"].get("lowercase", True)
        ),
        counts=counts,
        settings=counts["settings"],
        utterances=counts.get(UTTERANCES),
        is_dailytalk=counts["corpus"] == DAILYTALK,
        lists={"manifest": "manifests", "manifest and split list": "lists"}.get(counts["corpus"], "split lists"),
        template_parts=parts,
        collapsed=collapsed,
        row_parts="both" if len(parts) == len(PARTS) else _list_parts(parts),
        has_reference_words=_words(counts["settings"]["template"]) == _words(REFERENCE.settings()),
        fits_ustm=_fits_ustm(counts),
        is_offline_tokenizer=counts["tokenizer"]["name"] == OFFLINE,
        vocabulary=tokenizer.get_vocab_size(),
        has_emotions=any(emotion for summary in counts["statistics"].values() for emotion in summary["emotions"]),
        shown_reasons=SHOWN_REASONS,
        number=_number,
        plural=count_noun,
        count_too_long=count_too_long,
        plain=_plain,
        example=format_example(pq.ParquetFile(first[0]).read_row_group(0)[:1].to_pylist()[0], tokenizer, color=False),
        pictures=CAPTIONS,
        parts=ROW_PARTS,
        example_picture=EXAMPLE,
    )
    return f"{card}\n"


def _make_metadata(
    config_name: str,
    features: Features,
    num_bytes: Mapping[str, int],
    counts: Mapping[str, Any],
    files: Mapping[str, Sequence[Path]],
) -> DatasetCardData:
    """The YAML of the card."""
    split_infos = SplitDict()
    num_rows = {split: counts["splits"][split]["rows"] for split in num_bytes}
    for split, size in num_bytes.items():
        split_infos.add(SplitInfo(split, size, num_rows[split]))
    info = DatasetInfo(
        features=features,
        splits=split_infos,
        download_size=sum(path.stat().st_size for paths in files.values() for path in paths),
        dataset_size=sum(num_bytes.values()),
    )
    loss = counts["settings"]["template"]["loss"]
    metadata: dict[str, Any] = {
        **(DAILYTALK_METADATA if counts["corpus"] == DAILYTALK else OTHER_METADATA),
        "task_categories": [task for part, task in TASKS.items() if part in loss],
        "tags": TAGS,
        "size_categories": next((name for limit, name in SIZES.items() if sum(num_rows.values()) < limit), LARGEST),
        "configs": data_configs(counts),
        "dataset_info": dataset_info(config_name, info),
    }
    return DatasetCardData(**metadata)


def data_configs(counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The `configs` of the YAML: the data files of this folder and no others.

    `load_dataset` finds the rows of a local folder in its cache by the last name of the folder and by this YAML alone. The description
    makes it read the folder again when a data file has other bytes.
    """
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in counts["splits"]],
            "description": f"data files with sha256 {_digest_files(name, counts['files'])}",
        }
        for name in (counts["config"], UTTERANCES)
        if name == counts["config"] or name in counts
    ]
    return [configs[0] | {"default": True}, *configs[1:]]


def _digest_files(config_name: str, files: Mapping[str, str]) -> str:
    """The sha256 over the names and digests of the data files of a config."""
    return cache_key({name: sha256 for name, sha256 in files.items() if name.startswith(f"{config_name}/")})


def read_info(folder: Path, config: str) -> DatasetInfo:
    """Read the features and splits of a config from the card. `load_dataset_builder` takes the folder's path for a glob pattern.

    Raises:
        ValueError: The card has no features or splits of the config.
    """
    info = DatasetInfosDict.from_directory(str(folder)).get(config)
    if info is None or info.features is None or info.splits is None:
        raise ValueError("its dataset_info names no features or splits")
    return info


def _columns(features: Features, config_name: str, *, lists: bool, lowercase: bool) -> list[tuple[str, str, str]]:
    """Name, type and meaning of every column."""
    which = "first user turn of the row" if config_name == MULTI_TURN else "last user turn of the row"
    columns = TEXTS | (COLLAPSED_SPEECH if are_collapsed(features) else SPEECH)
    meanings = MEANINGS | {name: column.meaning for name, column in columns.items()}
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
        return meanings[name.split("_")[-1]] + ("; one entry per exchange" if lists else "")

    return [(name, describe(feature), meaning(name)) for name, feature in features.items()]


def _list_parts(parts: Sequence[str]) -> str:
    """The parts of a template as words, such as "two parts of them (user's speech, transcript)"."""
    numbers = {2: "two", 3: "three"}
    return f"{numbers[len(parts)]} parts of them ({', '.join(ROW_PARTS[part] for part in parts)})"


def _fits_ustm(counts: Mapping[str, Any]) -> bool:
    """True for the units and the ids of naver-ai/USTM."""
    tokenizer = counts["tokenizer"]
    return counts["unit_model"]["name"] is not None and tokenizer["num_units"] == NUM_UNITS and "ids" not in tokenizer


def _words(template: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a template without the labelled parts."""
    return {name: value for name, value in template.items() if name != "loss"}


def _number(value: float) -> str:
    """A number with thousands separators and at most two decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}".rstrip("0").rstrip(".")


def _plain(text: Any) -> str:
    """Untrusted text as Markdown that shows it unchanged on one line, also in a table cell."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)
