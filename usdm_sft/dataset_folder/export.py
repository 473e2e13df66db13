"""Export a dataset folder as the text files that naver-ai/usdm's train_sft.py reads, one row per line."""

from __future__ import annotations

from pathlib import Path

from usdm_sft.dataset_folder.layout import data_files, read_counts
from usdm_sft.dataset_folder.rows import iter_rows
from usdm_sft.dataset_folder.text_lines import format_line
from usdm_sft.utils.atomic import write_then_replace


def export_text(dataset_dir: str | Path, text_dir: str | Path) -> dict[str, int]:
    """Write `<split>.txt` for each split, in the order of the rows and, as the reference, without a newline at the end.

    Args:
        dataset_dir: A folder that `prepare` made.
        text_dir: Folder for train.txt and test.txt; existing files of these names are replaced.

    Returns:
        The number of lines of each split.

    Raises:
        FileNotFoundError: `dataset_dir` is not a finished dataset folder, or one of its files is missing.
        ValueError: A file is damaged.
    """
    dataset_dir, text_dir = Path(dataset_dir), Path(text_dir)
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
