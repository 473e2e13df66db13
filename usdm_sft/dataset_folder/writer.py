"""Write a dataset folder. It is complete as soon as it has counts.json."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from usdm_sft.corpus.features import TRAINER_COLUMNS, folder_features
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.dataset_folder.card import make_card
from usdm_sft.dataset_folder.layout import COUNTS, PICTURES, UNFINISHED, clear_unfinished, data_files, read_counts
from usdm_sft.dataset_folder.pictures import draw_pictures
from usdm_sft.dataset_folder.statistics import compute_statistics
from usdm_sft.dataset_folder.utterances import write_utterances
from usdm_sft.template.tokenizer import save_tokenizer
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
    utterances: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Write all files into a hidden folder inside the output folder, then move them into place, counts.json last.

    Args:
        folder: The output folder. Entries with the name of a new file or folder are replaced, others stay.
        config_name: Name of the config, such as "single_turn", and of the folder of the Parquet files.
        splits: The finished rows.
        tokenizer: The tokenizer to save in `tokenizer/`.
        counts: The counts so far; statistics and digests of the files are added.
        num_output_shards: Parquet files per split, never more than rows. By default 64 for train and 8 for others.
        utterances: The rows of the config `utterances` by split, if the folder keeps the audio.

    Returns:
        The counts as written.
    """
    clear_unfinished(folder)
    unfinished = folder / UNFINISHED
    unfinished.mkdir(parents=True)
    num_bytes, files = _write_parquet(unfinished / config_name, splits, num_output_shards)
    save_tokenizer(tokenizer, unfinished / "tokenizer")
    statistics = compute_statistics(files)
    draw_pictures(statistics, counts["num_units"], unfinished / PICTURES)
    counts = counts | {"statistics": {split: values.summary() for split, values in statistics.items()}}
    other_info = []
    if utterances is not None:
        counts[UTTERANCES], info = write_utterances(unfinished / UTTERANCES, utterances)
        other_info = [info]
    card = make_card(config_name, splits, num_bytes, counts, files, tokenizer.backend_tokenizer, other_info)
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    names = sorted(path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*") if path.is_file())
    counts = counts | {"files": {name: sha256_file(unfinished / name) for name in names}}
    replace_text(unfinished / COUNTS, _to_json(counts))

    _remove_utterances(folder)
    (folder / COUNTS).unlink(missing_ok=True)  # a folder without counts.json is unfinished
    for entry in sorted(unfinished.iterdir(), key=lambda path: path.name == COUNTS):
        target = folder / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(entry, target)
    unfinished.rmdir()
    return counts


def _remove_utterances(folder: Path) -> None:
    """Remove the utterances of an earlier run, which a run without `keep_audio` would not replace."""
    with suppress(FileNotFoundError, ValueError):  # not a finished dataset folder
        if UTTERANCES in read_counts(folder):
            shutil.rmtree(folder / UTTERANCES)


def _write_parquet(
    folder: Path, splits: Mapping[str, Dataset], num_output_shards: int | None
) -> tuple[dict[str, int], dict[str, list[Path]]]:
    """Write the rows with `TRAINER_COLUMNS`; returns the bytes in memory and the files of each split."""
    folder.mkdir()
    num_bytes: dict[str, int] = {}
    files: dict[str, list[Path]] = {}
    for split, rows in splits.items():
        num_files = max(1, min(num_output_shards or NUM_OUTPUT_SHARDS.get(split, 8), len(rows)))
        files[split] = [folder / f"{split}-{index:05d}-of-{num_files:05d}.parquet" for index in range(num_files)]
        num_bytes[split] = sum(
            _with_trainer_columns(rows.shard(num_files, index, contiguous=True)).to_parquet(str(path))
            for index, path in enumerate(files[split])
        )
    return num_bytes, files


def _with_trainer_columns(rows: Dataset) -> Dataset:
    """Return the rows of one output file in memory, with `TRAINER_COLUMNS` at the end."""
    features = folder_features(lists=isinstance(rows[0]["user_text"], list))
    return rows.with_format("arrow").map(_add_trainer_columns, batched=True, features=features, keep_in_memory=True)


def _add_trainer_columns(rows: pa.Table) -> pa.Table:
    ids = rows["input_ids"].combine_chunks()
    ones = pa.array(np.ones(len(ids.flatten()), np.int8))
    lengths = pc.list_value_length(ids)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    columns = (pa.ListArray.from_arrays(offsets, ones), lengths.cast(pa.int32()))
    for name, column in zip(TRAINER_COLUMNS, columns, strict=True):
        rows = rows.append_column(name, column)
    return rows


def replace_pictures(folder: str | Path) -> dict[str, Any]:
    """Draw the pictures of a finished folder again.

    Returns:
        The summary of the statistics of each split.
    """
    folder = Path(folder)
    counts = read_counts(folder)
    statistics = compute_statistics(data_files(folder, counts))
    draw_pictures(statistics, counts["num_units"], folder / PICTURES)
    files = {f"{PICTURES}/{path.name}": sha256_file(path) for path in sorted((folder / PICTURES).iterdir())}
    if not files.items() <= counts["files"].items():  # another version of matplotlib draws other bytes
        replace_text(folder / COUNTS, _to_json(counts | {"files": counts["files"] | files}))
    return {split: values.summary() for split, values in statistics.items()}


def _to_json(counts: Mapping[str, Any]) -> str:
    return json.dumps(counts, indent=2, ensure_ascii=False) + "\n"
