"""Stop with a list of all bad audio, or leave out the pairs that use it, or that use a bad row or a turn of another length than asked for.

Nothing replaces a bad utterance. A dialog with a bad utterance in the middle is cut into the parts before and after it, under
the same id. So is one with a long pause between two turns of one speaker (`Rules.max_gap`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_sft.audio.addresses import MISSING, format_address, parse_address
from usdm_sft.audio.digests import TOO_SHORT, AudioDigest, audio_digests
from usdm_sft.audio.reading import AudioError
from usdm_sft.audio.sound import PAST_END
from usdm_sft.corpus.dialogs import BadRow, Dialog, Split, Utterance
from usdm_sft.corpus.examples import example_id
from usdm_sft.corpus.problems import count_reasons, join_problems
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
_MISSING_REMEDY = "put it there, give --data_dir the folder that relative paths start at, or leave out its pairs with --on_bad_audio skip"
_END_REMEDY = "correct the end, cut it with --on_bad_rows clip, or leave out its pairs with --on_bad_rows skip"
_BAD_AUDIO = "bad audio"


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
    clipped: dict[str, str] = {}
    if rules.on_bad_rows == "clip":
        splits, addresses, clipped = _clip(splits, found, cache_dir)
        found |= audio_digests(addresses, cache_dir)
    problems = {address: digest.problem for address, digest in found.items() if digest.problem is not None}
    rows = find_bad_rows(splits, found, rules, streams)
    bad: dict[str, str] = {}
    lines: dict[str, str] = {}
    for split in splits.values():
        for utterance in split.utterances():
            if utterance.id in rows:
                lines[utterance.id] = f"{split.locate(utterance)}: {rows[utterance.id].problem}"
            elif utterance.audio in problems:
                bad[utterance.id] = problem = problems[utterance.audio]
                is_row = problem.startswith(PAST_END)
                place = split.locate(utterance) if is_row else f"utterance {utterance.id}"
                lines[utterance.id] = f"{place}: audio file {utterance.audio} {problem}"
    if bad and on_bad_audio == "error":
        error = FileNotFoundError if all(each.startswith(MISSING) for each in bad.values()) else AudioError
        remedies = {each: find_outcome(problem, rules, on_bad_audio)[1] for each, problem in bad.items()}
        raise error(join_problems([f"{lines[each]}: {remedy}" for each, remedy in remedies.items()]))
    left = {name: leave_out(split, bad, rows, clipped) for name, split in splits.items()}
    for name, split in left.items():
        if not split.dialogs:
            own = [each.id for each in splits[name].utterances() if each.id in lines]
            reasons = Counter(rows[each].reason if each in rows else _BAD_AUDIO for each in own)
            lengths = [_measure(each, found, streams) for each in splits[name].utterances()]
            head = _describe_empty(name, reasons, [length for length in lengths if length])
            raise AudioError(join_problems([head, *(lines[each] for each in own)]))
    return left, {address: found[address] for address in list_addresses(left)}


def _describe_empty(name: str, reasons: Mapping[str, int], lengths: Sequence[float]) -> str:
    """Say why a split has no pair left, and what helps; `lengths` are those of its turns in seconds."""
    ends = dict.fromkeys(f"{length:g}" for length in (min(lengths), max(lengths))) if lengths else ()
    there = f" (the turns have {' to '.join(ends)} s)" if lengths else ""
    remedies = {_SHORTER: f"lower --min_seconds{there}", _LONGER: f"raise --max_seconds{there}"}
    remedies[_BAD_AUDIO] = "replace files"
    remedy = ", ".join(dict.fromkeys(remedies.get(reason, "correct the rows") for reason in reasons))
    return f"no pair of {name} is left after turns were left out ({count_reasons(reasons)}): {remedy}, or name another split list"


def find_outcome(problem: str, rules: Rules, on_bad_audio: str) -> tuple[bool, str]:
    """Return True for a problem of audio that the options settle, and how they do, or else its remedy."""
    is_end, is_short = problem.startswith(PAST_END), problem.endswith(TOO_SHORT)
    if is_end and rules.on_bad_rows == "clip":
        return (
            True,
            "--on_bad_rows clip cuts it at the end of the recording, or leaves out its pairs where nothing is left",
        )
    if (is_end or is_short) and rules.on_bad_rows != "error":
        return True, f"--on_bad_rows {rules.on_bad_rows} leaves out its pairs"
    if is_short and rules.min_seconds is not None:
        return True, "--min_seconds leaves out its pairs"
    if on_bad_audio == "skip":
        return True, "--on_bad_audio skip leaves out its pairs"
    return False, _END_REMEDY if is_end else _MISSING_REMEDY if problem == MISSING else _REMEDY


def find_bad_rows(
    splits: Mapping[str, Split], found: Mapping[str, AudioDigest], rules: Rules, streams: UnitStreams | None
) -> dict[str, BadRow]:
    """Return utterance id -> why it is left out, other than for bad audio. Recordings that are not in `found` are not looked at."""
    utterances = (utterance for split in splits.values() for utterance in split.utterances())
    rows = ((each.id, each.bad or _find_bad_row(each, found, rules, streams)) for each in utterances)
    return {name: row for name, row in rows if row is not None}


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
    if problem or (seconds := _measure(utterance, found, streams)) is None:
        return None
    if rules.min_seconds is not None and seconds < rules.min_seconds:
        return BadRow(_SHORTER, f"has {seconds:g} s, less than min_seconds {rules.min_seconds:g}")
    if rules.max_seconds is not None and seconds > rules.max_seconds:
        return BadRow(_LONGER, f"has {seconds:g} s, more than max_seconds {rules.max_seconds:g}")
    return None


def measure_segments(addresses: Iterable[str]) -> dict[str, AudioDigest]:
    """Return what is known of segments before their recordings are opened, their seconds; of whole recordings nothing."""
    known = {}
    for address in addresses:
        segments = parse_address(address, exists=lambda _: False)
        lengths = [each.end - each.start for each in segments if each.start is not None and each.end is not None]
        if len(lengths) == len(segments):
            known[address] = AudioDigest("", 0, round(sum(lengths), 6))
    return known


def _measure(utterance: Utterance, found: Mapping[str, AudioDigest], streams: UnitStreams | None) -> float | None:
    """Return the seconds of a turn, or None where they are not known."""
    if streams is not None and utterance.units is not None:
        return streams.count_seconds(len(utterance.units))
    return found[utterance.audio].seconds if utterance.audio in found else None


def _clip(
    splits: Mapping[str, Split], found: Mapping[str, AudioDigest], cache_dir: str | Path | None
) -> tuple[dict[str, Split], list[str], dict[str, str]]:
    """Cut segments at the end of their recording; return the splits, the new addresses, and utterance id -> what was wrong."""
    too_long = [address for address, digest in found.items() if (digest.problem or "").startswith(PAST_END)]
    files = dict.fromkeys(segment.file for address in too_long for segment in parse_address(address))
    seconds = {file: digest.seconds for file, digest in audio_digests(files, cache_dir).items()}
    clipped = {address: clip_address(address, seconds.__getitem__) for address in too_long}

    def clip(dialog: Dialog) -> Dialog:
        if not any(utterance.audio in clipped for utterance in dialog.utterances):
            return dialog
        utterances = (replace(each, audio=clipped.get(each.audio, each.audio)) for each in dialog.utterances)
        return replace(dialog, utterances=tuple(utterances))

    cut = {
        utterance.id: f"{split.locate(utterance, short=True)}: {found[utterance.audio].problem}"
        for split in splits.values()
        for utterance in split.utterances()
        if utterance.audio in clipped
    }
    splits = {name: replace(each, dialogs=[*map(clip, each.dialogs)]) for name, each in splits.items()}
    return splits, [*clipped.values()], cut


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


def leave_out(
    split: Split,
    bad: Mapping[str, str],
    rows: Mapping[str, BadRow] | None = None,
    clipped: Mapping[str, str] | None = None,
) -> Split:
    """Leave out the pairs that have a bad utterance.

    Args:
        split: A split.
        bad: Utterance id -> what is wrong with its audio.
        rows: Utterance id -> why it is left out for another reason.
        clipped: Utterance id -> what was wrong with its end, which was cut.
    """
    rows, clipped = rows or {}, clipped or {}
    dialogs: list[Dialog] = []
    left_out = dict(split.left_out)
    pairs_left_out: dict[str, str] = {}
    reasons: dict[str, str] = {}
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
            left = [each for each in pair if each.id in rows]
            if audio or left:
                of_rows = [f"{split.locate(each, short=True)}: {rows[each.id].problem}" for each in left]
                pair_id = example_id(dialog.id, pair[0].turn)
                pairs_left_out[pair_id] = "; ".join([*audio, *of_rows])
                reasons[pair_id] = "; ".join([*audio, *(f"row of {each.id}: {rows[each.id].problem}" for each in left)])
                num_bad_rows += not audio
    turns = Counter(rows[each.id].reason for each in split.utterances() if each.id in rows)
    return replace(
        split,
        dialogs=dialogs,
        left_out=left_out,
        pairs_left_out=pairs_left_out,
        reasons=reasons,
        turns_left_out=dict(sorted(turns.items())),
        pairs_with_bad_rows=num_bad_rows,
        turns_clipped={
            example_id(each.dialog_id, each.turn): clipped[each.id]
            for dialog in dialogs
            for each in dialog.utterances
            if each.id in clipped
        },
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
    left_out = [dict(split.reasons) for split in splits.values() if split.reasons]
    content = json.dumps([dict(lists), [digest.sha256 for digest in audio.values()], *left_out])
    return hashlib.sha256(content.encode()).hexdigest()
