"""The part of the template that each token of a row belongs to, read from the ids alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from usdm_sft.template.tokenizer import CORRESPOND, NEWLINE, SPACE, UNIT_0

# In the order of a row. Each part but the frame includes the token that ends it.
ROW_PARTS = {
    "frame": "instruction and headings",
    "user_units": "user's speech",
    "user_text": "transcript",
    "agent_text": "answer",
    "agent_units": "agent's speech",
}
FRAME, USER_UNITS, USER_TEXT, AGENT_TEXT, AGENT_UNITS = range(len(ROW_PARTS))


def find_parts(input_ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Find the part of each token.

    `<|correspond|>` alternates between the end of the user's speech and the end of the answer, and a text has no newline. So
    the number of both before a token tells its part.

    Args:
        input_ids: (num_tokens,) ids of a row.

    Returns:
        (num_tokens,) positions in `ROW_PARTS`.
    """
    ids = np.asarray(input_ids)
    is_mark, is_newline, is_unit = ids == CORRESPOND, ids == NEWLINE, ids >= UNIT_0
    marks = np.cumsum(is_mark) - is_mark
    newlines = np.cumsum(is_newline) - is_newline
    # Newlines between the last mark and the token; a mark itself needs no count.
    lines = newlines - np.maximum.accumulate(np.where(is_mark, newlines, 0))
    in_texts = marks % 2 == 1
    follows_answer = (marks > 0) & (lines == 0)
    return np.select(
        [
            in_texts & (is_mark | (lines > 1)),
            in_texts & (lines == 0),
            in_texts,
            is_mark | (is_unit & ~follows_answer),
            (is_unit | (ids == SPACE)) & follows_answer,
        ],
        [AGENT_TEXT, USER_TEXT, FRAME, USER_UNITS, AGENT_UNITS],
        FRAME,
    )
