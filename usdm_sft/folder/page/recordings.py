"""The recordings of a corpus for the page: found for each row, compressed, and with the peaks of the waveform."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from usdm_sft.audio.frames import SAMPLE_RATE
from usdm_sft.audio.reading import read_waveform
from usdm_sft.corpus import manifest
from usdm_sft.corpus.dialogs import Utterance
from usdm_sft.corpus.examples import first_turn
from usdm_sft.corpus.find import find_lists
from usdm_sft.corpus.read import Rules, read_corpus

PEAK_SAMPLES = 160  # 100 peaks per second, two per unit

_OTHER_CORPUS = "name the corpus that the folder was made from"


class Recordings:
    """The recordings of a corpus. Paths come from the corpus only, never from the rows, which may be untrusted.

    Args:
        data_dir: The corpus of a dataset folder, or its manifest.
        split: Split of the rows.
        settings: The settings in counts.json of the folder.

    Raises:
        FileNotFoundError: The corpus has no list of the split.
    """

    def __init__(self, data_dir: str | Path, split: str, settings: Mapping[str, Any]):
        rules = Rules(settings.get("agent"), settings.get("merge_speaker_turns", False))
        self._name, self._history = data_dir, settings["history"]
        corpus = read_corpus({split: _find_list(data_dir, split)}, rules, data_dir=data_dir)
        self._dialogs = {dialog.id: dialog.utterances for dialog in corpus[split].dialogs}

    def of_row(self, row: Mapping[str, Any]) -> Iterator[Utterance]:
        """Yield the utterances of a row in the order of the turns, the user's and the agent's in turn.

        Raises:
            FileNotFoundError: The corpus has no such dialog or turn.
        """
        num_exchanges = len(row["user_text"]) if isinstance(row["user_text"], list) else 1
        utterances = self._dialogs.get(row["dialog_id"], ())
        last = next((place for place, utterance in enumerate(utterances) if utterance.turn == row["turn"]), None)
        if last is None:
            raise FileNotFoundError(f"{self._name} has no turn {row['id']}: {_OTHER_CORPUS}")
        first = first_turn(last, num_exchanges, self._history)
        yield from utterances[first : first + 2 * num_exchanges]


def encode_recording(address: str) -> dict[str, Any]:
    """Read and compress a recording.

    MP3 is what Chromium, Firefox and Safari all play; it takes about 7 kB per second of speech. The units of the page stay
    those of the original.

    Args:
        address: Address of the recording (`usdm_sft.audio.addresses`).

    Returns:
        `audio`, an MP3 file at 16 kHz, mono, in base64; `peaks`, base64 of one uint8 per 10 ms, relative to the loudest;
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
        "peaks": base64.b64encode(find_peaks(samples).tobytes()).decode(),
        "seconds": round(len(samples) / SAMPLE_RATE, 4),
    }


def find_peaks(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The largest magnitude of every 10 ms, as a share of the largest of all: 255 is the loudest, 0 is silence.

    Args:
        samples: (num_samples,) at 16 kHz.
    """
    loud = np.abs(np.pad(samples, (0, -len(samples) % PEAK_SAMPLES))).reshape(-1, PEAK_SAMPLES).max(axis=1)
    peaks: npt.NDArray[np.uint8] = np.round(loud / max(loud.max(initial=0), 1e-9) * 255).astype(np.uint8)
    return peaks


def _find_list(data_dir: str | Path, split: str) -> Path:
    """The split list or manifest of a split."""
    if manifest.RECIPE.reads(Path(data_dir)):
        return Path(data_dir)
    lists = find_lists(data_dir)
    if split not in lists:
        raise FileNotFoundError(f"{data_dir} has no list of {split}: {_OTHER_CORPUS}")
    return lists[split]
