import base64
import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from dailytalk_usdm import DailyTalkUSDM, load_dataset
from tests.code_blocks import find_code
from tests.helpers import REPOSITORY, content, options, page_data
from tests.mini_hub import serve
from usdm_sft.audio.reading import read_waveform
from usdm_sft.corpus.manifest import read_manifest
from usdm_sft.corpus.problems import CorpusError
from usdm_sft.corpus.read import NO_ANSWER, SAME_SPEAKER, Rules, read_corpus
from usdm_sft.folder.export import export
from usdm_sft.folder.page import write_page
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.prepare import prepare

TURNS = [  # dialog, turn, speaker, text
    ("call-1", 0, "A", "hello there"), ("call-1", 1, "B", "hi"), ("call-1", 2, "A", "how are you"), ("call-1", 3, "B", "fine"),
    ("call/2 ü", 0, "B", "did you see it"), ("call/2 ü", 1, "A", "no"),
]  # fmt: skip


def rows_of(turns=TURNS, **more):
    rows = [dict(zip(("dialog", "turn", "speaker", "text"), turn, strict=True)) for turn in turns]
    return [row | {"audio": "a.wav"} | more for row in rows]


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_table_format_gives_the_same_dialogs(tmp_path, kind):
    rows = rows_of(start=0.5, end=1.25, channel=1, emotion="none", note="passed over")
    [split] = read_corpus({"train": WRITERS[kind](tmp_path / f"m.{kind}", rows)}).values()
    assert [dialog.id for dialog in split.dialogs] == ["call-1", "call/2 ü"]
    utterances = [utterance for dialog in split.dialogs for utterance in dialog.utterances]
    assert [(u.dialog_id, u.turn, u.speaker, u.text) for u in utterances] == TURNS
    assert {u.audio for u in utterances} == {f"{tmp_path / 'a.wav'}#t=0.5,1.25&channel=1"}
    assert {u.emotion for u in utterances} == {"none"}


@pytest.mark.parametrize("kind", WRITERS)
def test_turns_without_numbers_are_ordered_by_start(tmp_path, kind):
    """Ties go to the earlier end, then to the speaker whose name is first."""
    segments = [  # speaker, start, end, text
        ("B", 1.5, 4, "fourth"), ("A", 10, 11, "sixth"), ("A", 1.5, 4, "third"),
        ("B", 9.5, 10.5, "fifth"), ("A", 1.5, 2, "second"), ("B", 0, 1, "first"),
    ]  # fmt: skip
    rows = [
        {"dialog": "c", "speaker": speaker, "text": text, "audio": "a.wav", "start": start, "end": end, "channel": int(speaker == "B")}
        for speaker, start, end, text in segments
    ]  # fmt: skip
    path = WRITERS[kind](tmp_path / f"m.{kind}", rows)
    turns = read_manifest(path, problems := [], None)
    assert problems == []
    assert [(turn.id, turn.turn, turn.speaker, turn.text, turn.audio.partition("#")[2]) for turn, _ in turns.dialogs["c"]] == [
        ("c_0", 0, "B", "first", "t=0,1&channel=1"),
        ("c_1", 1, "A", "second", "t=1.5,2&channel=0"),
        ("c_2", 2, "A", "third", "t=1.5,4&channel=0"),
        ("c_3", 3, "B", "fourth", "t=1.5,4&channel=1"),
        ("c_4", 4, "B", "fifth", "t=9.5,10.5&channel=1"),
        ("c_5", 5, "A", "sixth", "t=10,11&channel=0"),
    ]  # fmt: skip
    path = WRITERS[kind](tmp_path / f"n.{kind}", rows[::-1])
    assert [turn for turn, _ in read_manifest(path, [], None).dialogs["c"]] == [turn for turn, _ in turns.dialogs["c"]]


def test_dialogs_with_and_without_turn_numbers_keep_their_order(tmp_path):
    rows = rows_of([("c", None, "A", "b"), ("d", 5, "A", "x"), ("c", None, "B", "a"), ("d", 6, "B", "y")], end=9)
    for start, row in zip((2, 7, 1, 8), rows, strict=True):
        row["start"] = start
    dialogs = read_corpus({"train": write_jsonl(tmp_path / "m.jsonl", rows)})["train"].dialogs
    assert [[(u.id, u.text) for u in dialog.utterances] for dialog in dialogs] == [
        [("c_0", "a"), ("c_1", "b")],
        [("d_5", "x"), ("d_6", "y")],
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"start": None, "end": None}], r":2: turn missing: complete the row \(.*\), or give start and end, and turns are numbered by start$"),
        ([{"turn": 3}, {}], r":2: turn missing, but dialog call-1 has turn 3 at .*m\.jsonl:1: number all turns of a dialog, or none$"),
        ([{}, {"end": None}], r":2: start and end go together"),
        ([{}, {"start": 0, "speaker": "A"}], r":2: segment of 'call-1' stands already at .*m\.jsonl:1: delete one of the two$"),
    ],
)  # fmt: skip
def test_bad_turns_without_numbers(tmp_path, changes, message):
    rows = [row | {"start": i, "end": 5} for i, row in enumerate(rows_of(TURNS[:2]))]
    for row, change in zip(rows, changes, strict=True):
        del row["turn"]
        row |= change
    with pytest.raises(CorpusError, match=message) as error:
        read_corpus({"train": write_jsonl(tmp_path / "m.jsonl", rows)})
    assert len(error.value.problems) == 1


def test_relative_paths_start_at_the_manifest_or_data_dir(tmp_path):
    rows = rows_of()
    rows[0]["audio"], rows[1]["audio"] = "/elsewhere/x.wav", "zip://x.wav::../x.zip"
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    for data_dir, folder in ((None, tmp_path), ("/some/corpus", Path("/some/corpus"))):
        utterances = read_corpus({"train": path}, data_dir=data_dir)["train"].dialogs[0].utterances
        archive = f"zip://x.wav::{folder.parent / 'x.zip'}"
        assert [u.audio for u in utterances[:3]] == ["/elsewhere/x.wav", archive, str(folder / "a.wav")]


NAN = math.nan


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"start": NAN, "end": NAN, "channel": NAN}, ""),  # pandas writes NaN for what a table does not have
        ({"start": 0.5, "end": 1.25, "channel": NAN}, "#t=0.5,1.25"),
        ({"turn": -0.0, "start": -0.0, "end": 1.2, "channel": -0.0}, "#t=0,1.2&channel=0"),
    ],
)
def test_nan_is_missing_and_negative_zero_is_zero(tmp_path, kind, change, fragment):
    rows = [row | {"turn": float(row["turn"]), "start": 0.5, "end": 1.25, "channel": 1.0} for row in rows_of()]
    rows[0] |= change
    [split] = read_corpus({"train": WRITERS[kind](tmp_path / f"m.{kind}", rows)}).values()
    first, second = split.dialogs[0].utterances[:2]
    assert (first.id, first.audio) == ("call-1_0", f"{tmp_path}/a.wav{fragment}")
    assert (second.id, second.audio) == ("call-1_1", f"{tmp_path}/a.wav#t=0.5,1.25&channel=1")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nan_emotion_is_a_missing_value(tmp_path, kind):
    [split] = read_corpus({"train": WRITERS[kind](tmp_path / f"m.{kind}", rows_of(emotion=NAN))}).values()
    assert {utterance.emotion for dialog in split.dialogs for utterance in dialog.utterances} == {""}


@pytest.mark.parametrize("field", ["dialog", "speaker", "text", "emotion", "audio"])
@pytest.mark.parametrize("value", ["a\ud800b", "\udc80", "a\nb", "a\x1bb", "a\0b"])
def test_unpaired_surrogate_or_control_character(tmp_path, field, value):
    rows = rows_of(emotion="none")
    rows[1][field] = value
    with pytest.raises(CorpusError, match=rf"m\.jsonl:2: {field} '.*' ") as error:
        read_corpus({"train": write_jsonl(tmp_path / "m.jsonl", rows)})
    assert all(problem.isprintable() for problem in error.value.problems)


def test_column_that_is_not_read_may_hold_anything(tmp_path):
    rows = rows_of(note="a\ud800\nb")
    [split] = read_corpus({"train": write_jsonl(tmp_path / "m.jsonl", rows)}).values()
    assert len(split.dialogs) == 2


def write_texts(path, texts, **options):
    """A Parquet manifest of one long dialog."""
    number = len(texts)
    columns = {"dialog": ["c"] * number, "turn": range(number), "speaker": ["A"] * number, "audio": ["a.wav"] * number}
    pq.write_table(pa.table(columns | {"text": texts}), path, **options)
    return path


def test_long_text_in_parquet_is_refused_unread(tmp_path):
    path = write_texts(tmp_path / "m.parquet", ["a", "x" * 30_000_000, "b"], compression="zstd")
    with pytest.raises(
        CorpusError, match=r"m\.parquet: column text of row group 0 has 30,000,\d+ bytes in 3 rows: give"
    ):
        read_corpus({"train": path})


@pytest.mark.parametrize(("length", "refused"), [(1_000_000, False), (1_000_001, True)])
def test_length_of_a_text_in_parquet_is_limited(tmp_path, length, refused):
    path = write_texts(tmp_path / "m.parquet", ["a", "ü" * length, "b"])
    problems = []
    turns = read_manifest(path, problems, tmp_path)
    [found] = turns.dialogs.values()
    message = f"{path}: row 1: text has 1,000,001 characters: give 1,000,000 or fewer"
    assert problems == ([message] if refused else [])
    assert [turn.turn for turn, _ in found] == ([0, 2] if refused else [0, 1, 2])


def test_repeated_long_text_in_parquet_needs_little_memory(tmp_path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 2_000_000]))
    path = write_texts(tmp_path / "m.parquet", texts, compression="zstd")
    code = f"""
import resource
import pyarrow.compute, pyarrow.parquet
from pathlib import Path
from usdm_sft.corpus.manifest import read_manifest
from usdm_sft.corpus.problems import CorpusError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_manifest(Path({str(path)!r}), [], Path("/"))
except CorpusError as error:
    print(len(error.problems), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, kilobytes = map(int, done.stdout.split())
    assert number == 1000 and kilobytes < 500_000  # all texts together have 2 GB


def test_parquet_text_that_is_not_utf_8(tmp_path):
    texts = pa.array([b"ok"] * 20_000 + [b"\xff\xfe"] + [b"ok"] * 99)
    path = write_texts(tmp_path / "m.parquet", pa.Array.from_buffers(pa.string(), len(texts), texts.buffers()))
    with pytest.raises(CorpusError, match=r"m\.parquet: row 20000: not UTF-8 \(byte 0xFF\): save the texts as UTF-8"):
        read_corpus({"train": path})


def test_damaged_page_of_parquet_names_file_and_row(tmp_path):
    texts = [f"text {number:06} of many" for number in range(40_000)]
    path = write_texts(tmp_path / "m.parquet", texts, row_group_size=20_000, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    column = next(
        column
        for column in map(pq.ParquetFile(path).metadata.row_group(1).column, range(5))
        if column.path_in_schema == "text"
    )
    start, size = column.data_page_offset, column.total_compressed_size
    content[start + size // 4 : start + 3 * size // 4] = bytes(size // 2)
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"m\.parquet: damaged after row \d+ \(.+\): write it again"):
        read_corpus({"train": path})


def test_row_groups_nulls_and_types_of_parquet(tmp_path):
    rows = rows_of([(f"c{i // 4}", i % 4, "AB"[i % 2], f"text {i % 3}") for i in range(40)], emotion=None)
    rows[3]["emotion"] = "none"
    table = pa.Table.from_pylist(rows)
    large = table.set_column(table.schema.get_field_index("text"), "text", table["text"].cast(pa.large_string()))
    for each in (table, large):
        pq.write_table(each, tmp_path / "m.parquet", row_group_size=7)
        [split] = read_corpus({"train": tmp_path / "m.parquet"}).values()
        turns = [turn for dialog in split.dialogs for turn in dialog.utterances]
        assert [turn.text for turn in turns] == [row["text"] for row in rows]
        assert [turn.emotion for turn in turns] == [row["emotion"] or "" for row in rows]


@pytest.mark.parametrize("kind", WRITERS)
def test_agent_that_is_a_number(mini, tmp_path, kind):
    rows = [row | {"speaker": 1 + "AB".index(row["speaker"])} for row in rows_of()]
    for row in rows:
        row["audio"] = str(mini / "corpus" / "data" / "3" / "0_0_d3.wav")
    lists = {"train": str(WRITERS[kind](tmp_path / f"m.{kind}", rows))}
    builder = DailyTalkUSDM(data_files=lists, agent=2, digest_cache_dir=tmp_path / "cache", cache_dir=str(tmp_path))
    agents = {agent.speaker for dialog in builder.corpus["train"].dialogs for _, agent in dialog.pairs()}
    assert agents == {"2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, r"m\.jsonl:1: text missing: complete the row"),
        ({"dialog": "", "audio": None}, r":1: dialog, audio missing"),
        ({"turn": 1.5}, r":1: turn '1\.5' is not a whole number from 0 to 2,147,483,647"),
        ({"turn": -1}, r":1: turn '-1' is not a whole number"),
        ({"turn": "x"}, r":1: turn 'x' is not a whole number"),
        ({"turn": 2**40}, r":1: turn '1099511627776' is not a whole number"),
        ({"turn": True}, r":1: turn 'True' is not a whole number"),
        ({"turn": 1}, r":2: turn 1 of 'call-1' stands already at .*m\.jsonl:1: delete one of the two"),
        ({"turn": 7}, r"m\.jsonl:1: dialog call-1 has no turn 4: add the line"),
        ({"dialog": "a\nb"}, r":1: dialog 'a\\nb' is not a name"),
        ({"dialog": ["a"]}, r":1: dialog .* is not a name"),
        ({"speaker": "x" * 300}, r":1: speaker 'x+\.\.\.' has 300 characters: give 200 or fewer"),
        ({"text": "<|unit5|>"}, r":1: text '<\|unit5\|>' holds '<\|', which is part of a special token"),
        ({"text": "a\rb"}, r":1: text 'a\\rb' holds the control character"),
        ({"text": 5}, r":1: text '5' is not a text"),
        ({"audio": "a\nb.wav"}, r":1: audio 'a\\nb\.wav' is not a path"),
        ({"audio": "a\0.wav"}, r":1: audio .* is not a path"),
        ({"start": 1}, r":1: start and end go together"),
        ({"start": 2, "end": 1}, r":1: start 2 and end 1 are not a segment"),
        ({"start": -1, "end": 1}, r":1: start -1 and end 1 are not a segment"),
        ({"start": 0, "end": float("nan")}, r":1: start and end go together"),
        ({"start": 0, "end": float("inf")}, r":1: start 0 and end inf are not a segment"),
        ({"turn": float("nan")}, r":1: turn missing"),
        ({"text": float("nan")}, r":1: text missing"),
        ({"start": "x", "end": "y"}, r":1: start 'x' and end 'y' are not a segment"),
        ({"channel": -1}, r":1: channel -1 is not a channel"),
        ({"channel": "left"}, r":1: channel 'left' is not a channel"),
        ({"speaker": "C"}, r":1: dialog call-1 has 3 speakers \('A, B, C'\): say with --agent which of them is the agent"),
    ],
)  # fmt: skip
def test_bad_row(tmp_path, change, message):
    rows = rows_of()
    rows[0] |= change
    with pytest.raises(CorpusError, match=message):
        read_corpus({"train": write_jsonl(tmp_path / "m.jsonl", rows)})


def parquet(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


DOUBLED = pa.table(
    [["1"], [0], ["A"], ["one"], ["a.wav"], ["two"]], ["dialog", "turn", "speaker", "text", "audio", "text"]
)
NESTED = pa.Table.from_pylist(rows_of(emotion=["none"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.parquet", parquet(DOUBLED), r"m\.parquet: column text named twice: rename or delete one of the two"),
        ("m.parquet", parquet(NESTED), r"m\.parquet: column emotion is of type 'list<.*>': give one text or number"),
        ("m.jsonl", b'{"dialog": 1', r"m\.jsonl:1: '\{\"dialog\": 1' is not JSON: write one object per line"),
        ("m.jsonl", b"[1]", r":1: '\[1\]' is not a JSON object"),
        ("m.jsonl", b"[" * 100_000, r":1: .* is not JSON"),
        ("m.jsonl", b"\n", r":1: blank line: delete it"),
        ("m.jsonl", b"\xff\xfe{}", r":1: not UTF-8 \(byte 0xFF in .*\): save the file as UTF-8"),
        (
            "m.jsonl",
            b"x" * 1_000_001,
            r":1: line of more than 1,000,000 characters, 'x+\.\.\.': name a split list or manifest",
        ),
        ("m.csv", b"dialog,turn\n1,2\n", r":1: no column speaker, text, audio"),
        ("m.csv", b'dialog,turn,speaker,text,audio\n1,0,A,"x"y,a.wav\n', r":2: not CSV"),
        ("m.parquet", b"PAR1", r"m\.parquet: not a Parquet file"),
        (
            "m.csv",
            b"dialog,turn,speaker,text,audio\n1,0,A,hi,a.wav\n1,1,B,yes, and no,a.wav\n",
            r"m\.csv:3: 6 fields instead of 5 in '1,1,B,yes, and no,a\.wav': put a text that holds a comma in quotation marks",
        ),
        (
            "m.csv",
            b"dialog,turn,speaker,text,audio,channel\n1,0,A,hi,a.wav\n",
            r":2: 5 fields instead of 6 in '1,0,A,hi,a\.wav': .* or complete the row",
        ),
        (
            "m.csv",
            b"dialog,turn,speaker,text,text,audio\n1,0,A,one,two,a.wav\n",
            r"m\.csv:1: column text named twice: rename or delete one of the two",
        ),
        (
            "m.jsonl",
            b'{"dialog": 1, "turn": 0, "speaker": "A", "text": "one", "audio": "a.wav", "text": "two"}\n',
            r"m\.jsonl:1: text given twice in one object: delete one of the two",
        ),
    ],
)
def test_bad_table(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read_corpus({"train": tmp_path / name})


def test_csv_columns_that_are_not_read_may_share_a_name(tmp_path):
    """A spreadsheet writes empty columns as trailing commas; a blank line is none of its rows."""
    lines = ["dialog,turn,speaker,text,audio,,", '1,0,A,"yes, please",a.wav,,', "", "1,1,B,fine,a.wav,,"]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    [dialog] = read_corpus({"train": tmp_path / "m.csv"})["train"].dialogs
    assert [(u.turn, u.text) for u in dialog.utterances] == [(0, "yes, please"), (1, "fine")]


def test_table_with_a_bad_row_keeps_order_of_problems(tmp_path):
    """A line that is no row, a bad row and a doubled turn among many good ones are reported in their order."""
    lines = [json.dumps(row) for row in rows_of([("d", turn, "AB"[turn % 2], "hi") for turn in range(200)])]
    lines[70], lines[71], lines[150], lines[199] = "no JSON", lines[71].replace("hi", ""), lines[3], "\udcff"
    (tmp_path / "m.jsonl").write_text("\n".join(lines), errors="surrogateescape")
    problems = []
    turns = read_manifest(tmp_path / "m.jsonl", problems, None)
    assert [problem.partition("m.jsonl:")[2].partition(":")[0] for problem in problems] == ["71", "72", "151", "200"]
    assert len(turns.dialogs["d"]) == 196


def test_named_agent_is_never_the_user(tmp_path):
    turns = [("d", i, speaker, f"text {i}") for i, speaker in enumerate("ABCABC")]
    turns += [("e", i, speaker, "text") for i, speaker in enumerate("AB")] + [("f", 0, "C", "x"), ("f", 1, "A", "y")]
    split = read_corpus({"train": write_jsonl(tmp_path / "m.jsonl", rows_of(turns))}, Rules(agent="C"))["train"]
    pairs = [(user.turn, agent.turn) for dialog in split.dialogs for user, agent in dialog.pairs()]
    assert (pairs, split.num_pairs) == ([(1, 2), (4, 5)], 2)
    assert dict(split.left_out) == {"e": NO_ANSWER, "f": NO_ANSWER}


def test_neighbouring_turns_of_a_speaker_are_merged_on_request(tmp_path):
    turns = [("d", i, speaker, f"t{i}") for i, speaker in enumerate("AABBA")]
    rows = rows_of(turns)
    for i, row in enumerate(rows):
        row |= {"start": i, "end": i + 0.5, "channel": int(row["speaker"] == "B")}
    rows[3] |= {"audio": "b.wav"}
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    assert dict(read_corpus({"train": path})["train"].left_out) == {"d": SAME_SPEAKER}
    [dialog] = read_corpus({"train": path}, Rules(merge_speaker_turns=True))["train"].dialogs
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    assert [(u.turn, u.speaker, u.text, u.audio) for u in dialog.utterances] == [
        (0, "A", "t0 t1", f"{a}#t=0,1.5&channel=0"),
        (1, "B", "t2 t3", f"{a}#t=2,2.5&channel=1\n{b}#t=3,3.5&channel=1"),
        (2, "A", "t4", f"{a}#t=4,4.5&channel=0"),
    ]


def test_overlapping_turns_that_are_merged_are_heard_once(tmp_path):
    rows = rows_of([("d", i, speaker, f"t{i}") for i, speaker in enumerate("AAB")])
    for row, (start, end) in zip(rows, [(1, 5), (2, 3), (6, 7)], strict=True):
        row |= {"start": start, "end": end}
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    soundfile.write(tmp_path / "a.wav", np.zeros(8 * 16_000), 16_000)
    [dialog] = read_corpus({"train": path}, Rules(merge_speaker_turns=True))["train"].dialogs
    assert [(u.text, len(read_waveform(u.audio))) for u in dialog.utterances] == [("t0 t1", 64_000), ("t2", 16_000)]


@pytest.fixture(scope="module")
def stereo(mini, tmp_path_factory):
    """The mini corpus as telephone calls: a stereo file a dialog, speaker 0 left and 1 right, a pause between the turns."""
    folder = tmp_path_factory.mktemp("calls")
    for split in ("train", "test"):
        rows = []
        for dialog in read_corpus({split: mini / "corpus" / f"{split}.txt"}, data_dir=mini / "corpus")[split].dialogs:
            sides, position = [], 0
            for utterance in dialog.utterances:
                samples, rate = soundfile.read(utterance.audio, dtype="int16")
                samples = samples if samples.ndim == 1 else samples[:, 0]
                side = np.zeros((len(samples) + rate // 4, 2), np.int16)
                side[: len(samples), int(utterance.speaker)] = samples
                rows.append(
                    {
                        "dialog": dialog.id, "turn": utterance.turn, "speaker": utterance.speaker, "text": utterance.text,
                        "audio": f"{dialog.id}.wav", "start": position / rate, "end": (position + len(samples)) / rate,
                        "channel": int(utterance.speaker), "emotion": utterance.emotion,
                    }
                )  # fmt: skip
                sides.append(side)
                position += len(side)
            soundfile.write(folder / f"{dialog.id}.wav", np.concatenate(sides), rate, subtype="PCM_16")
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def calls(stereo, tmp_path):
    """A copy of the calls that a test may change."""
    return shutil.copytree(stereo, tmp_path / "calls")


def run(data_dir, output, unit_model, tmp_path, **changes):
    given = {"data_dir": str(data_dir), "output_path": str(output), "shard_dialogs": 64} | changes
    return prepare(**options(Path(data_dir), unit_model, tmp_path, **given))


@pytest.fixture(scope="module")
def prepared(stereo, unit_model, tmp_path_factory):
    """A folder with `out`, made of the calls, and its `cache`."""
    root = tmp_path_factory.mktemp("prepared")
    run(stereo, root / "out", unit_model, root)
    return root


def assert_lines_of_the_reference(folder, mini, tmp_path):
    export(folder, tmp_path / "text")
    for split in ("train", "test"):
        found, expected = (
            sorted((path / f"{split}.txt").read_text().split("\n")) for path in (tmp_path / "text", mini / "expected")
        )
        assert found == expected


def test_telephone_calls_give_the_lines_of_the_reference(stereo, prepared, mini, unit_model, tmp_path):
    """Cut out of stereo calls, the mini corpus is the mini corpus: ids and labels, to the last."""
    output = prepared / "out"
    assert_lines_of_the_reference(output, mini, tmp_path)
    assert verify(output) == {"train": 10, "test": 3}
    assert json.loads((output / "counts.json").read_text())["corpus"] == "manifest"
    card = (output / "README.md").read_text()
    assert "license: unknown" in card and "DailyTalk" not in card and "keonlee9420" not in card
    assert (
        "| sha256 of train manifest | `" in card
        and "The emotions come from the manifests and were not checked." in card
    )
    for config, rows in (("multi_turn", 7), ("single_turn", 10)):
        history = int(config == "single_turn")
        counts = run(stereo, tmp_path / config, unit_model, prepared, config_name=config, history=history)
        assert counts["splits"]["train"]["rows"] == rows
    assert len(list((prepared / "cache" / "units").glob("*.arrow"))) == 2  # the same units for all three


@pytest.mark.parametrize("named", [".", "test.jsonl"])
def test_page_plays_the_turns_of_a_call(stereo, prepared, tmp_path, named):
    write_page(prepared / "out", tmp_path / "page.html", split="test", num_examples=1, data_dir=stereo / named)
    recordings = page_data(tmp_path / "page.html")["recordings"]
    sounds = [base64.b64decode(recording["audio"]) for recording in recordings]
    durations = [soundfile.info(io.BytesIO(sound)).duration for sound in sounds]
    row = datasets.load_dataset(str(prepared / "out"), split="test", cache_dir=str(tmp_path / "datasets"))[0]
    assert durations == pytest.approx([row["user_seconds"], row["agent_seconds"]], abs=0.01)


def test_bad_turn_of_a_call_is_left_out(calls, prepared, unit_model, tmp_path):
    rows = [json.loads(line) for line in (calls / "test.jsonl").read_text().splitlines()]
    rows[2]["end"] = 1000
    write_jsonl(calls / "test.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"test\.jsonl:3: audio file .*d105\.wav#t=.* is to be cut up to 1000 s, but has"
    ):
        run(calls, tmp_path / "out", unit_model, prepared)
    counts = run(calls, tmp_path / "out", unit_model, prepared, on_bad_audio="skip")
    assert list(counts["splits"]["test"]["pairs_left_out"]) == ["d105_1"]


def test_manifests_through_load_dataset(calls, tmp_path):
    rows = load_dataset(str(calls), split="test", cache_dir=str(tmp_path / "datasets"))
    assert rows["id"][:] == ["d105_0", "d105_1", "d2001_0"]
    assert rows[0]["user_audio"]["path"].startswith(f"{calls / 'd105.wav'}#t=0,")
    builder = DailyTalkUSDM(data_files={"test": str(calls / "test.jsonl")}, cache_dir=str(tmp_path / "builder"))
    assert builder.info.license == "" and [row["id"] for row in builder.as_streaming_dataset("test")] == rows["id"][:]


def test_two_manifests_of_a_split_are_refused(calls, unit_model, tmp_path):
    (calls / "train.csv").touch()
    with pytest.raises(ValueError, match=r"train\.csv stands beside train\.jsonl: keep one"):
        run(calls, tmp_path / "out", unit_model, tmp_path)


@pytest.fixture
def archive(mini, tmp_path):
    path = tmp_path / "DailyTalk.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for wav in sorted((mini / "corpus" / "data").rglob("*.wav")):
            file.write(wav, f"DailyTalk/data/{wav.parent.name}/{wav.name}")
    for split in ("train", "test"):
        shutil.copyfile(mini / "corpus" / f"{split}.txt", tmp_path / f"{split}.txt")
    return path


def test_the_zip_of_dailytalk_is_read_without_unpacking(archive, mini, dataset_folder, unit_model, tmp_path):
    cache = shutil.copytree(dataset_folder.parent / "cache", tmp_path / "cache")
    run(archive, tmp_path / "out", unit_model, tmp_path)
    assert len(list((cache / "units").glob("*.arrow"))) == 2  # the same digests, the same shards
    assert content(tmp_path / "out") == content(dataset_folder)
    assert not list(tmp_path.rglob("*.wav"))
    pages = [tmp_path / "zip.html", tmp_path / "plain.html"]
    write_page(tmp_path / "out", pages[0], data_dir=archive)
    write_page(dataset_folder, pages[1], data_dir=mini / "corpus")
    assert page_data(pages[0]) == page_data(pages[1])


def test_archive_without_recordings_is_refused(tmp_path, unit_model):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(
            "0_0_d1|0|{P}|hi|none\n1_1_d1|1|{P}|yes|none\n".replace("d1", f"d{len(name)}")
        )
    with pytest.raises(FileNotFoundError, match=r"other\.zip holds no recordings such as data/23/0_1_d23\.wav"):
        run(tmp_path / "other.zip", tmp_path / "out", unit_model, tmp_path)
    (tmp_path / "other.zip").write_bytes(b"no zip")
    with pytest.raises(
        FileNotFoundError, match=r"other\.zip is not a zip file \(.*\): give DailyTalk's folder or its zip archive$"
    ):
        run(tmp_path / "other.zip", tmp_path / "out", unit_model, tmp_path)


@pytest.mark.slow
def test_corpus_on_the_hub_gives_the_lines_of_the_reference(stereo, mini, unit_model, tmp_path):
    """Rows with audio in them, pushed to the stand-in, come back as the lines of the reference."""
    server, hub, url = serve()
    repo = hub.create("datasets", "tester/calls", False)
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (stereo / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row["audio"] = {"bytes": (stereo / row["audio"]).read_bytes(), "path": row["audio"]}
        features = datasets.Features(
            {name: datasets.Audio() if name == "audio" else datasets.Value("string") for name in rows[0]}
            | {"turn": datasets.Value("int32"), "start": datasets.Value("float64"), "end": datasets.Value("float64"), "channel": datasets.Value("int8")}
        )  # fmt: skip
        table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
        pq.write_table(table, tmp_path / f"{split}.parquet")
        content = (tmp_path / f"{split}.parquet").read_bytes()
        hub.commit(repo, "main", {f"data/{split}-00000-of-00001.parquet": ("reg", content)}, [], "data", None)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    environment["PYTHONPATH"] = str(REPOSITORY)
    arguments = [
        "prepare", "--output_path", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--unit_model", str(unit_model),
        "--pretrained_model_name_or_path", "mistral-common", "--data_dir",
    ]  # fmt: skip

    code = [
        "import dailytalk_usdm",
        "from usdm_sft.cli.main import main",
        "from usdm_sft.folder.page import write_page",
        *[f"main({[*arguments, 'hub:tester/calls']})"] * 2,
        "print(write_page('out', 'page.html', data_dir='hub:tester/calls'))",
        "print(dailytalk_usdm.load_dataset('hub:tester/calls', split='test')['id'][:])",
        f"main({[*arguments, 'hub:tester/nothing']})",
    ]
    command = [sys.executable, "-c", "\n".join(code)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    server.shutdown()
    assert done.stdout.splitlines()[-2:] == ["10", "['d105_0', 'd105_1', 'd2001_0']"], done.stderr[-2000:]
    assert len(page_data(tmp_path / "page.html")["recordings"]) == 14  # each utterance once
    assert done.returncode == 1
    assert (
        "dataset tester/nothing cannot be loaded: the Hub has no tester/nothing, or it is private"
        in done.stderr.splitlines()[-1]
    )
    assert_lines_of_the_reference(tmp_path / "out", mini, tmp_path)
    assert len(list((tmp_path / "cache" / "hub").glob("*/manifest.jsonl"))) == 2


def test_preprocessed_text_as_rows(mini, tmp_path, monkeypatch):
    """The recipe of docs/reference-users.md: the reference's own files, read without the audio."""
    shutil.copytree(mini / "expected", tmp_path / "preprocessed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    scope = {}
    exec(find_code("preprocessed/train.txt"), scope)
    line = (mini / "expected" / "train.txt").read_text().split("\n")[0]
    assert scope["rows"]["train"][0] == {
        name: [int(value) for value in half.split()]
        for name, half in zip(("input_ids", "labels"), line.split("|"), strict=True)
    }
    assert scope["rows"].num_rows == {"train": 10, "test": 3}


@pytest.mark.slow
def test_named_agent_and_merged_turns_end_to_end(calls, unit_model, tmp_path):
    """Ids stay those of turns, and every row is what its columns encode to, in either shape."""
    rows = [json.loads(line) for line in (calls / "train.jsonl").read_text().splitlines()]
    first = [row for row in rows if row["dialog"] == "d8"]
    first[2]["speaker"] = first[1]["speaker"]  # two turns of one speaker, on two channels
    write_jsonl(calls / "train.jsonl", rows)
    merged = {"agent": "1", "merge_speaker_turns": True}
    cut = {"config_name": "multi_turn", "max_length": 400, "overflow": "split"}
    counts = run(calls, tmp_path / "out", unit_model, tmp_path, **merged, **cut)
    assert counts["splits"]["train"]["rows_cut"]
    verify(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Neighbouring turns of the same speaker were merged into one." in card
    assert "form a pair if the later one is by speaker 1, who is always the agent:" in card
    assert "twice in a row were left out" not in card and "Turns repeat" not in card
    data = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "datasets"))
    assert {speaker for row in data["agent_speaker"] for speaker in row} == {"1"}
    assert len(set(data["id"])) == len(data)
    single = run(calls, tmp_path / "single", unit_model, tmp_path, **merged)
    pairs = datasets.load_dataset(str(tmp_path / "single"), split="train", cache_dir=str(tmp_path / "datasets"))
    said = {row["id"]: (row["user_text"], row["agent_text"]) for row in pairs}
    assert single["splits"]["train"]["rows"] == len(said)
    for row in data:
        for number, exchange in enumerate(zip(row["user_text"], row["agent_text"], strict=True)):
            assert said[f"{row['dialog_id']}_{row['turn'] + 2 * number}"] == exchange
