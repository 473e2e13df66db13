"""Write the page: one HTML file with its style, script, data and audio, which fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from usdm_sft.corpus.published_lists import DAILYTALK
from usdm_sft.folder.card import DAILYTALK_METADATA, OTHER_METADATA
from usdm_sft.folder.layout import COUNTS, read_counts, read_layout
from usdm_sft.folder.page.examples import describe_row, list_left_out, spell_tokens
from usdm_sft.folder.page.recordings import Recordings, encode_recording
from usdm_sft.folder.rows import read_rows
from usdm_sft.template.parts import ROW_PARTS
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.utils.files import replace_text

UNITS_PER_SECOND = 50

# Shown in the header where counts.json has them.
_COUNTS = ("dialogs", "rows", "hours", "tokens", "labelled_tokens")


def write_page(
    dataset_dir: str | Path,
    html: str | Path,
    *,
    split: str = "train",
    index: int = 0,
    num_examples: int = 20,
    data_dir: str | Path | None = None,
) -> int:
    """Write one self-contained HTML page of examples.

    Args:
        dataset_dir: A folder that `prepare` made.
        html: The page to write; an existing file is replaced.
        split: Split of the rows.
        index: First row.
        num_examples: Number of rows.
        data_dir: The corpus of the folder (the `data_dir` of `prepare`) or its manifest; adds the audio of both sides.

    Returns:
        The number of rows on the page.

    Raises:
        FileNotFoundError: The folder, or an audio file below `data_dir`, is missing.
        IndexError: The split has fewer rows.
        ValueError: The folder has no such split, or a row is damaged.
    """
    counts = read_counts(dataset_dir)
    rows = read_rows(dataset_dir, split, index, num_examples)
    tokenizer = load_tokenizer(str(Path(dataset_dir) / "tokenizer")).backend_tokenizer
    layout = read_layout(Path(dataset_dir) / COUNTS, counts)
    examples = [describe_row(row, layout) for row in rows]
    recordings = [] if data_dir is None else _add_recordings(examples, rows, data_dir, split, counts)
    page = Path(html).expanduser()
    data = {
        "examples": examples,
        "recordings": recordings,
        "pieces": spell_tokens(examples, tokenizer, layout),
        "parts": {name: ROW_PARTS[name] for name in ("frame", *layout.template.parts)},
        "left_out": list_left_out(counts["splits"][split]),
        "first_unit": layout.tokens.unit_0,
        "units_per_second": UNITS_PER_SECOND,
    }
    replace_text(page, _render(data, split, counts, _links(Path(dataset_dir), page)))
    return len(rows)


def _add_recordings(
    examples: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    data_dir: str | Path,
    split: str,
    counts: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Give each turn the position of its recording; returns the recordings, each of which is stored once."""
    corpus = Recordings(data_dir, split, counts["settings"])
    positions: dict[str, int] = {}
    recordings: list[dict[str, Any]] = []
    for example, row in zip(examples, rows, strict=True):
        for turn, utterance in zip(example["turns"], corpus.of_row(row), strict=False):
            if utterance.audio not in positions:
                positions[utterance.audio] = len(recordings)
                recordings.append(encode_recording(utterance.audio))
            turn["recording"] = positions[utterance.audio]
    return recordings


def _render(data: Mapping[str, Any], split: str, counts: Mapping[str, Any], links: Sequence[tuple[str, str]]) -> str:
    """The HTML. Texts of the data are part of a JSON block and of no markup."""
    assets = importlib.resources.files("usdm_sft.dataset_card")
    template, style, script = (
        (assets / f"page.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    metadata = DAILYTALK_METADATA if counts.get("corpus") == DAILYTALK else OTHER_METADATA
    return environment.from_string(template).render(
        name=metadata["pretty_name"],
        config=counts["config"],
        split=split,
        num_examples=len(data["examples"]),
        counts={name: counts["splits"][split].get(name) for name in _COUNTS},
        settings=_flatten(counts["settings"]),
        versions=counts.get("versions") or {},
        links=links,
        policy="; ".join(
            [
                "default-src 'none'",
                f"script-src '{_digest(script)}'",
                f"style-src '{_digest(style)}'",
                "base-uri 'none'",
                "form-action 'none'",
            ]
        ),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_to_json(data)),
    )


def _flatten(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings with a value, those of the template with its prefix, as text."""
    template = {f"template.{name}": value for name, value in settings["template"].items()}
    flat = {name: value for name, value in settings.items() if name != "template"} | template
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in flat.items()
        if value is not None
    }


def _links(dataset_dir: Path, page: Path) -> list[tuple[str, str]]:
    """Name and relative address of the card and the counts; none where the address would name other folders."""
    try:
        folder = Path(os.path.relpath(dataset_dir.expanduser(), page.parent)).as_posix()
    except ValueError:  # another drive of Windows
        return []
    if folder.startswith(".."):
        return []
    return [(title, f"{folder}/{name}") for title, name in (("dataset card", "README.md"), ("counts", COUNTS))]


def _to_json(data: Mapping[str, Any]) -> str:
    """JSON that is the same text inside a script block: it has no "<", ">" and "&"."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
