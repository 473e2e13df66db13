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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from usdm_sft.template.chat_render import RenderError, render_chat
from usdm_sft.template.config import Template
from usdm_sft.template.special_tokens import CONTINUE_TOKEN, CORRESPOND_TOKEN, unit_token
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
