"""Join neighbouring turns of one speaker into one turn."""

from collections.abc import Sequence
from dataclasses import replace

from usdm_sft.audio.addresses import format_address, join_addresses, parse_address
from usdm_sft.corpus.dialogs import Utterance
from usdm_sft.corpus.further import join_further

MERGES = ("join", "span")


class MergeError(ValueError):
    """Turns that cannot be joined. The message names them, but not their line."""


def merge_turns(utterances: Sequence[Utterance], merge: str = "join", max_gap: float | None = None) -> list[Utterance]:
    """Join neighbouring turns of one speaker, keep the emotion of the first, and number the turns again.

    A turn that was joined with a bad one is bad, because a part of it is missing.

    Args:
        utterances: The turns of a dialog, in order.
        merge: "join" puts the recordings one after the other, where those of one channel that follow each other become one with the
            pause between them (`join_addresses`). "span" takes one channel from the first start to the last end.
        max_gap: Seconds of the longest pause in one recording over which turns are joined; None for any.

    Raises:
        MergeError: The turns are not of one channel of one recording, and `merge` is "span".
    """
    merged: list[Utterance] = []
    for utterance in utterances:
        is_same = bool(merged) and merged[-1].speaker == utterance.speaker
        if is_same and (max_gap is None or _find_gap(merged[-1], utterance) <= max_gap):
            utterance = _join(merged.pop(), utterance, merge)
        merged.append(utterance)
    return [replace(utterance, turn=turn) for turn, utterance in enumerate(merged, start=utterances[0].turn)]


def _find_gap(before: Utterance, after: Utterance) -> float:
    """Return the seconds between two turns; 0 if they overlap, or if they are not segments of one recording."""
    next_one = parse_address(after.audio)[0]
    ends = [segment.end for segment in parse_address(before.audio) if segment.file == next_one.file]
    known = [end for end in ends if end is not None]
    return max(0.0, next_one.start - max(known)) if known and next_one.start is not None else 0.0


def _join(before: Utterance, after: Utterance, merge: str) -> Utterance:
    # A turn that has units may have no recording; then the joined turn has none either.
    audio, bad = "", before.bad or after.bad
    if before.audio and after.audio and not bad:
        audio = _span(before, after) if merge == "span" else join_addresses(before.audio, after.audio)
    units = None
    if before.units is not None and after.units is not None:
        import numpy as np  # the command line reads this module

        units = np.concatenate([before.units, after.units])
    text = " ".join(filter(None, (before.text, after.text)))
    more = join_further(before.more, after.more)
    lines = (*before.lines, *after.lines) if not bad else before.lines if before.bad else after.lines
    return replace(before, text="" if bad else text, audio=audio, units=units, more=more, bad=bad, lines=lines)


def _span(before: Utterance, after: Utterance) -> str:
    first, second = parse_address(before.audio)[0], parse_address(after.audio)[0]
    if (first.file, first.channel) != (second.file, second.channel) or None in (first.start, second.start):
        raise MergeError(
            f"turns {before.turn} and {after.turn} of {before.speaker} are not segments of one channel of one recording, as --merge span needs "
            "them: use --merge join"
        )
    start, end = min(first.start or 0.0, second.start or 0.0), max(first.end or 0.0, second.end or 0.0)
    return format_address(first.file, start, end, first.channel)
