"""The HTML page of examples: text, units, labels and sound. `write_page` writes a self-contained one, which fetches nothing.

`usdm_sft.folder.serve` makes the same page for a whole folder, whose Parquet files the page reads.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import soundfile
from markupsafe import Markup
from tokenizers import Tokenizer

from usdm_sft.audio.digests import check_audio
from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.audio.reading import read_waveform
from usdm_sft.corpus.dailytalk import DAILYTALK
from usdm_sft.corpus.examples import first_turn
from usdm_sft.corpus.features import ROLES, SPEECH, TEXTS, are_collapsed
from usdm_sft.corpus.find import find_lists
from usdm_sft.corpus.left_out import clip_address
from usdm_sft.corpus.read import Rules, read_corpus
from usdm_sft.corpus.remote import fetch_addresses
from usdm_sft.corpus.unit_reader import UnitReader
from usdm_sft.folder.layout import COUNTS, read_counts, read_layout
from usdm_sft.folder.own_parts import DAILYTALK_METADATA, OTHER_METADATA
from usdm_sft.folder.rows import expand_rows, read_rows
from usdm_sft.template.config import PARTS
from usdm_sft.template.parts import ROW_PARTS, RowLayout, find_parts
from usdm_sft.template.special_tokens import NEWLINE_TOKENS
from usdm_sft.template.streams import read_streams
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.utils.files import replace_text
from usdm_sft.utils.texts import format_hours, printable

PEAKS_PER_UNIT = 2

# Shown in the header where counts.json has them.
_COUNTS = ("dialogs", "rows", "hours", "tokens", "labelled_tokens")
ASSETS = importlib.resources.files("usdm_sft.dataset_card")
_OTHER_CORPUS = "name the corpus that the folder was made from"


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
    layout = read_layout(Path(dataset_dir).expanduser() / COUNTS, counts)
    examples = [_describe_row(row, layout) for row in rows]
    recordings: list[dict[str, Any]] = []
    if data_dir is not None:
        recordings = _add_recordings(examples, rows, CorpusRecordings(data_dir, split, counts))
    page = Path(html).expanduser()
    ids = np.array(sorted({token_id for example in examples for token_id in example["ids"]}), np.int64)
    data = {
        **describe_split(counts, split, layout),
        "examples": examples,
        "recordings": recordings,
        "pieces": spell_ids(ids[~layout.is_unit(ids)].tolist(), tokenizer),
    }
    replace_text(page, render(data, split, counts, _links(Path(dataset_dir), page)))
    return len(rows)


def describe_split(counts: Mapping[str, Any], split: str, layout: RowLayout) -> dict[str, Any]:
    """Return what the page shows of a split besides its rows."""
    left_out = [counts["splits"][split].get(name) or {} for name in ("dialogs_left_out", "pairs_left_out")]
    return {
        "key": counts["key"],
        "parts": {name: ROW_PARTS[name] for name in ("frame", *layout.template.parts)},
        "left_out": [[name, str(reason)] for reasons in left_out for name, reason in reasons.items()],
        "first_unit": layout.tokens.unit_0,
        "num_units": layout.tokens.num_units,
        "units_per_second": read_streams(counts).units_per_second,
    }


def _describe_row(row: Mapping[str, Any], layout: RowLayout) -> dict[str, Any]:
    """Return a row of a dataset folder as the page shows it.

    Returns:
        `id`; `turns`, user and agent in turn, each with `left_out`, those of text and units that the template leaves out; `ids` and
        `labels`; `parts`, the runs of tokens of one part as [name, first token, number of tokens].

    Raises:
        ValueError: The numbers of ids and labels differ.
    """
    row = expand_rows(row) if are_collapsed(row) else row  # each unit of a turn lasts as long as the others
    ids, labels = row["input_ids"], row["labels"]
    if len(ids) != len(labels):
        raise ValueError(f"a row has {len(ids)} input_ids, but {len(labels)} labels: verify its folder")
    names, parts, start = tuple(ROW_PARTS), [], 0
    for part, run in groupby(find_parts(ids, layout).tolist()):
        parts.append([names[part], start, length := len(list(run))])
        start += length
    is_list = isinstance(row["user_text"], list)
    turns = []
    for exchange in range(len(row["user_text"]) if is_list else 1):
        for role in ROLES:
            left_out = [name for name in ("text", "units") if f"{role}_{name}" not in layout.template.parts]
            values = {name: row[f"{role}_{name}"] for name in (*TEXTS, *SPEECH)}
            turn = {name: value[exchange] if is_list else value for name, value in values.items()}
            turns.append({"role": role, "left_out": left_out} | turn)
    return {"id": row["id"], "turns": turns, "ids": ids, "labels": labels, "parts": parts}


def spell_ids(ids: Iterable[int], tokenizer: Tokenizer) -> dict[int, str]:
    """Spell ids with nothing hidden."""

    def spell(token_id: int) -> str:
        token = tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return f"no token {token_id}"
        return "⏎" if token in NEWLINE_TOKENS else printable(token)

    return {token_id: spell(token_id) for token_id in ids}


class CorpusRecordings:
    """Finds the recordings of rows in the corpus of a folder. Paths come from the corpus only, never from the rows, which may be untrusted.

    Args:
        data_dir: The corpus of the folder (the `data_dir` of `prepare`) or its manifest.
        split: Split of the rows.
        counts: The content of counts.json.

    Raises:
        FileNotFoundError: The corpus has no list of the split.
    """

    def __init__(self, data_dir: str | Path, split: str, counts: Mapping[str, Any]):
        settings, streams, is_given = counts["settings"], read_streams(counts), counts.get("unit_model") is None
        lists = find_lists(data_dir, corpus=(kind := settings.get("corpus")), with_units=is_given)
        listed = "train" if split == "validation" and "val_dialogs" in settings else split
        is_file = Path(data_dir).is_file() and len(lists) == 1  # one file, whatever the name of the split
        corpus = next(iter(lists.values())) if is_file else lists.get(listed)
        if corpus is None:
            raise FileNotFoundError(f"{data_dir} has no list of {split}: {_OTHER_CORPUS}")
        has_text = any(part.endswith("_text") for part in settings["template"].get("parts", PARTS))
        rules = Rules.of({**settings, "keep_columns": None, "needs_text": has_text})
        reader = UnitReader(streams.rate, streams.num_units, streams.streams) if is_given else None
        read = read_corpus({split: Path(corpus)}, rules, data_dir=data_dir, units=reader, corpus=kind)
        self.data_dir, self._history, self._clips = data_dir, settings["history"], rules.on_bad_rows == "clip"
        self._measure = cache(lambda file: (check := check_audio(file)).frames / max(check.rate, 1))
        self._units_per_second = streams.units_per_second
        self._dialogs = {dialog.id: dialog.utterances for dialog in read[split].dialogs}

    def find(self, row: Mapping[str, Any], num_turns: int) -> list[str]:
        """Return the address of the recording of each turn of a row, "" for a turn that has units alone.

        Args:
            row: `id`, `dialog_id` and `turn`.
            num_turns: Number of its turns.

        Raises:
            FileNotFoundError: The corpus has no such dialog or turn.
        """
        utterances = self._dialogs.get(row["dialog_id"], ())
        last = next((place for place, utterance in enumerate(utterances) if utterance.turn == row["turn"]), None)
        if last is None:
            raise FileNotFoundError(f"{self.data_dir} has no turn {row['id']}: {_OTHER_CORPUS}")
        first = first_turn(last, num_turns // 2, self._history)
        return [utterance.audio for utterance in utterances[first : first + num_turns]]

    def encode(self, address: str) -> dict[str, Any]:
        """Read and compress a recording. Same result and errors as `_encode_recording`."""
        address = fetch_addresses([address]).get(address, address)
        address = clip_address(address, self._measure) if self._clips else address
        return _encode_recording(address, self._units_per_second)


def _add_recordings(
    examples: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], corpus: CorpusRecordings
) -> list[dict[str, Any]]:
    """Give each turn the position of its recording; returns the recordings, each of which is stored once.

    Raises:
        FileNotFoundError: The corpus has no such dialog or turn, or no recordings.
    """
    positions: dict[str, int] = {}  # of the addresses of recordings
    recordings: list[dict[str, Any]] = []
    for example, row in zip(examples, rows, strict=True):
        addresses = corpus.find(row, len(example["turns"]))
        for turn, address in zip(example["turns"], addresses, strict=False):
            if not address:  # it has units alone
                continue
            turn["recording"] = positions.setdefault(address, len(positions))
            if turn["recording"] == len(recordings):
                recordings.append(corpus.encode(address))
    if not recordings:
        raise FileNotFoundError(f"{corpus.data_dir} has no recordings of these rows: leave out data_dir")
    return recordings


def _encode_recording(address: str, units_per_second: float) -> dict[str, Any]:
    """Read and compress a recording.

    MP3 is what Chromium, Firefox and Safari all play; it takes about 7 kB per second of speech. The units of the page stay
    those of the original.

    Returns:
        `audio`, an MP3 file at 16 kHz, mono, in base64; `peaks`, base64 of two uint8 per unit, relative to the loudest;
        `seconds`, the length before compression.

    Raises:
        FileNotFoundError: The recording does not exist.
        AudioError: It cannot be read.
    """
    samples = read_waveform(address)
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return {
        "audio": base64.b64encode(file.getvalue()).decode(),
        "peaks": base64.b64encode(find_peaks(samples, units_per_second).tobytes()).decode(),
        "seconds": round(len(samples) / SAMPLE_RATE, 4),
    }


def find_peaks(samples: npt.NDArray[np.float32], units_per_second: float) -> npt.NDArray[np.uint8]:
    """The largest magnitude of every half of a unit, as a share of the largest of all: 255 is the loudest, 0 is silence.

    Args:
        samples: (num_samples,) at 16 kHz, at least one.
        units_per_second: Number of units in a second.
    """
    per_peak = SAMPLE_RATE / (PEAKS_PER_UNIT * units_per_second)
    starts = (np.arange(math.ceil(len(samples) / per_peak)) * per_peak).astype(np.int64)
    loud = np.maximum.reduceat(np.abs(samples), np.minimum(starts, len(samples) - 1))
    peaks: npt.NDArray[np.uint8] = np.round(loud / max(loud.max(initial=0), 1e-9) * 255).astype(np.uint8)
    return peaks


def render(
    data: Mapping[str, Any],
    split: str,
    counts: Mapping[str, Any],
    links: Sequence[tuple[str, str]],
    sources: Sequence[str] | None = None,
    scripts: Sequence[str] = (),
) -> str:
    """Return the HTML. Texts of the data are part of a JSON block and of no markup.

    Args:
        data: What page.js reads.
        split: The split of the rows.
        counts: The content of counts.json.
        links: Name and address of each link in the header.
        sources: Where a page whose rows are in a folder reads files, as in a Content-Security-Policy; None if it reads nothing.
        scripts: Addresses of the modules that such a page loads; they are fetched all at once, before one asks for the next.
    """
    template, style, script = (
        (ASSETS / f"page.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    metadata = DAILYTALK_METADATA if counts.get("corpus") == DAILYTALK else OTHER_METADATA
    # The same text inside a script block as JSON alone: it has no "<", ">" and "&".
    block = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    block = block.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    policy = ["default-src 'none'", f"script-src '{_digest(script)}'", f"style-src '{_digest(style)}'"]
    if sources is not None:
        policy[1] += " 'self'"  # folder.js and the reader of Parquet
        policy.append(f"connect-src {' '.join(sources)}")
    return environment.from_string(template).render(
        name=metadata["pretty_name"],
        config=counts["config"],
        split=split,
        title=f"{len(data['examples'])} examples of {split}" if sources is None else split,
        counts={name: counts["splits"][split].get(name) for name in _COUNTS},
        settings=_flatten(counts["settings"]),
        versions=counts.get("versions") or {},
        links=links,
        scripts=scripts,
        hours=format_hours,
        policy="; ".join([*policy, "base-uri 'none'", "form-action 'none'"]),
        style=Markup(style),
        script=Markup(script),
        data=Markup(block),
    )


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _flatten(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings with a value, those of the template with its prefix, as text."""
    flat = {name: value for name, value in settings.items() if name != "template"}
    flat |= {f"template.{name}": value for name, value in settings["template"].items()}
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
