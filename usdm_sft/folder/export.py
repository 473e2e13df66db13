"""Export a dataset folder to the files that other trainers read.

Processes share out ranges of rows. Each range becomes a piece, the bytes of its rows, which the calling process adds to the output in
the order of the rows. So the bytes do not depend on the number of processes, and memory not on the number of rows.

A line of naver-ai/usdm's train_sft.py has `input_ids`, "|" and `labels`, each with spaces between the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from usdm_sft.corpus.features import arrow_schema, folder_features
from usdm_sft.folder.layout import UNFINISHED, data_files, read_counts
from usdm_sft.folder.rows import RowRange, check_num_proc, divide_files, map_ranges
from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.utils.files import remove_path, replace_path, sha256_file, write_then_replace


def format_lines(rows: pa.RecordBatch) -> list[bytes]:
    """Return the line of each row of a batch with `input_ids` and `labels`, without a newline."""
    ids, labels = (
        pc.binary_join(rows[name].cast(pa.list_(pa.string())), " ").cast(pa.binary())
        for name in ("input_ids", "labels")
    )
    lines: list[bytes] = pc.binary_join_element_wise(ids, labels, b"|").to_pylist()
    return lines


def parse_line(line: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The (num_tokens,) input_ids and labels of a line.

    Raises:
        ValueError: The line has another format.
        OverflowError: A number does not fit into int64.
    """
    input_ids, labels = (np.array(list(map(int, half.split())), dtype=np.int64) for half in line.split("|"))
    return input_ids, labels


Format = Literal["usdm", "arrow", "megatron"]

ARROW_COLUMNS = ["input_ids", "labels", "attention_mask"]  # LLaMA-Factory pads every column that it finds
_ARROW_LAST = "dataset_dict.json"
_ARROW_FILE = "data-00000-of-00001.arrow"
_ROW_GROUP = 500  # packs; Megatron-Bridge keeps one row group in memory
# The columns of the `GPTSFTPackedParquetDataset` of Megatron-Bridge: whole rows one after the other.
PACK = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.int8()), "seq_start_id": pa.list_(pa.int32())}
)
MASKED = pa.schema([PACK.field("input_ids"), PACK.field("loss_mask")])
_ROWS_PER_PROCESS = 100_000  # a process takes a few seconds to start, in which this one exports about as many rows


def export(
    dataset_dir: str | Path, output_dir: str | Path, *, format: Format = "usdm", num_proc: int | None = None
) -> dict[str, int]:
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
        num_proc: Largest number of processes. By default one per core that this process may use. A small folder needs none. The rows
            and their order do not depend on it.

    Returns:
        The number of rows of each split.

    Raises:
        FileNotFoundError: `dataset_dir` is not a finished dataset folder, or one of its files is missing.
        FileExistsError: The format is arrow, and `output_dir` is not empty.
        ValueError: The format is unknown, `num_proc` is not positive, or a file is damaged.
        RuntimeError: A process died.
    """
    writers = {"usdm": _export_text, "arrow": _export_arrow, "megatron": _export_megatron}
    if format not in writers:
        raise ValueError(f"format {format!r} is unknown: choose one of {', '.join(writers)}")
    check_num_proc(num_proc)
    counts = read_counts(dataset_dir)
    ranges = divide_files(data_files(dataset_dir, counts))
    make_pieces = partial(map_ranges, ranges=ranges, name="rows", num_proc=num_proc, rows_per_process=_ROWS_PER_PROCESS)
    writers[format](Path(output_dir).expanduser(), counts, make_pieces)
    return {split: sum(rows.num_rows for rows in ranges if rows.split == split) for split in counts["splits"]}


# Calls a function with each range of rows; yields the range and its piece, in the order of the rows.
_MakePieces = Callable[[Callable[[RowRange], Any]], Generator[tuple[RowRange, Any], None, None]]


def _export_text(folder: Path, counts: Mapping[str, Any], make_pieces: _MakePieces) -> None:
    """Write `<split>.txt` for each split, as the reference without a newline at the end."""
    with ExitStack() as stack:
        texts = {
            split: stack.enter_context(write_then_replace(folder / f"{split}.txt", "wb")) for split in counts["splits"]
        }
        for rows, lines in stack.enter_context(closing(make_pieces(_make_lines))):
            text = texts[rows.split]
            if rows.num_rows and text.tell():
                text.write(b"\n")
            text.write(lines)


def _make_lines(rows: RowRange) -> bytes:
    return b"\n".join(line for batch in rows.read(columns=["input_ids", "labels"]) for line in format_lines(batch))


def _export_arrow(folder: Path, counts: Mapping[str, Any], make_pieces: _MakePieces) -> None:
    """Save the splits as `DatasetDict.save_to_disk` does; a folder with dataset_dict.json and without `UNFINISHED` is complete."""
    unfinished, splits, schema = folder / UNFINISHED, list(counts["splits"]), _arrow_schema()
    targets = [folder / name for name in (_ARROW_LAST, *splits)]
    was_killed = unfinished.is_dir() and not unfinished.is_symlink()
    if folder.exists() and {*folder.iterdir()} - {unfinished, *(targets if was_killed else ())}:
        raise FileExistsError(f"{folder} is not empty: name another folder")
    _remove_all([*targets, unfinished])  # what a killed export moved into place, and what it left
    with ExitStack() as clean_up:
        clean_up.callback(_remove_all, [*targets, unfinished])  # after an error, and after Ctrl-C
        with ExitStack() as stack:
            streams = {}
            for split in splits:
                (unfinished / split).mkdir(parents=True)
                streams[split] = stack.enter_context(pa.ipc.new_stream(unfinished / split / _ARROW_FILE, schema))
            for rows, table in stack.enter_context(closing(make_pieces(_select_columns))):
                for batch in pa.ipc.open_stream(table):
                    streams[rows.split].write_batch(batch)
        for split in splits:
            _describe_split(unfinished / split, split, schema)
        (unfinished / _ARROW_LAST).write_text(json.dumps({"splits": splits}))
        for target in reversed(targets):
            replace_path(unfinished / target.name, target)
        clean_up.pop_all()
    remove_path(unfinished)


def _describe_split(folder: Path, split: str, schema: pa.Schema) -> None:
    """Write the files that datasets expects beside the rows of a saved split. Its own would have columns that datasets 3 cannot read."""
    info = json.loads(schema.metadata[b"huggingface"])["info"]
    state: dict[str, Any] = {
        "_data_files": [{"filename": _ARROW_FILE}],
        "_fingerprint": sha256_file(folder / _ARROW_FILE)[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def _remove_all(paths: Sequence[Path]) -> None:
    for path in paths:
        remove_path(path)


def _arrow_schema() -> pa.Schema:
    from datasets import Features

    features = folder_features(lists=False)
    return arrow_schema(Features({name: features[name] for name in ARROW_COLUMNS}))


def _select_columns(rows: RowRange) -> pa.Buffer:
    schema = _arrow_schema()
    batches = rows.read(columns=ARROW_COLUMNS)
    return _to_stream(schema, (pa.Table.from_batches([batch]).cast(schema) for batch in batches))


def _to_stream(schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for table in tables:
            stream.write_table(table)
    return sink.getvalue()


def _export_megatron(folder: Path, counts: Mapping[str, Any], make_pieces: _MakePieces) -> None:
    """Write packs. The processes check and mask the rows; this one packs them and encodes the Parquet files."""
    with ExitStack() as stack:
        writers = {}
        for split in counts["splits"]:
            file = stack.enter_context(write_then_replace(folder / f"{split}.idx.parquet", "wb"))
            writers[split] = stack.enter_context(pq.ParquetWriter(file, PACK))
        pieces = stack.enter_context(closing(make_pieces(_make_masks)))
        for split, of_split in groupby(pieces, key=lambda piece: piece[0].split):
            batches = (batch for _, table in of_split for batch in pa.ipc.open_stream(table))
            for packs in _pack(batches, counts["settings"]["max_length"]):
                writers[split].write_table(packs)


def _make_masks(rows: RowRange) -> pa.Buffer:
    batches = rows.read(columns=["id", "input_ids", "labels"])
    return _to_stream(MASKED, (pa.Table.from_batches([_mask_rows(batch, rows.path)]) for batch in batches))


def _mask_rows(rows: pa.RecordBatch, path: Path) -> pa.RecordBatch:
    """Replace the labels of rows by a mask, as the columns `MASKED`.

    `loss_mask` is shifted: it is 1 where the next token of the same row is labelled. The reader makes the labels from `input_ids`,
    and leaves out the last token of each row.

    Raises:
        ValueError: A label is neither the id of its token nor -100.
    """
    columns = (rows[name].to_numpy(zero_copy_only=False) for name in ("id", "input_ids", "labels"))
    for row_id, ids, labels in zip(*columns, strict=True):
        if len(ids) != len(labels) or ((labels != ids) & (labels != IGNORE_INDEX)).any():
            raise ValueError(
                f"{path}: the labels of {row_id} are not its input_ids or -100: run 'dailytalk-usdm verify'"
            )
    lengths = np.asarray(pc.list_value_length(rows["labels"]))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = np.append(np.asarray(pc.list_flatten(rows["labels"]))[1:] != IGNORE_INDEX, False)[: offsets[-1]]
    mask[offsets[1:][lengths > 0] - 1] = False
    flat = pc.list_flatten(rows["input_ids"]), pa.array(mask.astype(np.int8))
    return pa.RecordBatch.from_arrays([pa.ListArray.from_arrays(offsets, each) for each in flat], schema=MASKED)


def _pack(batches: Iterable[pa.RecordBatch], max_length: int) -> Iterator[pa.Table]:
    """Yield row groups of 500 packs, with one of them and one batch of rows in memory.

    A pack takes rows until the next one would not fit into `max_length` tokens. A longer row is alone.
    """
    rows: list[pa.RecordBatch] = []  # not yielded yet
    packs: list[int] = []  # their number of rows in each pack; the next row may join the last pack
    num_tokens = 0  # in the last pack
    for batch in batches:
        rows.append(batch)
        for length in pc.list_value_length(batch["input_ids"]).to_pylist():
            if packs and num_tokens + length <= max_length:
                packs[-1] += 1
                num_tokens += length
            else:
                packs.append(1)
                num_tokens = length
        while len(packs) > _ROW_GROUP:
            table, num_rows = pa.Table.from_batches(rows), sum(packs[:_ROW_GROUP])
            yield _join_rows(table.slice(0, num_rows), packs[:_ROW_GROUP])
            rows, packs = table.slice(num_rows).to_batches(), packs[_ROW_GROUP:]
    if packs:
        yield _join_rows(pa.Table.from_batches(rows), packs)


def _join_rows(table: pa.Table, packs: Sequence[int]) -> pa.Table:
    """Return the packs of rows with these numbers of rows, with the columns `PACK`."""
    rows = table.combine_chunks()
    lengths = np.asarray(pc.list_value_length(rows["input_ids"]))
    bounds = np.concatenate([[0], np.cumsum(packs)])  # of the packs, in rows
    starts = np.concatenate([[0], np.cumsum(lengths)])  # of the rows, in tokens
    offsets = pa.array(starts[bounds], pa.int32())
    columns = [pa.ListArray.from_arrays(offsets, pc.list_flatten(rows[name]).combine_chunks()) for name in MASKED.names]
    positions = starts[:-1] - np.repeat(starts[bounds[:-1]], packs)
    columns.append(pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(positions, pa.int32())))
    return pa.Table.from_arrays(columns, schema=PACK)
