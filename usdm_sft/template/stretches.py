"""Texts of the template <-> ids, stretch by stretch.

A stretch is the text of a turn or a line of fixed words. The two forms of tokenization differ in what surrounds it:

- `reference`, for USTM's legacy tokenizer, gives the ids that the stretch has inside the whole string of the template: with a leading "▁"
  after a token for units, without one after a newline. A newline is always one token there, so no other neighbour matters.
- `separate`, for every other tokenizer, encodes each line on its own and puts the id of a newline between two lines. In the whole
  string, a byte-level tokenizer may read "?" and the newline after it as one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from usdm_sft.template.tokens import TemplateTokens


class Stretches:
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

    def spell(self, text: str) -> str:
        """The text as it comes back from its ids; a tokenizer may change it, for example to lower case.

        "▁" (U+2581) becomes a space in the reference's form, because the tokenizer encodes both alike.
        """
        if not self._separate:
            return text.replace("▁", " ")
        return self.decode_batch(self.encode([text], [True]))[0]
