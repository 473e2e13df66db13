"""Export a dataset folder to the files that other trainers read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from usdm_sft.corpus.features import folder_features
from usdm_sft.dataset_folder.layout import UNFINISHED, data_files, read_counts
from usdm_sft.dataset_folder.rows import iter_rows
from usdm_sft.dataset_folder.text_lines import format_line
from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.utils.atomic import write_then_replace
from usdm_sft.utils.progress import quiet

if TYPE_CHECKING:
    from datasets import Dataset

Format = Literal["usdm", "arrow", "megatron"]

ARROW_COLUMNS = ["input_ids", "labels", "attention_mask"]  # LLaMA-Factory pads every column that it finds
_ROW_GROUP = 500  # packs; Megatron-Bridge keeps one row group in memory
_PACK = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.int8()), "seq_start_id": pa.list_(pa.int32())}
)


def export(dataset_dir: str | Path, output_dir: str | Path, *, format: Format = "usdm") -> dict[str, int]:
    """Write the ids and labels of a dataset folder in the format of another trainer, in the order of the rows.

    | format | files | read by |
    |---|---|---|
    | usdm | `<split>.txt`, one row per line | train_sft.py of naver-ai/usdm |
    | arrow | a folder of `DatasetDict.save_to_disk`: `input_ids`, `labels`, `attention_mask` | `tokenized_path` of LLaMA-Factory |
    | megatron | `<split>.idx.parquet`, rows packed up to the folder's `max_length` | Megatron-Bridge |

    Args:
        dataset_dir: A folder that `prepare` made.
        output_dir: The folder for the files. usdm and megatron replace files of the same names; arrow needs an empty folder.
        format: "usdm", "arrow" or "megatron".

    Returns:
        The number of rows of each split.

    Raises:
        FileNotFoundError: `dataset_dir` is not a finished dataset folder, or one of its files is missing.
        FileExistsError: The format is arrow, and `output_dir` is not empty.
        ValueError: The format is unknown, or a file is damaged.
    """
    writers = {"usdm": export_text, "arrow": _export_arrow, "megatron": _export_megatron}
    if format not in writers:
        raise ValueError(f"format {format!r} is unknown: choose one of {', '.join(writers)}")
    return writers[format](Path(dataset_dir), Path(output_dir))


def export_text(dataset_dir: Path, text_dir: Path) -> dict[str, int]:
    """Write `<split>.txt` for each split, as the reference without a newline at the end."""
    num_lines = {}
    for split, files in data_files(dataset_dir, read_counts(dataset_dir)).items():
        num_lines[split] = 0
        with write_then_replace(text_dir / f"{split}.txt", encoding="ascii", newline="") as text:
            for path in files:
                for batch in iter_rows(path, columns=["input_ids", "labels"]):
                    for row in batch.to_pylist():
                        line = format_line(row["input_ids"], row["labels"])
                        text.write("\n" + line if num_lines[split] else line)
                        num_lines[split] += 1
    return num_lines


def _export_arrow(dataset_dir: Path, arrow_dir: Path) -> dict[str, int]:
    """Save the splits with `DatasetDict.save_to_disk`; a folder with dataset_dict.json is complete."""
    from datasets import DatasetDict

    files = data_files(dataset_dir, read_counts(dataset_dir))
    if arrow_dir.exists() and {path.name for path in arrow_dir.iterdir()} - {UNFINISHED}:
        raise FileExistsError(f"{arrow_dir} is not empty: name another folder")
    unfinished = arrow_dir / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        splits = DatasetDict({split: _copy_rows(paths, unfinished / split) for split, paths in files.items()})
        with quiet():
            splits.save_to_disk(unfinished / "saved")
        for entry in sorted((unfinished / "saved").iterdir(), key=lambda path: path.is_file()):
            entry.rename(arrow_dir / entry.name)
    finally:
        shutil.rmtree(unfinished)
    return {split: len(rows) for split, rows in splits.items()}


def _copy_rows(paths: Sequence[Path], file: Path) -> Dataset:
    """Copy `ARROW_COLUMNS` of the rows into an Arrow file, which is then memory-mapped."""
    from datasets import Dataset, Features

    features = folder_features(lists=False)
    schema = Features({name: features[name] for name in ARROW_COLUMNS}).arrow_schema
    with pa.ipc.new_stream(file, schema) as stream:
        for path in paths:
            for batch in iter_rows(path, columns=ARROW_COLUMNS):
                stream.write_table(pa.Table.from_batches([batch]).cast(schema))
    return Dataset.from_file(str(file))


def _export_megatron(dataset_dir: Path, parquet_dir: Path) -> dict[str, int]:
    """Write packs with the columns that Megatron-Bridge's `GPTSFTPackedParquetDataset` requires."""
    counts = read_counts(dataset_dir)
    num_rows = {}
    for split, paths in data_files(dataset_dir, counts).items():
        num_rows[split] = 0
        packs: list[dict[str, Any]] = []
        with (
            write_then_replace(parquet_dir / f"{split}.idx.parquet", "wb") as file,
            pq.ParquetWriter(file, _PACK) as writer,
        ):
            for pack in _iter_packs(paths, counts["settings"]["max_length"]):
                num_rows[split] += len(pack["seq_start_id"])
                packs.append(pack)
                if len(packs) == _ROW_GROUP:
                    writer.write_table(pa.Table.from_pylist(packs, schema=_PACK))
                    packs = []
            if packs:
                writer.write_table(pa.Table.from_pylist(packs, schema=_PACK))
    return num_rows


def _iter_packs(paths: Sequence[Path], max_length: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Put whole rows one after the other, until the next row would not fit into `max_length` tokens.

    Yields:
        `input_ids` and `loss_mask`, (num_tokens,) each, and `seq_start_id`, the (num_rows,) positions of the first tokens.
        `loss_mask` is shifted: it is 1 where the next token of the same row is labelled. The reader makes the labels from
        `input_ids`, and leaves out the last token of each row.
    """
    rows: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
    num_tokens = 0
    for path in paths:
        for batch in iter_rows(path, columns=["id", "input_ids", "labels"]):
            for row_id, ids, labels in zip(*(batch[name] for name in batch.schema.names), strict=True):
                row = ids.values.to_numpy(), labels.values.to_numpy()
                _check_labels(path, row_id.as_py(), *row)
                if rows and num_tokens + len(row[0]) > max_length:
                    yield _join(rows)
                    rows, num_tokens = [], 0
                rows.append(row)
                num_tokens += len(row[0])
    if rows:
        yield _join(rows)


def _check_labels(path: Path, row_id: str, ids: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
    if len(ids) != len(labels) or ((labels != ids) & (labels != IGNORE_INDEX)).any():
        raise ValueError(f"{path}: the labels of {row_id} are not its input_ids or -100: run 'dailytalk-usdm verify'")


def _join(rows: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    lengths = [len(ids) for ids, _ in rows]
    return {
        "input_ids": np.concatenate([ids for ids, _ in rows]),
        "loss_mask": np.concatenate([np.append(labels[1:] != IGNORE_INDEX, False) for _, labels in rows]).astype(
            np.int8
        ),
        "seq_start_id": np.cumsum([0, *lengths[:-1]]),
    }
