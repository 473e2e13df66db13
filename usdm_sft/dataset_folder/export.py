"""A dataset folder as the text files that naver-ai/usdm's train_sft.py reads: ids, `|`, labels, one example a line."""

from __future__ import annotations

from pathlib import Path

from usdm_sft.dataset_folder.layout import data_files, read_counts
from usdm_sft.utils.atomic import write_then_replace


def export_text(dataset_dir: str | Path, text_dir: str | Path) -> dict[str, int]:
    """Write `<split>.txt` for each split, in the order of the rows and without a newline at the end, as the reference does.

    Args:
        dataset_dir: A folder that `prepare` made.
        text_dir: Where train.txt and test.txt go; files of these names are replaced.

    Returns:
        The number of lines of each split.

    Raises:
        FileNotFoundError: `dataset_dir` is not a finished dataset folder, or lacks a file.
        ValueError: A file is damaged.
    """
    from usdm_sft.dataset_folder.rows import iter_rows

    dataset_dir, text_dir = Path(dataset_dir), Path(text_dir)
    counts = read_counts(dataset_dir)
    num_lines = {}
    for split, files in data_files(dataset_dir, counts).items():
        num_lines[split] = 0
        with write_then_replace(text_dir / f"{split}.txt", encoding="ascii", newline="") as text:
            for path in files:
                for batch in iter_rows(path, columns=["input_ids", "labels"]):
                    for row in batch.to_pylist():
                        line = " ".join(map(str, row["input_ids"])) + "|" + " ".join(map(str, row["labels"]))
                        text.write("\n" + line if num_lines[split] else line)
                        num_lines[split] += 1
    return num_lines
