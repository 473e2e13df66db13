"""Draw the example of the README as an SVG: one row of the template with the labelled tokens highlighted.

    python docs/make_picture.py    # writes docs/example.svg

The row is a line that the unchanged reference wrote for the corpus of the tests, so the picture shows real ids and labels.
"""

from __future__ import annotations

from pathlib import Path

from usdm_sft.folder.example_picture import render_svg
from usdm_sft.template.tokenizer import build_tokenizer

DOCS = Path(__file__).resolve().parent
LINES = DOCS.parent / "usdm_sft" / "cli" / "demo_files" / "expected" / "train.txt"
WORDS = "did you water the plants"  # of the row that is drawn


def read_row(path: Path, words: str, tokenizer) -> tuple[list[int], list[int]]:
    """The ids and labels of the line whose text holds `words`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        input_ids, labels = ([int(value) for value in half.split()] for half in line.split("|"))
        if words in tokenizer.decode(input_ids):
            return input_ids, labels
    raise ValueError(f"{path} has no line with {words!r}: name words of one of its dialogs")


def make_picture() -> str:
    """The text of docs/example.svg."""
    tokenizer = build_tokenizer().backend_tokenizer
    return render_svg(*read_row(LINES, WORDS, tokenizer), tokenizer, narrow=True)


if __name__ == "__main__":
    (DOCS / "example.svg").write_text(make_picture(), encoding="utf-8")
