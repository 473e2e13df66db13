"""Draw one row of a dataset folder as an SVG: its parts by name, with the labelled tokens highlighted."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from tokenizers import Tokenizer

from usdm_sft.template.encoder import IGNORE_INDEX
from usdm_sft.template.parts import FRAME, REFERENCE_LAYOUT, ROW_PARTS, RowLayout, find_parts
from usdm_sft.template.view import split_parts

EXAMPLE = "example.svg"
MAX_SECTIONS = 13  # two exchanges with all parts; later tokens are counted in a last line

COLUMNS, NARROW = 86, 44  # characters in a line of tokens; the second is for a phone
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
    """A run of tokens of one part of the template."""

    name: str
    input_ids: Sequence[int]
    labels: Sequence[int]


def split_sections(
    input_ids: Sequence[int], labels: Sequence[int], layout: RowLayout = REFERENCE_LAYOUT
) -> list[Section]:
    """Cut a row where its parts begin."""
    names = tuple(ROW_PARTS.values())
    sections: list[Section] = []
    start = 0
    for part, run in groupby(find_parts(input_ids, layout).tolist()):
        stop = start + len(list(run))
        name = names[part]
        if part == FRAME:
            name = "instruction" if start == 0 else "end" if stop == len(input_ids) else "heading"
        sections.append(Section(name, input_ids[start:stop], labels[start:stop]))
        start = stop
    return sections


def render_svg(
    input_ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: Tokenizer,
    layout: RowLayout = REFERENCE_LAYOUT,
    *,
    narrow: bool = False,
) -> str:
    """Draw a row, at most its first `MAX_SECTIONS` sections.

    Args:
        input_ids: The ids of a row.
        labels: The labels of the row, -100 where no loss falls.
        tokenizer: A `tokenizers.Tokenizer` that spells the ids.
        layout: Tells the parts of the row.
        narrow: Draw lines of `NARROW` characters below the names of the sections, which are readable on a phone.

    Returns:
        The text of an SVG file.
    """
    labelled = sum(label != IGNORE_INDEX for label in labels)
    title = f"One training example: {len(input_ids)} tokens. The loss counts the {labelled} highlighted ones."
    columns, x = (NARROW, MARGIN) if narrow else (COLUMNS, MARGIN + LABELS)
    body, y = [], MARGIN + SIZE
    for line in textwrap.wrap(title, columns):
        body.append(f'<text class="title" x="{MARGIN}" y="{y}" font-size="14">{escape(line)}</text>')
        y += LINE
    y += 11
    sections = split_sections(input_ids, labels, layout)
    for section in sections[:MAX_SECTIONS]:
        y += 6 if narrow else 0
        body.append(f'<text class="name" x="{MARGIN}" y="{y}">{escape(section.name)}</text>')
        y += LINE if narrow else 0
        for part in split_parts(section.input_ids, section.labels, tokenizer):
            for line in _wrap(part.text, columns):
                body.append(_draw(line, x, y, part.labelled))
                y += LINE
    if more := sum(len(section.input_ids) for section in sections[MAX_SECTIONS:]):
        body.append(f'<text class="name" x="{MARGIN}" y="{y}">… and {more:,} more tokens</text>')
        y += LINE
    width, height = x + columns * CHAR + MARGIN, y - LINE + MARGIN + 4
    size = f' width="{width:g}"' if narrow else ""  # a wide picture fills the page
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg"{size} viewBox="0 0 {width:g} {height:g}" role="img" font-size="{SIZE}" '
        f'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        f'<rect class="back" x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="6"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _wrap(text: str, columns: int) -> Iterator[str]:
    for line in text.splitlines():
        yield from textwrap.wrap(line, columns // 2 if _width(line) > len(line) else columns, drop_whitespace=False)


def _width(line: str) -> int:
    """Columns of a line in a monospaced font; an East Asian wide character takes two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in line)


def _draw(line: str, x: int, y: int, labelled: bool) -> str:
    """One line of tokens; `textLength` fixes its width whatever the font, so that the mark fits it."""
    width = _width(line) * CHAR
    mark = f'<rect class="mark" x="{x - 3:g}" y="{y - 15}" width="{width + 6:g}" height="{LINE - 2}" rx="3"/>'
    text = (
        f'<text class="{"loss" if labelled else "token"}" x="{x}" y="{y}" textLength="{width:g}" xml:space="preserve">'
        f"{escape(line)}</text>"
    )
    return mark + text if labelled else text


def read_example(files: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Read `id`, `input_ids` and `labels` of the first row of the first split, given the Parquet files of each split."""
    [first, *_] = files.values()
    [row] = pq.ParquetFile(first[0]).read_row_group(0, columns=["id", "input_ids", "labels"])[:1].to_pylist()
    return dict(row)


def draw_example(row: Mapping[str, Any], tokenizer: Tokenizer, folder: Path, layout: RowLayout) -> None:
    """Write the picture of a row as the file `EXAMPLE` of a folder. Same other arguments as `render_svg`."""
    svg = render_svg(row["input_ids"], row["labels"], tokenizer, layout)
    (folder / EXAMPLE).write_text(svg, encoding="utf-8", newline="\n")
