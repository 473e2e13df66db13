"""Draw the example of the README as an SVG: one row of the template with the labelled tokens highlighted.

    python docs/make_picture.py    # writes docs/example.svg

The row is a line that the unchanged reference wrote for the corpus of the tests, so the picture shows real ids and labels.
"""

from __future__ import annotations

import textwrap
from html import escape
from pathlib import Path
from typing import NamedTuple

from usdm_sft.template.tokenizer import CORRESPOND, NEWLINE, UNIT_0, build_tokenizer
from usdm_sft.template.view import split_parts

DOCS = Path(__file__).resolve().parent
LINES = DOCS.parent / "usdm_sft" / "demo" / "files" / "expected" / "train.txt"
WORDS = "did you water the plants"  # of the row that is drawn

COLUMNS = 86  # characters in a line of tokens
CHAR, LINE, SIZE = 7.8, 22, 13  # pixels: width of a character, height of a line, size of the font
MARGIN, LABELS = 16, 118  # pixels: border of the picture, width of the names of the sections

# The dark palette follows the system; the background is drawn, so that either palette is readable on any page.
STYLE = """
.back { fill: #ffffff; stroke: #d0d7de } .mark { fill: #fff1b8 } .token { fill: #57606a } .loss { fill: #1f2328; font-weight: 600 }
.name { fill: #57606a; font-family: system-ui, sans-serif } .title { fill: #1f2328; font-family: system-ui, sans-serif }
@media (prefers-color-scheme: dark) {
  .back { fill: #0d1117; stroke: #30363d } .mark { fill: #4d3b00 } .token { fill: #9198a1 } .loss { fill: #f0f6fc }
  .name { fill: #9198a1 } .title { fill: #f0f6fc }
}
"""


class Section(NamedTuple):
    """A stretch of the row: its name, its tokens, and whether the loss counts them."""

    name: str
    input_ids: list[int]
    labels: list[int]


def read_row(path: Path, words: str, tokenizer) -> tuple[list[int], list[int]]:
    """The ids and labels of the line whose text holds `words`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        input_ids, labels = ([int(value) for value in half.split()] for half in line.split("|"))
        if words in tokenizer.decode(input_ids):
            return input_ids, labels
    raise ValueError(f"{path} has no line with {words!r}: name words of one of its dialogs")


def split_sections(input_ids: list[int], labels: list[int]) -> list[Section]:
    """Cut one exchange where its sections begin."""
    user_speech = next(at for at, token_id in enumerate(input_ids) if token_id >= UNIT_0)
    transcript = input_ids.index(CORRESPOND) + 1
    heading = input_ids.index(NEWLINE, transcript) + 1
    answer = input_ids.index(NEWLINE, heading) + 1
    agent_speech = input_ids.index(CORRESPOND, answer) + 1
    starts = {
        "instruction": 0,
        "user's speech": user_speech,
        "transcript": transcript,
        "heading": heading,
        "answer": answer,
        "agent's speech": agent_speech,
        "end": len(input_ids) - 2,
    }
    stops = [*list(starts.values())[1:], len(input_ids)]
    return [
        Section(name, input_ids[start:stop], labels[start:stop])
        for (name, start), stop in zip(starts.items(), stops, strict=True)
    ]


def render_svg(input_ids: list[int], labels: list[int], tokenizer) -> str:
    """Draw one exchange.

    Args:
        input_ids: The ids of a row.
        labels: The labels of the row, -100 where no loss falls.
        tokenizer: A `tokenizers.Tokenizer` that spells the ids.

    Returns:
        The text of an SVG file.
    """
    labelled = sum(label != -100 for label in labels)
    title = f"One training example: {len(input_ids)} tokens. The loss counts the {labelled} highlighted ones."
    body, y = [f'<text class="title" x="{MARGIN}" y="{MARGIN + SIZE}" font-size="14">{escape(title)}</text>'], 62
    for section in split_sections(input_ids, labels):
        body.append(f'<text class="name" x="{MARGIN}" y="{y}">{escape(section.name)}</text>')
        for part in split_parts(section.input_ids, section.labels, tokenizer):
            for line in _wrap(part.text):
                body.append(_draw(line, y, part.labelled))
                y += LINE
    width, height = MARGIN * 2 + LABELS + COLUMNS * CHAR, y - LINE + MARGIN + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" font-size="{SIZE}" '
        f'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        f'<rect class="back" x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="6"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _wrap(text: str) -> list[str]:
    wrapped = [textwrap.wrap(line, COLUMNS, drop_whitespace=False) for line in text.splitlines()]
    return [line for lines in wrapped for line in lines]


def _draw(line: str, y: int, labelled: bool) -> str:
    """One line of tokens; `textLength` fixes its width whatever the font, so that the mark fits it."""
    x, width = MARGIN + LABELS, len(line) * CHAR
    mark = f'<rect class="mark" x="{x - 3:g}" y="{y - 15}" width="{width + 6:g}" height="{LINE - 2}" rx="3"/>'
    text = (
        f'<text class="{"loss" if labelled else "token"}" x="{x}" y="{y}" textLength="{width:g}" xml:space="preserve">'
        f"{escape(line)}</text>"
    )
    return mark + text if labelled else text


def make_picture() -> str:
    """The text of docs/example.svg."""
    tokenizer = build_tokenizer().backend_tokenizer
    return render_svg(*read_row(LINES, WORDS, tokenizer), tokenizer)


if __name__ == "__main__":
    (DOCS / "example.svg").write_text(make_picture(), encoding="utf-8")
