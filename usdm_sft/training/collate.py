"""Batches for training: the library's own collators, given only what they can take.

A row also holds texts and units; a trainer that does not drop them (`remove_unused_columns=False`, a plain DataLoader) would stop
at the first string. Both collators pass on `input_ids` and `labels` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from usdm_sft.template.encoder import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
    missing = [name for name in ("input_ids", "labels") if name not in rows[0]]
    if missing:
        raise ValueError(f"rows hold no {missing[0]}: map TemplateEncoder over the dataset first")
    return [{name: [int(i) for i in row[name]] for name in ("input_ids", "labels")} for row in rows]


class PaddingCollator:
    """Rows side by side, padded on the right.

    Args:
        tokenizer: What `load_tokenizer` gives; its pad id fills `input_ids`, -100 fills `labels`.
        pad_to_multiple_of: Round the length up, as tensor cores like it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None):
        from transformers import DataCollatorForSeq2Seq

        self._collate = DataCollatorForSeq2Seq(
            tokenizer, label_pad_token_id=IGNORE_INDEX, pad_to_multiple_of=pad_to_multiple_of
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """-> `input_ids`, `attention_mask`, `labels`: (num_rows, longest) int64."""
        return dict(self._collate(_columns(rows)))


class PaddingFreeCollator:
    """Rows one after the other in one long row, each with positions of its own.

    With FlashAttention the boundaries come from `return_flash_attn_kwargs`. With sdpa and eager attention transformers reads them
    from `position_ids`, but only while no cache is in use; otherwise rows attend to each other, silently. So the batch says
    `use_cache=False` itself.

    Args:
        return_flash_attn_kwargs: Add `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`.
    """

    def __init__(self, return_flash_attn_kwargs: bool = False):
        from transformers import DataCollatorWithFlattening

        self._collate = DataCollatorWithFlattening(return_flash_attn_kwargs=return_flash_attn_kwargs)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """-> `input_ids`, `labels`, `position_ids`: (1, num_tokens) int64, and `use_cache`."""
        return dict(self._collate(_columns(rows))) | {"use_cache": False}
