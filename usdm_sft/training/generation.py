"""Generate the steps in which a trained model answers, such as transcript, answer and speech.

`TemplateEncoder.steps` are the steps of a template, `STEPS` those of the reference. `TemplateEncoder.prompt` makes the prompt of a step
from texts, `next_prompt` from the ids that the step before generated.
"""

from __future__ import annotations

import torch
from transformers import LogitsProcessor

from usdm_sft.template.steps import STEPS, Step

__all__ = ["STEPS", "Step", "StepLogitsProcessor", "next_prompt"]


def next_prompt(step: Step, prompt: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """Return the prompt of the next step, (1, num_tokens). It is built from ids; no generated text is tokenized again.

    The reference omits the agent's heading after an empty transcript. Here the heading is always present, as in training.

    Args:
        step: The step that was generated.
        prompt: (1, num_tokens), the prompt of `step`.
        generated: (num_new_tokens,), the ids that `step` generated. If a length limit cut off the stop id, it is added.
    """
    if len(generated) == 0 or generated[-1] != step.stop_id:
        generated = torch.cat([generated, generated.new_tensor([step.stop_id])])
    following = generated.new_tensor(step.following)
    return torch.cat([prompt, generated[None], following[None]], dim=1)


class StepLogitsProcessor(LogitsProcessor):
    """Limits generation to the ids of a step: `generate(..., logits_processor=[StepLogitsProcessor(step)])`.

    Args:
        step: One of `TemplateEncoder.steps`. Pass its `stop_id` as `eos_token_id`.
    """

    def __init__(self, step: Step):
        self.step = step
        self._blocked = torch.zeros(0, dtype=torch.bool)  # one value per id, made at the first call

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        if self._blocked.shape != scores.shape[-1:] or self._blocked.device != scores.device:
            blocked = torch.zeros(scores.shape[-1], dtype=torch.bool)
            for start, stop in self.step.blocked:
                blocked[start:stop] = True
            self._blocked = blocked.to(scores.device)
        return scores.masked_fill(self._blocked, -float("inf"))
