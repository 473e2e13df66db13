"""Stop with a list of all bad audio, or leave out the pairs that use it, or that use a bad row or a turn of another length than asked for.

Nothing replaces a bad utterance. A dialog with a bad utterance in the middle is cut into the parts before and after it, under
the same id. So is one with a long pause between two turns of one speaker (`Rules.max_gap`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_sft.audio.addresses import MISSING, format_address, parse_address
from usdm_sft.audio.digests import TOO_SHORT, AudioDigest, audio_digests
from usdm_sft.audio.reading import AudioError
from usdm_sft.audio.sound import PAST_END
from usdm_sft.corpus.dialogs import BadRow, Dialog, Split, Utterance
from usdm_sft.corpus.problems import join_problems
from usdm_sft.corpus.read import DAILYTALK, Rules
from usdm_sft.template.streams import UnitStreams

if TYPE_CHECKING:
    from usdm_sft.utils.pool import Pool

ALL_BAD = "each of its pairs has bad audio"
ALL_BAD_ROWS = "each of its pairs has a bad row or bad audio"
# Why turns are left out, as counts.json has it.
_AFTER_END, _TOO_SHORT = "end past the recording", "shorter than 25 ms"
_SHORTER, _LONGER = "shorter than min_seconds", "longer than max_seconds"
ON_BAD_AUDIO = ("error", "skip")

_REMEDY = "replace the file, or leave out its pairs with --on_bad_audio skip"
_END_REMEDY = "correct the end, cut it with --on_bad_rows clip, or leave out its pairs with --on_bad_rows skip"


def check_option(on_bad_audio: str) -> None:
    """Check the option `on_bad_audio`.

    Raises:
        ValueError: It is unknown.
    """
    if on_bad_audio not in ON_BAD_AUDIO:
        raise ValueError(f"on_bad_audio {on_bad_audio!r} is unknown: choose one of {', '.join(ON_BAD_AUDIO)}")


def screen_audio(
    splits: Mapping[str, Split],
    on_bad_audio: str,
    cache_dir: str | Path | None,
    pool: "Pool | None" = None,
    *,
    rules: Rules = DAILYTALK,
    streams: UnitStreams | None = None,
) -> tuple[dict[str, Split], dict[str, AudioDigest]]:
    """Check all audio of a corpus, and leave out the pairs with bad audio, with bad rows, or with turns that the rules leave out.

    Args:
        splits: The corpus.
        on_bad_audio: "error" or "skip".
        cache_dir: Where digests are remembered; this package's cache by default.
        pool: Shares out the recordings that are not remembered.
        rules: The rules that the corpus was read by.
        streams: Of units that the corpus has; None if it has recordings.

    Returns:
        The splits, and path -> digest of every recording that they use, in order.

    Raises:
        FileNotFoundError: Files are missing, and nothing else is wrong.
        AudioError: Audio is bad, and `on_bad_audio` is "error", or a split has no pair left. The message has a line for each of
            the first 20 files.
    """
    found = audio_digests(list_addresses(splits), cache_dir, pool=pool)
    if rules.on_bad_rows == "clip":
        splits, clipped = _clip(splits, found, cache_dir)
        found |= audio_digests(clipped, cache_dir)
    problems = {address: digest.problem for address, digest in found.items() if digest.problem is not None}
    rows: dict[str, BadRow] = {}
    bad: dict[str, str] = {}
    lines: dict[str, str] = {}
    for utterance in (utterance for split in splits.values() for utterance in split.utterances()):
        if (row := utterance.bad or _find_bad_row(utterance, found, rules, streams)) is not None:
            rows[utterance.id] = row
            lines[utterance.id] = f"utterance {utterance.id}: {row.problem}"
        elif utterance.audio in problems:
            bad[utterance.id] = problem = problems[utterance.audio]
            lines[utterance.id] = f"utterance {utterance.id}: audio file {utterance.audio} {problem}"
    if bad and on_bad_audio == "error":
        error = FileNotFoundError if all(each.startswith(MISSING) for each in bad.values()) else AudioError
        raise error(join_problems([f"{lines[each]}: {find_remedy(problem)[0]}" for each, problem in bad.items()]))
    left = {name: leave_out(split, bad, rows) for name, split in splits.items()}
    for name, split in left.items():
        if not split.dialogs:
            what = "bad audio leaves" if not rows else "bad rows, bad audio and lengths leave"
            head = f"{what} no pair of {name}: replace files, or name another split list"
            own = [lines[each.id] for each in splits[name].utterances() if each.id in lines]
            raise AudioError(join_problems([head, *own]))
    return left, {address: found[address] for address in list_addresses(left)}


def find_remedy(problem: str) -> tuple[str, str]:
    """Return the remedy for a problem of audio, and the option that leaves out the turns that have it."""
    return (_END_REMEDY, "on_bad_rows") if problem.startswith(PAST_END) else (_REMEDY, "on_bad_audio")


def list_addresses(splits: Mapping[str, Split]) -> list[str]:
    """Return the address of each utterance that has a recording."""
    return [utterance.audio for split in splits.values() for utterance in split.utterances() if utterance.audio]


def _find_bad_row(
    utterance: Utterance, found: Mapping[str, AudioDigest], rules: Rules, streams: UnitStreams | None
) -> BadRow | None:
    """Return why the rules leave out a turn, or None."""
    digest = found.get(utterance.audio)
    problem = (digest.problem if digest else None) or ""
    if problem.endswith(TOO_SHORT) and rules.min_seconds is not None:
        return BadRow(_SHORTER, problem)
    if rules.on_bad_rows != "error" and (problem.startswith(PAST_END) or problem.endswith(TOO_SHORT)):
        return BadRow(_AFTER_END if problem.startswith(PAST_END) else _TOO_SHORT, problem)
    if problem:
        return None
    if streams is not None and utterance.units is not None:
        seconds = streams.count_seconds(len(utterance.units))
    elif digest is None:
        return None
    else:
        seconds = digest.seconds
    if rules.min_seconds is not None and seconds < rules.min_seconds:
        return BadRow(_SHORTER, f"has {seconds:g} s, less than min_seconds {rules.min_seconds:g}")
    if rules.max_seconds is not None and seconds > rules.max_seconds:
        return BadRow(_LONGER, f"has {seconds:g} s, more than max_seconds {rules.max_seconds:g}")
    return None


def _clip(
    splits: Mapping[str, Split], found: Mapping[str, AudioDigest], cache_dir: str | Path | None
) -> tuple[dict[str, Split], list[str]]:
    """Cut segments at the end of their recording; return the splits and the new addresses."""
    too_long = [address for address, digest in found.items() if (digest.problem or "").startswith(PAST_END)]
    files = dict.fromkeys(segment.file for address in too_long for segment in parse_address(address))
    seconds = {file: digest.seconds for file, digest in audio_digests(files, cache_dir).items()}
    clipped = {address: clip_address(address, seconds.__getitem__) for address in too_long}

    def clip(dialog: Dialog) -> Dialog:
        if not any(utterance.audio in clipped for utterance in dialog.utterances):
            return dialog
        utterances = (replace(each, audio=clipped.get(each.audio, each.audio)) for each in dialog.utterances)
        return replace(dialog, utterances=tuple(utterances))

    return {name: replace(each, dialogs=[*map(clip, each.dialogs)]) for name, each in splits.items()}, [
        *clipped.values()
    ]


def clip_address(address: str, measure: Callable[[str], float]) -> str:
    """Return the address with each segment cut at the end of its recording; a segment that begins after the end stays as it is.

    Args:
        address: An address.
        measure: Returns the seconds of a file.
    """
    segments = [
        segment._replace(end=min(segment.end, seconds))
        if segment.start is not None and segment.end is not None and (seconds := measure(segment.file)) > segment.start
        else segment
        for segment in parse_address(address)
    ]
    return "\n".join(format_address(*segment) for segment in segments)


def leave_out(split: Split, bad: Mapping[str, str], rows: Mapping[str, BadRow] | None = None) -> Split:
    """Leave out the pairs that have a bad utterance.

    Args:
        split: A split.
        bad: Utterance id -> what is wrong with its audio.
        rows: Utterance id -> why it is left out for another reason.
    """
    rows = rows or {}
    dialogs: list[Dialog] = []
    left_out = dict(split.left_out)
    pairs_left_out: dict[str, str] = {}
    num_bad_rows = 0
    for dialog in split.dialogs:
        parts = [replace(dialog, utterances=tuple(run)) for run in _divide(dialog, {*bad, *rows})]
        if [len(part.utterances) for part in parts] == [len(dialog.utterances)]:
            dialogs.append(dialog)
            continue
        parts = [part for part in parts if any(part.pairs())]
        dialogs += parts
        if not parts:
            left_out[dialog.id] = ALL_BAD_ROWS if any(each.id in rows for each in dialog.utterances) else ALL_BAD
        for pair in dialog.pairs():
            audio = [f"audio of {each.id}: {bad[each.id]}" for each in pair if each.id in bad]
            if reasons := [*audio, *(f"row of {each.id}: {rows[each.id].problem}" for each in pair if each.id in rows)]:
                pairs_left_out[f"{dialog.id}_{pair[0].turn}"] = "; ".join(reasons)
                num_bad_rows += not audio
    turns = Counter(rows[each.id].reason for each in split.utterances() if each.id in rows)
    return replace(
        split,
        dialogs=dialogs,
        left_out=left_out,
        pairs_left_out=pairs_left_out,
        turns_left_out=dict(sorted(turns.items())),
        pairs_with_bad_rows=num_bad_rows,
    )


def _divide(dialog: Dialog, bad: set[str]) -> Iterator[list[Utterance]]:
    """Divide the good utterances of a dialog at the bad ones, and at pauses between two turns of one speaker."""
    part: list[Utterance] = []
    for utterance in dialog.utterances:
        if part and (utterance.id in bad or part[-1].speaker == utterance.speaker):
            yield part
            part = []
        if utterance.id not in bad:
            part.append(utterance)
    if part:
        yield part


def corpus_digest(lists: Mapping[str, str], audio: Mapping[str, AudioDigest], splits: Mapping[str, Split]) -> str:
    """Return the sha256 of a JSON list: digests of the lists by split, digests of the audio, pairs left out of each split."""
    left_out = [dict(split.pairs_left_out) for split in splits.values() if split.pairs_left_out]
    content = json.dumps([dict(lists), [digest.sha256 for digest in audio.values()], *left_out])
    return hashlib.sha256(content.encode()).hexdigest()
