"""The line format of naver-ai/usdm's train_sft.py: `input_ids`, "|" and `labels`, each with spaces between the numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def format_line(input_ids: Iterable[int], labels: Iterable[int]) -> str:
    """The line of a row, without a newline."""
    return f"{' '.join(map(str, input_ids))}|{' '.join(map(str, labels))}"


def parse_line(line: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The (num_tokens,) input_ids and labels of a line.

    Raises:
        ValueError: The line has another format.
        OverflowError: A number does not fit into int64.
    """
    input_ids, labels = (np.array(list(map(int, half.split())), dtype=np.int64) for half in line.split("|"))
    return input_ids, labels
