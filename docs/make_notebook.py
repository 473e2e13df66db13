"""Make the notebook of an example from its script, whose cells begin with "# %%" or "# %% [markdown]".

python docs/make_notebook.py    # writes examples/steps.ipynb
"""

from __future__ import annotations

import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
_CELL = re.compile(r"^# %%(?P<markdown> \[markdown\])?\n", flags=re.MULTILINE)


def make_notebook(script: str) -> str:
    """Return the notebook, in format 4.5 and without output, of a script in cells."""
    starts = list(_CELL.finditer(script))
    ends = [start.start() for start in starts[1:]] + [len(script)]
    cells = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True), start=1):
        text = script[start.end() : end].strip("\n")
        if start["markdown"]:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        cells.append(_cell(f"cell-{number}", text, is_markdown=bool(start["markdown"])))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _cell(name: str, text: str, *, is_markdown: bool) -> dict[str, object]:
    cell = {"id": name, "metadata": {}, "source": text.splitlines(keepends=True)}
    if is_markdown:
        return {"cell_type": "markdown"} | cell
    return {"cell_type": "code", "execution_count": None, "outputs": []} | cell


if __name__ == "__main__":
    script = (EXAMPLES / "steps.py").read_text(encoding="utf-8")
    (EXAMPLES / "steps.ipynb").write_text(make_notebook(script), encoding="utf-8")
