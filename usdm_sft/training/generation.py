"""The three steps in which a USDM model answers: which ids each may generate, and at which it stops.

`TemplateEncoder.prompt` gives the ids that go before each step, from texts; `next_prompt` from what was generated. (naver-ai/usdm,
inference.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

from usdm_sft.template.tokenizer import CONTINUE, CORRESPOND, NEWLINE, SPACE, UNIT_0

AGENT_IDS = (27332, 23393, NEWLINE)  # "### Agent" and its newline, after a newline: the reference's template


class Step(NamedTuple):
    """One step of inference."""

    name: str
    stop_id: int  # generated last, and part of the labels in training
    blocked: tuple[
        tuple[int, int | None], ...
    ]  # ranges of ids that may not be generated: from, up to (None: all further)


STEPS = (
    Step("transcript", NEWLINE, ((CONTINUE, None),)),
    Step("answer", CORRESPOND, ((UNIT_0, None),)),
    Step("speech", SPACE, ((0, SPACE), (SPACE + 1, UNIT_0))),
)


def next_prompt(
    step: Step, prompt: torch.Tensor, generated: torch.Tensor, *, agent_heading_ids: Sequence[int] = AGENT_IDS
) -> torch.Tensor:
    """The prompt of the step after `step`, from ids alone: nothing that was generated is tokenized again.

    The reference leaves the agent's heading out where the transcript came out empty; here it is always there, as in training.

    Args:
        step: The step that was generated.
        prompt: (1, num_tokens), its prompt.
        generated: (num_new_tokens,), what came out; the stop id is added where the length limit cut it off.
        agent_heading_ids: `TemplateEncoder.agent_heading_ids`, where the template has another name for the agent.
    """
    if len(generated) == 0 or generated[-1] != step.stop_id:
        generated = torch.cat([generated, generated.new_tensor([step.stop_id])])
    between = generated.new_tensor(agent_heading_ids if step.stop_id == NEWLINE else ())
    return torch.cat([prompt, generated[None], between[None]], dim=1)


class StepLogitsProcessor(LogitsProcessor):
    """Keeps generation to the ids of a step: `generate(..., logits_processor=[StepLogitsProcessor(step)])`.

    Args:
        step: One of `STEPS`; pass its `stop_id` as `eos_token_id`.
    """

    def __init__(self, step: Step):
        self.step = step

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        for start, stop in self.step.blocked:
            scores[:, start:stop] = -float("inf")
        return scores
