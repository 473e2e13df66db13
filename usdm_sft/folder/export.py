"""Export a dataset folder to the files that other trainers read.

Processes share out ranges of rows. Each range becomes a piece, the bytes of its rows, which the calling process adds to the output in
the order of the rows. So the bytes do not depend on the number of processes, and memory not on the number of rows.

A line of naver-ai/usdm's train_sft.py has `input_ids`, "|" and `labels`, each with spaces between the numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from usdm_sft.corpus.features import arrow_schema, folder_features
from usdm_sft.folder.layout import UNFINISHED, data_files, read_counts
from usdm_sft.folder.rows import RowRange, check_num_proc, count_processes, divide_rows
from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.utils.files import remove_path, replace_path, sha256_file, write_then_replace
from usdm_sft.utils.processes import ProcessPool, in_order


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
    writers = {"usdm": export_text, "arrow": _export_arrow, "megatron": _export_megatron}
    if format not in writers:
        raise ValueError(f"format {format!r} is unknown: choose one of {', '.join(writers)}")
    check_num_proc(num_proc)
    return writers[format](Path(dataset_dir), Path(output_dir), num_proc=num_proc)


def export_text(dataset_dir: Path, text_dir: Path, *, num_proc: int | None = None) -> dict[str, int]:
    """Write `<split>.txt` for each split, as the reference without a newline at the end."""
    files = data_files(dataset_dir, read_counts(dataset_dir))
    num_lines = dict.fromkeys(files, 0)
    text_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        texts = {split: stack.enter_context(write_then_replace(text_dir / f"{split}.txt", "wb")) for split in files}
        pieces = stack.enter_context(closing(_make_pieces(files, _make_lines, num_proc)))
        for rows, piece in pieces:
            if num_lines[rows.split] and rows.num_rows:
                texts[rows.split].write(b"\n")
            texts[rows.split].write(piece)
            num_lines[rows.split] += rows.num_rows
    return num_lines


def _make_lines(rows: RowRange) -> bytes:
    return b"\n".join(line for batch in rows.read(columns=["input_ids", "labels"]) for line in format_lines(batch))


def _export_arrow(dataset_dir: Path, arrow_dir: Path, *, num_proc: int | None) -> dict[str, int]:
    """Save the splits as `DatasetDict.save_to_disk` does; a folder with dataset_dict.json and without `UNFINISHED` is complete."""
    files = data_files(dataset_dir, read_counts(dataset_dir))
    unfinished = arrow_dir / UNFINISHED
    targets = [arrow_dir / name for name in (_ARROW_LAST, *files)]
    was_killed = unfinished.is_dir() and not unfinished.is_symlink()
    if arrow_dir.exists() and {*arrow_dir.iterdir()} - {unfinished, *(targets if was_killed else ())}:
        raise FileExistsError(f"{arrow_dir} is not empty: name another folder")
    _remove_all([*targets, unfinished])  # what a killed export moved into place, and what it left
    unfinished.mkdir(parents=True)
    try:
        saved, num_rows, schema = unfinished / "saved", dict.fromkeys(files, 0), _arrow_schema()
        for split in files:
            (saved / split).mkdir(parents=True)
        with ExitStack() as stack:
            streams = {
                split: stack.enter_context(pa.ipc.new_stream(saved / split / _ARROW_FILE, schema)) for split in files
            }
            pieces = stack.enter_context(closing(_make_pieces(files, _select_columns, num_proc)))
            for rows, piece in pieces:
                for batch in pa.ipc.open_stream(piece):
                    streams[rows.split].write_batch(batch)
                num_rows[rows.split] += rows.num_rows
        for split in files:
            _describe_split(saved / split, split, schema)
        (saved / _ARROW_LAST).write_text(json.dumps({"splits": list(files)}))
        try:
            for target in reversed(targets):
                replace_path(saved / target.name, target)
        except BaseException:  # Ctrl-C as well, or a part would look like a finished export; raised again
            _remove_all(targets)
            raise
    finally:
        shutil.rmtree(unfinished)
    return num_rows


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


def _export_megatron(dataset_dir: Path, parquet_dir: Path, *, num_proc: int | None) -> dict[str, int]:
    """Write packs. The processes check and mask the rows; this one packs them and encodes the Parquet files."""
    counts = read_counts(dataset_dir)
    files = data_files(dataset_dir, counts)
    num_rows = dict.fromkeys(files, 0)
    parquet_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        packs = {}
        for split in files:
            file = stack.enter_context(write_then_replace(parquet_dir / f"{split}.idx.parquet", "wb"))
            writer = stack.enter_context(pq.ParquetWriter(file, PACK))
            packs[split] = PackWriter(writer, counts["settings"]["max_length"])
        pieces = stack.enter_context(closing(_make_pieces(files, _make_masks, num_proc)))
        for rows, piece in pieces:
            for batch in pa.ipc.open_stream(piece):
                packs[rows.split].add(batch)
            num_rows[rows.split] += rows.num_rows
        for each in packs.values():
            each.finish()
    return num_rows


def _make_masks(rows: RowRange) -> pa.Buffer:
    batches = rows.read(columns=["id", "input_ids", "labels"])
    return _to_stream(MASKED, (pa.Table.from_batches([mask_rows(batch, rows.path)]) for batch in batches))


def _to_stream(schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for table in tables:
            stream.write_table(table)
    return sink.getvalue()


def _make_pieces(
    files: Mapping[str, Sequence[Path]], make: Callable[[RowRange], Any], num_proc: int | None
) -> Generator[tuple[RowRange, Any], None, None]:
    """Let processes make the piece of each range of rows; yields both, in the order of the rows."""
    ranges = [each for split, paths in files.items() for path in paths for each in divide_rows(path, split)]
    with ProcessPool(count_processes(ranges, num_proc, _ROWS_PER_PROCESS)) as pool:
        for index, piece in in_order(pool.map(make, ranges, name="rows")):
            yield ranges[index], piece


def mask_rows(rows: pa.RecordBatch, path: Path) -> pa.RecordBatch:
    """Replace the labels of rows by a mask.

    `loss_mask` is shifted: it is 1 where the next token of the same row is labelled. The reader makes the labels from `input_ids`,
    and leaves out the last token of each row.

    Args:
        rows: A batch with `id`, `input_ids` and `labels`.
        path: Its file, for the error.

    Returns:
        A batch with the columns `MASKED`.

    Raises:
        ValueError: A label is neither the id of its token nor -100.
    """
    if (position := _find_wrong_labels(rows)) is not None:
        raise ValueError(
            f"{path}: the labels of {rows['id'][position]} are not its input_ids or -100: run 'dailytalk-usdm verify'"
        )
    lengths = np.asarray(pc.list_value_length(rows["labels"]))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = np.append(np.asarray(pc.list_flatten(rows["labels"]))[1:] != IGNORE_INDEX, False)[: offsets[-1]]
    mask[offsets[1:][lengths > 0] - 1] = False
    flat = pc.list_flatten(rows["input_ids"]), pa.array(mask.astype(np.int8))
    return pa.RecordBatch.from_arrays([pa.ListArray.from_arrays(offsets, each) for each in flat], schema=MASKED)


def _find_wrong_labels(rows: pa.RecordBatch) -> int | None:
    """Return the first row whose labels are not its ids or -100, or None."""
    ids, labels = rows["input_ids"], rows["labels"]
    uneven = np.flatnonzero(np.asarray(pc.list_value_length(ids)) != np.asarray(pc.list_value_length(labels)))
    num_even = int(uneven[0]) if uneven.size else len(rows)
    flat_ids, flat_labels = (np.asarray(pc.list_flatten(each[:num_even])) for each in (ids, labels))
    wrong = np.flatnonzero((flat_labels != flat_ids) & (flat_labels != IGNORE_INDEX))
    if wrong.size:
        return int(pc.list_parent_indices(labels[:num_even])[int(wrong[0])].as_py())
    return num_even if uneven.size else None


class PackWriter:
    """Writes packs in row groups of 500.

    A pack takes rows until the next one would not fit into `max_length` tokens. One row group and one batch of rows are in memory.

    Args:
        writer: Writes a file with the columns `PACK`.
        max_length: Largest number of tokens in a pack; a longer row is alone.
    """

    def __init__(self, writer: pq.ParquetWriter, max_length: int):
        self._writer, self._max_length = writer, max_length
        self._rows: list[pa.RecordBatch] = []  # not written yet
        # The number of rows of each pack that is not written; the next row may join the last.
        self._packs: list[int] = []
        self._num_tokens = 0  # in the last pack

    def add(self, rows: pa.RecordBatch) -> None:
        """Add rows with the columns `MASKED`."""
        self._rows.append(rows)
        for length in pc.list_value_length(rows["input_ids"]).to_pylist():
            if self._packs and self._num_tokens + length <= self._max_length:
                self._packs[-1] += 1
                self._num_tokens += length
            else:
                self._packs.append(1)
                self._num_tokens = length
        while len(self._packs) > _ROW_GROUP:
            self._write(_ROW_GROUP)

    def finish(self) -> None:
        """Write the last packs."""
        if self._packs:
            self._write(len(self._packs))

    def _write(self, num_packs: int) -> None:
        packs, self._packs = self._packs[:num_packs], self._packs[num_packs:]
        table, num_rows = pa.Table.from_batches(self._rows), sum(packs)
        self._rows = table.slice(num_rows).to_batches()
        rows = table.slice(0, num_rows).combine_chunks()
        lengths = np.asarray(pc.list_value_length(rows["input_ids"]))
        bounds = np.concatenate([[0], np.cumsum(packs)])  # of the packs, in rows
        starts = np.concatenate([[0], np.cumsum(lengths)])  # of the rows, in tokens
        offsets = pa.array(starts[bounds], pa.int32())
        columns = [
            pa.ListArray.from_arrays(offsets, pc.list_flatten(rows[name]).combine_chunks()) for name in MASKED.names
        ]
        positions = starts[:-1] - np.repeat(starts[bounds[:-1]], packs)
        columns.append(pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(positions, pa.int32())))
        self._writer.write_table(pa.Table.from_arrays(columns, schema=PACK))
