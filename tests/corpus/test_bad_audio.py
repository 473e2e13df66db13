"""Bad audio, each kind of it: what the first pass over the audio says, and what becomes of the pairs."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import wave

import datasets
import numpy as np
import pytest
import soundfile

import dailytalk_usdm
from dailytalk_usdm import DailyTalkUSDM
from tests.helpers import command, options
from usdm_sft.audio.digests import AudioCheck, AudioDigest, audio_digests, check_audio
from usdm_sft.audio.reading import AudioError, read_waveform
from usdm_sft.cli.main import main
from usdm_sft.corpus.dialogs import Dialog, Split, Utterance
from usdm_sft.corpus.left_out import ALL_BAD, corpus_digest, leave_out
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units import reading
from usdm_sft.units.batches import plan_batches
from usdm_sft.units.model import UnitModel
from usdm_sft.units.settings import BATCH_SECONDS
from usdm_sft.units.tokenizer import UnitTokenizer

NOT_AUDIO = "is not audio that soundfile can read (Format not recognised)"


def noise(num_samples, channels=1, scale=0.5):
    samples = np.random.default_rng(0).uniform(-scale, scale, (num_samples, channels))
    return samples.astype(np.float32)


def wav_bytes(path, num_samples=8000, rate=16_000, **options):
    soundfile.write(path, noise(num_samples), rate, format="WAV", **options)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.wav"


def problem(path):
    """What the first pass says of a file; reading it must fail as well, save where only the check knows better."""
    return check_audio(path).problem


# What is there at all


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.symlink_to("nowhere.wav"), "does not exist (a symlink leads nowhere)"),
        (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
        (lambda path: path.mkdir(), "cannot be read (it is not a regular file)"),
        (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
    ],
    ids=["missing", "dangling symlink", "symlink loop", "folder", "empty"],
)
def test_path_without_content(path, tmp_path, make, said):
    make(path)
    assert problem(path) == said == audio_digests([str(path)], tmp_path / "cache")[str(path)].problem
    with pytest.raises(
        FileNotFoundError if said.startswith("does not") else AudioError, match=re.escape(f"a.wav {said}")
    ):
        read_waveform(path)


def test_file_instead_of_a_folder(tmp_path):
    (tmp_path / "3").write_text("")
    assert problem(tmp_path / "3" / "0_0_d3.wav") == "cannot be read (Not a directory)"


@pytest.mark.parametrize("call", ["check_audio", "read_waveform"])
def test_fifo_does_not_hang(path, call):
    os.mkfifo(path)
    module = "digests" if call == "check_audio" else "reading"
    code = f"from usdm_sft.audio.{module} import {call}; print({call}({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot be read (it is not a regular file)" in done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permissions(path):
    wav_bytes(path)
    path.chmod(0)
    assert problem(path) == "cannot be read (Permission denied)"


def test_permission_error_of_the_system(path, monkeypatch):
    """The same where the tests run as root."""
    wav_bytes(path)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert problem(path) == "cannot be read (Permission denied)"
    with pytest.raises(AudioError, match=r"a\.wav cannot be read \(Permission denied\)"):
        read_waveform(path)


# What is in it


@pytest.mark.parametrize(
    "content", [b"not audio at all", b"\0" * 1000, b"<html>404</html>" * 100, bytes(range(256)) * 9]
)
def test_not_audio(path, content):
    path.write_bytes(content)
    assert problem(path) == NOT_AUDIO


@pytest.mark.parametrize("size", [1, 11, 12, 20, 35])
def test_cut_in_the_header(path, size):
    content = wav_bytes(path)
    path.write_bytes(content[:size])
    assert problem(path).startswith("is not audio that soundfile can read (")


@pytest.mark.parametrize(("size", "there"), [(44, 0), (45, 1), (8044, 8000), (16_043, 15_999)])
def test_cut_in_the_samples(path, size, there):
    content = wav_bytes(path)
    assert len(content) == 16_044
    path.write_bytes(content[:size])
    assert problem(path) == f"is cut short (its header promises 16,000 bytes of samples, {there:,} are there)"


def test_cut_in_the_samples_after_another_chunk(path):
    content = wav_bytes(path)
    between = content[:36] + b"LIST" + struct.pack("<I", 5) + b"hello\0" + content[36:]  # padded to an even size
    path.write_bytes(between)
    assert check_audio(path) == AudioCheck(8000, 16_000)
    path.write_bytes(between[:-2])
    assert problem(path) == "is cut short (its header promises 16,000 bytes of samples, 15,998 are there)"


def test_bytes_after_the_samples_are_ignored(path):
    path.write_bytes(wav_bytes(path) + b"LIST" + struct.pack("<I", 4) + b"INFO")
    assert check_audio(path) == AudioCheck(8000, 16_000)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_sample_that_is_not_finite(path, value, subtype):
    samples = noise(3_000_000)[:, 0]  # more than one block
    samples[-1] = value
    soundfile.write(path, samples, 16_000, subtype=subtype)
    assert problem(path) == "holds NaN or infinite samples"


LOUD = 10**19.5
TOO_LOUD = r"holds samples beyond 1\.8e\+19, whose variance is not finite in fp32"


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("level", [-LOUD, LOUD, 1e25, 3e38])
def test_sample_whose_square_is_not_finite(path, level, subtype):
    """The normalization of the unit model would make silence of all others."""
    samples = noise(3_000_000)[:, 0]  # more than one block
    samples[-1] = level
    soundfile.write(path, samples, 16_000, subtype=subtype)
    assert re.fullmatch(TOO_LOUD, problem(path))
    assert re.fullmatch(TOO_LOUD, problem(f"{path}#t=187,187.5"))
    assert problem(f"{path}#t=0,1") is None
    with pytest.raises(AudioError, match=f"audio file .*{TOO_LOUD}: leave out the utterance"):
        read_waveform(path)


def test_run_names_or_leaves_out_audio_that_is_too_loud(mini, unit_model, tmp_path):
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    wav = corpus / "data" / "8" / "2_1_d8.wav"
    samples, rate = soundfile.read(wav)
    soundfile.write(wav, samples / np.abs(samples).max() * LOUD, rate, subtype="FLOAT")
    given = options(mini, unit_model, tmp_path, data_dir=str(corpus))
    with pytest.raises(ValueError, match=rf"utterance 2_1_d8: audio file .*2_1_d8\.wav {TOO_LOUD}"):
        prepare(**given)
    assert set(prepare(**given, on_bad_audio="skip")["splits"]["train"]["pairs_left_out"]) == {"d8_1", "d8_2"}


def test_command_and_tokenizer_refuse_audio_that_is_too_loud(path, unit_model, capsys):
    soundfile.write(path, np.full(8000, LOUD), 16_000, subtype="FLOAT")
    with pytest.raises(SystemExit, match="1"):
        main(["units", str(unit_model), str(path), "--device", "cpu"])
    assert re.search(rf"audio file {re.escape(str(path))} {TOO_LOUD}: leave out the utterance", capsys.readouterr().err)
    with pytest.raises(ValueError, match=f"waveform 1 {TOO_LOUD}: scale it"):
        UnitTokenizer.from_pretrained(unit_model, device="cpu").tokenize_waveforms(
            [noise(800)[:, 0], np.full(800, -LOUD)]
        )


@pytest.mark.parametrize("level", [30.0, 1e19])
def test_samples_beyond_one_are_allowed(path, level):
    soundfile.write(path, np.full(8000, level), 16_000, subtype="FLOAT")
    assert check_audio(path) == AudioCheck(8000, 16_000) and read_waveform(path).max() > 0.9 * level


@pytest.mark.parametrize("rate", [1, 999])
def test_sample_rate_of_a_damaged_header(path, rate):
    content = bytearray(wav_bytes(path))
    content[24:28] = struct.pack("<I", rate)
    path.write_bytes(content)
    assert problem(path) == f"has a sample rate of {rate} Hz, less than 1000"


@pytest.mark.parametrize(
    ("rate", "num_samples", "at_16_khz"),
    [
        (16_000, 0, 0), (16_000, 1, 1), (16_000, 399, 399), (16_000, 400, None),
        (8_000, 199, 398), (8_000, 200, None),
        (22_050, 549, 399), (22_050, 550, None),
        (44_100, 1099, 399), (44_100, 1100, None),
        (48_000, 1197, 399), (48_000, 1198, None),
        (96_000, 2394, 399), (96_000, 2395, None),
    ],
)  # fmt: skip
def test_shortest_audio(path, rate, num_samples, at_16_khz, unit_model):
    wav_bytes(path, num_samples, rate)
    if at_16_khz == 0:
        assert problem(path) == "holds no samples"
    elif at_16_khz is not None:
        message = f"has {at_16_khz} samples at 16 kHz, fewer than the 400 (25 ms) that make a unit"
        assert problem(path) == message
        with pytest.raises(AudioError, match=f"has {at_16_khz} samples at 16 kHz"):
            UnitTokenizer.from_pretrained(unit_model, device="cpu").tokenize_files([path])
    else:
        assert check_audio(path) == AudioCheck(num_samples, rate)
        [units], _ = UnitTokenizer.from_pretrained(unit_model, device="cpu").tokenize_files([path])
        assert len(units) == 1


def test_silence_has_units(path, unit_model):
    soundfile.write(path, np.zeros(16_000), 16_000)
    assert check_audio(path) == AudioCheck(16_000, 16_000)
    [units], _ = UnitTokenizer.from_pretrained(unit_model, device="cpu").tokenize_files([path])
    assert len(units) == 49


def test_odd_number_of_bytes_without_padding_is_good(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(bytes(801))  # an odd number of bytes, with none after them
    assert check_audio(path) == AudioCheck(801, 8000)


COMPRESSED = [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")]


@pytest.mark.parametrize(("kind", "subtype"), COMPRESSED)
def test_other_format_under_the_name_of_wav(path, tmp_path, kind, subtype):
    soundfile.write(path, noise(30_000), 24_000, format=kind, subtype=subtype)
    assert check_audio(path) == AudioCheck(30_000, 24_000)
    named = shutil.copyfile(path, tmp_path / f"b.{kind.lower()}")
    assert np.array_equal(read_waveform(path), read_waveform(named))


@pytest.mark.parametrize(
    "change", [lambda data, half: data[:half], lambda data, half: data[:half] + bytes(500) + data[half + 500 :]]
)
def test_flac_that_is_cut_or_damaged_in_the_middle(path, change):
    soundfile.write(path, noise(60_000), 24_000, format="FLAC")
    path.write_bytes(change(path.read_bytes(), path.stat().st_size // 2))
    assert problem(path).startswith("is not audio that soundfile can read (")
    with pytest.raises(AudioError, match=r"a\.wav is not audio that soundfile can read .*: replace the file"):
        read_waveform(path)


@pytest.mark.parametrize("kind", ["WAV", "sparse WAV", "FLAC"])
def test_hour_of_audio_needs_little_memory(path, tmp_path, kind):
    """Goes alone in a batch; looking at it takes no memory to speak of."""
    if kind == "FLAC":
        with soundfile.SoundFile(path, "w", 8000, 1, format="FLAC") as sound:
            for _ in range(60):
                sound.write(np.zeros(60 * 8000))
    else:
        header = bytearray(wav_bytes(path, 0, 8000, subtype="FLOAT" if kind == "sparse WAV" else "PCM_16"))
        size = 3600 * 8000 * (4 if kind == "sparse WAV" else 2)
        header[-4:] = struct.pack("<I", size)
        path.write_bytes(header)
        os.truncate(path, len(header) + size)
    tracemalloc.start()
    digest = audio_digests([str(path)], tmp_path / "cache")[str(path)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (digest.num_samples, digest.seconds, digest.problem) == (3600 * 16_000, 3600.0, None)
    assert peak < 20e6
    for device, batch_seconds in BATCH_SECONDS.items():  # one pass over such a recording holds nothing else
        assert plan_batches([16_000, digest.num_samples, 16_000], batch_seconds, device) == [[1], [0, 2]]


# What becomes of the pairs


def spoil(corpus):
    """Give a copy of the corpus three kinds of bad audio: in the middle, at both ends, and one of a pair. The rest is good."""
    data = corpus / "data"
    (data / "8" / "2_1_d8.wav").unlink()  # of five turns the third
    (data / "3" / "0_0_d3.wav").write_bytes(b"")
    (data / "3" / "3_1_d3.wav").write_text("not audio")
    (data / "20" / "1_0_d20.wav").write_bytes((data / "20" / "1_0_d20.wav").read_bytes()[:-2])
    return corpus


@pytest.fixture
def corpus(tmp_path, mini):
    return spoil(shutil.copytree(mini / "corpus", tmp_path / "corpus"))


SHORT = "is cut short (its header promises {:,} bytes of samples, {:,} are there)"


def short(mini):
    size = (mini / "corpus" / "data" / "20" / "1_0_d20.wav").stat().st_size - 44
    return f"audio of 1_0_d20: {SHORT.format(size, size - 2)}"


def left_out(mini):
    return {
        "d3_0": "audio of 0_0_d3: is empty (0 bytes)",
        "d3_2": f"audio of 3_1_d3: {NOT_AUDIO}",
        "d8_1": "audio of 2_1_d8: does not exist",
        "d8_2": "audio of 2_1_d8: does not exist",
        "d20_0": short(mini),
    }


KEPT = ["d3_1", "d8_0", "d8_3", "d77_0", "d77_1"]


@pytest.fixture(scope="module")
def skipped(mini, unit_model, tmp_path_factory):
    """A run that leaves out the bad audio: the folder of `corpus`, `cache` and `out`, the counts, and the recordings that were read."""
    root, read, real = tmp_path_factory.mktemp("skipped"), [], reading.read_waveform
    corpus = spoil(shutil.copytree(mini / "corpus", root / "corpus"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reading, "read_waveform", lambda source, *more: read.append(os.path.basename(source)) or real(source, *more)
        )
        counts = prepare(**options(mini, unit_model, root, data_dir=str(corpus), on_bad_audio="skip"))
    return root, counts, read


def test_error_names_twenty_files_at_most(corpus, tmp_path):
    for path in corpus.glob("data/*/*.wav"):
        path.unlink()
    with pytest.raises(FileNotFoundError) as caught:  # where nothing else is wrong
        DailyTalkUSDM(data_dir=corpus).screen_audio()
    assert len(str(caught.value).split("\n")) == 19
    with open(corpus / "train.txt", "a") as file:
        file.writelines(f"{turn}_{turn % 2}_d5|{turn % 2}|{{P}}|hello.|none\n" for turn in range(10))
    with pytest.raises(FileNotFoundError) as caught:
        DailyTalkUSDM(data_dir=corpus).screen_audio()
    assert str(caught.value).split("\n")[20:] == ["... and 9 more problems"]


def test_skip_leaves_out_exactly_the_pairs_with_bad_audio(skipped, finished, mini):
    root, counts, _ = skipped
    output, whole = root / "out", datasets.load_dataset(str(finished / "out"))
    rows = datasets.load_dataset(str(output), split="train")
    assert rows["id"][:] == KEPT
    all_rows = {row["id"]: row for row in whole["train"]}
    assert [dict(row) for row in rows] == [all_rows[name] for name in KEPT]
    assert datasets.load_dataset(str(output), split="test")[:] == whole["test"][:]

    train = counts["splits"]["train"]
    assert train["pairs_left_out"] == left_out(mini)
    assert train["dialogs_left_out"]["d20"] == ALL_BAD
    assert (train["dialogs"], train["utterances"], train["pairs"], train["rows"]) == (3, 9, 10, 5)
    assert train["pairs_with_bad_audio"] == 5
    assert counts["splits"]["test"]["pairs_left_out"] == {}
    assert json.loads((output / "counts.json").read_text()) == counts
    card = (output / "README.md").read_text()
    assert (
        "Left out of train: 3 dialogs and 5 pairs. Of the pairs, 5 had bad audio and 0 did not fit into `max_length` tokens.\n"
        "`counts.json` has the whole list." in card
    )
    assert "- d8_1: audio of 2_1_d8: does not exist\n" in card


def test_skip_reads_no_bad_audio_and_makes_no_empty_units(skipped):
    root, _, read = skipped
    # 0_1_d20 is good, but no pair is left that it is in.
    assert read and not {"2_1_d8.wav", "0_0_d3.wav", "3_1_d3.wav", "1_0_d20.wav", "0_1_d20.wav"} & set(read)
    rows = datasets.load_dataset(str(root / "out"), split="train")
    assert all(len(row["user_units"]) > 0 and len(row["agent_units"]) > 0 for row in rows)


def test_skip_does_not_depend_on_the_size_of_work_shards(skipped, mini, unit_model, tmp_path):
    root, counts, _ = skipped
    given = options(mini, unit_model, tmp_path, data_dir=str(root / "corpus"), on_bad_audio="skip", shard_dialogs=2)
    assert prepare(**given)["splits"] == counts["splits"]
    found, expected = (datasets.load_dataset(str(folder / "out"), split="train") for folder in (tmp_path, root))
    assert found[:] == expected[:]


def test_repaired_file_redoes_only_its_own_work_shard(skipped, mini, unit_model, tmp_path):
    root, before, _ = skipped
    folder = shutil.copytree(root, tmp_path / "run")
    name, corpus, level = "data/20/1_0_d20.wav", folder / "corpus", folder / "cache" / "units"
    finished = set(level.glob("*.arrow"))
    shutil.copyfile(mini / "corpus" / name, corpus / name)
    after = prepare(**options(mini, unit_model, folder, data_dir=str(corpus), on_bad_audio="skip", overwrite=True))
    assert len(set(level.glob("*.arrow")) - finished) == 1
    assert before["key"] != after["key"]
    assert "d20_0" in datasets.load_dataset(str(folder / "out"), split="train")["id"][:]
    assert "d20_0" not in after["splits"]["train"]["pairs_left_out"]


def test_skip_of_a_good_corpus_is_the_same_folder(finished, mini, unit_model, monkeypatch):
    counts = json.loads((finished / "out" / "counts.json").read_text())
    monkeypatch.setattr("usdm_sft.prepare.prepare.load_rows", None)
    assert prepare(**options(mini, unit_model, finished, on_bad_audio="skip")) == counts  # up to date


def test_too_long_and_bad_pairs_are_counted_apart(corpus, unit_model, tmp_path, capsys):
    arguments = command(corpus.parent, unit_model, tmp_path)[3:]
    main([*arguments, "--max_length", "300", "--on_bad_audio", "skip"])
    train, test, *_ = capsys.readouterr().out.splitlines()
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())["splits"]["train"]
    too_long = 5 - counts["rows"]
    assert 0 < too_long < 5
    assert f"train: {counts['rows']} rows from 3 dialogs" in train
    assert f"left out: {too_long} rows too long, 5 pairs with bad audio, 3 dialogs (d11: " in train
    assert "bad audio" not in test
    assert len(counts["pairs_left_out"]) == 5 + too_long


def test_command_prints_one_line_per_bad_file(corpus, unit_model, tmp_path, capsys, monkeypatch):
    """Before any forward pass, and without a traceback."""
    monkeypatch.setattr(UnitModel, "forward_pack", None)
    arguments = command(corpus.parent, unit_model, tmp_path)[3:]
    with pytest.raises(SystemExit, match="1"):
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("dailytalk-usdm prepare: utterance 0_0_d3: audio file ")
    skip = ", or leave out its pairs with --on_bad_audio skip"
    missing = f"utterance 2_1_d8: audio file {corpus.resolve()}/data/8/2_1_d8.wav does not exist: "
    missing += f"put it there, give --data_dir the folder that relative paths start at{skip}"
    assert missing in lines
    assert all(line.endswith(f": replace the file{skip}") for line in lines if line != missing)
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--on_bad_audio", "ignore"])


def test_split_without_a_pair_left_is_refused(corpus, tmp_path):
    for name in ("105/1_0_d105.wav", "2001/0_0_d2001.wav"):
        (corpus / "data" / name).write_bytes(b"")
    with pytest.raises(AudioError) as caught:
        DailyTalkUSDM(data_dir=corpus, on_bad_audio="skip").screen_audio()
    data = corpus.resolve() / "data"
    assert str(caught.value).split("\n") == [
        "no pair of test is left after turns were left out (bad audio: 2): replace files, or name another split list",
        f"utterance 1_0_d105: audio file {data}/105/1_0_d105.wav is empty (0 bytes)",
        f"utterance 0_0_d2001: audio file {data}/2001/0_0_d2001.wav is empty (0 bytes)",
    ]


def test_load_dataset_accepts_on_bad_audio(corpus, tmp_path):
    options = {"cache_dir": str(tmp_path / "cache")}
    rows = dailytalk_usdm.load_dataset(corpus, on_bad_audio="skip", split="train", **options)
    assert rows["id"][:] == KEPT
    lists = {"train": "train.txt", "test": "test.txt"}
    options |= {"data_dir": str(corpus), "data_files": lists, "split": "train"}
    streamed = datasets.load_dataset("dailytalk_usdm", on_bad_audio="skip", streaming=True, **options)
    assert [row["id"] for row in streamed] == KEPT
    with pytest.raises(AudioError, match="utterance 0_0_d3: "):
        datasets.load_dataset("dailytalk_usdm", **options)
    with pytest.raises(ValueError, match="on_bad_audio 'ignore' is unknown: choose one of error, skip"):
        DailyTalkUSDM(data_dir=corpus, on_bad_audio="ignore")


def test_corpus_digest_and_cache_follow_the_pairs_left_out(corpus, mini):
    def state(**options):
        builder = DailyTalkUSDM(data_dir=corpus, on_bad_audio="skip", **options)
        assert builder.config.on_bad_audio == "skip"
        return builder.content_digest, builder.cache_dir

    states = [state()]
    shutil.copyfile(mini / "corpus" / "data" / "3" / "0_0_d3.wav", corpus / "data" / "3" / "0_0_d3.wav")
    states.append(state())
    (corpus / "data" / "8" / "2_1_d8.wav").write_bytes(b"")  # bad in another way: the card says so
    states.append(state())
    assert len(set(states)) == len({digest for digest, _ in states}) == len({cache for _, cache in states}) == 3


def test_only_audio_that_is_used_is_exposed(corpus):
    """It is what `prepare` counts the hours of, and what it takes the sample for the agreement from."""
    builder = DailyTalkUSDM(data_dir=corpus, on_bad_audio="skip", data_files={"train": "train.txt"})
    assert [os.path.basename(path) for path in builder.audio_digests] == [
        "1_1_d3.wav", "2_0_d3.wav", "0_1_d8.wav", "1_0_d8.wav", "3_0_d8.wav", "4_1_d8.wav",
        "0_0_d77.wav", "1_1_d77.wav", "2_0_d77.wav",
    ]  # fmt: skip
    assert all(found.sha256 and found.problem is None for found in builder.audio_digests.values())


def test_symlink_out_of_the_corpus_is_followed(corpus, mini, tmp_path):
    """People keep audio on another disk."""
    shutil.rmtree(corpus / "data")
    elsewhere = shutil.copytree(mini / "corpus" / "data", tmp_path / "elsewhere" / "data")
    (corpus / "data").mkdir()
    for folder in elsewhere.iterdir():
        if folder.name == "3":
            (corpus / "data" / "3").mkdir()
            for path in folder.iterdir():
                (corpus / "data" / "3" / path.name).symlink_to(path)
        else:
            (corpus / "data" / folder.name).symlink_to(folder)
    linked, plain = DailyTalkUSDM(data_dir=corpus), DailyTalkUSDM(data_dir=mini / "corpus")
    assert linked.content_digest == plain.content_digest
    assert read_waveform(corpus / "data" / "3" / "0_0_d3.wav").any()


@pytest.mark.parametrize(
    ("bad", "pairs", "parts"),
    [
        ((), [], ["012345"]),
        ((0,), [0], ["12345"]),
        ((5,), [4], ["01234"]),
        ((2,), [1, 2], ["01", "345"]),
        ((1,), [0, 1], ["2345"]),
        ((1, 3), [0, 1, 2, 3], ["45"]),
        ((2, 3), [1, 2, 3], ["01", "45"]),
        ((1, 2, 4), [0, 1, 2, 3, 4], []),
    ],
)
def test_leave_out(bad, pairs, parts):
    dialog = Dialog("d1", tuple(Utterance(f"{t}_{t % 2}_d1", "d1", t, str(t % 2), "a", "none") for t in range(6)))
    other = Dialog("d2", tuple(Utterance(f"{t}_{t % 2}_d2", "d2", t, str(t % 2), "a", "none") for t in range(2)))
    split = Split("train", (dialog, other), {"d3": "a reason"}, ("d1", "d2"))
    left = leave_out(split, {f"{turn}_{turn % 2}_d1": "hums" for turn in bad})
    assert ["".join(str(u.turn) for u in part.utterances) for part in left.dialogs] == [*parts, "01"]
    assert list(left.pairs_left_out) == [f"d1_{turn}" for turn in pairs]
    assert left.left_out == {"d3": "a reason"} | ({} if parts else {"d1": ALL_BAD})
    assert left.num_pairs == 6 - len(pairs)
    assert left.dialog_ids == ("d1", "d2")
    if bad == (2, 3):
        assert left.pairs_left_out == {
            "d1_1": "audio of 2_0_d1: hums",
            "d1_2": "audio of 2_0_d1: hums; audio of 3_1_d1: hums",
            "d1_3": "audio of 3_1_d1: hums",
        }


@pytest.mark.parametrize("pairs", [{}, {"d1_0": "audio of ü: is empty"}])
@pytest.mark.parametrize("num", [0, 1, 3])
def test_digest_of_a_corpus_is_that_of_its_json(num, pairs):
    audio = {str(index): AudioDigest(f"{index:064x}", 1, 0.1) for index in range(num)}
    splits = {"train": Split("train", (), {}, (), reasons=pairs), "test": Split("test", (), {}, ())}
    lists = {"train": "0" * 64, "test": "1" * 64}
    expected = json.dumps([lists, [f"{index:064x}" for index in range(num)], *([pairs] if pairs else [])])
    assert corpus_digest(lists, audio, splits) == hashlib.sha256(expected.encode()).hexdigest()
