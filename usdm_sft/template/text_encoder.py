"""Texts of the template <-> ids, piece by piece.

A piece is the text of a turn or a line of fixed words. The two forms of tokenization differ in what surrounds it:

- `reference`, for USTM's legacy tokenizer, gives the ids that the piece has inside the whole string of the template: with a leading "▁"
  after a token for units, without one after a newline. A newline is always one token there, so no other neighbour matters.
- `separate`, for every other tokenizer, encodes each line on its own and puts the id of a newline between two lines. In the whole
  string, a byte-level tokenizer may read "?" and the newline after it as one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from tokenizers import Tokenizer

from usdm_sft.template.config import Template
from usdm_sft.template.row_form import Ids, Piece, RowForm, Surroundings, as_ids
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

    def encode(self, texts: Sequence[str], surroundings: Sequence[Surroundings]) -> list[Ids | None]:
        """Encode lines of text in one call of the tokenizer.

        Args:
            texts: One line each, without the newline at its end.
            surroundings: Of each text.

        Returns:
            (num_tokens,) int32 ids of each text; None where `Surroundings.cut` has none.
        """
        strings = [around.before + text + around.after for text, around in zip(texts, surroundings, strict=True)]
        encodings = self._tokenizer.encode_batch(strings, add_special_tokens=False)
        cut = zip(texts, encodings, surroundings, strict=True)
        return [around.cut(text, encoding.ids) for text, encoding, around in cut]

    def encode_words(self, text: str, *, after_newline: bool = False) -> Ids:
        """The ids of fixed words of the template, which end with a newline and may have several lines.

        Raises:
            ValueError: The tokenizer does not know the words.
        """
        if self._separate:
            first, *others = self._tokenizer.encode_batch(text.split("\n"), add_special_tokens=False)
            ids = as_ids([*first.ids, *(i for line in others for i in (self._tokens.newline, *line.ids))])
        elif after_newline:
            around = self.surround(after_newline=True)
            encoded = self._tokenizer.encode(around.before + text, add_special_tokens=False).ids
            ids = as_ids(encoded[len(around.before_ids) :])
        else:
            ids = as_ids(self._tokenizer.encode(text, add_special_tokens=False).ids)
        if problem := self.problem(text, ids):
            raise ValueError(f"the template's words {text!r}: a part {problem}: choose other words")
        return ids

    def surround(self, *, after_newline: bool) -> Surroundings:
        """The surroundings of a line of text: after a newline of the template, or after a token for units."""
        if self._separate:
            return Surroundings()
        newline = ("\n", (self._tokens.newline,))
        # The tokenizer puts "▁" before a newline at the beginning of a string, as it does after units.
        return (
            Surroundings("\n", self._tokens.end_of_units, *newline) if after_newline else Surroundings("", (), *newline)
        )

    def problem(self, text: str, ids: Ids) -> str | None:
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


def make_heading_form(encoder: TextEncoder, tokens: TemplateTokens, template: Template) -> RowForm:
    """The form of rows with exchanges under headings, such as "### User".

    Raises:
        ValueError: The tokenizer does not know the words of the template.
    """
    heading = template.user_heading if template.parts[0].startswith("user_") else f"\n{template.agent_heading}"
    opening = encoder.encode_words(template.instruction + heading)
    following = encoder.encode_words(heading, after_newline=True)
    agent_heading = encoder.encode_words(template.agent_heading, after_newline=True)
    exchanges = tuple(
        lay_out_turns(words, agent_heading, tokens, template) for words in (opening, opening, following, following)
    )
    # A transcript follows the user's speech; every other text follows the newline of a heading.
    surroundings = {
        (part, place): encoder.surround(after_newline=part == "agent_text" or "user_units" not in template.parts)
        for part in template.parts
        for place in range(len(exchanges))
    }
    return RowForm(as_ids(tokens.opening), exchanges, as_ids(tokens.closing), surroundings)


def lay_out_turns(heading: Ids, agent_heading: Ids, tokens: TemplateTokens, template: Template) -> tuple[Piece, ...]:
    """The pieces of an exchange after its first heading and, if the user has a turn too, the agent's."""
    pieces: list[Piece] = []
    for role in ("user", "agent"):
        parts = [part for part in template.parts if part.startswith(role)]
        if parts:
            pieces.append(Piece(None, agent_heading if pieces else heading))
        for part in parts:
            pieces.append(Piece(part))
            if part != parts[-1]:
                pieces.append(Piece(part, as_ids([tokens.correspond])))
            elif part.endswith("_text"):
                pieces.append(Piece(part, as_ids([tokens.newline])))
            else:
                stop_id, *others = tokens.end_of_units
                pieces += [Piece(part, as_ids([stop_id])), Piece(None, as_ids(others))]
    return tuple(pieces)
