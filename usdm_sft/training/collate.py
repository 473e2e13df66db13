"""Batches for training: the collators of transformers, given `input_ids` and `labels` alone.

A row also has texts and units. A trainer that does not drop these columns (`remove_unused_columns=False`, a plain DataLoader)
would fail at the first string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerBase

from usdm_sft.template.encoder import IGNORE_INDEX


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
    missing = [name for name in ("input_ids", "labels") if name not in rows[0]]
    if missing:
        raise ValueError(f"the rows have no {missing[0]}: map TemplateEncoder over the dataset first")
    return [{name: [int(i) for i in row[name]] for name in ("input_ids", "labels")} for row in rows]


class PaddingCollator:
    """Pads the rows of a batch on the right.

    Args:
        tokenizer: The tokenizer that `load_tokenizer` returns. Its pad id fills `input_ids`; -100 fills `labels`.
        pad_to_multiple_of: Round the length up to a multiple, which is faster on tensor cores.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None):
        self._collate = DataCollatorForSeq2Seq(
            tokenizer, label_pad_token_id=IGNORE_INDEX, pad_to_multiple_of=pad_to_multiple_of
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, (num_rows, longest) int64 each."""
        return dict(self._collate(_columns(rows)))


class PaddingFreeCollator:
    """Joins the rows of a batch into one long row, in which the positions of each row start at 0.

    With FlashAttention, `return_flash_attn_kwargs` gives the boundaries of the rows. With sdpa and eager attention, transformers
    finds the boundaries in `position_ids`, but only without a cache; with a cache, rows silently attend to each other.
    Therefore the batch sets `use_cache` to false. It is a tensor, because accelerate concatenates nothing else if one process reads
    for all (`dispatch_batches`); such batches must be of one length.

    Args:
        return_flash_attn_kwargs: Add `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`.
    """

    def __init__(self, return_flash_attn_kwargs: bool = False):
        self._collate = DataCollatorWithFlattening(  # type: ignore[no-untyped-call]  # transformers
            return_flash_attn_kwargs=return_flash_attn_kwargs
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `input_ids`, `labels` and `position_ids`, (1, num_tokens) int64 each, and `use_cache`, (1,) bool."""
        return dict(self._collate(_columns(rows))) | {"use_cache": torch.zeros(1, dtype=torch.bool)}
