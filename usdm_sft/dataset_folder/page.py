"""Write examples of a dataset folder to one self-contained HTML page, with their audio if the corpus is given."""

from __future__ import annotations

import base64
import importlib.resources
import io
import mimetypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import soundfile

from usdm_sft.audio.addresses import file_problem, open_file, parse_address
from usdm_sft.audio.reading import read_audio
from usdm_sft.corpus.find import find_manifests, find_split_lists
from usdm_sft.corpus.hub import fetch_corpus, is_hub_corpus
from usdm_sft.corpus.manifest import is_manifest
from usdm_sft.corpus.published_lists import fetch_split_lists
from usdm_sft.corpus.read import Rules, read_corpus
from usdm_sft.dataset_folder.layout import read_counts
from usdm_sft.dataset_folder.rows import read_rows
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.template.view import split_parts, title
from usdm_sft.utils.atomic import replace_text


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
        ValueError: The folder has no such split.
    """
    tokenizer = load_tokenizer(str(Path(dataset_dir) / "tokenizer")).backend_tokenizer
    rows = read_rows(dataset_dir, split, index, num_examples)
    settings = read_counts(dataset_dir)["settings"]
    recordings = None if data_dir is None else _Recordings(data_dir, split, settings)
    examples = [
        {
            "title": title(row),
            "parts": split_parts(row["input_ids"], row["labels"], tokenizer),
            "audio": [] if recordings is None else list(recordings.of_row(row)),
        }
        for row in rows
    ]
    template = importlib.resources.files("usdm_sft.dataset_card") / "examples.html"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template.read_text(encoding="utf-8")).render(split=split, examples=examples)
    replace_text(Path(html).expanduser(), page)
    return len(rows)


_OTHER_CORPUS = "name the corpus that the folder was made from"


class _Recordings:
    """The recordings of a corpus. Paths come from the corpus only, never from the rows, which may be untrusted."""

    def __init__(self, data_dir: str | Path, split: str, settings: Mapping[str, Any]):
        rules = Rules(settings.get("agent"), settings.get("merge_speaker_turns", False))
        self._name, self._history = data_dir, settings["history"]
        audio_dir = None if is_manifest(data_dir) or is_hub_corpus(data_dir) else data_dir
        corpus = read_corpus({split: _find_list(data_dir, split)}, rules, data_dir=audio_dir)
        self._dialogs = {dialog.id: dialog.utterances for dialog in corpus[split].dialogs}

    def of_row(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield name and data URI of every recording of a row, in the order of the turns."""
        num_exchanges = len(row["user_text"]) if isinstance(row["user_text"], list) else 1
        utterances = self._dialogs.get(row["dialog_id"], ())
        last = next((place for place, utterance in enumerate(utterances) if utterance.turn == row["turn"]), None)
        if last is None:
            raise FileNotFoundError(f"{self._name} has no turn {row['id']}: {_OTHER_CORPUS}")
        # A row with history is named after its last pair, every other row after its first.
        first = last - 2 * (num_exchanges - 1) if self._history else last
        for number, utterance in enumerate(utterances[first : first + 2 * num_exchanges]):
            yield f"{('user', 'agent')[number % 2]}, turn {utterance.turn}", _data_uri(utterance.audio)


def _find_list(data_dir: str | Path, split: str) -> Path:
    """The split list or manifest of a split."""
    if is_manifest(data_dir):
        return Path(data_dir)
    if is_hub_corpus(data_dir):
        lists = fetch_corpus(str(data_dir))
    else:
        folder = Path(data_dir).expanduser()
        lists = find_manifests(folder) or find_split_lists(folder) or fetch_split_lists()
    if split not in lists:
        raise FileNotFoundError(f"{data_dir} has no list of {split}: {_OTHER_CORPUS}")
    return lists[split]


def _data_uri(address: str) -> str:
    """A whole file as it is, a stretch of audio as WAV."""
    [stretch, *more] = parse_address(address)
    if stretch.is_whole and not more and not file_problem(stretch.file):
        with open_file(stretch.file) as file:
            member = stretch.file.removeprefix("zip://").partition("::")[0]
            content, kind = file.read(), mimetypes.guess_type(member)[0] or "audio/wav"
    else:
        samples, rate = read_audio(address)
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
        content, kind = buffer.getvalue(), "audio/wav"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
