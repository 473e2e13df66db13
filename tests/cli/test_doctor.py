"""The command `doctor`: every line, on good and on broken set-ups."""

import importlib.metadata
import shutil
import socket
from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError

from tests.bases import byte_level
from usdm_sft.cli.main import main
from usdm_sft.corpus import dailytalk
from usdm_sft.prepare import checks
from usdm_sft.prepare import open_run as devices
from usdm_sft.prepare.checks import SetUp, run_check
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.template.tokenizer import build_tokenizer, save_tokenizer
from usdm_sft.utils import download
from usdm_sft.utils.files import sha256_file

TOKEN = "hf_aVerySecretToken"
OFFLINE = ("--pretrained_model_name_or_path", "mistral-common")


@pytest.fixture
def doctor(mini, unit_model, tmp_path, capsys):
    """Run the command in a good set-up, with some options changed -> its findings as (level, subject, message), its status."""

    def run(*changes, data_dir=mini / "corpus"):
        given = ["--unit_model", str(unit_model), "--cache_dir", str(tmp_path / "cache"), *OFFLINE]
        if data_dir is not None:
            given += ["--data_dir", str(data_dir)]
        status = 0
        try:
            main(["doctor", *given, *changes])
        except SystemExit as exit:
            status = exit.code
        captured = capsys.readouterr()
        assert captured.err == "" and TOKEN not in captured.out
        *lines, total = captured.out.splitlines()
        found = [(line[:9].strip(), *line[9:].split(": ", 1)) for line in lines]
        levels = [level for level, _, _ in found]
        errors, warnings = levels.count("error"), levels.count("warning")
        assert total == f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
        return found, status

    return run


@pytest.fixture
def no_network(monkeypatch):
    """Fail at every connection and look-up."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def lines(found, subject):
    return [(level, message) for level, name, message in found if name == subject]


def test_good_set_up_without_a_gpu(doctor, mini, unit_model, no_network, tmp_path):
    found, status = doctor("--output_path", str(tmp_path / "out"))
    corpus = mini / "corpus"
    assert status == 0
    assert [name for _, name, _ in found] == [
        "packages", "device", "device", "Hub", "tokenizer", "unit model", "corpus", "corpus", "recordings", "disk", "locks"
    ]  # fmt: skip
    assert [level for level, _, _ in found].count("warning") == 1
    [(level, packages)] = lines(found, "packages")
    assert level == "ok" and f"torch {torch.__version__}" in packages
    assert lines(found, "Hub") == [("ok", "offline mode is on (HF_HUB_OFFLINE), so that nothing is fetched")]
    assert lines(found, "tokenizer") == [("ok", "mistral-common gives the ids of the reference, for 10,000 units")]
    assert lines(found, "unit model") == [("ok", f"{unit_model} is complete: layer 35, 100 units")]
    assert lines(found, "corpus") == [
        ("ok", f"{corpus}/train.txt (split list): 4 dialogs, 10 pairs; 2 dialogs left out, as counts.json will say"),
        ("ok", f"{corpus}/test.txt (split list): 2 dialogs, 3 pairs"),
    ]
    # The utterances of the six dialogs above; their files are 22,050 Hz, 16 bits, with a header of 44 bytes.
    used = [path for number in (3, 8, 20, 77, 105, 2001) for path in (corpus / "data" / str(number)).iterdir()]
    hours = sum((path.stat().st_size - 44) / 2 / 22_050 for path in used) / 3600
    assert lines(found, "recordings") == [
        ("ok", f"19 of 19 that were opened are good; the corpus has 19, about {hours:.2g} hours")
    ]
    assert not (tmp_path / "out").exists()


def test_machine_without_a_gpu(doctor, monkeypatch):
    monkeypatch.setattr(devices, "find_devices", lambda num_gpus: ["cpu"])
    monkeypatch.setattr(checks, "shutil", SimpleNamespace(which=lambda name: None, disk_usage=shutil.disk_usage))
    text = f"torch {torch.__version__} finds no GPU, and two CPU cores take about 12 hours for DailyTalk: "
    found, status = doctor(data_dir=None)
    assert status == 0
    [ok, warning] = lines(found, "device")
    assert ok[0] == "ok" and ok[1].startswith("CPU, ") and ok[1].endswith("; precisions fp32, fp16, bf16, bf16x3")
    assert warning == ("warning", text + "use a machine with a GPU for a large corpus (docs/performance.md)")
    assert lines(doctor("--num_gpus", "0", data_dir=None)[0], "device") == [ok]  # the user chose the CPU
    checks.shutil.which = lambda name: "/usr/bin/nvidia-smi"
    [_, warning] = lines(doctor(data_dir=None)[0], "device")
    remedy = "install torch for CUDA (pytorch.org), because this machine has NVIDIA's driver"
    assert warning == ("warning", text + remedy)


@pytest.mark.parametrize(
    ("capability", "precisions"), [((7, 5), "fp32, fp16, fp16x3"), ((8, 0), "fp32, tf32, fp16, bf16, fp16x3, bf16x3")]
)
def test_machine_with_a_gpu(doctor, monkeypatch, capability, precisions):
    monkeypatch.setattr(devices, "find_devices", lambda num_gpus: ["cuda:0"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(name="A GPU", total_memory=16_900_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    text = f"cuda:0, A GPU, 16.9 GB; precisions {precisions}"
    assert lines(doctor(data_dir=None)[0], "device") == [("ok", text)]
    found, status = doctor("--precision", "bf16", data_dir=None)
    if "bf16" in precisions:
        assert (lines(found, "device"), status) == ([("ok", text)], 0)
    else:
        assert (lines(found, "device"), status) == ([("error", f"{text}: choose one of these with --precision")], 1)


def test_precision_or_gpus_that_the_machine_lacks(doctor):
    found, status = doctor("--precision", "tf32", data_dir=None)
    assert status == 1
    assert lines(found, "device") == [("error", "precision tf32 exists on CUDA only: use fp32 or bf16 on the CPU")]
    [(level, message)] = lines(doctor("--num_gpus", "99", data_dir=None)[0], "device")
    assert level == "error" and message.startswith("num_gpus is 99: this machine has ")


def test_old_and_missing_packages(doctor, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "soxr":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found, status = doctor(data_dir=None)
    assert status == 1
    assert sorted(lines(found, "packages")) == [
        ("error", "soxr is not installed: pip install 'soxr>=0.5'"),
        ("error", "torch has version 0.1: pip install 'torch>=2.9'"),
    ]


def test_missing_split_list(doctor, mini, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "data").symlink_to(mini / "corpus" / "data")
    shutil.copy(mini / "corpus" / "train.txt", tmp_path / "corpus")
    found, status = doctor(data_dir=tmp_path / "corpus")
    assert status == 1
    text = f"{tmp_path}/corpus/train.txt has no test.txt beside it: add it, or name the split lists to use"
    assert lines(found, "corpus") == [("error", text)]
    assert lines(found, "disk")[0][0] == "ok"  # the later checks run


def test_no_split_list_at_all(doctor, mini, tmp_path, no_network):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "data").symlink_to(mini / "corpus" / "data")
    found, status = doctor(data_dir=tmp_path / "corpus")
    [(level, message)] = lines(found, "corpus")
    assert (level, status) == ("error", 1)
    assert message.startswith(dailytalk.SPLIT_LISTS_URL) and message.endswith(": run once without offline mode")


def test_cached_lists_of_dailytalk_are_read(doctor, mini, tmp_path, monkeypatch, no_network):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "data").symlink_to(mini / "corpus" / "data")
    shutil.copytree(mini / "corpus", tmp_path / "cache" / "split_lists", ignore=lambda *_: ["data"])
    names = {split: f"{split}.txt" for split in ("train", "test")}
    known = {split: (name, sha256_file(mini / "corpus" / name)) for split, name in names.items()}
    monkeypatch.setattr(dailytalk, "SPLIT_LISTS", known)
    found, status = doctor(data_dir=tmp_path / "corpus")
    assert status == 0
    assert lines(found, "corpus")[1] == (
        "ok", f"{tmp_path}/cache/split_lists/test.txt (DailyTalk): 2 dialogs, 3 pairs"
    )  # fmt: skip
    (tmp_path / "cache" / "split_lists" / "test.txt").write_text("cut short")
    assert dailytalk.cached_split_lists(tmp_path / "cache") is None


def test_first_problems_of_a_split_list(doctor, mini, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("\n" * 7)
    found, status = doctor("--train_metadata_path", str(bad))
    assert status == 1
    problems = [("error", f"{bad}:{number}: blank line: delete it") for number in range(1, 6)]
    more = ("error", "2 problems more: correct these first, prepare then lists 20 at once")
    assert lines(found, "corpus") == [*problems, more]


def test_list_without_a_pair(doctor, tmp_path):
    (tmp_path / "one.txt").write_text("0_0_d42|0|{P}|hello.|none\n")
    found, status = doctor("--test_metadata_path", str(tmp_path / "one.txt"))
    assert status == 1
    assert lines(found, "corpus")[-1] == (
        "error",
        f"{tmp_path}/one.txt (split list): 0 dialogs, 0 pairs; 1 dialog left out, as counts.json will say: "
        "name another list for test",
    )


@pytest.mark.parametrize(("option", "level", "expected"), [("error", "error", 1), ("skip", "warning", 0)])
def test_bad_recording(doctor, mini, tmp_path, option, level, expected):
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    (corpus / "data" / "3" / "0_0_d3.wav").write_bytes(b"")
    found, status = doctor("--on_bad_audio", option, data_dir=corpus)
    assert status == expected
    bad, total = lines(found, "recordings")
    remedy = "replace the file, or leave out its pairs with --on_bad_audio skip; prepare lists every such file"
    assert bad == (level, f"{corpus}/data/3/0_0_d3.wav is empty (0 bytes): {remedy}")
    assert total[1].startswith("18 of 19 that were opened are good; the corpus has 19, about ")


def test_corpus_that_does_not_exist(doctor, tmp_path):
    found, status = doctor(data_dir=tmp_path / "nowhere")
    text = f"data_dir {tmp_path}/nowhere does not exist: give the folder of the corpus, or DailyTalk's zip archive"
    assert (lines(found, "corpus"), status) == ([("error", text)], 1)


def test_too_little_disk(doctor, mini, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 9_000_000, 9_000_000))
    out = tmp_path / "out"
    found, status = doctor("--output_path", str(out))
    assert status == 1
    assert lines(found, "disk") == [
        (
            "error",
            f"9.0 MB are free at {tmp_path}/cache for the cache, the models, the dataset folder, which take about 10.1 MB: make "
            "room, or name a folder on another disk with --cache_dir, --model_cache_dir or --output_path",
        )
    ]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**12))
    found, status = doctor("--output_path", str(out), "--keep_audio")
    numbers = (3, 8, 20, 77, 105, 2001)  # the dialogs that are used
    audio = sum(
        path.stat().st_size for number in numbers for path in (mini / "corpus" / "data" / str(number)).iterdir()
    )
    assert f"which take about {10.1 + audio / 1e6:.1f} MB" in lines(found, "disk")[0][1]
    assert (lines(found, "disk")[0][0], status) == ("ok", 0)


def test_output_folder_with_other_content(doctor, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    found, status = doctor("--output_path", str(tmp_path / "out"))
    [(level, message)] = lines(found, "disk")
    assert (level, status) == ("error", 1) and message.startswith(f"{tmp_path}/out holds something else")


def test_models_that_are_missing_offline(doctor, no_network):
    found, status = doctor(
        "--pretrained_model_name_or_path", "naver-ai/USTM", "--unit_model", "xlsr2_1b_v2", data_dir=None
    )
    assert status == 1
    missing = "is not on this machine, and nothing can be fetched: run prepare once with a network, or give"
    assert lines(found, "tokenizer") == [
        ("error", f"naver-ai/USTM {missing} --pretrained_model_name_or_path and a folder, or mistral-common")
    ]
    [(level, message)] = lines(found, "unit model")
    assert level == "error" and message.endswith(
        "xlsr2_1b_v2.pt is needed, and offline mode (HF_HUB_OFFLINE) forbids fetching it: run once without offline mode"
    )
    found, _ = doctor("--unit_model", "user/model", data_dir=None)
    assert lines(found, "unit model") == [("error", f"user/model {missing} --unit_model and a folder")]


def test_tokenizer_of_another_base_model(doctor, tmp_path):
    byte_level().save_pretrained(tmp_path / "base")
    save_tokenizer(build_tokenizer(tmp_path / "base", 200), tmp_path / "units")
    chosen = "--pretrained_model_name_or_path", str(tmp_path / "units")
    found, status = doctor(*chosen, "--template.tokenization", "separate", data_dir=None)
    assert (lines(found, "tokenizer"), status) == ([("ok", f"{tmp_path / 'units'} has tokens for 200 units")], 0)
    found, status = doctor(*chosen, data_dir=None)
    [(level, message)] = lines(found, "tokenizer")
    assert (level, status) == ("error", 1)
    assert message.endswith("the tokenizer of another base model needs template.tokenization separate")


def test_unit_model_that_is_damaged_or_none(doctor, unit_model, tmp_path):
    folder = shutil.copytree(unit_model, tmp_path / "model")
    (folder / "kmeans.npy").unlink()
    found, status = doctor("--unit_model", str(folder), data_dir=None)
    text = f"{folder}/kmeans.npy is missing: remove the folder and convert the unit model again"
    assert (lines(found, "unit model"), status) == ([("error", text)], 1)
    [(level, message)] = lines(doctor("--unit_model", str(tmp_path), data_dir=None)[0], "unit model")
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
    found, status = doctor(
        "--pretrained_model_name_or_path", "tester/model", "--unit_model", "tester/model", data_dir=None
    )
    assert status == 0
    size = sum(path.stat().st_size for path in unit_model.iterdir())
    later = "tester/model is not on this machine yet: prepare downloads it once"
    assert lines(found, "tokenizer") == [("ok", f"{later} (1 kB)")]
    assert lines(found, "unit model") == [("ok", f"{later} ({size / 1e6:.1f} MB)")]
    assert f"which take about {size / 1e6:.1f} MB" in lines(found, "disk")[0][1]
    nobody = "reachable; nobody is logged in ('hf auth login' is needed for push and for private repositories)"
    assert lines(found, "Hub") == [("ok", nobody)]
    found, status = doctor("--unit_model", "tester/empty", data_dir=None)
    text = "the repository tester/empty holds no unit_model.json: upload a folder that 'dailytalk-usdm convert' made"
    assert (lines(found, "unit model"), status) == ([("error", text)], 1)
    found, status = doctor(
        "--pretrained_model_name_or_path", "tester/none", "--unit_model", "tester/none", data_dir=None
    )
    assert (lines(found, "tokenizer")[0][0], lines(found, "unit model")[0][0], status) == ("error", "error", 1)


def test_login(doctor, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert lines(doctor(data_dir=None)[0], "Hub") == [("ok", "reachable; tester is logged in")]
    monkeypatch.setattr(HfApi, "whoami", lambda self, token: (_ for _ in ()).throw(OSError(f"bad {token}")))
    found, status = doctor(data_dir=None)
    text = "reachable, but it does not accept the token (bad (token)): run 'hf auth login', or correct HF_TOKEN"
    assert (lines(found, "Hub"), status) == ([("warning", text)], 0)


def test_unreachable_hub(doctor, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def fail(self, *args, timeout, **kwargs):
        assert timeout <= 5
        raise HTTPError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", fail)
    found, status = doctor("--data_dir", "hub:user/calls")
    text = f"{constants.ENDPOINT} cannot be reached (no route to host): check the network and the proxy"
    assert lines(found, "Hub") == [("warning", f"{text}, or set HF_HUB_OFFLINE=1 if all files are here")]
    seen = "hub:user/calls cannot be looked at without the Hub: check the network"
    assert (lines(found, "corpus"), status) == ([("warning", seen)], 0)


def test_corpus_on_the_hub(doctor, hub):
    hub.create("datasets", "tester/calls", False)
    found, _ = doctor("--data_dir", "hub:tester/calls")
    assert lines(found, "corpus") == [("ok", "hub:tester/calls is on the Hub; prepare downloads and checks it")]
    assert lines(doctor("--data_dir", "hub:tester/none")[0], "corpus")[0][0] == "error"


def test_size_of_the_published_unit_model(doctor, hub, monkeypatch):
    monkeypatch.setattr(checks, "remote_size", lambda url, timeout: 3_900_000_000 * url.endswith(".pt"))
    found, _ = doctor("--unit_model", "xlsr2_1b_v2", data_dir=None)
    text = "xlsr2_1b_v2 is not on this machine yet: prepare downloads it once (3.9 GB)"
    assert lines(found, "unit model") == [("ok", text)]
    assert "which take about 6.7 GB" in lines(found, "disk")[0][1]  # the sources, and the folder made from them


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


def test_contradicting_options_are_refused(capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "--tasks", "2"])
    assert capsys.readouterr().err == (
        "dailytalk-usdm doctor: tasks and slurm are options of an executor: name one with --executor\n"
    )


def test_prepare_points_to_the_doctor(mini, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for data_dir, output, pointed in ((tmp_path / "none", "out", True), (mini / "corpus", "full", False)):
        with pytest.raises(SystemExit, match="1"):
            main(["prepare", "--data_dir", str(data_dir), "--output_path", str(tmp_path / output), *OFFLINE])
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.endswith(" ('dailytalk-usdm doctor' with the same options checks the whole set-up)\n") == pointed


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
    assert level == "error" and message.startswith(
        f"{tmp_path} is on a file system without working file locks (flock: No"
    )
    assert message.endswith(": name a folder on another file system with --cache_dir or HF_HOME")
