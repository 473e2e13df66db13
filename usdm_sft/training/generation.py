"""The three steps in which a USDM model answers: the ids that each may generate, and the id that ends it.

The steps are those of the inference in naver-ai/usdm. `TemplateEncoder.prompt` makes the prompt of a step from texts, `next_prompt`
from the ids that the step before generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

from usdm_sft.template.tokenizer import CONTINUE, CORRESPOND, NEWLINE, SPACE, UNIT_0

# "### Agent\n" after a newline, in the reference's template.
AGENT_IDS = (27332, 23393, NEWLINE)


class Step(NamedTuple):
    """One step of inference."""

    name: str
    stop_id: int  # ends the step; labelled in training
    blocked: tuple[
        tuple[int, int | None], ...
    ]  # ranges of ids that may not be generated: start and stop, None for no end


STEPS = (
    Step("transcript", NEWLINE, ((CONTINUE, None),)),
    Step("answer", CORRESPOND, ((UNIT_0, None),)),
    Step("speech", SPACE, ((0, SPACE), (SPACE + 1, UNIT_0))),
)


def next_prompt(
    step: Step, prompt: torch.Tensor, generated: torch.Tensor, *, agent_heading_ids: Sequence[int] = AGENT_IDS
) -> torch.Tensor:
    """Return the prompt of the next step, (1, num_tokens). It is built from ids; no generated text is tokenized again.

    The reference omits the agent's heading after an empty transcript. Here the heading is always present, as in training.

    Args:
        step: The step that was generated.
        prompt: (1, num_tokens), the prompt of `step`.
        generated: (num_new_tokens,), the ids that `step` generated. If a length limit cut off the stop id, it is added.
        agent_heading_ids: `TemplateEncoder.agent_heading_ids`, needed if the template has another name for the agent.
    """
    if len(generated) == 0 or generated[-1] != step.stop_id:
        generated = torch.cat([generated, generated.new_tensor([step.stop_id])])
    between = generated.new_tensor(agent_heading_ids if step.stop_id == NEWLINE else ())
    return torch.cat([prompt, generated[None], between[None]], dim=1)


class StepLogitsProcessor(LogitsProcessor):
    """Limits generation to the ids of a step: `generate(..., logits_processor=[StepLogitsProcessor(step)])`.

    Args:
        step: One of `STEPS`. Pass its `stop_id` as `eos_token_id`.
    """

    def __init__(self, step: Step):
        self.step = step

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        limited = torch.clone(scores)
        for start, stop in self.step.blocked:
            limited[:, start:stop] = -float("inf")
        return limited
