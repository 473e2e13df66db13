"""Write a dataset folder. It is complete as soon as it has counts.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_sft.dataset_folder.card import make_card
from usdm_sft.dataset_folder.example_picture import draw_example
from usdm_sft.dataset_folder.layout import COUNTS, PICTURES, UNFINISHED, clear_unfinished, data_files, read_counts
from usdm_sft.dataset_folder.pictures import CAPTIONS, draw_pictures
from usdm_sft.dataset_folder.statistics import SplitStatistics, compute_statistics
from usdm_sft.utils.atomic import replace_text
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
    """Write all files into a hidden folder inside the output folder, then move them into place, counts.json last.

    Args:
        folder: The output folder. Entries with the name of a new file or folder are replaced, others stay.
        config_name: Name of the config, such as "single_turn", and of the folder of the Parquet files.
        splits: The finished rows.
        tokenizer: The tokenizer to save in `tokenizer/`.
        counts: The counts so far; statistics and digests of the files are added.
        num_output_shards: Parquet files per split, never more than rows. By default 64 for train and 8 for others.

    Returns:
        The counts as written.
    """
    clear_unfinished(folder)
    unfinished = folder / UNFINISHED
    unfinished.mkdir(parents=True)
    num_bytes, files = _write_parquet(unfinished / config_name, splits, num_output_shards)
    tokenizer.save_pretrained(unfinished / "tokenizer")
    statistics = compute_statistics(files)
    draw_pictures(statistics, counts["num_units"], unfinished / PICTURES)
    counts = counts | {"statistics": {split: values.summary() for split, values in statistics.items()}}
    draw_example(files, tokenizer.backend_tokenizer, unfinished / PICTURES)
    card = make_card(config_name, splits, num_bytes, counts, files, tokenizer.backend_tokenizer)
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    names = sorted(path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*") if path.is_file())
    counts = counts | {"files": {name: sha256_file(unfinished / name) for name in names}}
    replace_text(unfinished / COUNTS, _to_json(counts))

    (folder / COUNTS).unlink(missing_ok=True)  # a folder without counts.json is unfinished
    for entry in sorted(unfinished.iterdir(), key=lambda path: path.name == COUNTS):
        target = folder / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(entry, target)
    unfinished.rmdir()
    return counts


def _write_parquet(
    folder: Path, splits: Mapping[str, Dataset], num_output_shards: int | None
) -> tuple[dict[str, int], dict[str, list[Path]]]:
    """Write the rows; returns the bytes in memory and the files of each split."""
    folder.mkdir()
    num_bytes: dict[str, int] = {}
    files: dict[str, list[Path]] = {}
    for split, rows in splits.items():
        num_files = max(1, min(num_output_shards or NUM_OUTPUT_SHARDS.get(split, 8), len(rows)))
        files[split] = [folder / f"{split}-{index:05d}-of-{num_files:05d}.parquet" for index in range(num_files)]
        num_bytes[split] = sum(
            rows.shard(num_files, index, contiguous=True).to_parquet(str(path))
            for index, path in enumerate(files[split])
        )
    return num_bytes, files


def replace_pictures(folder: str | Path) -> dict[str, SplitStatistics]:
    """Draw the pictures of a finished folder again.

    Returns:
        The statistics of each split.
    """
    folder = Path(folder)
    counts = read_counts(folder)
    statistics = compute_statistics(data_files(folder, counts))
    draw_pictures(statistics, counts["num_units"], folder / PICTURES)
    files = {f"{PICTURES}/{name}": sha256_file(folder / PICTURES / name) for name in CAPTIONS}
    if not files.items() <= counts["files"].items():  # another version of matplotlib draws other bytes
        replace_text(folder / COUNTS, _to_json(counts | {"files": counts["files"] | files}))
    return statistics


def _to_json(counts: Mapping[str, Any]) -> str:
    return json.dumps(counts, indent=2, ensure_ascii=False) + "\n"
