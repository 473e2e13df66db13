"""Lay out exchanges in a chat template: the frames around messages, read with probes, and the ids of texts between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from usdm_sft.template.chat import (
    MARK,
    OTHER_FORM,
    ChatIds,
    ChatTemplate,
    Frames,
    Piece,
    check_generation_prompt,
    check_messages,
    join_frames,
    mark_messages,
    place_of,
    separator,
)
from usdm_sft.template.config import Template
from usdm_sft.template.exchanges import Exchange
from usdm_sft.template.special_tokens import CONTINUE_TOKEN, CORRESPOND_TOKEN, TemplateTokens

# Why `ChatForm.encode` has no ids for a text.
CHANGED = (
    "does not stay as it is in the chat template, which joins it with its own words or removes white space around it"
)

Ids = tuple[int, ...]


@dataclass(frozen=True)
class ChatFrames:
    """A chat template with everything that is known about it.

    Args:
        chat: The template.
        texts: Its frames as strings.
        ids: Its frames as ids, and the id after every message of the assistant, such as that of `<|im_end|>`.
        strips: True if the template removes white space around a message.
    """

    chat: ChatTemplate
    texts: Frames[str]
    ids: ChatIds
    strips: bool


def read_frames(tokenizer: Tokenizer, tokens: TemplateTokens, template: Template, chat: ChatTemplate) -> ChatFrames:
    """Read the frames of a chat template, and prove with probes what `ChatForm` relies on.

    Args:
        tokenizer: A tokenizer without padding and truncation.
        tokens: Its ids of the template.
        template: The instruction and the parts.
        chat: The chat template of the tokenizer.

    Raises:
        ValueError: The tokenizer does not know a character of the instruction. Or the chat template refuses a conversation or changes its
            messages, lays out rows of different length differently, does not end an answer with a special token, begins an answer in
            another way than its generation prompt, puts words before a text that become one token with it, or marks other text as
            generated. The message says which.
    """

    def texts_of(number: int) -> list[str]:
        return chat.render(mark_messages(template, number)).split(MARK)

    def ids_of(number: int) -> list[Ids]:
        ids = tokenizer.encode(chat.render(mark_messages(template, number)), add_special_tokens=False).ids
        return [tuple(run) for is_mark, run in _runs(ids, tokens.unit_0) if not is_mark]

    if {*tokens.unknown} & {*tokenizer.encode(template.instruction, add_special_tokens=False).ids}:
        raise ValueError(
            f"template.instruction {template.instruction[:80]!r} has characters that the tokenizer does not know: choose other words"
        )
    texts = _find_frames(texts_of, chat)
    ids = _find_frames(ids_of, chat)
    check_messages(chat, template, texts)
    check_generation_prompt(chat, template, texts)
    stop_id = _find_stop(tokenizer, chat, template, ids)
    ids = Frames(
        (*ids.before_user[:2], *(frame[1:] for frame in ids.before_user[2:])), ids.before_assistant, ids.closing[1:]
    )
    strips = chat.render(mark_messages(template, 1, " a ")) != join_frames(texts, [" a "] * 2)
    frames = ChatFrames(replace(chat, name="this tokenizer"), texts, ChatIds(ids, stop_id), strips)
    ChatForm(tokenizer, tokens, template, frames).check_surroundings(chat.name)
    return frames


def _runs(ids: Sequence[int], mark: int) -> Iterator[tuple[bool, list[int]]]:
    """Cut ids at each mark; two marks have an empty run between them."""
    run: list[int] = []
    for token_id in ids:
        if token_id == mark:
            yield False, run
            yield True, [mark]
            run = []
        else:
            run.append(token_id)
    yield False, run


def _find_frames(pieces_of: Callable[[int], list[Piece]], chat: ChatTemplate) -> Frames[Piece]:
    """Find the frames of rows with one to three exchanges, and check that those of four follow from them."""
    one, two, three, four = map(pieces_of, (1, 2, 3, 4))
    if [len(pieces) for pieces in (one, two, three, four)] != [3, 5, 7, 9]:
        raise ValueError(f"the chat template of {chat.name} leaves out a message or repeats one: {OTHER_FORM}")
    frames = Frames((one[0], two[0], three[2], three[4]), (one[1], two[1], three[3], three[5]), one[-1])
    lengths = [len(user) + len(assistant) for user, assistant in zip(frames[0], frames[1], strict=True)]  # type: ignore[arg-type]
    rows = zip((1, 2, 3, 4), (one, two, three, four), strict=True)
    # The lengths of exchanges add up, on which `shards.overflow` relies.
    if (
        any(frames.around(number) != pieces for number, pieces in rows)
        or lengths[0] + lengths[2] != lengths[1] + lengths[3]
    ):
        raise ValueError(
            f"the chat template of {chat.name} puts different words around an exchange in rows of different length: {OTHER_FORM}"
        )
    return frames


def _find_stop(tokenizer: Tokenizer, chat: ChatTemplate, template: Template, ids: Frames[Ids]) -> int:
    """The id after the messages of the assistant. It ends a step of inference, and no text may become it."""
    added = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.content.strip("▁ \n")}
    after = [ids.before_user[2], ids.before_user[3], ids.closing]
    if len({frame[:1] for frame in after}) != 1 or not added & {*ids.closing[:1]}:
        tokens = [tokenizer.id_to_token(frame[0]) if frame else "nothing" for frame in after]
        raise ValueError(
            f"the chat template of {chat.name} does not end every answer with the same special token (but with "
            f"{', '.join(map(repr, tokens))}): {OTHER_FORM}"
        )
    first = template.parts[0]
    if first.endswith("_text") and separator(first, template) is None:
        for frame in ids.before_assistant:
            if not added & {*frame[:1]}:
                raise ValueError(
                    f"the chat template of {chat.name} does not end a message of the user with a special token: {OTHER_FORM}"
                )
    return ids.closing[0]


class Surroundings(NamedTuple):
    """What stands around a text up to the nearest special tokens."""

    before: str
    before_ids: Ids
    after: str
    after_id: int


class ChatForm:
    """Lays out exchanges in a chat template.

    Args:
        tokenizer: A tokenizer without padding and truncation.
        tokens: Its ids of the template.
        template: The parts of an exchange.
        frames: The chat template.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: TemplateTokens, template: Template, frames: ChatFrames):
        self._frames = frames
        self._tokenizer = tokenizer
        self._parts = template.parts
        self._correspond = tokens.correspond
        separators = {part: separator(part, template) for part in template.parts[:-1]}
        ids = {CORRESPOND_TOKEN: tokens.correspond, CONTINUE_TOKEN: tokens.continue_}
        self.stop_ids = {part: ids[token] for part, token in separators.items() if token is not None}
        self.stop_ids[template.parts[-1]] = frames.ids.stop_id
        self.opening, self.closing = _array(()), _array(frames.ids.frames.closing)
        self._before_user = [_array(frame) for frame in frames.ids.frames.before_user]
        self._before_assistant = [_array(frame) for frame in frames.ids.frames.before_assistant]
        self._stops = {part: _array((stop_id,)) for part, stop_id in self.stop_ids.items()}
        self._surroundings = {
            (part, place): self._surround(part, place)
            for part in template.parts
            if part.endswith("_text")
            for place in range(len(self._before_user))
        }

    def _surround(self, part: str, place: int) -> Surroundings:
        texts, (ids, stop_id) = self._frames.texts, self._frames.ids
        before = CORRESPOND_TOKEN
        before_ids: Ids = (self._correspond,)
        if part == self._parts[0]:
            is_first = place < 2
            before, before_ids = texts.before_user[place], (*(() if is_first else (stop_id,)), *ids.before_user[place])
        elif part == self._parts[1]:
            before, before_ids = before + texts.before_assistant[place], before_ids + ids.before_assistant[place]
        after_id = self.stop_ids[part] if part in self.stop_ids else ids.before_assistant[place][0]
        after = self._tokenizer.id_to_token(after_id)
        assert after is not None  # an added token
        return Surroundings(before, before_ids, after, after_id)

    def check_surroundings(self, name: str) -> None:
        """Check that an ordinary text does not become one token with the words before it.

        Raises:
            ValueError: It does. The message has the tokenizer's `name`.
        """
        for place, ids in zip(
            self._surroundings, self.encode(["a"] * len(self._surroundings), [*self._surroundings]), strict=True
        ):
            if ids is None:
                raise ValueError(
                    f"the chat template of {name} puts words before a text that become one token with it "
                    f"({self._surroundings[place].before[-20:]!r}): {OTHER_FORM}"
                )

    def encode(self, texts: Sequence[str], parts: Sequence[tuple[str, int]]) -> list[npt.NDArray[np.int32] | None]:
        """Encode texts as in the whole string of the template.

        Args:
            texts: One line each.
            parts: The part of each text, and the place of its exchange in the row (`place_of`).

        Returns:
            (num_tokens,) int32 ids of each text; None where a token covers both the text and the words beside it, and where the template
            removes white space of the text.
        """
        surroundings = [self._surroundings[each] for each in parts]
        strings = [around.before + text + around.after for text, around in zip(texts, surroundings, strict=True)]
        encodings = self._tokenizer.encode_batch(strings, add_special_tokens=False)
        return [
            self._cut(encoding.ids, around) if self._stays(text, part) else None
            for text, (part, _), encoding, around in zip(texts, parts, encodings, surroundings, strict=True)
        ]

    def _cut(self, ids: Sequence[int], around: Surroundings) -> npt.NDArray[np.int32] | None:
        start = len(around.before_ids)
        if tuple(ids[:start]) != around.before_ids or len(ids) <= start or ids[-1] != around.after_id:
            return None
        return _array(ids[start:-1])

    def _stays(self, text: str, part: str) -> bool:
        """False where the template removes white space at the edge of a message."""
        if not self._frames.strips:
            return True
        begins = part in self._parts[:2] and text != text.lstrip()
        ends = (part == self._parts[-1] or part not in self.stop_ids) and text != text.rstrip()
        return not begins and not ends

    def pieces(
        self, exchange: Exchange, position: int, number: int
    ) -> Iterator[tuple[npt.NDArray[np.int32], str | None]]:
        """The pieces of an exchange, each with the part that it belongs to, up to the first part that the exchange lacks."""
        place = place_of(position, number)
        yield self._before_user[place], None
        for part in self._parts:
            if part == self._parts[1]:
                yield self._before_assistant[place], None
            if part not in exchange:
                return
            yield exchange[part], part
            if part in self._stops:
                yield self._stops[part], part


def _array(ids: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(ids, dtype=np.int32)
