"""Wrong files of other tools: each is named with its line and a remedy."""

import gzip
import json
import os
import re

import pytest

from dailytalk_usdm import DailyTalkUSDM
from usdm_sft.cli.main import main
from usdm_sft.corpus.find import find_lists
from usdm_sft.corpus.problems import CorpusError
from usdm_sft.corpus.read import read_corpus

RECORDING = {"id": "r", "sources": [{"type": "file", "channels": [0, 1], "source": "r.wav"}], "duration": 9.0}
SUPERVISION = {"id": "s", "recording_id": "r", "start": 1, "duration": 1, "channel": 0, "speaker": "A", "text": "hello"}
CUT = {"id": "c", "start": 0, "duration": 9, "channel": [0, 1], "supervisions": [SUPERVISION], "recording": RECORDING}
NEMO = {"audio_filepath": "r.wav", "offset": 1, "duration": 1, "text": "hello", "speaker": "A"}
WAV_SCP, SEGMENTS, TEXT, UTT2SPK = "r r.wav\n", "u r 1 2\n", "u hello\n", "u A\n"
KALDI = {"wav.scp": WAV_SCP, "segments": SEGMENTS, "text": TEXT, "utt2spk": UTT2SPK}
SPEAKER = "SPEAKER r 1 1.0 1.0 <NA> <NA> A <NA> <NA>\n"
WORD = "r 1 1.2 0.3 hello\n"
ROW = '{"dialog": "d", "turn": 0, "speaker": "A", "text": "hello", "audio": "r.wav"}\n'


def lhotse(**changes):
    return {"cuts.jsonl": json.dumps(CUT | changes)}


def recording(**changes):
    return lhotse(recording=RECORDING | changes)


def supervision(**changes):
    return lhotse(supervisions=[SUPERVISION | changes])


def nemo(**changes):
    return {"train.json": json.dumps(NEMO | changes)}


def words(content):
    return {"train.jsonl": '{"path": "r.wav", "duration": 9}', "r.json": content, "r.wav": ""}


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


WRONG = [
    # Lhotse
    (lhotse(recording=None), r"cuts\.jsonl:1: cut 'c' has no recording, only features: give cuts with recordings"),
    (lhotse(supervisions=7), r":1: cut 'c' has start '0' and supervisions '7': give seconds and a list"),
    (lhotse(supervisions=["s"]), r":1: cut 'c' has a supervision that is not an object: correct it"),
    (lhotse(start="x"), r":1: cut 'c' has start 'x' and supervisions"),
    ({"cuts.jsonl": '{"id": "m", "tracks": []}'}, r":1: cut 'm' is a mix of several recordings: give the cuts before they were mixed"),
    (recording(sources=[]), r":1: recording 'r' has no sources: give the file of its sound"),
    (recording(sources=[{"type": "command", "channels": [0], "source": "sox"}]), r":1: recording 'r' is of type 'command', and only files are read"),
    (recording(transforms=[{"name": "Speed"}, 7]), r":1: recording 'r' is to be transformed when it is read: save it transformed"),
    (supervision(channel=2), r":1: channel '2' is not one file or channel of recording 'r': correct it"),
    (supervision(channel=[0, {}]), r":1: channel .* is not one file or channel of recording 'r'"),
    (supervision(duration="long"), r":1: supervision 's': start '1' and duration 'long' are not a segment: give seconds"),
    (supervision(start=-0.1), r":1: start -0\.1 and end .* are not a segment: give seconds"),
    (supervision(text="</s>"), r":1: text '</s>' holds '</s>', which is part of a special token"),
    ({"recordings.jsonl": json.dumps(RECORDING)}, r"recordings\.jsonl:1: recordings\.jsonl holds recordings alone: name the file of their supervisions"),
    ({"supervisions.jsonl": json.dumps(SUPERVISION)}, r":1: supervision 's' is of recording 'r', but no file beside it has the recordings \(recordings\.jsonl\.gz\)"),
    ({"supervisions.jsonl": json.dumps(SUPERVISION), "recordings.jsonl": json.dumps(RECORDING | {"id": 7})}, r":1: .* 'r', but recordings\.jsonl has no such recording"),
    ({"supervisions.jsonl": json.dumps(SUPERVISION), "recordings.jsonl": f"7\n{json.dumps(RECORDING)}"}, r"recordings\.jsonl:1: '7.n' is not a JSON object"),
    # NeMo, and tables of segments
    (nemo(duration=None), r"train\.json:1: start '1' and duration 'None' are not a segment: give seconds"),
    (nemo(duration=0), r":1: start 1 and end 1\.0 are not a segment: give seconds, the start before the end"),
    (nemo(speaker=None), r":1: speaker missing: complete the row"),
    (nemo(channel_selector=[0, 1]), r":1: channel \[0, 1\] is not a channel"),
    ({"train.json": "\n".join(json.dumps(NEMO | {"audio_filepath": name}) for name in ("a/r.wav", "b/r.wav"))}, r":2: 'b/r\.wav' and 'a/r\.wav' have one name, and there is no column of dialogs: add one, such as 'conversation'"),
    ({"calls.csv": "file,start,end,speaker\nr.wav,1,2,A,x\n"}, r"calls\.csv:2: 5 fields instead of 4"),
    ({"calls.csv": "file,file,start,end,speaker\nr.wav,r.wav,1,2,A\n"}, r"calls\.csv:1: column file named twice"),
    # Kaldi
    (KALDI | {"wav.scp": "r sph2pipe -c 1 r.sph |\n"}, r"wav\.scp:1: recording 'r' is the output of a command, 'sph2pipe -c 1 r\.sph \|', and commands are never run: write its output to a file"),
    (KALDI | {"wav.scp": "r raw.ark:17\n"}, r"wav\.scp:1: recording 'r' lies in an archive of Kaldi, 'raw\.ark:17': copy it to a file"),
    (KALDI | {"wav.scp": "r\n"}, r"wav\.scp:1: recording 'r' has no file: give its path"),
    (KALDI | {"wav.scp": "r r.wav\nr s.wav\n"}, r"wav\.scp:2: 'r' stands already at line 1: delete one of the two lines"),
    (KALDI | {"wav.scp": "r r.wav\ns r.wav\n"}, r"segments:1: 'r' is one of 2 recordings of 'r\.wav', and reco2file_and_channel has no side A or B for it"),
    (KALDI | {"segments": "u r 1\n"}, r"segments:1: 'u r 1' is not utterance, recording, start and end: correct the line"),
    (KALDI | {"segments": "u\n"}, r"segments:1: 'u' is not utterance, recording, start and end"),
    (KALDI | {"segments": "u s 1 2\n"}, r"segments:1: 's' is not a recording of wav\.scp: add it there, or delete the line"),
    (KALDI | {"segments": "u r 2 -1\n"}, r"segments:1: start '2' and end '-1' are not a segment"),
    (KALDI | {"text": "u hello\nv bye\n"}, r"text:2: 'v' is not in segments: add it there, or delete the line"),
    (KALDI | {"text": ""}, r"segments:1: text missing"),
    (KALDI | {"utt2spk": "v A\n"}, r"segments:1: 'u' has no speaker in utt2spk: add its line"),
    ({name: KALDI[name] for name in ("wav.scp", "segments", "text")}, r"utt2spk does not exist: write it, with an utterance and its speaker in each line"),
    (KALDI | {"text": b"u hello\n\xff\n"}, r"text:2: not UTF-8 \(byte 0xFF"),
    # RTTM and CTM
    ({"a.rttm": "SPEAKER r 1 1.0 x <NA> <NA> A\n", "r.wav": ""}, r"a\.rttm:1: 'SPEAKER r 1 1\.0 x <NA> <NA> A' is not 'SPEAKER file channel start duration <NA> <NA> speaker': correct the line"),
    ({"a.rttm": SPEAKER}, r"a\.rttm:1: 'r' has no recording of this name in the folder: give data_dir the folder with one"),
    ({"a.rttm": SPEAKER, "r.wav": "", "r.flac": ""}, r":1: 'r' has several recordings of this name \(r\.flac, r\.wav\) in the folder"),
    ({"a.rttm": SPEAKER, "r.wav": "", "a.ctm": f"{WORD}r 1 5.0 0.5 bye\n"}, r"a\.ctm:2: 'bye' at 5 s of 'r' is in no turn of the RTTM: add the turn, or delete the word"),
    ({"a.rttm": SPEAKER, "r.wav": "", "a.ctm": f";; words\n{WORD}r 1 5.0 bye\n"}, r"a\.ctm:3: 'r 1 5\.0 bye' is not 'file channel start duration word'"),
    ({"a.rttm": SPEAKER, "r.wav": "", "a.ctm": ""}, r"a\.rttm:1: text missing"),
    # Word alignments
    ({"train.jsonl": '{"path": "r.wav", "duration": 9}'}, r"train\.jsonl:1: .*r\.json does not exist: put the words beside the recording"),
    ({"train.jsonl": '{"path": 7, "duration": 9}'}, r":1: path '7' is not a path: give that of the recording"),
    ({"train.jsonl": '{"path": "a/r.wav", "duration": 9}\n{"path": "b/r.wav", "duration": 9}', "a/r.json": '[["hi", [0, 1], "A"]]'}, r":2: 'b/r\.wav' and 'a/r\.wav' have one name, which is that of the dialog: rename one of the two"),
    (words("{}"), r"r\.json has no words: give \{\"alignments\": \[\[word, \[start, end\], speaker\], \.\.\.\]\}"),
    (words('{"alignments": [["hi", 1, "A"]]}'), r"r\.json has .* as word 0: give \[word, \[start, end\], speaker\]"),
    (words("no JSON"), r"r\.json cannot be read \(.*\): correct the file"),
    # The other formats of a manifest
    ({"train.json": '[{"dialog": "d", "turn": 0, "speaker": "A", "text": "a", "audio": "r.wav"}, 7]'}, r"train\.json: row 1: '7' is not a JSON object: write one object per row"),
    ({"train.json": '[{"dialog": "d", "speaker"'}, r"train\.json: not JSON \(.*line 1 column 27.*\): correct the file"),
    ({"train.json": '[{"dialog": 1, "dialog": 2}]'}, r"train\.json: dialog given twice in one object"),
    ({"train.jsonl.gz": gzip.compress(ROW.encode())[:-9]}, r"train\.jsonl\.gz:\d+: damaged \(.*\): compress the file again"),
    ({"train.tsv": "dialog\tspeaker\ttext\naudio\n"}, r"train\.tsv:1: no column turn, audio: name the columns"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), WRONG)
def test_wrong_file_is_named_with_its_line(tmp_path, files, message):
    write_files(tmp_path, files)
    with pytest.raises(CorpusError, match=message) as error:
        read_corpus(find_lists(tmp_path), data_dir=tmp_path)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        ({"a.rttm": SPEAKER, "b.rttm": SPEAKER}, "join the files of a split, such as with cat"),
        ({"train-1.json": json.dumps(NEMO), "train-2.json": json.dumps(NEMO)}, "keep one, or name the one to use"),
        ({"train-a/wav.scp": "", "train-b/wav.scp": ""}, "keep one, or name the one to use"),
    ],
)
def test_two_files_of_a_split_are_refused(tmp_path, files, remedy):
    with pytest.raises(ValueError, match=f"stands beside .*{remedy}"):
        find_lists(write_files(tmp_path, files))


def test_unknown_folder_lists_the_kinds_and_its_files(tmp_path, no_network, capsys):
    """A folder `data` without dialogs of DailyTalk is not taken for it, and nothing is downloaded."""
    folder = write_files(tmp_path / "corpus", {"data/notes.txt": "", "1.wav": "", **{f"{n}.txt": "" for n in range(9)}})
    with pytest.raises(SystemExit, match="1"):
        main(["prepare", "--data_dir", str(folder), "--output_path", str(tmp_path / "out")])
    first, heading, *kinds = capsys.readouterr().err.splitlines()
    assert first == (
        f"dailytalk-usdm prepare: {folder} holds no corpus of a known kind: give its folder or file as data_dir, or its split files "
        "(--train_metadata_path). It holds '0.txt', '1.txt', '1.wav', '2.txt', '3.txt' and 6 more."
    )
    assert heading == "What was looked for:"
    names = [line.split()[0] for line in kinds]
    assert [*dict.fromkeys(names)] == [
        "dataset", "manifest", "dailytalk", "lhotse", "nemo", "kaldi", "rttm", "alignments", "segments",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["notes.txt", "calls.csv", "empty", "fifo"])
def test_unknown_file_or_empty_folder(tmp_path, name):
    write_files(tmp_path, {"notes.txt": "hello", "calls.csv": "a,b\n1,2\n"})
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileNotFoundError, match=rf"{name} holds no corpus of a known kind: give"):
        find_lists(tmp_path / name)


@pytest.mark.parametrize(("columns", "lacking"), [
    ("call_file,start,end,channel", "audio (such as audio, audio_filepath, audio_path, audio_file)"),
    ("audio,start,speaker,text", "end (such as end, end_time, stop)"),
    ("file,end,who", "start (such as start, offset, start_time, begin) or speaker (such as speaker, speaker_id, speaker_name, spk)"),
])  # fmt: skip
def test_columns_that_a_table_lacks_are_named(tmp_path, columns, lacking):
    table = write_files(tmp_path, {"calls.csv": f"{columns}\n", "notes.txt": "start"}) / "calls.csv"
    for data_dir in (tmp_path, table):
        with pytest.raises(
            FileNotFoundError, match=re.escape(f". calls.csv has no column for {lacking}.\nWhat was looked")
        ):
            find_lists(data_dir)


def test_named_kind_is_the_only_one_that_is_looked_for(tmp_path):
    files = {"nemo.json": json.dumps(NEMO), "wav.scp": WAV_SCP, "other.json": "{}"}
    folder = write_files(tmp_path, files)
    assert find_lists(folder) == {"train": folder / "nemo.json"}
    assert find_lists(folder, corpus="kaldi") == {"train": folder / "wav.scp"}
    with pytest.raises(
        FileNotFoundError, match=r"holds no corpus of the kind lhotse: .*\nWhat was looked for:\n  lhotse +cuts"
    ):
        find_lists(folder, corpus="lhotse")
    with pytest.raises(ValueError, match="corpus 'kaldy' is unknown: choose one of manifest, dailytalk"):
        DailyTalkUSDM(data_dir=folder, corpus="kaldy")
    assert find_lists(folder / "other.json", corpus="nemo") == {"train": folder / "other.json"}
    with pytest.raises(CorpusError, match=r"other\.json:1: dialog, speaker, text, audio missing"):
        DailyTalkUSDM(data_dir=folder / "other.json", corpus="nemo")


def test_damaged_saved_dataset(tmp_path):
    folder = write_files(tmp_path, {"state.json": "{}", "dataset_info.json": "{}"})
    with pytest.raises(OSError, match=r"cannot be opened as a saved dataset \(.*\): save it again"):
        find_lists(folder, cache_dir=tmp_path / "cache")
