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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from tokenizers import Tokenizer

from usdm_sft.template.chat_render import RenderError, render_chat
from usdm_sft.template.config import Template
from usdm_sft.template.row_form import NO_IDS, Piece, RowForm, Surroundings, as_ids, place_of
from usdm_sft.template.special_tokens import CONTINUE_TOKEN, CORRESPOND_TOKEN, TemplateTokens, unit_token
from usdm_sft.template.text_encoder import TextEncoder
from usdm_sft.utils.texts import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


Frame = TypeVar("Frame")
Ids = tuple[int, ...]
Message = dict[str, str]

MARK = unit_token(0)  # stands for a message in probes

# Some templates tell the model the day, which would change the ids every day. This one is the default of Llama 3.1's template.
TODAY = date(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class Frames(NamedTuple, Generic[Frame]):
    """What the chat template puts around the messages of exchanges, as strings or as ids.

    Attributes:
        before_user: Before the user's message, for an exchange that is the only, the first, a middle and the last one of a row.
        before_assistant: Between the user's message and the assistant's, for the same four.
        closing: After the last message.
    """

    before_user: tuple[Frame, ...]
    before_assistant: tuple[Frame, ...]
    closing: Frame

    def around(self, number: int) -> list[Frame]:
        """The frames of a row with a number of exchanges, in order."""
        places = [place_of(position, number) for position in range(number)]
        pieces = [piece for place in places for piece in (self.before_user[place], self.before_assistant[place])]
        return [*pieces, self.closing]


class ChatIds(NamedTuple):
    """The ids of a chat template: its frames, and `stop_id`, which follows every message of the assistant and is not in the frames."""

    frames: Frames[Ids]
    stop_id: int


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

    def render(self, messages: Sequence[Message], **options: bool) -> tuple[str, list[tuple[int, int]]]:
        """The string of `apply_chat_template` with some options, and the spans that the template marks with `{% generation %}`.

        Raises:
            ValueError: The template refuses the messages.
        """
        try:
            return render_chat(self.source, self.special_tokens, messages, options)
        except RenderError as error:
            raise ValueError(
                f"the chat template of {self.name} refuses a conversation ({first_line(error)}): if it takes no system message, set "
                "template.instruction to an empty text; otherwise use template.tokenization separate"
            ) from error

    def error(self, problem: str, remedy: str = "use template.tokenization separate") -> ValueError:
        """What to raise for a template that cannot be used."""
        return ValueError(f"the chat template of {self.name} {problem}: {remedy}")


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
    special_tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    chat = ChatTemplate(source, special_tokens, name)
    if "strftime_now(" in source:
        raise chat.error(
            "formats the time in a way that cannot be fixed",
            "write a date into it, because its ids would differ from day to day",
        )
    return chat


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


def _check_messages(chat: ChatTemplate, template: Template, texts: Frames[str]) -> None:
    """Check that messages stay as they are, and that those of the assistant are what the template marks as generated."""
    samples = [{part: f"{part} {number}, or?" for part in template.parts} for number in range(2)]
    messages = make_messages(samples, template)
    contents = [message["content"] for message in messages if message["role"] != "system"]
    if chat.render(messages)[0] != join_frames(texts, contents):
        raise chat.error("changes the messages")
    if not re.search(r"{%-?\s*generation\b", chat.source):
        return
    _, spans = chat.render(messages, return_assistant_tokens_mask=True)
    start = 0
    for index, (piece, content) in enumerate(zip(texts.around(2), [*contents, ""], strict=True)):
        start += len(piece)
        stop = start + len(content)
        is_inside = any(first <= start and stop <= last for first, last in spans)
        overlaps = any(first < stop and start < last for first, last in spans)
        if not is_inside if index % 2 else overlaps:
            raise chat.error(
                f"marks other text as generated than the messages of the assistant ({content!r})",
                "correct its {% generation %}",
            )
        start = stop


def _check_generation_prompt(chat: ChatTemplate, template: Template, texts: Frames[str]) -> None:
    """Check that the generation prompt is the beginning of what training puts before an answer."""
    *messages, _ = mark_messages(template, 1)
    found, _ = chat.render(messages, add_generation_prompt=True)
    expected = texts.before_user[0] + MARK + texts.before_assistant[0]
    if not expected.startswith(found):
        raise chat.error(f"begins an answer with {found[-40:]!r}, but in a whole conversation with {expected[-40:]!r}")


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
    """Read the frames of a chat template, and prove with probes what `make_chat_form` relies on.

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
        return chat.render(mark_messages(template, number))[0].split(MARK)

    def ids_of(number: int) -> list[Ids]:
        text, _ = chat.render(mark_messages(template, number))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        marks = [index for index, token_id in enumerate(ids) if token_id == tokens.unit_0]
        return [tuple(ids[before + 1 : after]) for before, after in pairwise([-1, *marks, len(ids)])]

    if {*tokens.unknown} & {*tokenizer.encode(template.instruction, add_special_tokens=False).ids}:
        raise ValueError(
            f"template.instruction {template.instruction[:80]!r} has characters that the tokenizer does not know: choose other words"
        )
    texts = _find_frames(texts_of, chat)
    ids = _find_frames(ids_of, chat)
    _check_messages(chat, template, texts)
    _check_generation_prompt(chat, template, texts)
    stop_id = _find_stop(tokenizer, chat, template, ids)
    ids = Frames(
        (*ids.before_user[:2], *(frame[1:] for frame in ids.before_user[2:])), ids.before_assistant, ids.closing[1:]
    )
    strips = chat.render(mark_messages(template, 1, " a "))[0] != join_frames(texts, [" a "] * 2)
    frames = ChatFrames(replace(chat, name="this tokenizer"), texts, ChatIds(ids, stop_id), strips)
    surroundings = [*make_chat_form(tokenizer, tokens, template, frames).surroundings.values()]
    encoded = TextEncoder(tokenizer, tokens, separate=True).encode(["a"] * len(surroundings), surroundings)
    for around, text_ids in zip(surroundings, encoded, strict=True):
        if text_ids is None:
            raise chat.error(f"puts words before a text that become one token with it ({around.before[-20:]!r})")
    return frames


def _find_frames(pieces_of: Callable[[int], list[Frame]], chat: ChatTemplate) -> Frames[Frame]:
    """Find the frames of rows with one to three exchanges, and check that those of four follow from them."""
    one, two, three, four = map(pieces_of, (1, 2, 3, 4))
    if [len(pieces) for pieces in (one, two, three, four)] != [3, 5, 7, 9]:
        raise chat.error("leaves out a message or repeats one")
    frames = Frames((one[0], two[0], three[2], three[4]), (one[1], two[1], three[3], three[5]), one[-1])
    lengths = [len(user) + len(assistant) for user, assistant in zip(frames[0], frames[1], strict=True)]  # type: ignore[arg-type]
    rows = zip((1, 2, 3, 4), (one, two, three, four), strict=True)
    # The lengths of exchanges add up, on which `prepare.overflow` relies.
    if (
        any(frames.around(number) != pieces for number, pieces in rows)
        or lengths[0] + lengths[2] != lengths[1] + lengths[3]
    ):
        raise chat.error("puts different words around an exchange in rows of different length")
    return frames


def _find_stop(tokenizer: Tokenizer, chat: ChatTemplate, template: Template, ids: Frames[Ids]) -> int:
    """The id after the messages of the assistant. It ends a step of inference, and no text may become it."""
    added = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.content.strip("▁ \n")}
    after = [ids.before_user[2], ids.before_user[3], ids.closing]
    if len({frame[:1] for frame in after}) != 1 or not added & {*ids.closing[:1]}:
        tokens = [tokenizer.id_to_token(frame[0]) if frame else "nothing" for frame in after]
        raise chat.error(
            f"does not end every answer with the same special token (but with {', '.join(map(repr, tokens))})"
        )
    first = template.parts[0]
    ends_with_text = first.endswith("_text") and separator(first, template) is None
    if ends_with_text and not all(added & {*frame[:1]} for frame in ids.before_assistant):
        raise chat.error("does not end a message of the user with a special token")
    return ids.closing[0]


def lay_out_messages(ids: ChatIds, tokens: TemplateTokens, template: Template, place: int) -> tuple[Piece, ...]:
    """The pieces of an exchange at a place in its row (`place_of`)."""
    separators = {CORRESPOND_TOKEN: tokens.correspond, CONTINUE_TOKEN: tokens.continue_}
    pieces = [Piece(None, as_ids(ids.frames.before_user[place]))]
    for part in template.parts:
        if part == template.parts[1]:
            pieces.append(Piece(None, as_ids(ids.frames.before_assistant[place])))
        pieces.append(Piece(part))
        if part == template.parts[-1]:
            pieces.append(Piece(part, as_ids([ids.stop_id])))
        elif (token := separator(part, template)) is not None:
            pieces.append(Piece(part, as_ids([separators[token]])))
    return tuple(pieces)


def make_chat_form(tokenizer: Tokenizer, tokens: TemplateTokens, template: Template, frames: ChatFrames) -> RowForm:
    """The form of rows in a chat template; `tokenizer` is without padding and truncation."""
    first, second, *_ = template.parts
    texts, ids = frames.texts, frames.ids.frames
    exchanges = tuple(lay_out_messages(frames.ids, tokens, template, place) for place in range(len(ids.before_user)))

    def surround(part: str, place: int) -> Surroundings:
        """What stands around a text up to the nearest special tokens."""
        before = CORRESPOND_TOKEN
        before_ids: Ids = (tokens.correspond,)
        if part == first:
            stops = () if place < 2 else (frames.ids.stop_id,)  # of the exchange before it
            before, before_ids = texts.before_user[place], (*stops, *ids.before_user[place])
        elif part == second:
            before, before_ids = before + texts.before_assistant[place], before_ids + ids.before_assistant[place]
        stop = exchanges[place][[piece.part for piece in exchanges[place]].index(part) + 1]
        assert stop.ids is not None  # a fixed piece follows every part
        after_id = int(stop.ids[0])
        after = tokenizer.id_to_token(after_id)
        assert after is not None  # an added token
        is_at_end = part == template.parts[-1] or stop.part is None  # of its message
        return Surroundings(
            before,
            before_ids,
            after,
            (after_id,),
            strips_left=frames.strips and part in (first, second),
            strips_right=frames.strips and is_at_end,
        )

    surroundings = {
        (part, place): surround(part, place)
        for part in template.parts
        if part.endswith("_text")
        for place in range(len(exchanges))
    }
    return RowForm(NO_IDS, exchanges, as_ids(ids.closing), surroundings)
