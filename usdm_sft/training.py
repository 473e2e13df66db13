"""Help for training loops: collators, labels for trainers that do not shift them, and generation stage by stage.

A row of a dataset folder also has texts and units. A trainer that does not drop these columns (`remove_unused_columns=False`, a
plain DataLoader) would fail at the first string, so the collators of transformers are given `input_ids` and `labels` alone.

A trained model answers in stages, such as transcript, answer and speech. `TemplateEncoder.steps` are the stages of a template,
`REFERENCE_STAGES` those of the reference. `TemplateEncoder.prompt` makes the prompt of a stage from texts, `next_prompt` from the ids that the stage
before generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, LogitsProcessor, PreTrainedTokenizerBase

from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.template.parts import REFERENCE_STAGES as REFERENCE_STAGES
from usdm_sft.template.parts import AnswerStage as AnswerStage


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


STEPS = REFERENCE_STAGES  # the former names, for one version
Step = AnswerStage


def next_prompt(step: AnswerStage, prompt: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """Return the prompt of the next stage, (1, num_tokens). It is built from ids; no generated text is tokenized again.

    The reference omits the agent's heading after an empty transcript. Here the heading is always present, as in training.

    Args:
        step: The stage that was generated.
        prompt: (1, num_tokens), the prompt of `step`.
        generated: (num_new_tokens,), the ids that `step` generated. If a length limit cut off the stop id, it is added.
    """
    if len(generated) == 0 or generated[-1] != step.stop_id:
        generated = torch.cat([generated, generated.new_tensor([step.stop_id])])
    following = generated.new_tensor(step.following)
    return torch.cat([prompt, generated[None], following[None]], dim=1)


class StepLogitsProcessor(LogitsProcessor):
    """Limits generation to the ids of a stage: `generate(..., logits_processor=[StepLogitsProcessor(step)])`.

    Args:
        step: One of `TemplateEncoder.steps`. Pass its `stop_id` as `eos_token_id`.
    """

    def __init__(self, step: AnswerStage):
        self.step = step
        self._blocked = torch.zeros(0, dtype=torch.bool)  # one value per id, made at the first call

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        if self._blocked.shape != scores.shape[-1:] or self._blocked.device != scores.device:
            blocked = torch.zeros(scores.shape[-1], dtype=torch.bool)
            for start, stop in self.step.blocked:
                blocked[start:stop] = True
            self._blocked = blocked.to(scores.device)
        return scores.masked_fill(self._blocked, -float("inf"))
