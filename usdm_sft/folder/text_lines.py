"""The line format of naver-ai/usdm's train_sft.py: `input_ids`, "|" and `labels`, each with spaces between the numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


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
