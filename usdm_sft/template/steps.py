"""The steps in which a trained model answers: the ids that each may generate, the id that ends it, and the ids that follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tokenizers import Tokenizer

from usdm_sft.template.config import REFERENCE, Template
from usdm_sft.template.special_tokens import BYTE_NEWLINE, TemplateTokens
from usdm_sft.template.tokenizer import ustm_tokens

NAMES = {"user_text": "transcript", "agent_text": "answer", "agent_units": "speech"}


class Step(NamedTuple):
    """One step of inference.

    Attributes:
        name: transcript, answer or speech.
        stop_id: The id that ends the step; it is labelled in training.
        blocked: Ranges of ids that may not be generated: start and stop, None for no end.
        following: The ids between the stop id and the next step.
    """

    name: str
    stop_id: int
    blocked: tuple[tuple[int, int | None], ...]
    following: tuple[int, ...] = ()


def make_steps(
    tokens: TemplateTokens,
    template: Template,
    agent_heading: tuple[int, ...],
    tokenizer: Tokenizer | None = None,
    stop_ids: Mapping[str, int] | None = None,
) -> tuple[Step, ...]:
    """Make a step for each part of the template but the first, which is given.

    Args:
        tokens: The ids of the template.
        template: Its parts and the form of tokenization.
        agent_heading: The ids of the agent's heading.
        tokenizer: The tokenizer of the ids; the reference's form needs none.
        stop_ids: The id after each part; by default as under headings. In a chat template, no ids are between two parts.
    """
    steps = []
    for part in template.parts[1:]:
        stop_id = _stop_id(part, tokens, template) if stop_ids is None else stop_ids[part]
        if tokenizer is None or template.tokenization == "reference":
            blocked = _block_as_reference(part, stop_id, tokens)
        else:
            blocked = _block(part, stop_id, tokens, tokenizer)
        following = agent_heading if part == "user_text" and part != template.parts[-1] else ()
        steps.append(Step(NAMES[part], stop_id, blocked, following))
    return tuple(steps)


def _stop_id(part: str, tokens: TemplateTokens, template: Template) -> int:
    if part == "agent_units":
        return tokens.end_of_units[0]
    is_spoken = part == "agent_text" and "agent_units" in template.parts
    return tokens.correspond if is_spoken else tokens.newline


def _block_as_reference(part: str, stop_id: int, tokens: TemplateTokens) -> tuple[tuple[int, int | None], ...]:
    """What the inference of naver-ai/usdm blocks: units, and in a transcript the tokens between texts and units as well."""
    if part == "agent_units":
        return ((0, stop_id), (stop_id + 1, tokens.unit_0))
    return ((tokens.unit_0 if stop_id == tokens.correspond else tokens.continue_, None),)


def _block(part: str, stop_id: int, tokens: TemplateTokens, tokenizer: Tokenizer) -> tuple[tuple[int, int | None], ...]:
    """Every id that training does not teach in the part, and those that the tokenizer does not have."""
    size = tokenizer.get_vocab_size()
    if part == "agent_units":
        units = range(tokens.unit_0, tokens.unit_0 + tokens.num_units)
        blocked = {token_id for token_id in range(size) if token_id not in units}
    else:
        blocked = _not_text(tokenizer, tokens)
    return (*_ranges(sorted(blocked - {stop_id})), (size, None))


def _not_text(tokenizer: Tokenizer, tokens: TemplateTokens) -> set[int]:
    """The ids that a line of text cannot have: added tokens and tokens that contain a newline."""
    added = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.content.strip("▁ ")}
    newline = tokenizer.id_to_token(tokens.newline)
    assert newline is not None  # read from the tokenizer
    broken = {i for token, i in tokenizer.get_vocab().items() if newline in token or token == BYTE_NEWLINE}
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


_USTM = ustm_tokens()
# "### Agent\n" after a newline, in USTM's tokenizer.
_AGENT_HEADING = (27332, 23393, _USTM.newline)

# The steps of the inference in naver-ai/usdm.
STEPS = make_steps(_USTM, REFERENCE, _AGENT_HEADING)
