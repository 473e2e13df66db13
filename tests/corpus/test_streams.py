"""Units that a manifest has: their checks, what becomes of several streams, and the dataset of the builder."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

import dailytalk_usdm
from dailytalk_usdm import DailyTalkUSDM, flatten_units, unflatten_units
from usdm_sft.corpus import manifest
from usdm_sft.corpus.problems import CorpusError
from usdm_sft.corpus.read import Rules, read_corpus
from usdm_sft.corpus.unit_reader import UnitReader
from usdm_sft.template.streams import UnitStreams, read_streams

FRAMES = [[5, 9, 2], [6, 9, 0]]  # of three streams with 10, 20 and 3 units
SIZES = [10, 20, 3]
FLAT = [5, 19, 32, 6, 19, 30]  # by hand: 5, 10 + 9, 30 + 2, 6, 10 + 9, 30 + 0


def rows_of(units, **more):
    """A dialog of two turns, the second with other units."""
    rows = [
        {"dialog": "c", "turn": turn, "speaker": "AB"[turn], "text": f"text {turn}", "units": each}
        for turn, each in enumerate(
            [[1, 2, 3] if isinstance(units, str | list) and not _has_frames(units) else FRAMES, units]
        )
    ]
    return [row | more for row in rows]


def _has_frames(units):
    return isinstance(units, list) and any(isinstance(each, list) for each in units)


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def read(path, num_units=SIZES, streams="flatten", rate=12.5, **options):
    reader = UnitReader(rate, num_units, streams)
    [split] = read_corpus({"train": path}, units=reader, **options).values()
    return [utterance for dialog in split.dialogs for utterance in dialog.utterances], reader.streams


def problems_of(path, *args, **options):
    with pytest.raises(CorpusError) as raised:
        read(path, *args, **options)
    return raised.value.problems


def test_flattened_units_and_their_frames():
    flat = flatten_units(FRAMES, SIZES)
    assert (flat.tolist(), flat.dtype) == (FLAT, np.uint16)
    frames = unflatten_units(flat, SIZES)
    assert (frames.tolist(), frames.dtype) == (FRAMES, np.int64)
    assert unflatten_units([], SIZES).shape == (0, 3)
    assert flatten_units([[65_535]], [65_536]).tolist() == [65_535]


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (FLAT[:5], "5 units instead of whole frames of 3: leave out the units after the last whole frame"),
        ([[5, 19, 32]], r"shape \(1, 3\) instead of whole frames of 3"),
        ([5, 19, 33], "unit 33 at position 2 is not of stream 2, whose units are 30 to 32"),
        ([*FLAT, 5, 9, 30], "unit 9 at position 7 is not of stream 1, whose units are 10 to 29"),
        ([-1, 19, 30], "unit -1 at position 0 is not of stream 0, whose units are 0 to 9"),
        ([5.9, 19.0, 32.0], "units are float64: give whole numbers"),
    ],
)
def test_units_that_are_no_frames_are_refused(units, message):
    with pytest.raises(ValueError, match=message):
        unflatten_units(units, SIZES)


@pytest.mark.parametrize(
    ("frames", "sizes", "message"),
    [
        ([[5, 9]], SIZES, r"frames have shape \(1, 2\): give 3 units for each frame"),
        ([[5, 9, 2], [5, 20, 2]], SIZES, "unit 20 of frame 1 is not of stream 1, which has 20: give"),
        ([[-1, 9, 2]], SIZES, "unit -1 of frame 0 is not of stream 0"),
        ([[5.7, 9.0, float("nan")]], SIZES, "units are float64: give whole numbers"),
        ([[1, 1]], [65_536, 1], r"num_units is \[65536, 1\]: give one for each stream, 65,536 or fewer in all"),
    ],
)
def test_frames_that_cannot_be_flattened_are_refused(frames, sizes, message):
    with pytest.raises(ValueError, match=message):
        flatten_units(frames, sizes)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("streams", "expected", "rate"), [("flatten", FLAT, 37.5), ("first", [5, 6], 12.5)])
def test_streams_of_a_manifest(tmp_path, suffix, streams, expected, rate):
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[suffix]
    path = write(tmp_path / f"m.{suffix}", rows_of(FRAMES, emotion="calm"))
    utterances, found = read(path, streams=streams)
    assert [(each.units.tolist(), each.units.dtype) for each in utterances] == [(expected, np.uint16)] * 2
    assert [(each.id, each.text, each.emotion, each.audio) for each in utterances] == [
        ("c_0", "text 0", "calm", ""), ("c_1", "text 1", "calm", "")
    ]  # fmt: skip
    assert found == UnitStreams(12.5, (10, 20, 3), streams) and found.units_per_second == rate
    assert found.count_seconds(len(expected)) == 2 / 12.5


@pytest.mark.parametrize("kind", [pa.list_(pa.uint16()), pa.large_list(pa.int64()), pa.list_(pa.int8(), 3)])
def test_lists_of_every_parquet_type(tmp_path, kind):
    columns = {name: [row[name] for row in rows_of([4, 5, 6])] for name in ("dialog", "turn", "speaker", "text")}
    units = pa.array([[1, 2, 3], [4, 5, 6]], kind)
    pq.write_table(pa.table({**columns, "units": units}), tmp_path / "m.parquet")
    utterances, streams = read(tmp_path / "m.parquet", 7, None)
    assert [each.units.tolist() for each in utterances] == [[1, 2, 3], [4, 5, 6]]
    assert streams == UnitStreams(12.5, (7,), None)  # one stream needs no choice


def test_frames_of_one_unit_are_one_stream(tmp_path):
    rows = [row | {"units": [[3], [4]]} for row in rows_of([1])]
    utterances, streams = read(write_jsonl(tmp_path / "m.jsonl", rows), 5, None)
    assert utterances[0].units.tolist() == [3, 4] and streams.streams is None


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ("[1, 2]", "units '[1, 2]' is not a list: give a list of whole numbers, or of frames of them"),
        ([], "units is empty: give one unit or more, or leave out the turn"),
        ([1, True], "units holds 'True' at position 1: give whole numbers"),
        ([1, 2.0], "units holds '2.0' at position 1: give whole numbers"),
        ([1, None], "units holds 'None' at position 1: give whole numbers"),
        ([1, "2"], "units holds '2' at position 1: give whole numbers"),
        ([0, 9, 10], "units has '10' at position 2, not a number from 0 to 9: correct it, or --num_units"),
        ([0, -1], "units has '-1' at position 1, not a number from 0 to 9: correct it, or --num_units"),
        ([10**30], f"units has '{10**30}' at position 0, not a number from 0 to 9: correct it, or --num_units"),
        (None, "units missing: complete the row (a row has dialog, turn, speaker, text, units)"),
    ],
)  # fmt: skip
def test_row_with_wrong_units_is_named(tmp_path, units, message):
    rows = rows_of([1])
    rows[1]["units"] = units
    rows[0]["units"] = [1, 2, 3]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    assert problems_of(path, 10, None) == [f"{path}:2: {message}"]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([[5, 9, 2], [6, 9]], "frame 1 of units has 2 units, the first one 3: give one unit of each stream in each frame"),
        ([[5, 9, 2], 6], "frame 1 of units is '6', the first one 3: give one unit of each stream in each frame"),
        ([[]], "frame 0 of units has 0 units, the first one 0: give one unit of each stream in each frame"),
        ([[5, 9, 2], [5, 9, 3]], "units has '3' at frame 1, stream 2, not a number from 0 to 2: correct it, or --num_units"),
        ([[5, 9, False]], "units holds 'False' at position 2: give whole numbers"),
        ([[5, 9]], "units has 2 units in a frame, but 3 units at {path}:1: give every row the same streams"),
        ([5, 9], "units has 1 unit in a frame, but 3 units at {path}:1: give every row the same streams"),
    ],
)  # fmt: skip
def test_row_with_wrong_frames_is_named(tmp_path, frames, message):
    rows = rows_of(FRAMES)
    rows[1]["units"] = frames
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    assert problems_of(path) == [f"{path}:2: {message.format(path=path)}"]


@pytest.mark.parametrize(
    ("num_units", "streams", "message"),
    [
        (20, None, "units has frames of 3 units: choose with --streams first (stream 0 alone) or flatten (all streams, frame by frame)"),
        ([10, 20], "first", "units has 3 units in a frame, but num_units names 2 streams: give one number for all streams, or one for each"),
        (30_000, "flatten", "3 streams with 90,000 units in all, more than the 65,536 that are stored: use streams first"),
        (70_000, "first", "1 stream with 70,000 units in all, more than the 65,536 that are stored: use another codec"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_frames_are_told_once(tmp_path, num_units, streams, message):
    path = write_jsonl(tmp_path / "m.jsonl", rows_of(FRAMES))
    assert problems_of(path, num_units, streams) == [f"{path}:1: {message}"]


def test_splits_have_the_same_streams(tmp_path):
    paths = {"train": write_jsonl(tmp_path / "a.jsonl", rows_of(FRAMES))}
    rows = [row | {"dialog": "d", "units": [[1, 2]]} for row in rows_of(FRAMES)]
    paths["test"] = write_jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(CorpusError, match=r"b\.jsonl:1: units has 2 units in a frame, but 3 units at .*a\.jsonl:1"):
        read_corpus(paths, units=UnitReader(12.5, SIZES, "flatten"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit_rate": 0, "num_units": 5}, "unit_rate is 0: give a positive number of units"),
        ({"unit_rate": math.nan, "num_units": 5}, "unit_rate is nan: give a positive number of units"),
        ({"unit_rate": 12.5}, "unit_rate is 12.5, but num_units is missing: give"),
        ({"num_units": 5}, "num_units is given without unit_rate: give the units"),
        ({"num_units": 5, "streams": "first"}, "num_units and streams are given without unit_rate: give"),
        ({"unit_rate": 12.5, "num_units": 0}, "num_units is 0: give a whole number, or a list with one for each stream"),
        ({"unit_rate": 12.5, "num_units": [5, True]}, r"num_units is \[5, True\]: give a whole number, or a list"),
        ({"unit_rate": 12.5, "num_units": []}, r"num_units is \[\]: give a whole number, or a list"),
        ({"unit_rate": 12.5, "num_units": 5, "streams": "all"}, "streams 'all' is unknown: choose one of first, flatten"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_the_builder(tmp_path, options, message):
    write_jsonl(tmp_path / "train.jsonl", rows_of([1]))
    with pytest.raises(ValueError, match=message):
        DailyTalkUSDM(data_dir=tmp_path, cache_dir=str(tmp_path / "cache"), **options)


def test_units_in_csv_are_refused(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("dialog,turn,speaker,text,units\n")
    expected = f"{path}: lists of units are not read from CSV: write the manifest as JSON lines or Parquet"
    assert problems_of(path) == [expected]


def test_split_lists_have_no_units(mini):
    with pytest.raises(
        ValueError, match=r"train\.txt is a split list, which has no units: leave out unit_rate, or name a"
    ):
        read(mini / "corpus" / "train.txt")


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.bool_()), pa.int64(), pa.string()])
def test_column_of_another_type_is_refused(tmp_path, kind):
    rows = {"dialog": ["c"], "turn": [0], "speaker": ["A"], "text": ["yes"]}
    pq.write_table(pa.table(rows | {"units": pa.array([None], kind)}), tmp_path / "m.parquet")
    [problem] = problems_of(tmp_path / "m.parquet")
    assert problem.startswith(
        f"{tmp_path / 'm.parquet'}: column units is of type '{str(kind).replace('item', 'element')}'"
    )
    assert problem.endswith(": give a list of whole numbers, or of lists of them, in each row")


def test_row_group_with_too_many_units_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_GROUP_UNITS", 7)
    path = write_parquet(tmp_path / "m.parquet", rows_of([1, 2, 3, 4, 5]))
    [problem] = problems_of(path, 10, None)
    assert problem == (
        f"{path}: column units of row group 0 has 8 units in 2 rows: write row groups of up to 7 units (row_group_size of pyarrow)"
    )
    path = write_parquet(tmp_path / "m.parquet", rows_of([1, 2, 3, 4, 5]), row_group_size=1)
    assert len(read(path, 10, None)[0]) == 2


@pytest.mark.parametrize("frames", [1, 2])
def test_row_with_too_many_units_is_refused_undecoded(tmp_path, monkeypatch, frames):
    monkeypatch.setattr(manifest, "_MANY_UNITS", 3)
    monkeypatch.setattr(manifest, "MAX_ROW_UNITS", 4)
    rows = rows_of([1])
    units = [[1, 2, 3, 4], [1, 2, 3, 4, 5]] if frames == 1 else [[[1, 2], [1, 2]], [[1, 2]] * 3]
    for row, each in zip(rows, units, strict=True):
        row["units"] = each
    path = write_parquet(tmp_path / "m.parquet", rows)
    message = f"units has {len(units[1]) * frames} units: give 4 or fewer"
    assert problems_of(path, 10, "first") == [f"{path}: row 1: {message}"]


def test_units_are_ignored_without_a_rate(tmp_path):
    """As in the config `utterances`: whatever the column holds."""
    rows = rows_of([1], audio="a.wav", seconds=0.5)
    rows[1]["units"] = "anything"
    [split] = read_corpus({"train": write_jsonl(tmp_path / "m.jsonl", rows)}).values()
    assert [each.units for each in split.utterances()] == [None, None]


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
@pytest.mark.parametrize("more", [{}, {"audio": None}], ids=str)
def test_missing_audio_beside_units_names_the_option(tmp_path, name, more):
    rows = [row | more for row in rows_of([1])]
    path = {"m.jsonl": write_jsonl, "m.parquet": write_parquet}[name](tmp_path / name, rows)
    with pytest.raises(
        CorpusError, match=r"audio.*, or give --unit_rate, and its column units is read in place of audio"
    ):
        read_corpus({"train": path})


def test_doubled_column_units(tmp_path):
    line = '{"dialog": "c", "turn": 0, "speaker": "A", "text": "a", "audio": "a.wav", "units": [1], "units": [2]}'
    path = tmp_path / "m.jsonl"
    path.write_text(line)
    assert problems_of(path) == [f"{path}:1: units given twice in one object: delete one of the two"]
    read_corpus({"train": path})  # they are not read


def test_audio_beside_units(tmp_path):
    rows = rows_of([1], audio="a.wav", start=0.5, end=1.0, channel=1)
    del rows[1]["audio"]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    assert problems_of(path, 10, None) == [
        f"{path}:2: start, end and channel are of a recording, but the row has no audio: leave them out"
    ]
    rows[1] |= {"start": None, "end": None, "channel": None}
    utterances, _ = read(write_jsonl(path, rows), 10, None)
    assert [each.audio for each in utterances] == [f"{tmp_path / 'a.wav'}#t=0.5,1&channel=1", ""]


def test_turns_with_units_alone_are_ordered_by_start(tmp_path):
    rows = [
        {"dialog": "c", "speaker": speaker, "text": text, "start": start, "end": 9, "units": [[start, 0]]}
        for speaker, text, start in (("B", "later", 3), ("A", "sooner", 1))
    ]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    utterances, _ = read(path, 10, "first")
    assert [(each.id, each.text, list(each.units)) for each in utterances] == [
        ("c_0", "sooner", [1]),
        ("c_1", "later", [3]),
    ]
    write_jsonl(path, [rows[0] | {"channel": 0}, rows[1]])
    assert problems_of(path, 10, "first") == [
        f"{path}:1: start, end and channel are of a recording, but the row has no audio: leave them out"
    ]


def test_merged_turns_have_the_units_of_both(tmp_path):
    rows = [
        {
            "dialog": "c",
            "turn": turn,
            "speaker": speaker,
            "text": str(turn),
            "units": [[turn, turn + 1, 0]],
            "audio": f"{turn}.wav",
        }
        for turn, speaker in enumerate("AABBA")
    ]
    del rows[3]["audio"]
    utterances, _ = read(write_jsonl(tmp_path / "m.jsonl", rows), rules=Rules(merge_speaker_turns=True))
    assert [each.units.tolist() for each in utterances] == [[0, 11, 30, 1, 12, 30], [2, 13, 30, 3, 14, 30], [4, 15, 30]]
    assert [each.audio for each in utterances] == [
        f"{tmp_path / '0.wav'}\n{tmp_path / '1.wav'}",
        "",
        str(tmp_path / "4.wav"),
    ]


@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"name": "multi_turn"}], ids=str)
def test_load_dataset_gives_units_and_seconds(tmp_path, options):
    soundfile.write(tmp_path / "a.wav", np.zeros(2560), 16_000)
    rows = rows_of(FRAMES)
    rows[1] |= {"units": FRAMES[:1], "audio": "a.wav"}
    write_jsonl(tmp_path / "train.jsonl", rows)
    given = {"unit_rate": 12.5, "num_units": SIZES, "streams": "flatten", "cache_dir": str(tmp_path / "cache")}
    [row] = dailytalk_usdm.load_dataset(tmp_path, split="train", **given, **options)
    values = {
        name: value[0] if options.get("name") else value
        for name, value in row.items()
        if name.startswith(("user", "agent"))
    }
    assert values["user_units"] == FLAT and values["agent_units"] == FLAT[:3]
    assert values["user_seconds"] == pytest.approx(0.16) and values["agent_seconds"] == pytest.approx(0.08)
    assert values["user_audio"] is None and values["agent_audio"]["path"] == str(tmp_path / "a.wav")


@pytest.mark.parametrize(
    "settings",
    [
        {"unit_rate": "12.5", "num_units": [5]}, {"unit_rate": 12.5, "num_units": 5}, {"unit_rate": 12.5, "num_units": [5], "streams": "first"},
        {"unit_rate": 12.5, "num_units": [5, 5]}, {"unit_rate": True, "num_units": [5]}, {"unit_rate": 12.5},
        {"unit_rate": 12.5, "num_units": [40_000, 40_000], "streams": "flatten"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_a_forged_folder_are_refused(settings):
    with pytest.raises(ValueError, match="are not units of a dataset"):
        read_streams({"settings": settings, "num_units": 5})


def test_settings_are_read_again():
    for streams in (UnitStreams(12.5, (5,)), UnitStreams(50.0, (5, 6), "first"), UnitStreams(50.0, (5, 6), "flatten")):
        assert read_streams({"settings": json.loads(json.dumps(streams.settings()))}) == streams
    assert read_streams({"settings": {"history": 0}, "num_units": 300}) == UnitStreams(50.0, (300,))
