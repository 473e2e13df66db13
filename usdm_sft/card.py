"""The dataset card: YAML that `load_dataset` and the Hub read, and what a person should know, filled from the counts."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from usdm_sft.pictures import CAPTIONS
from usdm_sft.view import format_example

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from tokenizers import Tokenizer

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
LARGEST = "10M<n<100M"
TASKS = ["text-generation", "automatic-speech-recognition", "text-to-speech"]
TAGS = ["spoken-dialog", "speech-units", "usdm"]

MEANINGS = {
    "id": "dialog and turn of the user, such as d23_0",
    "dialog_id": "the dialog",
    "turn": "number of the user's turn in its dialog, from 0",
    "speaker": "who speaks",
    "text": "transcript, as the corpus has it; only the template lower-cases it",
    "emotion": "as the corpus has it",
    "units": "the speech as discrete units, 50 a second",
    "seconds": "length of the recording",
    "input_ids": "the example in the template, BOS and EOS included",
    "labels": "unshifted: -100 where no loss falls, else the id",
}


def make_card(
    config_name: str,
    splits: Mapping[str, Dataset],
    num_bytes: Mapping[str, int],
    counts: Mapping[str, Any],
    files: Mapping[str, Sequence[Path]],
    tokenizer: Tokenizer,
) -> str:
    """README.md of a dataset folder.

    Args:
        config_name: Such as "single_turn".
        splits: The rows.
        num_bytes: Of each split in memory.
        counts: As in counts.json, with the statistics.
        files: The Parquet files of each split.
        tokenizer: Spells the ids of the example that is shown.
    """
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from huggingface_hub import DatasetCard, DatasetCardData

    features = next(iter(splits.values())).features
    split_infos = SplitDict()
    for split, rows in splits.items():
        split_infos.add(SplitInfo(split, num_bytes[split], len(rows)))
    info = DatasetInfo(
        features=features,
        splits=split_infos,
        download_size=sum(path.stat().st_size for paths in files.values() for path in paths),
        dataset_size=sum(num_bytes.values()),
    )
    num_rows = sum(len(rows) for rows in splits.values())
    # Of another corpus its owner knows language and licence.
    known = {"language": "en", "license": "cc-by-sa-4.0", "pretty_name": "DailyTalk for USDM"}
    data = DatasetCardData(
        **(
            known
            if counts["corpus"] == "DailyTalk"
            else {"license": "unknown", "pretty_name": "Spoken dialogs for USDM"}
        ),
        task_categories=TASKS,
        tags=TAGS,
        size_categories=next((name for limit, name in SIZES.items() if num_rows < limit), LARGEST),
        configs=data_configs(config_name, splits),
        dataset_info={"config_name": config_name, **info._to_yaml_dict()},
    )
    [first, *_] = files.values()
    template = importlib.resources.files("usdm_sft.dataset_card") / "template.md"
    card = DatasetCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        config_name=config_name,
        columns=_columns(features),
        counts=counts,
        example=format_example(pq.ParquetFile(first[0]).read_row_group(0)[:1].to_pylist()[0], tokenizer, color=False),
        pictures=CAPTIONS,
    )
    return str(card)


def data_configs(config_name: str, splits: Iterable[str]) -> list[dict[str, Any]]:
    """What the YAML says of the data files: the ones beside it, and no others."""
    data_files = [{"split": split, "path": f"{config_name}/{split}-*.parquet"} for split in splits]
    return [{"config_name": config_name, "data_files": data_files, "default": True}]


def _columns(features: Features) -> list[tuple[str, str, str]]:
    """Name, type and meaning of every column."""

    def describe(feature: Any) -> str:
        if isinstance(feature, list):
            return f"list of {describe(feature[0])}"
        return f"list of {describe(feature.feature)}" if hasattr(feature, "feature") else feature.dtype

    return [
        (name, describe(feature), MEANINGS.get(name) or MEANINGS[name.split("_")[-1]])
        for name, feature in features.items()
    ]
