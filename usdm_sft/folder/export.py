"""Export a dataset folder to the files that other trainers read.

Processes share out ranges of rows. Each range becomes a piece, a file in a hidden folder, which the calling process adds to the
output in the order of the rows and removes. So the bytes do not depend on the number of processes, and memory not on that of rows.

A line of naver-ai/usdm's train_sft.py has `input_ids`, "|" and `labels`, each with spaces between the numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from usdm_sft.corpus.features import arrow_schema, folder_features
from usdm_sft.folder.layout import UNFINISHED, data_files, read_counts
from usdm_sft.folder.packs import MASKED, PACK, PackWriter, mask_rows
from usdm_sft.folder.ranges import RowRange, count_processes, divide_rows
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
    return writers[format](Path(dataset_dir), Path(output_dir), num_proc=num_proc)


def export_text(dataset_dir: Path, text_dir: Path, *, num_proc: int | None = None) -> dict[str, int]:
    """Write `<split>.txt` for each split, as the reference without a newline at the end."""
    files = data_files(dataset_dir, read_counts(dataset_dir))
    num_lines = dict.fromkeys(files, 0)
    folder = text_dir / f"{UNFINISHED}-usdm"
    with ExitStack() as stack, _make_pieces(files, folder, _write_lines, num_proc) as pieces:
        texts = {split: stack.enter_context(write_then_replace(text_dir / f"{split}.txt", "wb")) for split in files}
        for split, path, num_rows in pieces:
            if num_lines[split] and num_rows:
                texts[split].write(b"\n")
            with open(path, "rb") as piece:
                shutil.copyfileobj(piece, texts[split])
            num_lines[split] += num_rows
    return num_lines


def _write_lines(rows: RowRange, file: IO[bytes]) -> int:
    num_rows = 0
    for batch in rows.read(columns=["input_ids", "labels"]):
        file.write(b"\n" if num_rows else b"")
        file.write(b"\n".join(format_lines(batch)))
        num_rows += len(batch)
    return num_rows


def _export_arrow(dataset_dir: Path, arrow_dir: Path, *, num_proc: int | None) -> dict[str, int]:
    """Save the splits as `DatasetDict.save_to_disk` does; a folder with dataset_dict.json and without `UNFINISHED` is complete."""
    files = data_files(dataset_dir, read_counts(dataset_dir))
    unfinished = arrow_dir / UNFINISHED
    targets = [arrow_dir / name for name in (_ARROW_LAST, *files)]
    was_killed = unfinished.is_dir() and not unfinished.is_symlink()
    if arrow_dir.exists() and {*arrow_dir.iterdir()} - {unfinished, *(targets if was_killed else ())}:
        raise FileExistsError(f"{arrow_dir} is not empty: name another folder")
    _remove_all(targets)  # what a killed export moved into place
    with _temporary(unfinished):
        saved, num_rows, schema = unfinished / "saved", dict.fromkeys(files, 0), _arrow_schema()
        for split in files:
            (saved / split).mkdir(parents=True)
        with ExitStack() as stack, _make_pieces(files, unfinished / "pieces", _write_columns, num_proc) as pieces:
            streams = {
                split: stack.enter_context(pa.ipc.new_stream(saved / split / _ARROW_FILE, schema)) for split in files
            }
            for split, path, number in pieces:
                for batch in _read_batches(path):
                    streams[split].write_batch(batch)
                num_rows[split] += number
        for split in files:
            _describe_split(saved / split, split, schema)
        (saved / _ARROW_LAST).write_text(json.dumps({"splits": list(files)}))
        try:
            for target in reversed(targets):
                replace_path(saved / target.name, target)
        except BaseException:  # Ctrl-C as well, or a part would look like a finished export; raised again
            _remove_all(targets)
            raise
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


def _write_columns(rows: RowRange, file: IO[bytes]) -> int:
    schema, num_rows = _arrow_schema(), 0
    with pa.ipc.new_stream(file, schema) as stream:
        for batch in rows.read(columns=ARROW_COLUMNS):
            stream.write_table(pa.Table.from_batches([batch]).cast(schema))
            num_rows += len(batch)
    return num_rows


def _export_megatron(dataset_dir: Path, parquet_dir: Path, *, num_proc: int | None) -> dict[str, int]:
    """Write packs. The processes check and mask the rows; this one packs them and encodes the Parquet files."""
    counts = read_counts(dataset_dir)
    files = data_files(dataset_dir, counts)
    num_rows = dict.fromkeys(files, 0)
    folder = parquet_dir / f"{UNFINISHED}-megatron"
    with ExitStack() as stack, _make_pieces(files, folder, _write_masks, num_proc) as pieces:
        packs = {}
        for split in files:
            file = stack.enter_context(write_then_replace(parquet_dir / f"{split}.idx.parquet", "wb"))
            writer = stack.enter_context(pq.ParquetWriter(file, PACK))
            packs[split] = PackWriter(writer, counts["settings"]["max_length"])
        for split, path, number in pieces:
            for batch in _read_batches(path):
                packs[split].add(batch)
            num_rows[split] += number
        for each in packs.values():
            each.finish()
    return num_rows


def _write_masks(rows: RowRange, file: IO[bytes]) -> int:
    num_rows = 0
    with pa.ipc.new_stream(file, MASKED) as stream:
        for batch in rows.read(columns=["id", "input_ids", "labels"]):
            stream.write_batch(mask_rows(batch, rows.path))
            num_rows += len(batch)
    return num_rows


def _read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
        yield from stream


@contextmanager
def _make_pieces(
    files: Mapping[str, Sequence[Path]],
    folder: Path,
    write: Callable[[RowRange, IO[bytes]], int],
    num_proc: int | None,
) -> Iterator[Iterator[tuple[str, Path, int]]]:
    """Let processes write a piece for each range of rows.

    Args:
        files: The Parquet files of each split.
        folder: The hidden folder of the pieces, which is removed at the end.
        write: Writes the piece of a range to a file and returns its number of rows.
        num_proc: Largest number of processes.

    Yields:
        The split, file and number of rows of each piece in order. A piece is removed when the next one is asked for.
    """
    ranges = [each for split, paths in files.items() for path in paths for each in divide_rows(path, split)]
    num_proc = count_processes(ranges, num_proc, _ROWS_PER_PROCESS)
    with _temporary(folder), ProcessPool(num_proc) as pool:
        yield _iter_pieces(pool, write, [(folder / str(index), each) for index, each in enumerate(ranges)])


def _iter_pieces(
    pool: ProcessPool, write: Callable[[RowRange, IO[bytes]], int], pieces: Sequence[tuple[Path, RowRange]]
) -> Iterator[tuple[str, Path, int]]:
    for index, num_rows in in_order(pool.map(partial(_write_piece, write), pieces, name="rows")):
        path, rows = pieces[index]
        yield rows.split, path, num_rows
        path.unlink()


def _write_piece(write: Callable[[RowRange, IO[bytes]], int], piece: tuple[Path, RowRange]) -> int:
    path, rows = piece
    with open(path, "wb") as file:
        return write(rows, file)


@contextmanager
def _temporary(folder: Path) -> Iterator[None]:
    """Make a folder, in place of one that a killed run left, and remove it at the end."""
    remove_path(folder)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder)
