"""Writes a dataset folder, so that it is whole as soon as it has its counts.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.dataset_folder.card import make_card
from usdm_sft.dataset_folder.layout import COUNTS, PICTURES, UNFINISHED, clear_unfinished, data_files, read_counts
from usdm_sft.dataset_folder.pictures import draw_pictures
from usdm_sft.dataset_folder.statistics import compute_statistics
from usdm_sft.utils.cache import sha256_file

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

NUM_OUTPUT_SHARDS = {"train": 64, "test": 8}


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
    num_bytes, files = {}, {}
    for split, rows in splits.items():
        num_shards = max(1, min(num_output_shards or NUM_OUTPUT_SHARDS.get(split, 8), len(rows)))
        num_bytes[split], files[split] = 0, []
        (unfinished / config_name).mkdir(exist_ok=True)
        for index in range(num_shards):
            path = unfinished / config_name / f"{split}-{index:05d}-of-{num_shards:05d}.parquet"
            num_bytes[split] += rows.shard(num_shards, index, contiguous=True).to_parquet(str(path))
            files[split].append(path)
    tokenizer.save_pretrained(unfinished / "tokenizer")
    statistics = compute_statistics(files)
    draw_pictures(statistics, counts["num_units"], unfinished / PICTURES)
    counts = counts | {"statistics": {split: its.summary() for split, its in statistics.items()}}
    card = make_card(config_name, splits, num_bytes, counts, files, tokenizer.backend_tokenizer)
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    files = sorted(path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*") if path.is_file())
    counts = counts | {"files": {name: sha256_file(unfinished / name) for name in files}}
    (unfinished / COUNTS).write_text(_to_json(counts), encoding="utf-8")

    (folder / COUNTS).unlink(missing_ok=True)  # what is not finished has none
    for entry in sorted(unfinished.iterdir(), key=lambda path: path.name == COUNTS):
        target = folder / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(entry, target)
    unfinished.rmdir()
    return counts


def replace_pictures(folder: str | Path) -> dict[str, Any]:
    """Draw the pictures of a finished folder anew, from its files.

    Returns:
        The summary of the statistics by split.
    """
    folder = Path(folder)
    counts = read_counts(folder)
    statistics = compute_statistics(data_files(folder, counts))
    draw_pictures(statistics, counts["num_units"], folder / PICTURES)
    files = {f"{PICTURES}/{path.name}": sha256_file(path) for path in sorted((folder / PICTURES).iterdir())}
    if not files.items() <= counts["files"].items():  # another matplotlib draws other bytes
        unfinished = folder / f"{COUNTS}.unfinished"
        unfinished.write_text(_to_json(counts | {"files": counts["files"] | files}), encoding="utf-8")
        os.replace(unfinished, folder / COUNTS)
    return {split: its.summary() for split, its in statistics.items()}


def _to_json(counts: Mapping[str, Any]) -> str:
    return json.dumps(counts, indent=2, ensure_ascii=False) + "\n"
