"""The dataset folder: Parquet files and a README that `load_dataset` and the Hub read, the tokenizer, and counts.json.

    README.md                                    dataset card; its YAML names the files and the features
    counts.json                                  what it holds, what was left out and why, every digest and version
    single_turn/train-00000-of-00064.parquet     ...
    tokenizer/                                   for `AutoTokenizer.from_pretrained` and the trainers

counts.json is written last: a folder that has it is complete. Nothing in the folder depends on the clock or on paths.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.download import sha256_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

COUNTS = "counts.json"
UNFINISHED = ".unfinished"
NUM_OUTPUT_SHARDS = {"train": 64, "test": 8}


def read_counts(folder: str | Path) -> dict[str, Any]:
    """What `prepare` counted.

    Raises:
        FileNotFoundError: The folder is not a dataset folder, or was not finished.
        ValueError: Its counts.json is not what `prepare` wrote.
    """
    path = Path(folder) / COUNTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {COUNTS}: name a folder that 'dailytalk-usdm prepare' finished")
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): run prepare again with overwrite") from error
    if not isinstance(counts, dict) or not {"key", "config", "splits", "files"} <= counts.keys():
        raise ValueError(f"{path} is not the counts of a dataset folder: run prepare again with overwrite")
    return counts


def is_up_to_date(folder: Path, key: str) -> bool:
    """Whether `folder` is the finished result of the run that `key` describes, with every file as it was written."""
    try:
        counts = read_counts(folder)
    except (FileNotFoundError, ValueError):
        return False
    return counts["key"] == key and all(
        (folder / name).is_file() and sha256_file(folder / name) == digest for name, digest in counts["files"].items()
    )


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run left in a folder."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def check_output(folder: Path, *, overwrite: bool, finished_too: bool) -> None:
    """Refuse to write into a folder with other content, before any work is done.

    Args:
        folder: The output folder.
        overwrite: Allow it.
        finished_too: Whether a finished dataset folder counts as other content; not before it is known what it holds.

    Raises:
        FileExistsError: The folder holds something, it is no interrupted run, and `overwrite` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder: name another output_path")
    if overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return
    finished = (folder / COUNTS).exists()
    if finished_too if finished else not (folder / UNFINISHED).exists():
        raise FileExistsError(
            f"{folder} holds something else (or the result of other settings): name another output_path, or pass overwrite"
        )


def write_folder(
    folder: Path,
    config_name: str,
    splits: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerFast,
    counts: dict[str, Any],
    *,
    num_output_shards: int | None = None,
) -> dict[str, Any]:
    """Write everything beside its place and then move it there, counts.json last.

    Args:
        folder: The output folder. What has the name of ours in it is replaced, other files at its top stay.
        config_name: Such as "single_turn"; the folder of the Parquet files.
        splits: The finished rows.
        tokenizer: Saved into `tokenizer/`.
        counts: Completed with the digests of the files.
        num_output_shards: Parquet files a split; 64 for train and 8 for test where None. Never more than rows.

    Returns:
        The counts as written.
    """
    clear_unfinished(folder)
    unfinished = folder / UNFINISHED
    unfinished.mkdir(parents=True)
    num_bytes = {}
    for split, rows in splits.items():
        num_shards = max(1, min(num_output_shards or NUM_OUTPUT_SHARDS.get(split, 8), len(rows)))
        num_bytes[split] = 0
        (unfinished / config_name).mkdir(exist_ok=True)
        for index in range(num_shards):
            path = unfinished / config_name / f"{split}-{index:05d}-of-{num_shards:05d}.parquet"
            num_bytes[split] += rows.shard(num_shards, index, contiguous=True).to_parquet(str(path))
    tokenizer.save_pretrained(unfinished / "tokenizer")
    (unfinished / "README.md").write_text(_card(config_name, splits, num_bytes, counts, unfinished), encoding="utf-8")
    files = sorted(path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*") if path.is_file())
    counts = counts | {"files": {name: sha256_file(unfinished / name) for name in files}}
    (unfinished / COUNTS).write_text(json.dumps(counts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    (folder / COUNTS).unlink(missing_ok=True)  # what is not finished has none
    for entry in sorted(unfinished.iterdir(), key=lambda path: path.name == COUNTS):
        target = folder / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(entry, target)
    unfinished.rmdir()
    return counts


def _card(
    config_name: str, splits: dict[str, Dataset], num_bytes: dict[str, int], counts: dict[str, Any], folder: Path
) -> str:
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from huggingface_hub import DatasetCard, DatasetCardData

    features = next(iter(splits.values())).features
    split_infos = SplitDict()
    for split, rows in splits.items():
        split_infos.add(SplitInfo(split, num_bytes[split], len(rows)))
    info = DatasetInfo(
        features=features,
        splits=split_infos,
        download_size=sum(path.stat().st_size for path in folder.rglob("*.parquet")),
        dataset_size=sum(num_bytes.values()),
    )
    num_rows = sum(len(rows) for rows in splits.values())
    data = DatasetCardData(
        language="en",
        license="cc-by-sa-4.0",
        pretty_name="DailyTalk for USDM",
        size_categories="n<1K" if num_rows < 1000 else "1K<n<10K" if num_rows < 10_000 else "10K<n<100K",
        configs=[
            {
                "config_name": config_name,
                "data_files": [{"split": split, "path": f"{config_name}/{split}-*.parquet"} for split in splits],
                "default": True,
            }
        ],
        dataset_info={"config_name": config_name, **info._to_yaml_dict()},
    )
    template = importlib.resources.files("usdm_sft.dataset_card") / "template.md"
    card = DatasetCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        config_name=config_name,
        features=features,
        counts=counts,
    )
    return str(card)
