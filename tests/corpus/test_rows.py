"""Rows of manifests as they come: segments that are joined, agents by channel or column, bad rows, lengths, further columns, no texts."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from dailytalk_usdm import DailyTalkUSDM, PrepareConfig
from usdm_sft.corpus import manifest as manifest_module
from usdm_sft.corpus.dialogs import Split, Utterance
from usdm_sft.corpus.left_out import clip_address, corpus_digest, measure_segments, screen_audio
from usdm_sft.corpus.problems import CorpusError, describe_left_out
from usdm_sft.corpus.read import ALONE, NO_ANSWER, SAME_SPEAKER, Rules, find_large_share, read_corpus
from usdm_sft.template.streams import UnitStreams

RATE = 16_000


def segment(speaker, start, end, text="hi", dialog="c", **more):
    row = {"dialog": dialog, "speaker": speaker, "text": text, "audio": "c.wav", "start": start, "end": end}
    return row | {"channel": int(speaker == "B")} | more


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def read(tmp_path, rows, **rules):
    [split] = read_corpus({"train": write(tmp_path / "m.jsonl", rows)}, Rules(**rules)).values()
    return split


def problems_of(tmp_path, rows, **rules):
    with pytest.raises(CorpusError) as raised:
        read(tmp_path, rows, **rules)
    return [problem.replace(f"{tmp_path}/", "") for problem in raised.value.problems]


def describe(split):
    """Speaker, text and the end of the address of each turn."""
    return [(u.speaker, u.text, u.audio.partition("#")[2]) for dialog in split.dialogs for u in dialog.utterances]


CALL = [
    segment("A", 0, 2, "so i"), segment("A", 2.5, 4, "called them"), segment("B", 3, 3.5, "right"), segment("B", 9, 10, "and then"),
    segment("A", 11, 12, "no"),
]  # fmt: skip


@pytest.mark.parametrize("merge", ["join", "span"])
def test_neighbouring_segments_of_a_channel_are_joined_with_their_pause(tmp_path, merge):
    split = read(tmp_path, CALL, merge_speaker_turns=True, merge=merge)
    assert describe(split) == [
        ("A", "so i called them", "t=0,4&channel=0"),
        ("B", "right and then", "t=3,10&channel=1"),
        ("A", "no", "t=11,12&channel=0"),
    ]
    assert [(u.id, u.turn) for u in split.dialogs[0].utterances] == [("c_0", 0), ("c_2", 1), ("c_4", 2)]


def test_span_takes_turns_in_any_order_of_time(tmp_path):
    rows = [segment("A", 5, 6, turn=0), segment("A", 1, 2, turn=1), segment("B", 7, 8, turn=2)]
    spans = describe(read(tmp_path, rows, merge_speaker_turns=True, merge="span"))
    assert spans[0] == ("A", "hi hi", "t=1,6&channel=0")
    joined = describe(read(tmp_path, rows, merge_speaker_turns=True))
    assert joined[0] == ("A", "hi hi", f"t=5,6&channel=0\n{tmp_path}/c.wav#t=1,2&channel=0")


@pytest.mark.parametrize("more", [{"channel": 1}, {"audio": "d.wav"}])
def test_span_of_several_channels_or_recordings_is_refused(tmp_path, more):
    rows = [segment("A", 0, 1), segment("A", 2, 3, **more), segment("B", 4, 5)]
    assert problems_of(tmp_path, rows, merge_speaker_turns=True, merge="span") == [
        "m.jsonl:1: dialog c: turns 0 and 1 of A are not segments of one channel of one recording, as --merge span needs them: use --merge join"
    ]


def test_long_pause_divides_a_dialog(tmp_path):
    """No pair is made across the pause, in either shape, and the ids stay those of the turns."""
    split = read(tmp_path, CALL, merge_speaker_turns=True, max_gap=5)
    assert [text for _, text, _ in describe(split)] == ["so i called them", "right", "and then", "no"]
    [dialog] = split.dialogs
    assert [(user.turn, agent.turn) for user, agent in dialog.pairs()] == [(0, 1), (2, 3)]
    soundfile.write(tmp_path / "c.wav", np.zeros((13 * RATE, 2)), RATE)
    for name, ids in (("single_turn", ["c_0", "c_2"]), ("multi_turn", ["c_0", "c_2"])):
        lists = {"train": str(tmp_path / "m.jsonl")}
        builder = DailyTalkUSDM(
            config_name=name, data_files=lists, merge_speaker_turns=True, max_gap=5.0, cache_dir=str(tmp_path / name), digest_cache_dir=tmp_path
        )  # fmt: skip
        assert [row["id"] for row in builder.as_streaming_dataset("train")] == ids
    alone = [segment("A", 0, 1), segment("A", 9, 10)]
    assert dict(read(tmp_path, alone, merge_speaker_turns=True, max_gap=5).left_out) == {"c": ALONE}


@pytest.mark.parametrize(("rules", "message"), [
    ({"merge": "span"}, "merge says how turns are joined: add --merge_speaker_turns, or leave it out"),
    ({"merge": "span", "max_gap": 1.0}, "merge and max_gap say how turns are joined: add --merge_speaker_turns, or leave them out"),
    ({"min_seconds": 2.0, "max_seconds": 1.0}, r"min_seconds is 2\.0, but max_seconds 1\.0: give a range"),
    ({"keep_columns": "topic, seconds"}, "keep_columns names seconds, which is no further column of a manifest: leave it out"),
    ({"keep_columns": "seconds,turn"}, "keep_columns names seconds, turn, which are no further columns of a manifest: leave them out"),
    ({"on_bad_rows": "drop"}, "on_bad_rows 'drop' is unknown: choose one of error, skip, clip"),
])  # fmt: skip
def test_rules_that_contradict(tmp_path, rules, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, CALL, **rules)


def test_config_refuses_kept_audio_of_divided_dialogs():
    with pytest.raises(ValueError, match="keep_audio stores turns without their times, so that max_gap would divide"):
        PrepareConfig(data_dir="d", output_path="o", keep_audio=True, merge_speaker_turns=True, max_gap=2.0)


def test_many_dialogs_of_segments_name_the_option_in_a_short_message(tmp_path):
    rows = [
        segment(speaker, 0.0 + i, 1.0 + i, dialog=f"call-{n}") for n in range(600) for i, speaker in enumerate("AAB")
    ]
    path = write(tmp_path / "m.jsonl", rows)
    with pytest.raises(CorpusError) as raised:
        DailyTalkUSDM(data_files={"train": str(path)}, digest_cache_dir=tmp_path, cache_dir=str(tmp_path))
    assert str(raised.value) == (
        f"{path}: not one pair: one speaker speaks twice in a row: 600, such as call-0, call-1, call-2: "
        "join neighbouring turns with --merge_speaker_turns, which keeps 600 of them, or name another split list"
    )


def test_more_than_a_tenth_of_the_dialogs_is_worth_a_warning(tmp_path):
    rows = [segment("AB"[i % 2] if n >= 2 else "A", i, i + 1, dialog=f"d{n}") for n in range(20) for i in range(2)]
    split = read(tmp_path, rows)
    assert len(split.left_out) == 2 and find_large_share(split) is None
    reasons = "d0: one speaker speaks twice in a row, d1: one speaker speaks twice in a row"
    split = read(tmp_path, rows[:-2])
    assert find_large_share(split) == f"train: 2 of 19 dialogs are left out ({reasons}): counts.json names each"
    split = read(tmp_path, [*rows[:-2], segment("B", 2, 3, dialog="d1")])
    assert find_large_share(split) == (
        f"train: 2 of 19 dialogs are left out ({reasons}): join neighbouring turns with --merge_speaker_turns, which keeps 1 of them"
    )
    assert not read(tmp_path, [*rows[:-2], segment("B", 2, 3, dialog="d1")], agent="A").num_mergeable
    assert find_large_share(read(tmp_path, rows[2:6])) == (
        "train: 1 of 2 dialogs is left out (d1: one speaker speaks twice in a row): counts.json names each"
    )


def test_dialogs_left_out_are_grouped_where_there_are_many():
    few = {f"d{n}": NO_ANSWER for n in range(3)} | {"e": SAME_SPEAKER}
    assert describe_left_out({"d": NO_ANSWER}) == "d: the agent answers nobody in it"
    assert describe_left_out(few | {"f": SAME_SPEAKER, "d3": NO_ANSWER}) == (
        "the agent answers nobody in it: 4, such as d0, d1, d2; one speaker speaks twice in a row: e, f"
    )


ROLES = [segment(speaker, i, i + 1, dialog=dialog, role=role)
         for dialog, speakers, role in (("c", "ABA", "B"), ("d", "XYX", "X")) for i, speaker in enumerate(speakers)]  # fmt: skip


@pytest.mark.parametrize(("agent", "pairs"), [
    ("B", {"c": [(0, 1)], "d": []}), ("channel=1", {"c": [(0, 1)], "d": []}), ("channel=0", {"c": [(1, 2)], "d": None}),
    ("column=role", {"c": [(0, 1)], "d": [(1, 2)]}),
])  # fmt: skip
def test_agent_by_name_channel_or_column(tmp_path, agent, pairs):
    if pairs["d"] is None:  # both speakers of d are on channel 0
        assert problems_of(tmp_path, ROLES, agent=agent) == [
            "m.jsonl:4: dialog d has several speakers on channel 0 ('X, Y'): name the agent in a column"
        ]
        return
    split = read(tmp_path, ROLES, agent=agent)
    assert {d.id: [(u.turn, a.turn) for u, a in d.pairs()] for d in split.dialogs} == {
        k: v for k, v in pairs.items() if v
    }
    assert dict(split.left_out) == {name: NO_ANSWER for name, found in pairs.items() if not found}


@pytest.mark.parametrize(("agent", "rows", "problem"), [
    ("C", ROLES, "m.jsonl: no turn is by the agent 'C': the speakers are 'A, B, X, Y'"),
    ("n", [segment(f"s{i:02}", i, i + 1) for i in range(13)],
     "m.jsonl: no turn is by the agent 'n': the speakers are 's00, s01, s02, s03, s04, s05, s06, s07, s08, s09' and 3 more"),
    ("channel=2", ROLES, "m.jsonl: no turn is on channel 2, that of the agent: the channels are '0, 1'"),
    ("column=rôle", ROLES, "m.jsonl has no column rôle: its further columns are 'role'"),
    ("column=role", [row | {"role": "Z"} for row in ROLES[:3]],
     "m.jsonl:1: dialog c names 'Z' as the agent in column role: give one of its speakers 'A, B' in its rows"),
    ("column=role", [*ROLES[:2], ROLES[2] | {"role": "A"}],
     "m.jsonl:1: dialog c names 'A, B' as agents in column role: give one of its speakers 'A, B' in its rows"),
    ("column=role", [*ROLES[:3], ROLES[3] | {"role": None}, *(row | {"role": None} for row in ROLES[4:])],
     "m.jsonl:4: dialog d names no agent in column role: give one of its speakers 'X, Y' in its rows"),
])  # fmt: skip
def test_agent_that_is_not_there(tmp_path, agent, rows, problem):
    assert problem in problems_of(tmp_path, rows, agent=agent)


BAD = [  # change of a row, its reason, and the problem
    ({"text": None}, "no text", "text missing"),
    ({"text": " "}, "no text", "text ' ' is empty or white space only"),
    (
        {"text": "<|unit1|>"},
        "special token in the text",
        "text '<|unit1|>' holds '<|', which is part of a special token",
    ),
    ({"text": "a\tb"}, "control character in the text", r"text 'a\tb' holds the control character '\t'"),
    ({"end": 2}, "zero or negative length", "start 2 and end 2 are not a segment"),
    ({"end": 1.5}, "zero or negative length", "start 2 and end 1.5 are not a segment"),
]


@pytest.mark.parametrize(("change", "reason", "problem"), BAD)
def test_bad_row_is_one_problem_or_leaves_out_its_pairs(tmp_path, change, reason, problem):
    rows = [segment("AB"[i % 2], i, i + 1, f"t{i}", turn=i) for i in range(6)]
    rows[2] |= change
    [found] = problems_of(tmp_path, rows)
    assert found.startswith(f"m.jsonl:3: {problem}: ") and found.endswith(
        ", or leave out such rows with --on_bad_rows skip"
    )
    soundfile.write(tmp_path / "c.wav", np.zeros((6 * RATE, 2)), RATE)
    rules = Rules(on_bad_rows="skip")
    whole = read_corpus({"train": tmp_path / "m.jsonl"}, rules)
    split = screen_audio(whole, "error", tmp_path, rules=rules)[0]["train"]
    assert [[u.text for u in dialog.utterances] for dialog in split.dialogs] == [["t0", "t1"], ["t3", "t4", "t5"]]
    row = f"m.jsonl:3: {problem}"
    assert (dict(split.pairs_left_out), dict(split.turns_left_out)) == ({"c_1": row, "c_2": row}, {reason: 1})
    assert split.pairs_with_bad_rows == 2


@pytest.mark.parametrize("change", [{"speaker": None}, {"turn": 1.5}, {"start": -1}, {"audio": 3}, {"turn": 0}])
def test_row_that_cannot_be_placed_is_one_problem_in_any_case(tmp_path, change):
    rows = [segment("AB"[i % 2], i, i + 1, turn=i) for i in range(4)]
    rows[1] |= change
    for on_bad_rows in ("error", "skip"):
        assert len(problems_of(tmp_path, rows, on_bad_rows=on_bad_rows)) == 1


def test_line_of_unknown_dialog_hides_no_other_kind_of_problem(tmp_path):
    rows = [segment("AB"[i % 2], i, i + 1, turn=i) for i in range(4)]
    lines = [json.dumps(row) for row in rows]
    lines[1], lines[3] = "no JSON", json.dumps(rows[3] | {"text": ""})
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    with pytest.raises(CorpusError) as raised:
        read_corpus({"train": tmp_path / "m.jsonl"})
    assert [problem.partition("m.jsonl:")[2][:4] for problem in raised.value.problems] == ["2: '", "4: t"]


def test_bad_row_makes_the_turn_bad_that_it_is_joined_to(tmp_path):
    rows = [
        segment("A", 0, 1, "a"),
        segment("B", 1, 2, "b"),
        segment("B", 2, 3, ""),
        segment("B", 3, 4, "d"),
        segment("A", 4, 5, "e"),
    ]
    soundfile.write(tmp_path / "c.wav", np.zeros((6 * RATE, 2)), RATE)
    write(tmp_path / "m.jsonl", [*rows, *(row | {"dialog": "e"} for row in rows[:2])])
    rules = Rules(on_bad_rows="skip", merge_speaker_turns=True, merge="span")
    split = screen_audio(read_corpus({"train": tmp_path / "m.jsonl"}, rules), "error", tmp_path, rules=rules)[0][
        "train"
    ]
    assert [dialog.id for dialog in split.dialogs] == ["e"]
    assert dict(split.left_out) == {"c": "each of its pairs has a bad row or bad audio"}
    assert dict(split.pairs_left_out) == dict.fromkeys(["c_0", "c_1"], "m.jsonl:3: text missing")


TIMES = [(0, 1), (1, 2), (2, 3.06), (2.9, 3.04), (3.01, 9), (2.99, 9)]
END = [segment("AB"[turn % 2], start, end, turn=turn) for turn, (start, end) in enumerate(TIMES)]


@pytest.mark.parametrize(("on_bad_rows", "turns_left_out", "pairs"), [
    ("skip", {"end past the recording": 3}, ["c_0"]),
    ("clip", {"end past the recording": 1, "shorter than 25 ms": 1}, ["c_0", "c_1", "c_2"]),
])  # fmt: skip
def test_end_past_the_recording(tmp_path, on_bad_rows, turns_left_out, pairs):
    """50 ms are rounding. What begins after the end, or is too short once it is cut, is left out in any case."""
    soundfile.write(tmp_path / "c.wav", np.zeros((3 * RATE, 2)), RATE)
    path, rules = write(tmp_path / "m.jsonl", END), Rules(on_bad_rows=on_bad_rows)
    whole = read_corpus({"train": path}, rules)
    with pytest.raises(
        ValueError,
        match=rf"^{path}:3: audio file .* is to be cut up to 3\.06 s, but has 3 s: correct the end, cut it with --on_bad_rows clip",
    ):
        screen_audio(whole, "error", tmp_path)
    assert screen_audio(whole, "skip", tmp_path)[0]["train"].turns_clipped == {}
    split = screen_audio(whole, "error", tmp_path, rules=rules)[0]["train"]
    assert dict(split.turns_left_out) == turns_left_out
    found = [f"c_{user.turn}" for dialog in split.dialogs for user, _ in dialog.pairs()]
    assert found == pairs
    if on_bad_rows == "clip":
        assert split.dialogs[0].utterances[2].audio.endswith("#t=2,3&channel=0")
        assert split.turns_clipped == {"c_2": "m.jsonl:3: is to be cut up to 3.06 s, but has 3 s"}
    else:
        assert split.turns_clipped == {}


def test_place_of_a_turn_that_was_joined_of_rows_apart():
    """Rows of a dataset are counted from 0, and lines of a manifest may be in any order."""
    turn = Utterance("c_0", "c", 0, "A", "hi", "none", lines=(90, 3))
    of_lines = Split("train", [], {}, (), place=lambda line: f"a/m.jsonl:{line}")
    assert of_lines.locate(turn) == "a/m.jsonl:3, 90" and of_lines.locate(turn, short=True) == "m.jsonl:3, 90"
    joined = replace(turn, lines=(4, 5, 3))
    assert of_lines.locate(joined, short=True) == "m.jsonl:3 to 5"
    dataset = replace(of_lines, place=lambda line: f"hub:u/n@refs/pr/1, split train, row {line - 1}", is_dataset=True)
    assert dataset.locate(joined) == "hub:u/n@refs/pr/1, split train, row 2 to 4"
    assert dataset.locate(turn, short=True) == "row 2, 89"


def test_lengths_of_segments_are_those_of_their_samples():
    """0.1 to 0.4 and 1.1 to 1.4 s have the same length, whatever floats say, and so a doctor counts what prepare counts."""
    found = measure_segments(["c.wav#t=0.1,0.4", "c.wav#t=1.1,1.4", "c.wav"])
    assert {address: digest.seconds for address, digest in found.items()} == {
        "c.wav#t=0.1,0.4": 0.3,
        "c.wav#t=1.1,1.4": 0.3,
    }


def test_names_of_manifest_and_folder_do_not_decide_the_digest(tmp_path):
    rows = [segment("A", 0, 1), segment("B", 1, 2), segment("A", 2, 3) | {"text": ""}, segment("B", 3, 4)]
    soundfile.write(tmp_path / "c.wav", np.zeros((4 * RATE, 2)), RATE)
    (tmp_path / "other").mkdir()
    rules, digests = Rules(on_bad_rows="skip"), set()
    for name, place in (("train.jsonl", "train.jsonl:3"), ("other/calls-train.jsonl", "calls-train.jsonl:3")):
        path = write(tmp_path / name, rows)
        left, audio = screen_audio(
            read_corpus({"train": path}, rules, data_dir=tmp_path), "error", tmp_path, rules=rules
        )
        assert left["train"].pairs_left_out == {f"c_{turn}": f"{place}: text missing" for turn in (1, 2)}
        digests.add(corpus_digest({"train": "0"}, audio, left))
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("end", "clipped"), [(5, {"c_1": "m.jsonl:3 to 4: is to be cut up to 5 s, but has 4 s"}), (4, {})]
)
def test_joined_turn_is_named_by_its_rows(tmp_path, end, clipped):
    """Its pair has the number after joining, its rows are those of the file."""
    rows = [segment("A", 0, 1), segment("A", 1, 2), segment("B", 2, 3), segment("B", 3, end)]
    soundfile.write(tmp_path / "c.wav", np.zeros((4 * RATE, 2)), RATE)
    rules = Rules(on_bad_rows="clip", merge_speaker_turns=True)
    whole = read_corpus({"train": write(tmp_path / "m.jsonl", rows)}, rules)
    assert screen_audio(whole, "error", tmp_path, rules=rules)[0]["train"].turns_clipped == clipped
    longer = Rules(merge_speaker_turns=True, max_seconds=1.5)
    with pytest.raises(ValueError, match=r"m\.jsonl:1 to 2: has 2 s, more than max_seconds 1\.5"):
        screen_audio(
            read_corpus({"train": write(tmp_path / "m.jsonl", rows[:3])}, longer), "error", tmp_path, rules=longer
        )


def test_joined_segments_are_cut_each_at_the_end_of_its_recording():
    lengths = {"a.wav": 3.0, "b.wav": 1.5}
    address = "a.wav#t=1,4&channel=1\nb.wav#t=0,1\nb.wav#t=2,3\na.wav"
    assert clip_address(address, lengths.__getitem__) == "a.wav#t=1,3&channel=1\nb.wav#t=0,1\nb.wav#t=2,3\na.wav"


def test_turns_of_other_lengths_are_left_out(tmp_path):
    rows = [
        segment("AB"[i % 2], start, end)
        for i, (start, end) in enumerate([(0, 1), (1, 1.01), (2, 3), (3, 3.5), (4, 8), (8, 9.5), (9.5, 11)])
    ]
    soundfile.write(tmp_path / "c.wav", np.zeros((11 * RATE, 2)), RATE)
    rules = Rules(min_seconds=0.6, max_seconds=2)
    whole = read_corpus({"train": write(tmp_path / "m.jsonl", rows)}, rules)
    split = screen_audio(whole, "error", tmp_path, rules=rules)[0]["train"]
    assert dict(split.turns_left_out) == {"longer than max_seconds": 1, "shorter than min_seconds": 2}
    assert [f"c_{user.turn}" for dialog in split.dialogs for user, _ in dialog.pairs()] == ["c_5"]
    assert split.pairs_left_out["c_3"] == (
        "m.jsonl:4: has 0.5 s, less than min_seconds 0.6; m.jsonl:5: has 4 s, more than max_seconds 2"
    )
    left, there = "no pair of train is left after turns were left out", r"\(the turns have 0\.5 to 4 s\)"
    with pytest.raises(
        ValueError, match=rf"{left} \(shorter than min_seconds: 5\): lower --min_seconds {there}, or name"
    ):
        screen_audio(
            read_corpus({"train": write(tmp_path / "m.jsonl", rows[2:])}), "error", tmp_path, rules=Rules(min_seconds=5)
        )
    with pytest.raises(
        ValueError,
        match=rf"{left} \(longer than max_seconds: 1, no text: 1\): raise --max_seconds \(the turns have 1 s\), correct the rows, or",
    ):
        rules = Rules(on_bad_rows="skip", max_seconds=0.5)
        write(tmp_path / "m.jsonl", [rows[0], rows[1] | {"text": ""}])
        screen_audio(read_corpus({"train": tmp_path / "m.jsonl"}, rules), "error", tmp_path, rules=rules)


def test_length_of_turns_with_units_is_that_of_their_units(tmp_path):
    rows = [
        {"dialog": "c", "turn": i, "speaker": "AB"[i % 2], "text": "hi", "units": [1] * number}
        for i, number in enumerate((10, 10, 3, 10, 10))
    ]
    from usdm_sft.corpus.unit_reader import UnitReader

    reader = UnitReader(10.0, 5, None)
    whole = read_corpus({"train": write(tmp_path / "m.jsonl", rows)}, units=reader)
    split = screen_audio(whole, "error", tmp_path, rules=Rules(min_seconds=0.5), streams=UnitStreams(10.0, (5,)))[0][
        "train"
    ]
    assert [[u.turn for u in dialog.utterances] for dialog in split.dialogs] == [[0, 1], [3, 4]]


def test_counts_of_3000_dialogs_with_bad_rows_of_every_reason_add_up(tmp_path):
    soundfile.write(tmp_path / "c.wav", np.zeros((8 * RATE, 2), np.int16), RATE)
    changes = [change for change, _, _ in BAD] + [{"end": 20}, {"end": 2.01}, {"end": 2.3}, {}]
    reasons = [reason for _, reason, _ in BAD] + [
        "end past the recording",
        "shorter than min_seconds",
        "shorter than min_seconds",
        None,
    ]
    rows = [
        segment("AB"[i % 2], i, i + 1, dialog=f"d{n}", turn=i) | (changes[n % 10] if i == 2 else {}) for n in range(3000) for i in range(4)
    ]  # fmt: skip
    rules = Rules(on_bad_rows="skip", min_seconds=0.5)
    whole = read_corpus({"train": write(tmp_path / "m.jsonl", rows)}, rules)
    split = screen_audio(whole, "error", tmp_path, rules=rules)[0]["train"]
    assert split.turns_left_out == {reason: 300 * number for reason, number in Counter(filter(None, reasons)).items()}
    assert (split.num_pairs, len(split.pairs_left_out), split.pairs_with_bad_rows) == (3000 * 3 - 5400, 5400, 5400)
    assert len(split.left_out) == 0


TOPICS = [
    segment("AB"[i % 2], i, i + 1, topic=topic, quality=0.5 * i, words=[{"word": "hi", "start": i}], empty=None)
    for i, topic in enumerate(["tea", "tea", None])
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("keep", "kept", "ignored"), [
    (None, (), ("topic", "quality", "words", "empty")),
    ("quality, topic", ("quality", "topic"), ("words", "empty")),
    ("all", ("topic", "quality", "words", "empty"), ()),
])  # fmt: skip
def test_further_columns_are_kept_as_texts(tmp_path, kind, keep, kept, ignored):
    path = tmp_path / f"m.{kind}"
    write(path, TOPICS) if kind == "jsonl" else pq.write_table(pa.Table.from_pylist(TOPICS), path)
    [split] = read_corpus({"train": path}, Rules(keep_columns=keep)).values()
    assert (split.columns, split.ignored) == (kept, ignored)
    soundfile.write(tmp_path / "c.wav", np.zeros((3 * RATE, 2)), RATE)
    lists, more = {"train": str(path)}, {} if keep is None else {"keep_columns": keep}
    builder = DailyTalkUSDM(data_files=lists, digest_cache_dir=tmp_path, cache_dir=str(tmp_path / "builder"), **more)
    row = list(builder.as_streaming_dataset("train"))[1]
    expected = {"topic": ("tea", ""), "quality": ("0.5", "1.0"), "empty": ("", "")}
    for name in set(kept) & expected.keys():
        assert (row[f"user_{name}"], row[f"agent_{name}"]) == expected[name]
    assert ("user_topic" in row) == ("topic" in kept)
    if "words" in kept:
        assert json.loads(row["agent_words"]) == [{"word": "hi", "start": 2}]


def test_joined_turns_keep_the_first_value_and_join_lists(tmp_path):
    rows = [
        segment("A", 0, 1, words=[["so", 0.1]], topic="tea"),
        segment("A", 1, 2, words=[["well", 1.2]], topic="milk"),
        segment("B", 2, 3),
    ]
    first = read(tmp_path, rows, merge_speaker_turns=True, keep_columns="words,topic").dialogs[0].utterances[0]
    assert first.more == {"words": '[["so", 0.1], ["well", 1.2]]', "topic": "tea"}


@pytest.mark.parametrize(("rows", "keep", "problem"), [
    (TOPICS, "topik", "m.jsonl has no column topik: its further columns are 'empty, quality, topic, words'"),
    ([segment("A", 0, 1), segment("B", 1, 2)], "topic", "m.jsonl has no column topic: it has no further columns"),
    ([segment("A", 0, 1, note="a\ud800")], "all", r"m.jsonl:1: column note 'a\ud800' holds an unpaired surrogate: correct it"),
])  # fmt: skip
def test_further_columns_that_are_wrong(tmp_path, rows, keep, problem):
    assert problem in problems_of(tmp_path, rows, keep_columns=keep)


def test_further_columns_of_tables_that_are_wrong(tmp_path):
    (tmp_path / "m.csv").write_text("dialog,turn,speaker,text,audio,note,note\n1,0,A,hi,a.wav,x,y\n")
    with pytest.raises(CorpusError, match=r"m\.csv:1: column note named twice"):
        read_corpus({"train": tmp_path / "m.csv"}, Rules(keep_columns="note"))
    pq.write_table(pa.Table.from_pylist([segment("A", 0, 1, note=b"\xff")]), tmp_path / "m.parquet")
    with pytest.raises(CorpusError, match=r"column note is of type 'binary', not text: leave it out of --keep_columns"):
        read_corpus({"train": tmp_path / "m.parquet"}, Rules(keep_columns="all"))


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (["x" * 400_000] * 3, "1,200,001"),
        ({"note": ["x" * 400_000] * 3}, "1,200,002"),
        ([{"note": "x" * 400_000}] * 3, "1,200,004"),
        ([0.5] * 1_200_000, "1,200,001"),
        ([[]] * 1_200_000, "1,200,001"),
    ],
    ids=["texts", "struct of texts", "structs", "numbers", "empty lists"],
)
def test_length_of_nested_further_columns_of_parquet_is_limited(tmp_path, value, size):
    """Dictionaries keep texts that repeat small in the file: of lists of them, a row may have any amount."""
    empty = {"note": []} if isinstance(value, dict) else []
    pq.write_table(
        pa.Table.from_pylist([segment("A", 0, 1, notes=value), segment("B", 1, 2, notes=empty)]), tmp_path / "m.parquet"
    )
    assert (tmp_path / "m.parquet").stat().st_size < 1_000_000
    message = rf"m\.parquet: row 0: notes has {size} characters and values: give 1,000,000 or fewer"
    with pytest.raises(CorpusError, match=message):
        read_corpus({"train": tmp_path / "m.parquet"}, Rules(keep_columns="all"))


def test_values_of_a_row_group_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "_GROUP_UNITS", 5)
    pq.write_table(pa.Table.from_pylist([segment("A", 0, 1, times=[0.5] * 6)]), tmp_path / "m.parquet")
    message = r"m\.parquet: column times of row group 0 has 6 values in 1 row: give lists of up to 1,000,000 values"
    with pytest.raises(CorpusError, match=message):
        read_corpus({"train": tmp_path / "m.parquet"}, Rules(keep_columns="all"))


def test_maps_and_nulls_of_nested_further_columns_are_read(tmp_path, monkeypatch):
    """Of rows that are decoded one by one, each is measured by itself."""
    monkeypatch.setattr(manifest_module, "MAX_LINE", 8)
    maps = pa.array([[("a", "bcdef")], None, [("q", "z")], []], pa.map_(pa.string(), pa.string()))
    lists = pa.array([[["a"], None, []], None, [[None, "zz"]], []])
    structs = pa.array([{"x": ["p", None]}, None, {"x": None}, {"x": []}])
    table = pa.Table.from_pylist([segment("AB"[turn % 2], turn, turn + 1) for turn in range(4)])
    for name, column in (("map", maps), ("list", lists), ("struct", structs)):
        table = table.append_column(name, column)
    pq.write_table(table, tmp_path / "m.parquet")
    [dialog] = read_corpus({"train": tmp_path / "m.parquet"}, Rules(keep_columns="all"))["train"].dialogs
    assert [each.more for each in dialog.utterances] == [
        {"map": '[["a", "bcdef"]]', "list": '[["a"], null, []]', "struct": '{"x": ["p", null]}'},
        {},
        {"map": '[["q", "z"]]', "list": '[[null, "zz"]]', "struct": '{"x": null}'},
        {"map": "[]", "list": "[]", "struct": '{"x": []}'},
    ]


def test_texts_in_lists_of_several_row_groups_are_read(tmp_path):
    rows = [segment("AB"[turn % 2], turn, turn + 1, words=[{"word": f"w{turn}"}, {"word": "x"}]) for turn in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet", row_group_size=2)
    [dialog] = read_corpus({"train": tmp_path / "m.parquet"}, Rules(keep_columns="words"))["train"].dialogs
    assert [each.more for each in dialog.utterances] == [
        {"words": f'[{{"word": "w{turn}"}}, {{"word": "x"}}]'} for turn in range(6)
    ]


@pytest.mark.parametrize(("rules", "named"), [
    ({"on_bad_rows": "skip"}, "on_bad_rows skip is for manifests and files of other tools: leave it out"),
    ({"keep_columns": "all"}, "keep_columns is for manifests"), ({"needs_text": False}, "a template without texts is for manifests"),
    ({"agent": "column=role"}, "agent column=role is for manifests"), ({"agent": "channel=1"}, "agent channel=1 is for manifests"),
    ({"keep_columns": "all", "on_bad_rows": "clip"}, "on_bad_rows clip and keep_columns are for manifests and files of other tools: leave them out"),
])  # fmt: skip
def test_split_lists_have_no_rules_of_manifests(mini, rules, named):
    with pytest.raises(ValueError, match=rf"train\.txt is a split list, and {named}"):
        read_corpus({"train": mini / "corpus" / "train.txt"}, Rules(**rules))


def test_corpus_without_texts(tmp_path):
    rows = [{name: value for name, value in segment("AB"[i % 2], i, i + 1).items() if name != "text"} for i in range(2)]
    assert len(problems_of(tmp_path, rows)) == 2
    assert describe(read(tmp_path, rows, needs_text=False)) == [
        ("A", "", "t=0,1&channel=0"),
        ("B", "", "t=1,2&channel=1"),
    ]
    joined = describe(
        read(
            tmp_path, [*rows, rows[1] | {"start": 3, "end": 4, "text": " "}], needs_text=False, merge_speaker_turns=True
        )
    )
    assert joined[1] == ("B", "", "t=1,4&channel=1")
    (tmp_path / "m.csv").write_text("dialog,turn,speaker,audio\n1,0,A,a.wav\n1,1,B,b.wav\n")
    assert len(read_corpus({"train": tmp_path / "m.csv"}, Rules(needs_text=False))["train"].dialogs) == 1
