"""The same dialogs as DailyTalk, and as other tools write them: the same turns, samples, units and labels."""

import gzip
import json
import random
import shutil
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from dailytalk_usdm import load_dataset
from tests.helpers import options
from usdm_sft.audio.reading import read_waveform
from usdm_sft.corpus.find import digest_list, find_lists, recipe_of
from usdm_sft.corpus.problems import CorpusError
from usdm_sft.corpus.read import Rules, read_corpus
from usdm_sft.folder.export import export
from usdm_sft.folder.page import CorpusRecordings, _add_recordings
from usdm_sft.prepare.checks import SetUp
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.prepare import prepare

RATE = 16_000


def make_turns():
    """Return dialog -> turns of (speaker, start, end, words); times are multiples of 1/16 s, and each speaker has a channel."""
    choose = random.Random(0)
    dialogs = {}
    for number in range(20):
        position, turns = 0.25, []
        for turn in range(choose.randint(2, 4)):
            length = choose.randint(4, 8) / 16
            turns.append((turn % 2, position, position + length, [f"word{turn}", f"of{number}", "me"]))
            position += length + 0.125
        dialogs[f"d{number}"] = turns
    return dialogs


DIALOGS = make_turns()
ROWS = [
    {"dialog": name, "turn": turn, "speaker": str(side), "text": " ".join(words), "audio": f"{name}.wav", "start": start, "end": end,
     "channel": side}
    for name, turns in DIALOGS.items()
    for turn, (side, start, end, words) in enumerate(turns)
]  # fmt: skip


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


def write_lines(path, rows):
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_table(path, rows, separator):
    write_lines(path, [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)])


def times_of_words(start, end, words):
    step = (end - start) / len(words)
    return [(word, start + index * step, step) for index, word in enumerate(words)]


def write_dailytalk(folder, calls):
    lines = []
    for row in ROWS:
        number, name = row["dialog"][1:], f"{row['turn']}_{row['speaker']}_{row['dialog']}"
        path = folder / "data" / number / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        samples = calls[row["dialog"]][round(row["start"] * RATE) : round(row["end"] * RATE), row["channel"]]
        soundfile.write(path, samples, RATE, subtype="PCM_16")
        lines.append(f"{name}|{row['speaker']}|{{P}}|{row['text']}|")
    write_lines(folder / "train.txt", lines)
    write_lines(folder / "test.txt", ["0_0_d99|0|{P}|a|", "1_1_d99|1|{P}|b|"])
    (folder / "data" / "99").mkdir()
    for name in ("0_0_d99", "1_1_d99"):
        soundfile.write(folder / "data" / "99" / f"{name}.wav", calls["d0"][:RATE, 0], RATE)


def recording_of(name):
    source = {"type": "file", "channels": [0, 1], "source": f"{name}.wav"}
    return {
        "id": name,
        "sources": [source],
        "sampling_rate": RATE,
        "num_samples": 80_000,
        "duration": 5.0,
        "channel_ids": [0, 1],
    }


def supervision_of(row, number, offset=0.0):
    segment = {"start": row["start"] - offset, "duration": row["end"] - row["start"], "channel": row["channel"]}
    return {
        "id": f"s{number}",
        "recording_id": row["dialog"],
        "text": row["text"],
        "speaker": row["speaker"],
        **segment,
    }


def write_lhotse_cuts(folder, calls):
    cuts = []
    for name in DIALOGS:
        rows = [row for row in ROWS if row["dialog"] == name]
        parts = [rows[:1], rows[1:]]  # a MonoCut and a MultiCut, each with a start of its own
        for kind, part in zip(("MonoCut", "MultiCut"), parts, strict=True):
            start = part[0]["start"] - 0.0625
            supervisions = [supervision_of(row, number, start) for number, row in enumerate(part)]
            cut = {"id": f"{name}-{kind}", "start": start, "duration": 4.0, "supervisions": supervisions, "type": kind}
            cuts.append(cut | {"channel": 0 if kind == "MonoCut" else [0, 1], "recording": recording_of(name)})
    write_lines(folder / "cuts.jsonl.gz", cuts)


def write_lhotse(folder, calls):
    """Recordings of two mono files, one for each channel."""
    recordings = []
    for name, samples in calls.items():
        sources = [{"type": "file", "channels": [side], "source": f"{name}-{side}.wav"} for side in (0, 1)]
        recordings.append(recording_of(name) | {"sources": sources})
        for side in (0, 1):
            soundfile.write(folder / f"{name}-{side}.wav", samples[:, side], RATE, subtype="PCM_16")
    write_lines(folder / "calls_recordings_train.jsonl", recordings)
    supervisions = [supervision_of(row, number) for number, row in enumerate(ROWS)]
    write_lines(folder / "calls_supervisions_train.jsonl", reversed(supervisions))


def write_nemo(folder, calls):
    renamed = {"audio": "audio_filepath", "start": "offset", "dialog": "conversation_id", "channel": "channel_selector"}
    rows = [
        {renamed.get(name, name): value for name, value in without(row, "turn", "end").items()} | {"duration": row["end"] - row["start"]}
        for row in ROWS
    ]  # fmt: skip
    write_lines(folder / "train_manifest.json", rows)


def write_kaldi(folder, calls):
    sides = [(f"{name}-{'AB'[side]}", name, "AB"[side]) for name in DIALOGS for side in (0, 1)]
    write_lines(folder / "wav.scp", [f"{recording} {name}.wav" for recording, name, _ in sides])
    write_lines(folder / "reco2file_and_channel", [" ".join(side) for side in sides])
    utterances = [(f"{row['dialog']}-{row['turn']:03d}", row) for row in ROWS]
    write_lines(
        folder / "segments",
        [f"{name} {row['dialog']}-{'AB'[row['channel']]} {row['start']} {row['end']}" for name, row in utterances],
    )
    write_lines(folder / "text", [f"{name} {row['text']}" for name, row in utterances])
    write_lines(folder / "utt2spk", [f"{name} {row['speaker']}" for name, row in utterances])


def write_rttm(folder, calls):
    lines = [
        f"SPEAKER {row['dialog']} {row['channel'] + 1} {row['start']} {row['end'] - row['start']} <NA> <NA> {row['speaker']} <NA> <NA>"
        for row in ROWS
    ]
    write_lines(folder / "calls.rttm", [";; a comment", *lines])
    words = [
        f"{name} {side + 1} {start:.4f} {length:.4f} {word}"
        for name, turns in DIALOGS.items()
        for side, first, last, said in turns
        for word, start, length in times_of_words(first, last, said)
    ]
    write_lines(folder / "calls.ctm", reversed(words))


def write_alignments(folder, calls):
    for name, turns in DIALOGS.items():
        words = [
            [word, [start, start + length], ("SPEAKER_MAIN", "1")[side]]
            for side, first, last, said in turns
            for word, start, length in times_of_words(first, last, said)
        ]
        (folder / f"{name}.json").write_text(json.dumps({"alignments": words[::-1]}))
    write_lines(folder / "train.jsonl", [{"path": f"{name}.wav", "duration": 5.0} for name in DIALOGS])


def write_csv(folder, calls):
    renamed = {"audio": "file", "start": "start_time", "text": "transcript"}
    rows = [
        {renamed.get(name, name): value for name, value in without(row, "turn", "dialog", "speaker").items()}
        for row in ROWS
    ]
    write_table(folder / "calls.csv", rows, ",")


def dataset_of(calls, folder):
    rows = []
    for row in ROWS:
        samples = calls[row["dialog"]][round(row["start"] * RATE) : round(row["end"] * RATE), row["channel"]]
        soundfile.write(folder / "one.wav", samples, RATE, subtype="PCM_16")
        audio = {"bytes": (folder / "one.wav").read_bytes(), "path": None}
        rows.append(without(row, "start", "end", "channel") | {"audio": audio})
    (folder / "one.wav").unlink()
    return rows


def write_saved(folder, calls):
    rows = dataset_of(calls, folder)
    features = {name: datasets.Value("int32" if name == "turn" else "string") for name in rows[0]}
    table = pa.Table.from_pylist(rows, schema=datasets.Features(features | {"audio": datasets.Audio()}).arrow_schema)
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(folder / "saved")
    for path in (folder / "saved").iterdir():
        path.rename(folder / path.name)


def write_parquet(folder, calls):
    table = pa.Table.from_pylist(dataset_of(calls, folder))
    (folder / "data").mkdir()
    for part in (0, 1):
        half = table.slice(part * 30, 30 if part == 0 else None)
        pq.write_table(half, folder / "data" / f"train-{part:05d}-of-00002.parquet")


WRITERS = {
    "manifest": lambda folder, calls: write_lines(folder / "train.jsonl", ROWS),
    "manifest.gz": lambda folder, calls: write_lines(folder / "calls.jsonl.gz", ROWS),
    "manifest.json": lambda folder, calls: (folder / "train.json").write_text(json.dumps(ROWS, indent=1)),
    "manifest.tsv": lambda folder, calls: write_table(folder / "calls-train.tsv", ROWS, "\t"),
    "lhotse": write_lhotse,
    "lhotse.cuts": write_lhotse_cuts,
    "nemo": write_nemo,
    "kaldi": write_kaldi,
    "rttm": write_rttm,
    "alignments": write_alignments,
    "segments": write_csv,
    "dataset": write_saved,
    "dataset.parquet": write_parquet,
}
IN_FILES = [kind for kind in WRITERS if not kind.startswith(("dataset", "kaldi"))]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A folder with the dialogs in a folder for each kind."""
    root = tmp_path_factory.mktemp("corpora")
    noise = np.random.default_rng(0)
    calls = {name: noise.integers(-3000, 3000, (5 * RATE, 2), np.int16) for name in DIALOGS}
    for kind, write in {"dailytalk": write_dailytalk, **WRITERS}.items():
        (root / kind).mkdir()
        if not kind.startswith("dataset") and kind not in ("dailytalk", "lhotse"):
            for name, samples in calls.items():
                soundfile.write(root / kind / f"{name}.wav", samples, RATE, subtype="PCM_16")
        write(root / kind, calls)
    return root


@pytest.fixture(scope="module")
def expected(corpora):
    """The turns of the dialogs as DailyTalk, with their samples."""
    return describe(find_lists(corpora / "dailytalk"), corpora / "dailytalk")


def describe(lists, data_dir, corpus=None):
    split = read_corpus({"train": lists["train"]}, data_dir=data_dir, corpus=corpus)["train"]
    turns = [(dialog.id, turn.turn, turn.text) for dialog in split.dialogs for turn in dialog.utterances]
    order = sorted(range(len(turns)), key=lambda place: (int(turns[place][0][1:]), turns[place][1]))
    samples = [read_waveform(turn.audio).tobytes() for dialog in split.dialogs for turn in dialog.utterances]
    return [(*turns[place], samples[place]) for place in order]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_gives_the_turns_of_dailytalk(corpora, expected, tmp_path, kind):
    lists = find_lists(corpora / kind, cache_dir=tmp_path)
    assert list(lists) == ["train"]
    assert recipe_of(lists["train"]).name == kind.partition(".")[0]
    assert [turn[:3] for turn in expected] == [(row["dialog"], row["turn"], row["text"]) for row in ROWS]
    assert describe(lists, corpora / kind) == expected


@pytest.mark.parametrize("kind", IN_FILES)
def test_the_file_itself_may_be_data_dir(corpora, kind):
    [file] = find_lists(corpora / kind).values()
    assert find_lists(file) == {"train": file}
    assert len(read_corpus({"train": file}, data_dir=file)["train"].dialogs) == len(DIALOGS)


@pytest.mark.parametrize("kind", WRITERS)
def test_load_dataset_reads_every_kind(corpora, tmp_path, kind):
    rows = load_dataset(
        corpora / kind, split="train", cache_dir=str(tmp_path / "datasets"), digest_cache_dir=tmp_path / "cache"
    )
    pairs = {f"{a['dialog']}_{a['turn']}" for a, b in pairwise(ROWS) if a["dialog"] == b["dialog"]}
    assert set(rows["id"]) == pairs


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # One recording, or one for each speaker: by start.
        ([("a.wav", 2, "A"), ("a.wav", 1, "B"), ("a.wav", 3, "B")], [1, 0, 2]),
        ([("a.wav", 2, "A"), ("b.wav", 1, "B"), ("a.wav", 0, "A")], [2, 1, 0]),
        # One recording for each turn: in the order of the lines.
        ([("1.wav", 2, "A"), ("2.wav", 1, "B"), ("3.wav", 0, "A")], [0, 1, 2]),
        ([("1.wav", None, "B"), ("2.wav", None, "A")], [0, 1]),
        ([("1.wav", 0, "B"), ("2.wav", 0, "A")], [0, 1]),
    ],
)
def test_order_of_turns_without_numbers(tmp_path, changes, expected):
    rows = [
        {"audio_filepath": file, "offset": start, "duration": 1 / (number + 1), "speaker": speaker, "text": str(number), "session": "x"}
        for number, (file, start, speaker) in enumerate(changes)
    ]  # fmt: skip
    write_lines(
        tmp_path / "m.jsonl", [{name: value for name, value in row.items() if value is not None} for row in rows]
    )
    [dialog] = read_corpus(find_lists(tmp_path))["train"].dialogs
    assert [int(turn.text) for turn in dialog.utterances] == expected


def test_splits_follow_the_words_in_the_names(tmp_path):
    for name in ("cuts_dev", "cuts_train", "eval-cuts"):
        write_lines(tmp_path / f"{name}.jsonl", [{"id": "c", "supervisions": [], "duration": 1}])
    assert {split: path.stem for split, path in find_lists(tmp_path).items()} == {
        "train": "cuts_train", "test": "eval-cuts", "validation": "cuts_dev",
    }  # fmt: skip
    for name in ("train", "test"):
        (tmp_path / "kaldi" / name).mkdir(parents=True)
        write_lines(tmp_path / "kaldi" / name / "wav.scp", [])
    assert [*find_lists(tmp_path / "kaldi")] == ["train", "test"]


def test_digest_of_a_split_covers_all_its_files(corpora, tmp_path):
    for kind, name in (
        ("kaldi", "text"),
        ("rttm", "calls.ctm"),
        ("lhotse", "calls_recordings_train.jsonl"),
        ("alignments", "d3.json"),
    ):
        folder = shutil.copytree(corpora / kind, tmp_path / kind)
        [path] = find_lists(folder).values()
        before = digest_list(path, folder)
        (folder / name).write_text((folder / name).read_text() + " ")
        assert digest_list(path, folder) != before


def test_channels_and_times_of_lhotse(tmp_path):
    """A supervision is cut out of the recording where it reaches beyond its cut, also to an end that the recording has not, and a channel
    is that of the file."""
    sources = [
        {"type": "file", "channels": [0], "source": "l.wav"},
        {"type": "file", "channels": [2, 3], "source": "r.wav"},
    ]
    record = recording_of("r") | {"sources": sources, "transforms": [{"name": "Resample"}]}
    spoken = [("A", 0, -0.3, 1.0), ("B", [3], 1.0, 1.0), (None, [2, 3], 2.0, 9.0)]
    cut = {"id": "c", "start": 0.25, "duration": 3.0, "type": "MultiCut", "channel": [0, 2, 3], "recording": record}
    supervisions = [
        {"id": str(start), "start": start, "duration": length, "channel": channel, "speaker": speaker, "text": "t",
         "custom": {"conversation": "x"}}
        for speaker, channel, start, length in spoken
    ]  # fmt: skip
    write_lines(tmp_path / "cuts.jsonl", [cut | {"supervisions": []}, cut | {"supervisions": supervisions}])
    [dialog] = read_corpus(find_lists(tmp_path), Rules(agent="B"))["train"].dialogs
    assert (dialog.id, [turn.speaker for turn in dialog.utterances]) == ("x", ["A", "B", "[2, 3]"])
    assert [turn.audio.removeprefix(f"{tmp_path}/") for turn in dialog.utterances] == [
        "l.wav#t=0,0.95", "r.wav#t=1.25,2.25&channel=1", "r.wav#t=2.25,11.25",
    ]  # fmt: skip


def test_options_of_rows_hold_for_every_kind(corpora, tmp_path):
    """An utterance of Kaldi without a text is left out, and further fields of NeMo are kept."""
    kaldi = shutil.copytree(corpora / "kaldi", tmp_path / "kaldi")
    (kaldi / "text").write_text((kaldi / "text").read_text().replace("d3-001 word1 of3 me\n", ""))
    with pytest.raises(CorpusError, match=r"segments:\d+: text missing"):
        read_corpus(find_lists(kaldi), data_dir=kaldi)
    split = read_corpus(find_lists(kaldi), Rules(on_bad_rows="skip"), data_dir=kaldi)["train"]
    assert [(turn.id, turn.bad.reason) for turn in split.utterances() if turn.bad] == [("d3_1", "no text")]
    [path] = find_lists(corpora / "nemo").values()
    rows = [json.loads(line) | {"lang": "en"} for line in path.read_text().splitlines()]
    write_lines(tmp_path / "m.json", rows)
    split = read_corpus({"train": tmp_path / "m.json"}, Rules(keep_columns="all"))["train"]
    assert {json.dumps(turn.more) for turn in split.utterances()} == {'{"lang": "en"}'}


def test_doctor_does_not_unpack_a_dataset(corpora, tmp_path):
    found = SetUp(
        PrepareConfig(data_dir=corpora / "dataset", output_path=tmp_path / "out", cache_dir=tmp_path / "cache")
    ).check_corpus()
    assert [(level, text.partition(" is ")[2]) for level, text in found] == [
        ("ok", "a dataset with its recordings in it; prepare unpacks them to the cache and checks them")
    ]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["nemo", "kaldi"])
def test_page_plays_the_turns_of_another_kind(corpora, kind):
    rows = [{"id": "d0_0", "dialog_id": "d0", "turn": 0}]
    counts = {"settings": {"history": 0, "corpus": kind, "template": {}}, "unit_model": {}, "num_units": 100}
    recordings = _add_recordings([{"turns": [{}, {}]}], rows, CorpusRecordings(corpora / kind, "train", counts))
    assert len(recordings) == 2


def lines_of(folder, target):
    export(folder, target)
    return sorted((target / "train.txt").read_text().splitlines())


@pytest.mark.slow
def test_every_kind_gives_the_units_and_labels_of_dailytalk(corpora, unit_model, tmp_path):
    """Segments of the same recordings have the same keys in the cache: their units are made once."""
    lines = {}
    for kind in ("dailytalk", *(kind for kind in WRITERS if not kind.startswith("manifest."))):
        given = {"output_path": str(tmp_path / kind), "data_dir": str(corpora / kind), "shard_dialogs": 64}
        prepare(**options(tmp_path, unit_model, tmp_path, **given))
        lines[kind] = lines_of(tmp_path / kind, tmp_path / f"{kind}.lines")
    assert all(each == lines["dailytalk"] for each in lines.values())
    # DailyTalk has utterance ids of its own and a test split; Lhotse has one file for each channel, datasets one for each turn.
    assert len([*tmp_path.glob("cache/units/*.arrow")]) == 5
    assert json.loads((tmp_path / "lhotse" / "counts.json").read_text())["corpus"] == "Lhotse manifest"
