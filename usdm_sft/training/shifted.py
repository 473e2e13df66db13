"""Shifted labels, for trainers that compare the output after each token with the label at the same position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from usdm_sft.template.encoder import IGNORE_INDEX


class ShiftedLabels:
    """Moves `labels` one position to the left. A batched `.map` callable for `Dataset` and `IterableDataset`.

    The models of transformers shift labels themselves. A trainer that does not would learn to repeat its input::

        input_ids   1   20811   5081   2
        labels   -100    -100   5081   -100
        shifted  -100    5081   -100   -100    the target after each token

    The last position has no target. No label is lost, because a row begins with BOS, which is never labelled.
    """

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[npt.NDArray[np.int32]]]:
        """Shift the labels of a batch of rows.

        Args:
            batch: Columns `input_ids` and `labels` of a dataset folder or of `TemplateEncoder`.

        Returns:
            `labels`, one (num_tokens,) int32 array per row.

        Raises:
            ValueError: A label differs from the id at its position, so the labels are shifted already; or the first token is
                labelled.
        """
        shifted = []
        for ids, labels in zip(map(np.asarray, batch["input_ids"]), map(np.asarray, batch["labels"]), strict=True):
            if ids.shape != labels.shape or ((labels != ids) & (labels != IGNORE_INDEX)).any():
                raise ValueError("the labels are not those of input_ids, or are shifted already: shift them once")
            if labels[:1] != IGNORE_INDEX:
                raise ValueError(f"the first token has the label {labels[0]}, which no model can learn: set it to -100")
            shifted.append(np.append(labels[1:], IGNORE_INDEX).astype(np.int32))
        return {"labels": shifted}
