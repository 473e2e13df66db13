"""The part of the template that each token of a row belongs to, and the stages in which a trained model generates the parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from usdm_sft.template.chat import ChatIds, lay_out_messages
from usdm_sft.template.config import MAX_UNITS, REFERENCE, Template
from usdm_sft.template.row_form import NO_IDS, Piece, as_ids, place_of
from usdm_sft.template.special_tokens import BYTE_NEWLINE, TemplateTokens
from usdm_sft.template.text_encoder import lay_out_turns
from usdm_sft.template.tokenizer import ustm_tokens

# In the order of a row. Each part but the frame includes the token that ends it.
ROW_PARTS = {
    "frame": "instruction and headings",
    "user_units": "user's speech",
    "user_text": "transcript",
    "agent_text": "answer",
    "agent_units": "agent's speech",
}
FRAME, USER_UNITS, USER_TEXT, AGENT_TEXT, AGENT_UNITS = range(len(ROW_PARTS))


class RowLayout(NamedTuple):
    """What tells the parts of a row apart: the ids of the template and its words."""

    tokens: TemplateTokens
    template: Template
    chat: ChatIds | None = None

    def is_unit(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """True for each id that is a unit."""
        return (ids >= self.tokens.unit_0) & (ids < self.tokens.unit_0 + self.tokens.num_units)


REFERENCE_LAYOUT = RowLayout(ustm_tokens(MAX_UNITS), REFERENCE)


def find_parts(
    input_ids: Sequence[int] | npt.NDArray[np.integer], layout: RowLayout = REFERENCE_LAYOUT
) -> npt.NDArray[np.int64]:
    """Find the part of each token.

    Without a chat template, a newline or `<|correspond|>` ends every heading and every part, and neither is inside a part. So the number of both before a
    token tells its part.

    Args:
        input_ids: (num_tokens,) ids of a row.
        layout: The ids and the template of the row; by default the reference's.

    Returns:
        (num_tokens,) positions in `ROW_PARTS`.
    """
    ids = np.asarray(input_ids)
    return find_parts_of_rows(ids, np.array([len(ids)]), layout)


def find_parts_of_rows(
    ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer], layout: RowLayout
) -> npt.NDArray[np.int64]:
    """Find the part of each token of several rows.

    Args:
        ids: (num_tokens,) ids of the rows, one after the other.
        lengths: (num_rows,) number of tokens of each row.
        layout: The ids and the template of the rows.

    Returns:
        (num_tokens,) positions in `ROW_PARTS`.
    """
    tokens, template, chat = layout
    if chat is not None:
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        return np.concatenate([_find_parts_of_chat(row, tokens, template, chat) for row in rows])
    is_end = (ids == tokens.newline) | (ids == tokens.correspond)
    ends = np.cumsum(is_end) - is_end
    starts = np.cumsum(lengths) - lengths
    ends -= np.repeat(np.append(ends, 0)[starts], lengths) + template.instruction.count("\n")
    exchange = np.array(list_parts(template))
    parts = np.where(ends < 0, FRAME, exchange[ends % len(exchange)])
    if len(tokens.end_of_units) > 1:  # the newline after the stop token of units belongs to no part
        parts[(ids == tokens.newline) & ((parts == USER_UNITS) | (parts == AGENT_UNITS))] = FRAME
    return parts.astype(np.int64)


def list_parts(template: Template) -> list[int]:
    """Return the part that each newline or `<|correspond|>` of an exchange ends, with the two newlines of its first heading."""
    names = list(ROW_PARTS)
    user, agent = (
        [names.index(part) for part in template.parts if part.startswith(role)] for role in ("user", "agent")
    )
    between = [FRAME] if user and agent else []  # the agent's heading
    return [FRAME, FRAME, *user, *between, *agent]


def _find_parts_of_chat(
    ids: npt.NDArray[np.integer], tokens: TemplateTokens, template: Template, chat: ChatIds
) -> npt.NDArray[np.int64]:
    """Walk through the pieces of a row: what is fixed has a known length, and each part ends where the next piece begins."""
    parts = np.full(len(ids), FRAME, dtype=np.int64)
    number = _count_exchanges(ids, chat)
    end = 0
    for position in range(number):
        pieces = lay_out_messages(chat, tokens, template, place_of(position, number))
        for index, (part, fixed) in enumerate(pieces):
            start = end
            if fixed is not None:
                end += len(fixed)
            elif (following := pieces[index + 1].ids) is not None:
                end = _index(ids, following[0], start)
            parts[start:end] = FRAME if part is None else list(ROW_PARTS).index(part)
    return parts


def _count_exchanges(ids: npt.NDArray[np.integer], chat: ChatIds) -> int:
    """The number of exchanges, from how often the id that ends the assistant's messages occurs."""
    one, two = (sum(frame.count(chat.stop_id) for frame in chat.frames.around(number)) + number for number in (1, 2))
    return 1 + (int((ids == chat.stop_id).sum()) - one) // (two - one)


def _index(ids: npt.NDArray[np.integer], token_id: int, start: int) -> int:
    """The first position of an id from `start` on; the end of a damaged row that lacks it."""
    found = np.flatnonzero(ids[start:] == token_id)
    return start + int(found[0]) if found.size else len(ids)


NAMES = {"user_text": "transcript", "agent_text": "answer", "agent_units": "speech"}


class AnswerStage(NamedTuple):
    """A stage in which a model answers: the transcript, the answer or the speech.

    Attributes:
        name: transcript, answer or speech.
        stop_id: The id that ends the stage; it is labelled in training.
        blocked: Ranges of ids that may not be generated: start and stop, None for no end.
        following: The ids between the stop id and the next stage.
    """

    name: str
    stop_id: int
    blocked: tuple[tuple[int, int | None], ...]
    following: tuple[int, ...] = ()


def make_stages(
    pieces: Sequence[Piece], tokens: TemplateTokens, template: Template, tokenizer: Tokenizer | None = None
) -> tuple[AnswerStage, ...]:
    """Make a stage for each part of the template but the first, which is given.

    Args:
        pieces: Those of an exchange (`RowForm.exchanges`).
        tokens: The ids of the template.
        template: Its parts and the form of tokenization.
        tokenizer: The tokenizer of the ids; the reference's form needs none.
    """
    stages = []
    for index, (part, ids) in enumerate(pieces):
        if part is None or ids is not None or part == template.parts[0]:
            continue
        rest = takewhile(lambda piece: piece.ids is not None, pieces[index + 1 :])
        fixed = [piece.ids for piece in rest if piece.ids is not None]
        stop_id, *following = np.concatenate(fixed).tolist()
        if tokenizer is None or template.tokenization == "reference":
            blocked = _block_as_reference(part, stop_id, tokens)
        else:
            blocked = _block(part, stop_id, tokens, tokenizer)
        is_last = part == template.parts[-1]
        stages.append(AnswerStage(NAMES[part], stop_id, blocked, () if is_last else tuple(following)))
    return tuple(stages)


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


def _ranges(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of neighbouring ids; [1, 2, 5] -> [(1, 3), (5, 6)]."""
    runs = np.split(np.array(ids, np.int64), np.flatnonzero(np.diff(ids) > 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]


_USTM = ustm_tokens()
# "### Agent\n" after a newline, in USTM's tokenizer.
_AGENT_HEADING = as_ids((27332, 23393, _USTM.newline))

# The stages of the inference in naver-ai/usdm.
REFERENCE_STAGES = make_stages(lay_out_turns(NO_IDS, _AGENT_HEADING, _USTM, REFERENCE), _USTM, REFERENCE)
