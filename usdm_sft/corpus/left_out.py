"""Stop with a list of all bad audio, or leave out the pairs that use it.

Nothing replaces a bad utterance. A dialog with a bad utterance in the middle is cut into the parts before and after it, under
the same id.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_sft.audio.addresses import MISSING
from usdm_sft.audio.digests import AudioDigest, audio_digests
from usdm_sft.audio.reading import AudioError
from usdm_sft.corpus.dialogs import Dialog, Split
from usdm_sft.corpus.problems import join_problems

if TYPE_CHECKING:
    from usdm_sft.utils.pool import Pool

ALL_BAD = "each of its pairs has bad audio"
ON_BAD_AUDIO = ("error", "skip")

_REMEDY = "replace the file, or leave out its pairs with --on_bad_audio skip"


def check_option(on_bad_audio: str) -> None:
    """Check the option `on_bad_audio`.

    Raises:
        ValueError: It is unknown.
    """
    if on_bad_audio not in ON_BAD_AUDIO:
        raise ValueError(f"on_bad_audio {on_bad_audio!r} is unknown: choose one of {', '.join(ON_BAD_AUDIO)}")


def screen_audio(
    splits: Mapping[str, Split], on_bad_audio: str, cache_dir: str | Path | None, pool: "Pool | None" = None
) -> tuple[dict[str, Split], dict[str, AudioDigest]]:
    """Check all audio of a corpus, and leave out the pairs with bad audio.

    Args:
        splits: The corpus.
        on_bad_audio: "error" or "skip".
        cache_dir: Where digests are remembered; this package's cache by default.
        pool: Shares out the recordings that are not remembered.

    Returns:
        The splits, and path -> digest of every recording that they use, in order.

    Raises:
        FileNotFoundError: Files are missing, and nothing else is wrong.
        AudioError: Audio is bad, and `on_bad_audio` is "error" or a split has no pair left. The message has a line for each of
            the first 20 files.
    """
    found = audio_digests(list_addresses(splits), cache_dir, pool=pool)
    problems = {address: digest.problem for address, digest in found.items() if digest.problem is not None}
    if not problems:
        return dict(splits), found
    bad: dict[str, str] = {}
    lines: dict[str, str] = {}
    for utterance in (each for split in splits.values() for each in split.utterances() if each.audio in problems):
        bad[utterance.id] = problem = problems[utterance.audio]
        lines[utterance.id] = f"utterance {utterance.id}: audio file {utterance.audio} {problem}"
    if on_bad_audio == "error":
        error = FileNotFoundError if all(each.startswith(MISSING) for each in bad.values()) else AudioError
        raise error(join_problems([f"{line}: {_REMEDY}" for line in lines.values()]))
    left = {name: leave_out(split, bad) for name, split in splits.items()}
    for name, split in left.items():
        if not split.dialogs:
            head = f"bad audio leaves no pair of {name}: replace files, or name another split list"
            own = [lines[each.id] for each in splits[name].utterances() if each.id in lines]
            raise AudioError(join_problems([head, *own]))
    return left, {address: found[address] for address in list_addresses(left)}


def list_addresses(splits: Mapping[str, Split]) -> list[str]:
    """Return the address of each utterance that has a recording."""
    return [utterance.audio for split in splits.values() for utterance in split.utterances() if utterance.audio]


def leave_out(split: Split, bad: Mapping[str, str]) -> Split:
    """Leave out the pairs that have a bad utterance.

    Args:
        split: A split.
        bad: Utterance id -> what is wrong with its audio.
    """
    dialogs: list[Dialog] = []
    left_out = dict(split.left_out)
    pairs_left_out: dict[str, str] = {}
    for dialog in split.dialogs:
        parts = [
            replace(dialog, utterances=tuple(run))
            for is_bad, run in groupby(dialog.utterances, key=lambda utterance: utterance.id in bad)
            if not is_bad
        ]
        parts = [part for part in parts if any(part.pairs())]
        dialogs += parts
        if not parts:
            left_out[dialog.id] = ALL_BAD
        for pair in dialog.pairs():
            if reasons := [f"audio of {each.id}: {bad[each.id]}" for each in pair if each.id in bad]:
                pairs_left_out[f"{dialog.id}_{pair[0].turn}"] = "; ".join(reasons)
    return replace(split, dialogs=dialogs, left_out=left_out, pairs_left_out=pairs_left_out)


def corpus_digest(lists: Mapping[str, str], audio: Mapping[str, AudioDigest], splits: Mapping[str, Split]) -> str:
    """Return the sha256 of a JSON list: digests of the lists by split, digests of the audio, pairs left out of each split."""
    left_out = [dict(split.pairs_left_out) for split in splits.values() if split.pairs_left_out]
    content = json.dumps([dict(lists), [digest.sha256 for digest in audio.values()], *left_out])
    return hashlib.sha256(content.encode()).hexdigest()
