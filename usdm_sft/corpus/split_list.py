"""Read DailyTalk's split lists: one utterance per line, `<turn>_<speaker>_d<dialog>|<speaker>|{phones}|<text>|<emotion>`."""

import re
from collections.abc import Callable
from pathlib import Path

from usdm_sft.corpus.dialogs import Turns, Utterance
from usdm_sft.corpus.problems import add_problem
from usdm_sft.utils.texts import CONTROL, LineError, quote, read_limited_lines, text_problem

_UTTERANCE_ID = re.compile(r"([0-9]{1,9})_([0-9]{1,9})_d([0-9]{1,9})")


def read_split_list(path: Path, problems: list[str], address: Callable[[str], str]) -> Turns:
    """Read the turns of a split list, whose dialogs are in order of their number.

    Args:
        path: The list.
        problems: Problems are appended to this list.
        address: From an audio name, such as "23/0_1_d23.wav", to the address of the recording.

    Returns:
        The turns, each with its line. A dialog with an unreadable line is absent, so that its other lines cause no further
        problems.
    """
    turns = Turns(lambda number: f"{path}:{number}")
    seen: dict[str, int] = {}
    broken: set[str] = set()
    before = len(problems)
    try:
        for number, line in read_limited_lines(path):
            place = f"{path}:{number}"
            utterance = _parse_line(line.removesuffix("\n"), place, problems, address)
            if utterance is None:
                if match := _UTTERANCE_ID.match(line):
                    broken.add(f"d{match[3]}")
            elif utterance.id in seen:
                add_problem(
                    problems,
                    f"{place}: id {utterance.id} stands already at line {seen[utterance.id]}: "
                    "delete one of the two lines",
                )
            else:
                seen[utterance.id] = number
                turns.add(utterance, number)
    except LineError as error:
        problems[before:] = []  # earlier problems of the file may be a consequence
        add_problem(problems, str(error))
        turns.dialogs = {}
        return turns
    whole = turns.dialogs.keys() - broken
    turns.dialogs = {name: turns.dialogs[name] for name in sorted(whole, key=lambda name: (int(name[1:]), name))}
    return turns


def _parse_line(line: str, place: str, problems: list[str], address: Callable[[str], str]) -> Utterance | None:
    if not line.strip():
        add_problem(problems, f"{place}: blank line: delete it")
        return None
    fields = line.split("|")
    if len(fields) != 5:
        add_problem(
            problems,
            f"{place}: {len(fields)} fields instead of 5 (id|speaker|phones|text|emotion) in {quote(line)}: "
            "take '|' out of the text, or complete the line",
        )
        return None
    utterance_id, speaker, _, text, emotion = fields
    match = _UTTERANCE_ID.fullmatch(utterance_id)
    if match is None:
        add_problem(
            problems, f"{place}: id {quote(utterance_id)} is not <turn>_<speaker>_d<dialog>: correct the first field"
        )
        return None
    if match[2] != speaker:
        add_problem(
            problems,
            f"{place}: speaker {quote(speaker)} is not the speaker of id {utterance_id}: correct one of the two fields",
        )
        return None
    if problem := text_problem(text):
        add_problem(problems, f"{place}: text {quote(text)} of {utterance_id} {problem}: correct the text")
    if CONTROL.search(emotion):
        add_problem(problems, f"{place}: emotion {quote(emotion)} holds a control character: correct it")
    audio = address(f"{match[3]}/{utterance_id}.wav")
    return Utterance(utterance_id, f"d{match[3]}", int(match[1]), speaker, text, emotion, audio)
