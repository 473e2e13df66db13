"""The text of the template, written independently of the encoder's ids."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.exchanges import has_lists


def stand_for(rows: Sequence[Sequence[int]], texts: Sequence[str], encoder: TemplateEncoder) -> list[bool]:
    """True for each row whose ids stand for its text: they decode to it, or are those of the whole text of a chat template."""
    if encoder.template.tokenization == "chat":
        encoded = encoder.encode_whole(texts)
        return [list(ids) == whole for ids, whole in zip(rows, encoded, strict=True)]
    return [found == text for found, text in zip(encoder.decode_batch(rows), texts, strict=True)]


def render(row: Mapping[str, Any], encoder: TemplateEncoder) -> str:
    """The text of the template for one row, written independently of the encoder's ids.

    Args:
        row: The columns of the template's parts.
        encoder: Has the words of the template, and says how a text comes back from its ids.
    """
    template = encoder.template
    values = {part: row[part] for part in template.parts}
    if not has_lists(values):
        values = {part: [value] for part, value in values.items()}
    exchanges = [
        {
            part: template.fold_case(value) if isinstance(value, str) else _unit_tokens(value)
            for part, value in zip(template.parts, exchange, strict=True)
        }
        for exchange in zip(*values.values(), strict=True)
    ]
    if template.tokenization == "chat":
        return encoder.render_chat(exchanges)
    blocks = []
    for exchange in exchanges:
        parts = {part: encoder.spell(text) if part.endswith("_text") else text for part, text in exchange.items()}
        turns = [
            (heading, "<|correspond|>".join(parts[name] for name in names if name in parts))
            for heading, names in (
                (template.user_heading.strip("\n"), ("user_units", "user_text")),
                (template.agent_heading.strip("\n"), ("agent_text", "agent_units")),
            )
            if any(name in parts for name in names)
        ]
        blocks.append("\n" + "".join(f"{encoder.spell(heading)}\n{turn}\n" for heading, turn in turns))
    instruction = "\n".join(encoder.spell(line) for line in template.instruction.split("\n"))
    return f"{instruction}{''.join(blocks)}{encoder.end}"


def _unit_tokens(units: Iterable[int]) -> str:
    return "".join(f"<|unit{unit}|>" for unit in units)
