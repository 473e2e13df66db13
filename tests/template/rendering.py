"""The text of the template, written independently of the encoder's ids."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from usdm_sft.template.chat import make_messages
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.exchanges import values_have_lists
from usdm_sft.template.row_form import Surroundings


def stand_for(rows: Sequence[Sequence[int]], texts: Sequence[str], encoder: TemplateEncoder) -> list[bool]:
    """True for each row whose ids stand for its text: they decode to it, or are those of the whole text of a chat template."""
    if encoder.template.tokenization == "chat":
        encoded = encoder._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [list(ids) == whole.ids for ids, whole in zip(rows, encoded, strict=True)]
    return [found == text for found, text in zip(encoder.decode_batch(rows), texts, strict=True)]


def render(row: Mapping[str, Any], encoder: TemplateEncoder) -> str:
    """The text of the template for one row, written independently of the encoder's ids.

    Args:
        row: The columns of the template's parts.
        encoder: Has the words of the template, and says how a text comes back from its ids.
    """
    template = encoder.template
    values = {part: row[part] for part in template.parts}
    if not values_have_lists(values):
        values = {part: [value] for part, value in values.items()}
    exchanges = [
        {
            part: template.fold_case(value) if isinstance(value, str) else _unit_tokens(value)
            for part, value in zip(template.parts, exchange, strict=True)
        }
        for exchange in zip(*values.values(), strict=True)
    ]
    if template.tokenization == "chat":
        return encoder._frames.chat.render(make_messages(exchanges, template))[0]

    def spell(text: str) -> str:
        """The text as it comes back from its ids; a tokenizer may change it, for example to lower case."""
        if template.tokenization == "reference":
            return text.replace("▁", " ")  # the tokenizer encodes both alike
        return encoder._text_encoder.decode_batch(encoder._text_encoder.encode([text], [Surroundings()]))[0]

    blocks = []
    for exchange in exchanges:
        parts = {part: spell(text) if part.endswith("_text") else text for part, text in exchange.items()}
        turns = [
            (heading, "<|correspond|>".join(parts[name] for name in names if name in parts))
            for heading, names in (
                (template.user_heading.strip("\n"), ("user_units", "user_text")),
                (template.agent_heading.strip("\n"), ("agent_text", "agent_units")),
            )
            if any(name in parts for name in names)
        ]
        blocks.append("\n" + "".join(f"{spell(heading)}\n{turn}\n" for heading, turn in turns))
    instruction = "\n".join(spell(line) for line in template.instruction.split("\n"))
    return f"{instruction}{''.join(blocks)}{encoder.decode(encoder.tokens.closing)}"


def _unit_tokens(units: Iterable[int]) -> str:
    return "".join(f"<|unit{unit}|>" for unit in units)
