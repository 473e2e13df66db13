"""The command `doctor`: every line, on good and on broken set-ups."""

import importlib.metadata
import json
import re
import shutil
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError

from tests.bases import byte_level
from tests.units import test_encoders as encoders
from usdm_sft.cli.main import main
from usdm_sft.corpus import dailytalk
from usdm_sft.prepare import checks
from usdm_sft.prepare import open_run as devices
from usdm_sft.prepare.checks import SetUp, run_check
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.template.tokenizer import build_tokenizer, load_tokenizer, save_tokenizer
from usdm_sft.units.convert import convert
from usdm_sft.utils import download
from usdm_sft.utils.files import sha256_file

TOKEN = "hf_aVerySecretToken"
OFFLINE = ("--pretrained_model_name_or_path", "mistral-common")
LEFT_OUT = "d11: one speaker speaks twice in a row, d42: a single turn makes no pair"
USED = (3, 8, 20, 77, 105, 2001)  # the dialogs of the demo that are not left out


class Findings(list):
    """The findings of a run as (level, subject, message)."""

    def about(self, subject):
        return [(level, message) for level, name, message in self if name == subject]


@pytest.fixture
def doctor(unit_model, tokenizer, tmp_path, capsys, monkeypatch):
    """Run the command in a good set-up, with some options changed; USTM's tokenizer is built once."""

    def load(name):
        return tokenizer if name == "mistral-common" else load_tokenizer(name)

    monkeypatch.setattr(checks, "load_tokenizer", load)

    def run(*changes, data_dir=None):
        given = ["--unit_model", str(unit_model), "--cache_dir", str(tmp_path / "cache"), *OFFLINE]
        if data_dir is not None:
            given += ["--data_dir", str(data_dir)]
        status = 0
        try:
            main(["doctor", *given, *map(str, changes)])
        except SystemExit as exit:
            status = exit.code
        captured = capsys.readouterr()
        assert captured.err == "" and TOKEN not in captured.out
        *lines, total = captured.out.splitlines()
        found = Findings((line[:9].strip(), *line[9:].split(": ", 1)) for line in lines)
        levels = [level for level, _, _ in found]
        errors, warnings = levels.count("error"), levels.count("warning")
        assert total == f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
        assert status == (errors > 0)
        return found

    return run


@pytest.fixture
def corpus_copy(mini, tmp_path):
    """A corpus with the recordings of the demo, and with copies of the split lists that are named."""

    def copy(*lists):
        (tmp_path / "corpus").mkdir()
        (tmp_path / "corpus" / "data").symlink_to(mini / "corpus" / "data")
        for name in lists:
            shutil.copy(mini / "corpus" / name, tmp_path / "corpus")
        return tmp_path / "corpus"

    return copy


def test_good_set_up_without_a_gpu(doctor, mini, unit_model, no_network, tmp_path):
    corpus = mini / "corpus"
    found = doctor("--output_path", tmp_path / "out", data_dir=corpus)
    assert [name for _, name, _ in found] == [
        "packages", "device", "device", "Hub", "tokenizer", "unit model", "corpus", "corpus", "corpus", "recordings", "disk", "locks"
    ]  # fmt: skip
    levels = [level for level, _, _ in found]
    assert (levels.count("error"), levels.count("warning")) == (0, 2)
    [(level, packages)] = found.about("packages")
    assert level == "ok" and f"torch {torch.__version__}" in packages
    assert found.about("Hub") == [("ok", "offline mode is on (HF_HUB_OFFLINE), so that nothing is fetched")]
    assert found.about("tokenizer") == [("ok", "mistral-common gives the ids of the reference, for 10,000 units")]
    assert found.about("unit model") == [("ok", f"{unit_model} is complete: layer 35, 100 units")]
    assert found.about("corpus") == [
        ("ok", f"{corpus}/train.txt (split list): 4 dialogs, 10 pairs; 2 dialogs left out, as counts.json will say"),
        (
            "warning",
            f"train: 2 of 6 dialogs are left out ({LEFT_OUT}): join neighbouring turns with --merge_speaker_turns, which keeps 1 of them",
        ),
        ("ok", f"{corpus}/test.txt (split list): 2 dialogs, 3 pairs"),
    ]
    # The utterances of the six dialogs above; their files are 22,050 Hz, 16 bits, with a header of 44 bytes.
    used = [path for number in USED for path in (corpus / "data" / str(number)).iterdir()]
    hours = sum((path.stat().st_size - 44) / 2 / 22_050 for path in used) / 3600
    text = f"19 of 19 that were opened are good; the corpus has 19, about {hours:.2g} hours"
    assert found.about("recordings") == [("ok", text)]
    assert not (tmp_path / "out").exists()


def test_machine_without_a_gpu(doctor, monkeypatch):
    monkeypatch.setattr(devices, "find_devices", lambda num_gpus: ["cpu"])
    monkeypatch.setattr(checks, "shutil", SimpleNamespace(which=lambda name: None, disk_usage=shutil.disk_usage))
    text = f"torch {torch.__version__} finds no GPU: "
    [ok, warning] = doctor().about("device")
    assert ok[0] == "ok" and ok[1].startswith("CPU, ") and ok[1].endswith("; precisions fp32, fp16, bf16, bf16x3")
    assert warning == ("warning", text + "use a machine with a GPU for a large corpus (docs/performance.md)")
    assert doctor("--num_gpus", "0").about("device") == [ok]  # the user chose the CPU
    checks.shutil.which = lambda name: "/usr/bin/nvidia-smi"
    [_, warning] = doctor().about("device")
    remedy = "install torch for CUDA (pytorch.org), because this machine has NVIDIA's driver"
    assert warning == ("warning", text + remedy)


@pytest.mark.parametrize(("precision", "hours", "rate"), [("fp32", 8, 2.6), ("bf16", 3, 7.4), ("fp16", None, None)])
def test_time_on_the_cpu_is_that_of_model_and_corpus(doctor, mini, monkeypatch, precision, hours, rate):
    """Of the published unit model alone a rate was measured; `RATES` has it for 20 hours and for the 31 s of the demo."""
    monkeypatch.setattr(devices, "find_devices", lambda num_gpus: ["cpu"])
    chosen = ("--unit_model", "xlsr2_1b_v2", "--precision", precision)
    [_, (_, without_corpus)] = doctor(*chosen).about("device")
    assert ("two CPU cores" in without_corpus) is (hours is not None)
    assert (
        hours is None or f" finds no GPU, and two CPU cores take about {hours} hours for DailyTalk: " in without_corpus
    )
    found = doctor(*chosen, data_dir=mini / "corpus")
    assert all("two CPU cores" not in text for _, text in found.about("device"))
    [(_, text)] = found.about("recordings")
    seconds = sum(soundfile.info(path).duration for number in USED for path in mini.glob(f"corpus/data/{number}/*.wav"))
    end = f", about {seconds / 3600:.2g} hours"
    if rate is not None:
        end += f", whose units two CPU cores compute in about {seconds / 3600 / rate:.2g} hours"
    assert text.endswith(end)


@pytest.mark.parametrize(
    ("capability", "precisions"), [((7, 5), "fp32, fp16, fp16x3"), ((8, 0), "fp32, tf32, fp16, bf16, fp16x3, bf16x3")]
)
def test_machine_with_a_gpu(doctor, monkeypatch, capability, precisions):
    monkeypatch.setattr(devices, "find_devices", lambda num_gpus: ["cuda:0"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(name="A GPU", total_memory=16_900_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    text = f"cuda:0, A GPU, 16.9 GB; precisions {precisions}"
    assert doctor().about("device") == [("ok", text)]
    refused = ("error", f"{text}: choose one of these with --precision")
    assert doctor("--precision", "bf16").about("device") == [("ok", text) if "bf16" in precisions else refused]


def test_precision_that_the_family_lacks(doctor, tmp_path, capsys):
    np.save(tmp_path / "kmeans.npy", np.zeros((2, encoders.WIDTH), np.float32))
    source = encoders.save(encoders.MODELS["wavlm post-norm"], tmp_path / "source")
    made = convert(source, tmp_path / "kmeans.npy", tmp_path / "unit_model", layer=2)
    capsys.readouterr()  # transformers has shown its progress
    assert doctor("--unit_model", made).about("unit model") == [("ok", f"{made} is complete: layer 2, 2 units")]
    [(level, message)] = doctor("--unit_model", made, "--precision", "bf16").about("unit model")
    assert level == "error" and "precision bf16 does not exist for wavlm models" in message


def test_precision_or_gpus_that_the_machine_lacks(doctor):
    text = "precision tf32 exists on CUDA only: use fp32 or bf16 on the CPU"
    assert doctor("--precision", "tf32").about("device") == [("error", text)]
    [(level, message)] = doctor("--num_gpus", "99").about("device")
    assert level == "error" and message.startswith("num_gpus is 99: this machine has ")


def test_old_and_missing_packages(doctor, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "soxr":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert sorted(doctor().about("packages")) == [
        ("error", "soxr is not installed: pip install 'soxr>=0.5'"),
        ("error", "torch has version 0.1: pip install 'torch>=2.9'"),
    ]


def test_missing_split_list(doctor, corpus_copy):
    corpus = corpus_copy("train.txt")
    found = doctor(data_dir=corpus)
    text = f"{corpus}/train.txt has no test.txt beside it: add it, or name the split lists to use"
    assert found.about("corpus") == [("error", text)]
    assert found.about("disk")[0][0] == "ok"  # the later checks run


def test_no_split_list_at_all(doctor, corpus_copy, no_network):
    [(level, message)] = doctor(data_dir=corpus_copy()).about("corpus")
    assert level == "error" and message.startswith(dailytalk.SPLIT_LISTS_URL)
    assert message.endswith(": run once without offline mode")


def test_cached_lists_of_dailytalk_are_read(doctor, mini, corpus_copy, tmp_path, monkeypatch, no_network):
    lists = tmp_path / "cache" / "split_lists"
    shutil.copytree(mini / "corpus", lists, ignore=lambda *_: ["data"])
    known = {split: (f"{split}.txt", sha256_file(lists / f"{split}.txt")) for split in ("train", "test")}
    monkeypatch.setattr(dailytalk, "SPLIT_LISTS", known)
    found = doctor(data_dir=corpus_copy())
    assert found.about("corpus")[2] == ("ok", f"{lists}/test.txt (DailyTalk): 2 dialogs, 3 pairs")
    assert not [finding for finding in found if finding[0] == "error"]
    (lists / "test.txt").write_text("cut short")
    assert dailytalk.fetch_split_lists(tmp_path / "cache", may_download=False) is None


def test_first_problems_of_a_split_list(doctor, mini, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("\n" * 7)
    problems = [("error", f"{bad}:{number}: blank line: delete it") for number in range(1, 6)]
    more = ("error", "2 problems more: correct these first, prepare then lists 20 at once")
    assert doctor("--train_metadata_path", bad, data_dir=mini / "corpus").about("corpus") == [*problems, more]


def test_list_without_a_pair(doctor, mini, tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("0_0_d42|0|{P}|hello.|none\n")
    text = f"{one} (split list): 0 dialogs, 0 pairs; 1 dialog left out, as counts.json will say: name another list for test"
    assert doctor("--test_metadata_path", one, data_dir=mini / "corpus").about("corpus")[-1] == ("error", text)


@pytest.mark.parametrize(("option", "level"), [("error", "error"), ("skip", "warning")])
def test_bad_recording(doctor, mini, tmp_path, option, level):
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    (corpus / "data" / "3" / "0_0_d3.wav").write_bytes(b"")
    found = doctor("--on_bad_audio", option, data_dir=corpus)
    bad, total = found.about("recordings")
    remedy = "--on_bad_audio skip leaves out its pairs"
    remedy = remedy if option == "skip" else "replace the file, or leave out its pairs with --on_bad_audio skip"
    assert bad == (level, f"{corpus}/data/3/0_0_d3.wav is empty (0 bytes): {remedy}; prepare lists every one")
    assert total[1].startswith("18 of 19 that were opened are good; the corpus has 19, about ")
    assert ("error" in [level for level, _, _ in found]) == (option == "error")


def test_paths_that_start_at_another_folder(doctor, tmp_path):
    """Not one good recording is an error, and a dialog that a turn without a text divides is one dialog."""
    rows = [
        {"dialog": "d", "turn": turn, "speaker": "AB"[turn % 2], "text": "" if turn == 2 else "hi", "audio": "a/b.wav"}
        for turn in range(5)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = doctor("--on_bad_rows", "skip", data_dir=tmp_path)
    assert found.about("corpus")[0][1].startswith(
        f"{tmp_path}/train.jsonl (manifest): 1 dialog, 2 pairs; 2 pairs left out"
    )
    remedy = "put it there, give --data_dir the folder that relative paths start at, or leave out its pairs with --on_bad_audio skip"
    *bad, total = found.about("recordings")
    assert set(bad) == {("error", f"{tmp_path}/a/b.wav does not exist: {remedy}; prepare lists every one")}
    assert total == ("error", "0 of 4 that were opened are good; the corpus has 4")


@pytest.mark.parametrize(("on_bad_rows", "remedy"), [
    ("skip", "--on_bad_rows skip leaves out its pairs"),
    ("clip", "--on_bad_rows clip cuts it at the end of the recording, or leaves out its pairs where nothing is left"),
])  # fmt: skip
def test_pairs_without_bad_rows_and_short_segments(doctor, tmp_path, on_bad_rows, remedy):
    """As prepare counts them; no option is advised that is given already."""
    rows = [
        {"dialog": dialog, "turn": turn, "speaker": "AB"[turn % 2], "text": "hi", "audio": "c.wav", "start": turn, "end": turn + 1}
        for dialog in "cde"
        for turn in range(4)
    ]  # fmt: skip
    rows[1]["text"], rows[7]["end"], rows[11]["end"] = "", 3.1, 9
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    soundfile.write(tmp_path / "corpus" / "c.wav", np.zeros(4 * 16_000), 16_000)
    found = doctor("--on_bad_rows", on_bad_rows, "--min_seconds", 0.5, "--val_dialogs", 1, data_dir=tmp_path / "corpus")
    corpus, validation = (text for _, text in found.about("corpus") if "dry_run" in text)
    counts = [re.search(r"(\d) dialogs?, (\d) pair", text).groups() for text in (corpus, validation)]
    assert [sum(map(int, each)) for each in zip(*counts, strict=True)] == [3, 6]
    assert "no text: 1" in corpus + validation and "shorter than min_seconds: 1" in corpus + validation
    assert validation.startswith(f"validation of {tmp_path}/corpus/train.jsonl (manifest): 1 dialog, ")
    [(level, text), _] = found.about("recordings")
    assert level == "warning" and text.endswith(
        f"is to be cut up to 9 s, but has 4 s: {remedy}; prepare lists every one"
    )


def test_corpus_that_does_not_exist(doctor, tmp_path):
    text = f"data_dir {tmp_path}/nowhere does not exist: give the folder of the corpus, or DailyTalk's zip archive"
    assert doctor(data_dir=tmp_path / "nowhere").about("corpus") == [("error", text)]


def test_too_little_disk(doctor, mini, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 9_000_000, 9_000_000))
    corpus, output = mini / "corpus", ("--output_path", tmp_path / "out")
    assert doctor(*output, data_dir=corpus).about("disk") == [
        (
            "error",
            f"9.0 MB are free at {tmp_path}/cache for the cache, the models, the dataset folder, which take about 10.1 MB: make "
            "room, or name a folder on another disk with --cache_dir, --model_cache_dir or --output_path",
        )
    ]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))
    audio = sum(path.stat().st_size for number in USED for path in (corpus / "data" / str(number)).iterdir())
    [(level, message)] = doctor(*output, "--keep_audio", data_dir=corpus).about("disk")
    assert level == "ok" and f"which take about {10.1 + audio / 1e6:.1f} MB" in message


def test_output_folder_with_other_content(doctor, mini, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    [(level, message)] = doctor("--output_path", tmp_path / "out", data_dir=mini / "corpus").about("disk")
    assert level == "error" and message.startswith(f"{tmp_path}/out holds something else")


def test_models_that_are_missing_offline(doctor, no_network):
    missing = "is not on this machine, and nothing can be fetched: run prepare once with a network, or give"
    found = doctor("--pretrained_model_name_or_path", "naver-ai/USTM", "--unit_model", "xlsr2_1b_v2")
    text = f"naver-ai/USTM {missing} --pretrained_model_name_or_path and a folder, or mistral-common"
    assert found.about("tokenizer") == [("error", text)]
    [(level, message)] = found.about("unit model")
    assert level == "error" and message.endswith(
        "xlsr2_1b_v2.pt is needed, and offline mode (HF_HUB_OFFLINE) forbids fetching it: run once without offline mode"
    )
    text = f"user/model {missing} --unit_model and a folder"
    assert doctor("--unit_model", "user/model").about("unit model") == [("error", text)]


def test_tokenizer_of_another_base_model(doctor, tmp_path):
    byte_level().save_pretrained(tmp_path / "base")
    save_tokenizer(build_tokenizer(tmp_path / "base", 200), tmp_path / "units")
    chosen = "--pretrained_model_name_or_path", tmp_path / "units"
    found = doctor(*chosen, "--template.tokenization", "separate")
    assert found.about("tokenizer") == [("ok", f"{tmp_path / 'units'} has tokens for 200 units")]
    [(level, message)] = doctor(*chosen).about("tokenizer")
    text = "the tokenizer of another base model needs template.tokenization separate or chat"
    assert level == "error" and message.endswith(text)


def test_unit_model_that_is_damaged_or_none(doctor, unit_model, tmp_path):
    folder = shutil.copytree(unit_model, tmp_path / "model")
    (folder / "kmeans.npy").unlink()
    text = f"{folder}/kmeans.npy is missing: remove the folder and convert the unit model again"
    assert doctor("--unit_model", folder).about("unit model") == [("error", text)]
    [(level, message)] = doctor("--unit_model", tmp_path).about("unit model")
    assert level == "error" and message.endswith("make one with 'dailytalk-usdm convert'")


@pytest.fixture
def hub(served_hub, unit_model):
    """A stand-in for the Hub with the toy unit model and a tokenizer.json."""
    hub, hub.token = served_hub, TOKEN
    files = {path.name: ("reg", path.read_bytes()) for path in unit_model.iterdir()}
    files["tokenizer.json"] = ("reg", b"{}" * 500)
    hub.commit(hub.create("models", "tester/model", False), "main", files, [], "a model", None)
    hub.commit(hub.create("models", "tester/empty", False), "main", {}, [], "nothing", None)
    return hub


def test_models_on_the_hub(doctor, hub, unit_model):
    found = doctor("--pretrained_model_name_or_path", "tester/model", "--unit_model", "tester/model")
    size = sum(path.stat().st_size for path in unit_model.iterdir())
    later = "tester/model is not on this machine yet: prepare downloads it once"
    assert found.about("tokenizer") == [("ok", f"{later} (1 kB)")]
    assert found.about("unit model") == [("ok", f"{later} ({size / 1e6:.1f} MB)")]
    assert f"which take about {size / 1e6:.1f} MB" in found.about("disk")[0][1]
    nobody = "reachable; nobody is logged in ('hf auth login' is needed for push and for private repositories)"
    assert found.about("Hub") == [("ok", nobody)]
    text = "the repository tester/empty holds no unit_model.json and is not one of a codec: upload a folder that 'dailytalk-usdm convert' made"
    assert doctor("--unit_model", "tester/empty").about("unit model") == [("error", text)]
    text = "the repository tester/empty holds no tokenizer.json: name one with a fast tokenizer"
    assert doctor("--pretrained_model_name_or_path", "tester/empty").about("tokenizer") == [("error", text)]
    found = doctor("--pretrained_model_name_or_path", "tester/none", "--unit_model", "tester/none")
    start = "the Hub has no tester/none, or it is private (status 401: Repository not found): correct the name, or log in with"
    for subject in ("tokenizer", "unit model"):
        [(level, message)] = found.about(subject)
        assert level == "error" and message.startswith(start)


def test_login(doctor, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert doctor().about("Hub") == [("ok", "reachable; tester is logged in")]
    monkeypatch.setenv("HF_TOKEN", "hf_anotherVerySecretToken")
    text = "reachable, but the Hub does not accept your token (status 401: Invalid user token.): log in again with 'hf auth login', or correct HF_TOKEN"
    assert doctor().about("Hub") == [("warning", text)]


def test_unreachable_hub(doctor, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def fail(self, *args, timeout, **kwargs):
        assert timeout <= 5
        raise HTTPError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", fail)
    found = doctor(data_dir="hub:user/calls")
    text = f"the Hub cannot be reached at {constants.ENDPOINT} (no route to host): check the network and the proxy, and run the command again"
    assert found.about("Hub") == [("warning", f"{text}, or set HF_HUB_OFFLINE=1 if all files are here")]
    seen = "hub:user/calls cannot be looked at without the Hub: check the network"
    assert found.about("corpus") == [("warning", seen)]


@pytest.mark.parametrize(
    ("status", "start"),
    [(429, "the Hub takes no more requests for now (status 429: busy): wait a few"), (200, "what answers at")],
)
def test_answer_of_which_nothing_can_be_fetched(doctor, hub, monkeypatch, status, start):
    monkeypatch.setattr(hub.handler, "route", lambda self, path, query, data: self.send(status, {"error": "busy"}))
    found = doctor("--pretrained_model_name_or_path", "tester/model")
    [(level, message)] = found.about("Hub")
    assert level == "warning" and message.startswith(start)
    assert "tester/model is not on this machine, and nothing can be fetched" in found.about("tokenizer")[0][1]


def test_corpus_on_the_hub(doctor, hub):
    hub.create("datasets", "tester/calls", False)
    text = "hub:tester/calls is on the Hub; prepare downloads and checks it"
    assert doctor(data_dir="hub:tester/calls").about("corpus") == [("ok", text)]
    [(level, message)] = doctor(data_dir="hub:tester/none").about("corpus")
    assert level == "error" and message.startswith(
        "the Hub has no tester/none, or it is private (status 401: Repository"
    )
    text = "tester/calls has no revision 'v9': name a branch, a tag or a commit of it"
    assert doctor(data_dir="hub:tester/calls@v9").about("corpus") == [("error", text)]


def test_size_of_the_published_unit_model(doctor, hub, monkeypatch):
    monkeypatch.setattr(checks, "remote_size", lambda url, timeout: 3_900_000_000 * url.endswith(".pt"))
    found = doctor("--unit_model", "xlsr2_1b_v2")
    text = "xlsr2_1b_v2 is not on this machine yet: prepare downloads it once (3.9 GB)"
    assert found.about("unit model") == [("ok", text)]
    assert "which take about 6.7 GB" in found.about("disk")[0][1]  # the sources, and the folder made from them


def test_size_of_a_remote_file(hub):
    url = f"{constants.ENDPOINT}/tester/model/resolve/main/tokenizer.json"
    assert download.remote_size(url, timeout=5) == 1000
    with pytest.raises(OSError, match=r"missing\.json cannot be reached .*: check the network and the proxy"):
        download.remote_size(url.replace("tokenizer", "missing"), timeout=5)


def test_an_error_of_a_check_is_one_line():
    def check():
        yield "ok", "fine"
        raise RuntimeError("first\nsecond")

    assert list(run_check("disk", check)) == [("ok", "disk", "fine"), ("error", "disk", "first")]


def test_contradicting_options_are_refused(refused):
    message = "dailytalk-usdm doctor: tasks and slurm are options of an executor: name one with --executor"
    assert refused("doctor", "--tasks", "2") == message


def test_prepare_points_to_the_doctor(mini, tmp_path, refused):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for data_dir, output, pointed in ((tmp_path / "none", "out", True), (mini / "corpus", "full", False)):
        error = refused("prepare", "--data_dir", data_dir, "--output_path", tmp_path / output, *OFFLINE)
        assert error.endswith(" ('dailytalk-usdm doctor' with the same options checks the whole set-up)") == pointed


def test_locks_of_the_cache(tmp_path, monkeypatch):
    config = PrepareConfig(data_dir=".", output_path=".", cache_dir=tmp_path / "cache")
    examine = partial(SetUp(config).examine, "locks")
    assert list(examine()) == [("ok", "locks", f"file locks work in {tmp_path}")]
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(checks, "find_local_locks", lambda folder: "nolock of nfs")
        text = f"file locks in {tmp_path} hold on this machine only, because it is mounted with nolock of nfs"
        assert list(examine()) == [("warning", "locks", f"{text}: let no two machines share this cache")]
    monkeypatch.setattr("usdm_sft.utils.locks._remembered_problem", lambda folder: "No locks available")
    [(level, _, message)] = examine()
    start = f"{tmp_path} is on a file system without working file locks (flock: No"
    assert level == "error" and message.startswith(start)
    assert message.endswith(": name a folder on another file system with --cache_dir or HF_HOME")
