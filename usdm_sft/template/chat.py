"""The chat form: exchanges as messages in the chat template of a base model, and the ids that the template puts around them.

The first part of an exchange is the user's message, and the parts that the model generates are the assistant's. One exchange in ChatML, with
`U` and `A` for runs of unit tokens; the line marked `label` is labelled::

    -100   <|im_start|> system \\n Below … . <|im_end|> \\n
    -100   <|im_start|> user \\n U <|correspond|> <|im_end|> \\n
    -100   <|im_start|> assistant \\n
    label  where were you ? <|continue|> at home . <|correspond|> A <|im_end|>
    -100   \\n

`<|correspond|>` stands between the two parts of one speaker, and `<|continue|>` in a message between the user's part and the agent's. The
ids are those of the whole string that `apply_chat_template` renders. Special tokens divide this string, and a tokenizer reads
what is between two of them on its own; so each text is encoded with its surroundings up to the nearest special token, and everything else
comes from probes at load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from usdm_sft.template.chat_render import RenderError, render_chat
from usdm_sft.template.config import Template
from usdm_sft.template.exchanges import Exchange
from usdm_sft.template.special_tokens import CONTINUE_TOKEN, CORRESPOND_TOKEN, TemplateTokens, unit_token
from usdm_sft.utils.texts import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


Piece = TypeVar("Piece")
Message = dict[str, str]

MARK = unit_token(0)  # stands for a message in probes
OTHER_FORM = "use template.tokenization separate"

# Some templates tell the model the day, which would change the ids every day. This one is the default of Llama 3.1's template.
TODAY = date(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# Of an exchange: is it the first of its row, and is it the last.
_PLACES = ((True, True), (True, False), (False, False), (False, True))


class Frames(NamedTuple, Generic[Piece]):
    """What the chat template puts around the messages of exchanges, as strings or as ids.

    Attributes:
        before_user: Before the user's message, for an exchange that is the only, the first, a middle and the last one of a row.
        before_assistant: Between the user's message and the assistant's, for the same four.
        closing: After the last message.
    """

    before_user: tuple[Piece, ...]
    before_assistant: tuple[Piece, ...]
    closing: Piece

    def around(self, number: int) -> list[Piece]:
        """The frames of a row with a number of exchanges, in order."""
        places = [place_of(position, number) for position in range(number)]
        pieces = [piece for place in places for piece in (self.before_user[place], self.before_assistant[place])]
        return [*pieces, self.closing]


class ChatIds(NamedTuple):
    """The ids of a chat template: its frames, and `stop_id`, which follows every message of the assistant and is not in the frames."""

    frames: Frames[tuple[int, ...]]
    stop_id: int


def place_of(position: int, number: int) -> int:
    """The index in `Frames` of an exchange, from its position among a number of exchanges."""
    return _PLACES.index((position == 0, position == number - 1))


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        source: Jinja, with fixed dates.
        special_tokens: The tokens that it may name, such as `bos_token`.
        name: Of the tokenizer, in error messages.
    """

    source: str
    special_tokens: Mapping[str, str]
    name: str

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The string of `apply_chat_template`.

        Raises:
            ValueError: The template refuses the messages.
        """
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def generated(self, messages: Sequence[Message]) -> list[tuple[int, int]] | None:
        """The spans of `render(messages)` that the template marks with `{% generation %}`, or None where it has no such marks."""
        if not re.search(r"{%-?\s*generation\b", self.source):
            return None
        return self._render(messages, return_assistant_tokens_mask=True)[1]

    def _render(self, messages: Sequence[Message], **options: bool) -> tuple[str, list[tuple[int, int]]]:
        try:
            return render_chat(self.source, self.special_tokens, messages, options)
        except RenderError as error:
            raise ValueError(
                f"the chat template of {self.name} refuses a conversation ({first_line(error)}): if it takes no system message, set "
                "template.instruction to an empty text; otherwise use template.tokenization separate"
            ) from error


def read_chat_template(tokenizer: PreTrainedTokenizerFast, name: str) -> ChatTemplate:
    """Read the chat template of a tokenizer, and replace today's date in it by `TODAY`.

    Raises:
        ValueError: The tokenizer has no chat template, or one that tells the time.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{name} has no chat template: name the tokenizer of a chat model, or use template.tokenization separate"
        )
    source = _NOW.sub(lambda match: repr(TODAY.strftime(match[2])), tokenizer.get_chat_template())
    if "strftime_now(" in source:
        raise ValueError(
            f"the chat template of {name} formats the time in a way that cannot be fixed: write a date into it, because "
            "its ids would differ from day to day"
        )
    special_tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return ChatTemplate(source, special_tokens, name)


def separator(part: str, template: Template) -> str | None:
    """The token after a part that is followed by another one; None where the assistant's message follows on the other speaker's."""
    following = template.parts[template.parts.index(part) + 1]
    if part.split("_")[0] == following.split("_")[0]:
        return CORRESPOND_TOKEN
    return None if part == template.parts[0] else CONTINUE_TOKEN


def make_messages(exchanges: Sequence[Mapping[str, str]], template: Template) -> list[Message]:
    """The messages of a conversation.

    Args:
        exchanges: The parts of each exchange as strings; units as their tokens.
        template: Its instruction is the system message, unless it is empty.
    """
    instruction = template.instruction.strip()
    messages = [{"role": "system", "content": instruction}] if instruction else []
    for exchange in exchanges:
        pieces = [exchange[part] + (separator(part, template) or "") for part in template.parts[:-1]]
        messages.append({"role": "user", "content": pieces[0]})
        messages.append({"role": "assistant", "content": "".join(pieces[1:]) + exchange[template.parts[-1]]})
    return messages


def mark_messages(template: Template, number: int, content: str = MARK) -> list[Message]:
    """The messages of a number of exchanges, all with the same content."""
    exchange = [{"role": role, "content": content} for role in ("user", "assistant")]
    return [*make_messages([], template), *exchange * number]


def join_frames(texts: Frames[str], contents: Sequence[str]) -> str:
    """The string of a row from its frames and the contents of its messages."""
    pieces = texts.around(len(contents) // 2)
    return "".join(piece for pair in zip(pieces, [*contents, ""], strict=True) for piece in pair)


def check_messages(chat: ChatTemplate, template: Template, texts: Frames[str]) -> None:
    """Check that messages stay as they are, and that those of the assistant are what the template marks as generated."""
    samples = [{part: f"{part} {number}, or?" for part in template.parts} for number in range(2)]
    messages = make_messages(samples, template)
    contents = [message["content"] for message in messages if message["role"] != "system"]
    if chat.render(messages) != join_frames(texts, contents):
        raise ValueError(f"the chat template of {chat.name} changes the messages: {OTHER_FORM}")
    spans = chat.generated(messages)
    if spans is None:
        return
    start = 0
    for index, (piece, content) in enumerate(zip(texts.around(2), [*contents, ""], strict=True)):
        start += len(piece)
        stop = start + len(content)
        is_inside = any(first <= start and stop <= last for first, last in spans)
        overlaps = any(first < stop and start < last for first, last in spans)
        if not is_inside if index % 2 else overlaps:
            raise ValueError(
                f"the chat template of {chat.name} marks other text as generated than the messages of the assistant "
                f"({content!r}): correct its {{% generation %}}"
            )
        start = stop


def check_generation_prompt(chat: ChatTemplate, template: Template, texts: Frames[str]) -> None:
    """Check that the generation prompt is the beginning of what training puts before an answer."""
    *messages, _ = mark_messages(template, 1)
    found = chat.render(messages, add_generation_prompt=True)
    expected = texts.before_user[0] + MARK + texts.before_assistant[0]
    if not expected.startswith(found):
        raise ValueError(
            f"the chat template of {chat.name} begins an answer with {found[-40:]!r}, but in a whole conversation with "
            f"{expected[-40:]!r}: {OTHER_FORM}"
        )


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
    # The lengths of exchanges add up, on which `prepare.overflow` relies.
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
