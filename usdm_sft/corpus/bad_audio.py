"""What becomes of bad audio: the run stops with all that is wrong, or the pairs concerned are left out and listed.

Nothing is ever put in the place of an utterance. A dialog with a bad one in the middle goes on as two, before and after it,
under the same id, so that whoever walks dialogs meets good audio only.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from usdm_sft.audio.addresses import MISSING
from usdm_sft.audio.digests import AudioDigest, audio_digests
from usdm_sft.audio.reading import AudioError
from usdm_sft.corpus.dialogs import Dialog, Split
from usdm_sft.corpus.problems import tell_problems

ALL_BAD = "each of its pairs has bad audio"
ON_BAD_AUDIO = ("error", "skip")

_REMEDY = "replace the file, or leave out its pairs with --on_bad_audio skip"


def screen_audio(
    splits: Mapping[str, Split], on_bad_audio: str, cache_dir: str | Path | None
) -> tuple[dict[str, Split], dict[str, AudioDigest]]:
    """The first pass over the audio, and what it leaves of the corpus.

    Args:
        splits: The corpus.
        on_bad_audio: "error" or "skip".
        cache_dir: Where digests are remembered.

    Returns:
        The splits, and path -> digest of every recording that they use, in order.

    Raises:
        FileNotFoundError: All that is wrong is that files are missing.
        AudioError: Audio is bad, and `on_bad_audio` is "error" or nothing is left of a split. The message has a line for each of
            the first 20 files.
        ValueError: `on_bad_audio` is neither.
    """
    if on_bad_audio not in ON_BAD_AUDIO:
        raise ValueError(f"on_bad_audio {on_bad_audio!r} is unknown: choose one of {', '.join(ON_BAD_AUDIO)}")
    utterances = {u.id: u for split in splits.values() for dialog in split.dialogs for u in dialog.utterances}
    paths = {utterance.id: utterance.audio for utterance in utterances.values()}
    found = audio_digests(paths.values(), cache_dir)
    bad = {name: problem for name, path in paths.items() if (problem := found[path].problem) is not None}
    if bad and on_bad_audio == "error":
        error = FileNotFoundError if all(map(_is_missing, bad.values())) else AudioError
        raise error(tell_problems([f"{_name(name, paths)} {problem}: {_REMEDY}" for name, problem in bad.items()]))
    left = {name: leave_out(split, bad) for name, split in splits.items()} if bad else dict(splits)
    for name, split in left.items():
        if not split.dialogs:
            its = {u.id for dialog in splits[name].dialogs for u in dialog.utterances}
            problems = [f"{_name(each, paths)} {problem}" for each, problem in bad.items() if each in its]
            head = f"bad audio leaves no pair of {name}: replace files, or name another split list"
            raise AudioError(tell_problems([head, *problems]))
    used = [paths[u.id] for split in left.values() for dialog in split.dialogs for u in dialog.utterances]
    return left, {path: found[path] for path in used}


def leave_out(split: Split, bad: Mapping[str, str]) -> Split:
    """Leave out the pairs of which an utterance is bad.

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
    return replace(split, dialogs=tuple(dialogs), left_out=left_out, pairs_left_out=pairs_left_out)


def _name(utterance_id: str, paths: Mapping[str, str]) -> str:
    return f"utterance {utterance_id}: audio file {paths[utterance_id]}"


def _is_missing(problem: str) -> bool:
    return problem.startswith(MISSING)
