"""Texts of the template <-> ids, piece by piece.

A piece is the text of a turn or a line of fixed words. The two forms of tokenization differ in what surrounds it:

- `reference`, for USTM's legacy tokenizer, gives the ids that the piece has inside the whole string of the template: with a leading "▁"
  after a token for units, without one after a newline. A newline is always one token there, so no other neighbour matters.
- `separate`, for every other tokenizer, encodes each line on its own and puts the id of a newline between two lines. In the whole
  string, a byte-level tokenizer may read "?" and the newline after it as one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from usdm_sft.template.config import Template
from usdm_sft.template.exchanges import Exchange
from usdm_sft.template.special_tokens import TemplateTokens


class TextEncoder:
    """Encodes and decodes the texts of a template.

    Args:
        tokenizer: A tokenizer without padding and truncation.
        tokens: Its ids of the template.
        separate: The form of tokenization: `separate`, or else `reference`.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: TemplateTokens, *, separate: bool):
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._separate = separate
        added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        if separate:  # added tokens for white space belong to texts
            added = {token_id: content for token_id, content in added.items() if content.strip("▁ \t\r\n")}
        self._refused = frozenset({*added, *tokens.unknown})
        self._decoded = added | ({tokens.newline: "\n"} if separate else {})

    def encode(self, texts: Sequence[str], after_newline: Sequence[bool]) -> list[npt.NDArray[np.int32]]:
        """Encode lines of text.

        Args:
            texts: One line each, without the newline at its end.
            after_newline: True for a text that follows a newline of the template, False for one after a token for units.

        Returns:
            (num_tokens,) int32 ids of each text.
        """
        if self._separate:
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        strings = [f"\n{text}\n" if after else f"{text}\n" for text, after in zip(texts, after_newline, strict=True)]
        encodings = self._tokenizer.encode_batch(strings, add_special_tokens=False)
        # Without the newlines around the text, and without the "▁" that the tokenizer puts before the first newline.
        return [
            np.array(encoding.ids[2 if after else 0 : -1], dtype=np.int32)
            for encoding, after in zip(encodings, after_newline, strict=True)
        ]

    def encode_words(self, text: str, *, after_newline: bool = False) -> npt.NDArray[np.int32]:
        """The ids of fixed words that end with a newline and may have several lines."""
        if not self._separate:
            ids = self._tokenizer.encode("\n" + text if after_newline else text, add_special_tokens=False).ids
            return np.array(ids[2 if after_newline else 0 :], dtype=np.int32)
        first, *others = self.encode(lines := text.split("\n"), [True] * len(lines))
        newline = np.array([self._tokens.newline], dtype=np.int32)
        return np.concatenate([first, *(ids for line in others for ids in (newline, line))])

    def problem(self, text: str, ids: npt.NDArray[np.int32]) -> str | None:
        """Say why the ids do not stand for the text, or None where they do. The reference's form knows every text."""
        if not self._separate:
            return None
        if text.strip() and not len(ids):
            return "has no token in this tokenizer"
        for token_id in ids.tolist():
            if token_id in self._refused:
                return f"becomes {self._tokenizer.id_to_token(token_id)!r}, which does not stand for its characters"
        return None

    def decode_batch(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """Decode rows of ids to the text of the template, without what the tokenizer puts before every text."""
        opening = list(self._tokens.opening)
        parts: list[list[str | int]] = []  # an int is the number of a run of ordinary tokens
        runs: dict[tuple[int, ...], int] = {}  # the instruction begins every row, and is decoded once
        for row in rows:
            ids = [int(token_id) for token_id in row]
            parts.append([])
            start = len(opening) if ids[: len(opening)] == opening else 0
            for is_fixed, run in groupby(ids[start:], key=self._decoded.__contains__):
                # Decoding strips the "▁" that the tokenizer puts before a run of ordinary tokens.
                if is_fixed:
                    parts[-1] += [self._decoded[token_id] for token_id in run]
                else:
                    parts[-1].append(runs.setdefault(tuple(run), len(runs)))
        texts = self._tokenizer.decode_batch(list(map(list, runs)), skip_special_tokens=False)
        return ["".join([texts[part] if isinstance(part, int) else part for part in row]) for row in parts]


class Headings:
    """Lays out exchanges under headings, such as "### User".

    Args:
        text_encoder: Encodes the texts.
        tokens: The ids of the template.
        template: The words and the parts.

    Raises:
        ValueError: The tokenizer does not know the words.
    """

    def __init__(self, text_encoder: TextEncoder, tokens: TemplateTokens, template: Template):
        self._text_encoder = text_encoder
        self._parts = template.parts
        turns = (tuple(part for part in template.parts if part.startswith(role)) for role in ("user", "agent"))
        self._turns = [parts for parts in turns if parts]
        has_user_turn = template.parts[0].startswith("user_")
        heading = template.user_heading if has_user_turn else f"\n{template.agent_heading}"
        self.opening, self.closing = _array(tokens.opening), _array(tokens.closing)
        self._correspond, self._newline = _array([tokens.correspond]), _array([tokens.newline])
        self._end_of_units, self._after_units = _array(tokens.end_of_units[:1]), _array(tokens.end_of_units[1:])
        self._open = self._encode_words(template.instruction + heading)
        self._next = self._encode_words(heading, after_newline=True)
        self._agent_heading = self._encode_words(template.agent_heading, after_newline=True)

    @property
    def agent_heading(self) -> tuple[int, ...]:
        """The ids of the agent's heading after a newline."""
        return tuple(self._agent_heading.tolist())

    def _encode_words(self, text: str, *, after_newline: bool = False) -> npt.NDArray[np.int32]:
        ids = self._text_encoder.encode_words(text, after_newline=after_newline)
        if problem := self._text_encoder.problem(text, ids):
            raise ValueError(f"the template's words {text!r}: a part {problem}: choose other words")
        return ids

    def encode(self, texts: Sequence[str], parts: Sequence[tuple[str, int]]) -> Sequence[npt.NDArray[np.int32] | None]:
        """Encode texts, with the arguments of `ChatForm.encode`. The place of an exchange does not matter."""
        # A transcript follows the user's speech; every other text follows the newline of a heading.
        after_newline = [part == "agent_text" or "user_units" not in self._parts for part, _ in parts]
        return self._text_encoder.encode(texts, after_newline)

    def pieces(
        self, exchange: Exchange, position: int, number: int
    ) -> Iterator[tuple[npt.NDArray[np.int32], str | None]]:
        """The pieces of an exchange, each with the part that it belongs to, up to the first part that the exchange lacks.

        The stop token of a part belongs to it.

        Args:
            exchange: Units and texts as ids.
            position: Of the exchange in the row.
            number: Number of exchanges in the row.
        """
        heading = self._next if position else self._open
        for parts in self._turns:
            yield heading, None
            for part in parts:
                if part not in exchange:
                    return
                yield exchange[part], part
                if part != parts[-1]:
                    yield self._correspond, part
                elif part.endswith("_text"):
                    yield self._newline, part
                else:
                    yield self._end_of_units, part
                    yield self._after_units, None
            heading = self._agent_heading


def _array(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(ids, dtype=np.int32)
