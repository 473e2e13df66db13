"""Rows packed for Megatron-Bridge: whole rows one after the other, with the columns of its `GPTSFTPackedParquetDataset`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from usdm_sft.template.encoder import IGNORE_INDEX

_ROW_GROUP = 500  # packs; Megatron-Bridge keeps one row group in memory
PACK = pa.schema(
    {"input_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.int8()), "seq_start_id": pa.list_(pa.int32())}
)
MASKED = pa.schema([PACK.field("input_ids"), PACK.field("loss_mask")])


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
