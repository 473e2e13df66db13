"""Units and texts -> `input_ids` and `labels` of the USDM template, built together in one pass.

The reference writes one string, tokenizes it, and then searches the ids for the stretches that bear loss. Here each
stretch is put down with its label as it comes: units by offset, fixed parts as constants, and the two texts in one
tokenizer call, cut by character offsets. The reference takes 25 ms an example, this about a tenth of one.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from usdm_sft.template.config import REFERENCE, Template
from usdm_sft.template.tokenizer import BOS, CORRESPOND, EOS, NEWLINE, SPACE, UNIT_0, check_tokenizer, plain_copy
from usdm_sft.utils.texts import text_problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VERSION = "1"  # of the ids and labels below: change it when they change, and cached ones are made anew

IGNORE_INDEX = -100

COLUMNS = ("user_units", "user_text", "agent_text", "agent_units")


class Exchange(NamedTuple):
    """One user turn and the answer to it; units are 1-D integer arrays."""

    user_units: np.ndarray
    user_text: str
    agent_text: str
    agent_units: np.ndarray


class TemplateEncoder:
    """Lay exchanges out in the USDM template. A batched `.map` callable, for `Dataset` and `IterableDataset` alike.

    One exchange, with `U` and `A` for runs of unit tokens; what bears loss is on the lines marked `label`::

        -100   <s> ▁Below … . \\n \\n ### ▁User \\n U <|correspond|>
        label  ▁what ? \\n
        -100   ### ▁Agent \\n
        label  yes . <|correspond|> A ▁
        -100   \\n </s>

    Both texts are lower-cased. Further exchanges follow as `\\n### User\\n ...` blocks before the one `</s>`. Every row is
    encoded, however long. (naver-ai/usdm, preprocess/fine-tuning/dailytalk_single_turn.py, `tokenize_speech`.)

    Args:
        tokenizer: What `load_tokenizer` or `build_tokenizer` gives; probed, so that no other slips in.
        template: The words, and which parts bear loss; the reference's, drawn above, by default.
        last_exchange_only: Loss falls in the last exchange of a row only; those before it are context.

    Raises:
        ValueError: The tokenizer does not give the ids of naver-ai/USTM, or the template holds a token of its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | Tokenizer,
        template: Template = REFERENCE,
        *,
        last_exchange_only: bool = False,
    ):
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.num_units = check_tokenizer(backend, getattr(tokenizer, "name_or_path", "") or "this tokenizer")
        self._set_up(plain_copy(backend), template, last_exchange_only)

    def _set_up(self, tokenizer: Tokenizer, template: Template, last_exchange_only: bool) -> None:
        self.template = template
        self.last_exchange_only = last_exchange_only
        self._tokenizer = tokenizer
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(added)
        other = [token.content for token in added.values() if text_problem(f"a{token.content}") is None]
        self._other_added = (
            re.compile("|".join(map(re.escape, sorted(other, key=len, reverse=True)))) if other else None
        )
        for name in ("instruction", "user_role", "agent_role"):
            if self._other_added is not None and (match := self._other_added.search(getattr(template, name))):
                raise ValueError(
                    f"template.{name} holds {match.group()!r}, a token of the tokenizer's added vocabulary: take it out"
                )

        def encode(text):
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

        self._open = np.concatenate([[BOS], encode(template.instruction + template.user_heading)]).astype(np.int32)
        # A stretch that begins with a newline gets the tokenizer's "▁" before it; that one bears loss and stands apart.
        self._next = encode("\n" + template.user_heading)[1:]
        self.agent_heading_ids = tuple(encode("\n" + template.agent_heading)[2:].tolist())  # as after a text's newline
        self._close = np.array([NEWLINE, EOS], dtype=np.int32)
        self._correspond = np.array([CORRESPOND], dtype=np.int32)
        self._space = np.array([SPACE], dtype=np.int32)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self._tokenizer.to_str(), "num_units": self.num_units, "version": VERSION, **self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self.num_units = state["num_units"]
        self._set_up(Tokenizer.from_str(state["tokenizer"]), Template(**state["template"]), state["last_exchange_only"])

    @property
    def _options(self) -> dict[str, Any]:
        return {"template": asdict(self.template), "last_exchange_only": self.last_exchange_only}

    @property
    def tokenizer_digest(self) -> str:
        """sha256 of the tokenizer, in hex."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    @property
    def key(self) -> tuple[Any, ...]:
        """All that the ids and labels of a row depend on beside its columns; JSON values."""
        return VERSION, self.tokenizer_digest, self._options

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, list[np.ndarray]]:
        """Encode a batch of rows.

        Args:
            batch: Columns `user_units`, `user_text`, `agent_text`, `agent_units` (and `id`, for error messages). A row
                holds one exchange, or lists of as many exchanges in each column.

        Returns:
            `input_ids` and `labels`, each one (num_tokens,) int32 array a row; labels are unshifted, -100 where no loss
            falls.

        Raises:
            ValueError: A text is empty or holds a control character or a special-token string, or a unit is out of
                range. The message names row and column.
        """
        rows = [self._exchanges(batch, i) for i in range(len(batch["user_text"]))]
        encoded = self._encode(rows)
        return {"input_ids": [ids for ids, _ in encoded], "labels": [labels for _, labels in encoded]}

    def _encode(self, rows: Sequence[Sequence[Exchange]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows of checked exchanges -> (input_ids, labels) of each, two (num_tokens,) int32 arrays."""
        heading = self.template.agent_heading
        stretches = [f"{exchange.user_text}\n{heading}{exchange.agent_text}" for row in rows for exchange in row]
        encodings = iter(self._tokenizer.encode_batch(stretches, add_special_tokens=False))
        return [self._lay_out(row, encodings) for row in rows]

    def _lay_out(self, row: Sequence[Exchange], encodings: Iterable) -> tuple[np.ndarray, np.ndarray]:
        parts: list[np.ndarray] = []
        labels: list[np.ndarray] = []

        def add(ids: np.ndarray, supervised: bool) -> None:
            parts.append(ids)
            labels.append(ids if supervised else np.full(len(ids), IGNORE_INDEX, dtype=np.int32))

        for position, (exchange, encoding) in enumerate(zip(row, encodings, strict=False)):
            ids = np.array(encoding.ids, dtype=np.int32)
            starts = [start for start, _ in encoding.offsets]
            # Both cuts come right after a newline, which is a token of its own whatever the heading says.
            agent_mark = bisect_left(starts, len(exchange.user_text) + 1)
            agent_text = bisect_left(starts, len(exchange.user_text) + 1 + len(self.template.agent_heading))
            context = self.last_exchange_only and position < len(row) - 1
            loss = () if context else self.template.loss
            add(self._next if position else self._open, False)
            add(exchange.user_units, False)
            add(self._correspond, False)
            add(ids[:agent_mark], "user_text" in loss)
            add(ids[agent_mark:agent_text], False)
            add(ids[agent_text:], "agent_text" in loss)
            add(self._correspond, "agent_text" in loss)
            add(exchange.agent_units, "agent_units" in loss)
            add(self._space, "agent_units" in loss)
        add(self._close, False)
        return np.concatenate(parts), np.concatenate(labels)

    def _exchanges(self, batch: Mapping[str, Sequence], i: int) -> list[Exchange]:
        """Row `i` of the batch, checked: texts lower-cased, units as token ids."""
        values = [batch[column][i] for column in COLUMNS]
        if any(value is None for value in values):
            raise ValueError(
                f"{_row_name(batch, i)}: {COLUMNS[next(k for k, value in enumerate(values) if value is None)]} is missing"
            )
        if isinstance(values[1], str):
            values = [[value] for value in values]
        if len({len(value) for value in values}) != 1:
            lengths = ", ".join(f"{column} {len(value)}" for column, value in zip(COLUMNS, values, strict=True))
            raise ValueError(f"{_row_name(batch, i)}: the columns hold different numbers of exchanges ({lengths})")
        if not len(values[1]):
            raise ValueError(f"{_row_name(batch, i)}: there is no exchange in it")

        def check(exchange: tuple) -> Exchange:
            user_units, user_text, agent_text, agent_units = exchange
            return Exchange(
                self._check_units(user_units, "user_units", batch, i),
                self._check_text(user_text, "user_text", batch, i),
                self._check_text(agent_text, "agent_text", batch, i),
                self._check_units(agent_units, "agent_units", batch, i),
            )

        return [check(exchange) for exchange in zip(*values, strict=True)]

    def _check_text(self, text: str, column: str, batch: Mapping[str, Sequence], i: int) -> str:
        problem = text_problem(text)
        text = text.lower()
        if problem is None and self._other_added is not None and (match := self._other_added.search(text)):
            problem = f"holds {match.group()!r}, a token of the tokenizer's added vocabulary"
        if problem is not None:
            raise ValueError(f"{_row_name(batch, i)}: {column} {text[:80]!r} {problem}: correct the text")
        return text

    def _check_units(self, units: Sequence[int], column: str, batch: Mapping[str, Sequence], i: int) -> np.ndarray:
        """-> (num_units,) int32 token ids."""
        units = np.asarray(units)
        if units.size == 0:
            return np.zeros(0, dtype=np.int32)
        if units.ndim != 1 or units.dtype.kind not in "iu":
            raise ValueError(f"{_row_name(batch, i)}: {column} is not a flat list of integers")
        low, high = int(units.min()), int(units.max())
        if low < 0 or high >= self.num_units:
            raise ValueError(
                f"{_row_name(batch, i)}: {column} holds unit {low if low < 0 else high}, but the tokenizer has units 0 to "
                f"{self.num_units - 1}: use the unit model and the tokenizer that belong together"
            )
        return units.astype(np.int32) + UNIT_0

    def prompt(
        self,
        user_units: Sequence[int],
        user_text: str | None = None,
        agent_text: str | None = None,
        *,
        history: Sequence[Exchange | tuple] = (),
    ) -> np.ndarray:
        """What goes before each of the three steps of inference, an exact prefix of the training ids.

        Args:
            user_units: The user's speech; alone, the model is to write its transcript.
            user_text: The transcript; with it, the model is to write its answer. It may be empty, if so it was generated.
            agent_text: The answer; with it, the model is to speak.
            history: Earlier exchanges, oldest first: (user_units, user_text, agent_text, agent_units) each.

        Returns:
            (num_tokens,) int32 ids.

        Raises:
            ValueError: A unit is out of range, a text holds what the template cannot, or an answer has no transcript.
        """
        if agent_text is not None and user_text is None:
            raise ValueError("agent_text goes with the user_text before it")
        batch = {"user_units": [user_units]}
        parts = [self._open]
        if history:
            columns = dict(zip(COLUMNS, ([list(values)] for values in zip(*history, strict=True)), strict=True))
            ids = self(columns)["input_ids"][0]
            parts = [ids[: -len(self._close)], self._next]
        parts += [self._check_units(user_units, "user_units", batch, 0), self._correspond]
        if user_text is not None:
            stretch = (
                f"{user_text and self._check_text(user_text, 'user_text', batch, 0)}\n{self.template.agent_heading}"
            )
            stretch += "" if agent_text is None else self._check_text(agent_text, "agent_text", batch, 0)
            parts.append(np.array(self._tokenizer.encode(stretch, add_special_tokens=False).ids, dtype=np.int32))
        if agent_text is not None:
            parts.append(self._correspond)
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids back to the text of the template, for people.

        BOS, which the tokenizer adds, is left out; a "▁" (U+2581) of a text comes back as a space, which the tokenizer takes
        it for.
        """
        ids = [int(token_id) for token_id in ids]
        if ids[:1] == [BOS]:
            ids = ids[1:]
        parts = []
        for special, run in groupby(ids, key=self._special_ids.__contains__):
            # A stretch loses the one "▁" that the tokenizer put before it; special tokens stand for themselves.
            if special:
                parts += [self._tokenizer.id_to_token(token_id) for token_id in run]
            else:
                parts.append(self._tokenizer.decode(list(run), skip_special_tokens=False))
        return "".join(parts)


def _row_name(batch: Mapping[str, Sequence], i: int) -> str:
    return f"row {batch['id'][i]}" if "id" in batch else f"row {i} of the batch"
