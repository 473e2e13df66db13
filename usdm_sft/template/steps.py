"""The steps in which a trained model answers: the ids that each may generate, the id that ends it, and the ids that follow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tokenizers import Tokenizer

from usdm_sft.template.config import Template
from usdm_sft.template.tokenizer import CONTINUE, CORRESPOND, NEWLINE, SPACE, UNIT_0
from usdm_sft.template.tokens import TemplateTokens

NAMES = {"user_text": "transcript", "agent_text": "answer", "agent_units": "speech"}

# "### Agent\n" after a newline, in the reference's template.
AGENT_IDS = (27332, 23393, NEWLINE)


class Step(NamedTuple):
    """One step of inference."""

    name: str
    stop_id: int  # ends the step; labelled in training
    blocked: tuple[
        tuple[int, int | None], ...
    ]  # ranges of ids that may not be generated: start and stop, None for no end
    following: tuple[int, ...] = ()  # ids between the stop token and the next step


# The steps of the inference in naver-ai/usdm.
STEPS = (
    Step("transcript", NEWLINE, ((CONTINUE, None),), AGENT_IDS),
    Step("answer", CORRESPOND, ((UNIT_0, None),)),
    Step("speech", SPACE, ((0, SPACE), (SPACE + 1, UNIT_0))),
)


def make_steps(
    tokenizer: Tokenizer, tokens: TemplateTokens, template: Template, agent_heading: tuple[int, ...]
) -> tuple[Step, ...]:
    """Make a step for each part of the template but the first, which is given.

    Args:
        tokenizer: The tokenizer of the ids.
        tokens: Its ids of the template.
        template: Its parts and the form of tokenization.
        agent_heading: The ids of the agent's heading.
    """
    steps = []
    for part in template.parts[1:]:
        if part == "agent_units":
            stop_id = tokens.end_of_units[0]
        else:
            units = f"{part.removesuffix('_text')}_units"
            stop_id = tokens.correspond if part == "agent_text" and units in template.parts else tokens.newline
        following = agent_heading if part == "user_text" and part != template.parts[-1] else ()
        steps.append(Step(NAMES[part], stop_id, _block(tokenizer, tokens, template, part, stop_id), following))
    return tuple(steps)


def _block(
    tokenizer: Tokenizer, tokens: TemplateTokens, template: Template, part: str, stop_id: int
) -> tuple[tuple[int, int | None], ...]:
    """The ids that the step of a part may not generate."""
    if template.tokenization == "reference":
        # As in the reference: a text may be anything before the ids of the tokens that its step must not generate.
        if part == "agent_units":
            return ((0, stop_id), (stop_id + 1, tokens.unit_0))
        return ((tokens.unit_0 if stop_id == tokens.correspond else tokens.correspond - 1, None),)
    size = tokenizer.get_vocab_size()
    if part == "agent_units":
        allowed = range(tokens.unit_0, tokens.unit_0 + tokens.num_units)
        blocked: Iterable[int] = (token_id for token_id in range(size) if token_id not in allowed)
    else:
        blocked = _not_text(tokenizer)
    return (*_ranges(sorted({*blocked} - {stop_id})), (size, None))


def _not_text(tokenizer: Tokenizer) -> set[int]:
    """The ids that a line of text cannot have: added tokens and tokens that contain a newline."""
    added = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.content.strip("▁ ")}
    broken = {i for token, i in tokenizer.get_vocab().items() if any(each in token for each in ("\n", "Ċ", "<0x0A>"))}
    return added | broken


def _ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Ranges of neighbouring ids; [1, 2, 5] -> [(1, 3), (5, 6)]."""
    ranges: list[tuple[int, int]] = []
    for token_id in ids:
        if ranges and ranges[-1][1] == token_id:
            ranges[-1] = (ranges[-1][0], token_id + 1)
        else:
            ranges.append((token_id, token_id + 1))
    return ranges
