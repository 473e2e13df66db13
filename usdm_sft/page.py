"""Examples of a dataset folder on one self-contained HTML page, with both audios where the corpus is at hand."""

from __future__ import annotations

import base64
import importlib.resources
import mimetypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from usdm_sft.corpus import Utterance, find_data_folder
from usdm_sft.folder import data_files, read_counts
from usdm_sft.rows import iter_rows, open_rows
from usdm_sft.tokenizer import load_tokenizer
from usdm_sft.view import split_parts, title


def read_rows(dataset_dir: str | Path, split: str, index: int, num_examples: int) -> list[dict[str, Any]]:
    """Rows `index` to `index + num_examples` of a split, fewer at its end.

    Raises:
        FileNotFoundError: `dataset_dir` is not a finished dataset folder, or lacks a file.
        IndexError: There is no such row.
        ValueError: There is no such split, or a file is damaged.
    """
    import pyarrow as pa

    counts = read_counts(dataset_dir)
    if split not in counts["splits"]:
        raise ValueError(f"{dataset_dir} has no split {split!r}: name one of {', '.join(counts['splits'])}")
    rows: list[dict[str, Any]] = []
    start = 0
    for path in data_files(dataset_dir, counts)[split]:
        stop = start + open_rows(path).metadata.num_rows
        if start < index + num_examples and index < stop:
            first = max(index - start, 0)
            table = pa.Table.from_batches(iter_rows(path))
            rows += table.slice(first, index + num_examples - start - first).to_pylist()
        start = stop
    if index < 0 or not rows:
        raise IndexError(
            f"split {split} of {dataset_dir} has {start} rows, and no row {index}: name one from 0 to {start - 1}"
        )
    return rows


def write_page(
    dataset_dir: str | Path,
    html: str | Path,
    *,
    split: str = "train",
    index: int = 0,
    num_examples: int = 20,
    data_dir: str | Path | None = None,
) -> int:
    """Write one self-contained HTML page of examples.

    Args:
        dataset_dir: A folder that `prepare` made.
        html: The page to write; replaced where it exists.
        split: Split of the rows.
        index: First row.
        num_examples: How many rows.
        data_dir: The corpus that the folder was made from; with it, both sides can be heard.

    Returns:
        The number of rows on the page.

    Raises:
        FileNotFoundError: The folder, or an audio file below `data_dir`, is missing.
        IndexError: There is no such row.
        ValueError: There is no such split.
    """
    import jinja2

    tokenizer = load_tokenizer(str(Path(dataset_dir) / "tokenizer")).backend_tokenizer
    rows = read_rows(dataset_dir, split, index, num_examples)
    data = None if data_dir is None else find_data_folder(data_dir)
    examples = [
        {
            "title": title(row),
            "parts": split_parts(row["input_ids"], row["labels"], tokenizer),
            "audio": [] if data is None else [(name, _data_uri(data, path)) for name, path in _audio(row)],
        }
        for row in rows
    ]
    template = importlib.resources.files("usdm_sft.dataset_card") / "examples.html"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template.read_text(encoding="utf-8")).render(split=split, examples=examples)
    Path(html).expanduser().write_text(page, encoding="utf-8")
    return len(rows)


def _audio(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and path below the data folder of every audio of a row, in the order of the turns."""
    turn = row["turn"]
    several = isinstance(row["user_speaker"], list)
    speakers = (row["user_speaker"], row["agent_speaker"])
    for exchange in zip(*speakers, strict=True) if several else [speakers]:
        for role, speaker in zip(("user", "agent"), exchange, strict=True):
            utterance_id = f"{turn}_{speaker}_{row['dialog_id']}"
            yield f"{role}, turn {turn}", Utterance(utterance_id, row["dialog_id"], turn, speaker, "", "").audio_name
            turn += 1


def _data_uri(data: Path, name: str) -> str:
    path = data / name
    if len(Path(name).parts) != 2 or ".." in Path(name).parts or not path.is_file():  # rows may come from strangers
        raise FileNotFoundError(f"{path} is no recording: name the corpus that the folder was made from as data_dir")
    kind = mimetypes.guess_type(path.name)[0] or "audio/wav"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
