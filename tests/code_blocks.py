"""Find the code blocks of README.md and docs/, and make a folder with small versions of the files that they use.

A block runs unchanged, unless an HTML comment on the line before it says otherwise:

    <!-- not run: REASON -->     another test covers the block, or it cannot run here
    <!-- names: a, b -->         the test that runs the block defines these names
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from tests.helpers import DEMO, REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
MARKER = re.compile(r"<!-- (not run|names): (.+) -->")
_BLOCK = re.compile(r"(?:^(<!-- [^\n]* -->)\n)?^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A code block with its page, first line, language, and the comment before it."""

    page: str
    line: int
    language: str
    marker: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def find_blocks(language: str) -> list[Block]:
    """Return the blocks of all pages in one language."""
    blocks = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(2)) + 1
            page = path.relative_to(REPOSITORY).as_posix()
            blocks.append(Block(page, line, match[2], match[1] or "", match[3]))
    return [block for block in blocks if block.language == language]


def find_code(word: str) -> str:
    """Return the code of the only Python block that contains `word`."""
    [block] = [block for block in find_blocks("python") if word in block.code]
    return block.code


def make_workplace(root: Path, dataset_folder: Path, unit_model: Path, model) -> Path:
    """Fill a folder with the files that the pages use: data, configs, a unit model, and `model` as naver-ai/USTM."""
    from usdm_sft.folder.export import export
    from usdm_sft.template.tokenizer import load_tokenizer

    shutil.copytree(dataset_folder, root / "dailytalk-usdm-data")
    shutil.copytree(unit_model, root / "unit_model")
    shutil.copytree(REPOSITORY / "configs", root / "configs")
    shutil.copytree(DEMO / "corpus", root / "DailyTalk")
    shutil.copytree(DEMO / "expected", root / "preprocessed")
    shutil.copy(DEMO / "corpus" / "data" / "3" / "0_0_d3.wav", root / "hello.wav")
    export(dataset_folder, root / "arrow", format="arrow")
    model.save_pretrained(root / "naver-ai" / "USTM")
    load_tokenizer(dataset_folder / "tokenizer").save_pretrained(root / "naver-ai" / "USTM")
    return root


def small_environment() -> dict[str, str]:
    """Return the environment of a process that trains on the CPU."""
    small = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | small | {"PYTHONPATH": str(REPOSITORY)}
