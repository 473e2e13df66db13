import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.helpers import REPOSITORY, command, content, options
from usdm_sft import prepare as pipeline
from usdm_sft.audio.digests import audio_digests
from usdm_sft.audio.reading import AudioError
from usdm_sft.prepare import prepare
from usdm_sft.shards import make as shards
from usdm_sft.shards import workers
from usdm_sft.units.agreement import measure_agreement
from usdm_sft.units.model import UnitModel
from usdm_sft.units.tokenizer import UnitTokenizer
from usdm_sft.utils.processes import start_process


@pytest.fixture(scope="module")
def undisturbed(mini, unit_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    prepare(**options(mini, unit_model, folder))
    return content(folder / "out")


@pytest.fixture
def two_processes(monkeypatch):
    """Two processes on the CPU take the place of two GPUs."""
    monkeypatch.setattr(pipeline, "_find_devices", lambda num_gpus: ["cpu", "cpu:0"])


def test_two_processes_give_the_bytes_of_one(mini, unit_model, tmp_path, two_processes, undisturbed, monkeypatch):
    monkeypatch.setattr(UnitModel, "forward", None)  # not in this process
    prepare(**options(mini, unit_model, tmp_path))
    assert content(tmp_path / "out") == undisturbed


@pytest.fixture
def after_the_first_pass(monkeypatch):
    """Bytes to write to a file of the corpus between the first pass over the audio and the units."""
    real = shards.load_rows

    def write(path, data):
        monkeypatch.setattr(shards, "load_rows", lambda builder: path.write_bytes(data) and real(builder))

    return write


def test_error_in_a_process_reaches_the_caller_without_a_printed_traceback(
    mini, unit_model, tmp_path, two_processes, after_the_first_pass, capfd
):
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    path = corpus / "data" / "8" / "0_1_d8.wav"
    after_the_first_pass(path, path.read_bytes()[:244])
    with pytest.raises(AudioError, match=r"0_1_d8\.wav has 73 samples at 16 kHz") as caught:
        prepare(**options(mini, unit_model, tmp_path, data_dir=str(corpus)))
    assert "in _process" in caught.value.__notes__[0]  # the traceback, for whoever prints that of the parent
    assert capfd.readouterr().err == ""


def test_audio_that_changes_during_the_run_leaves_no_units_under_its_key(
    mini, unit_model, tmp_path, after_the_first_pass, undisturbed
):
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    path = corpus / "data" / "8" / "0_1_d8.wav"
    before = path.read_bytes()
    after_the_first_pass(path, (corpus / "data" / "3" / "0_0_d3.wav").read_bytes())
    with pytest.raises(AudioError, match=r"0_1_d8\.wav was changed during the run"):
        prepare(**options(mini, unit_model, tmp_path, data_dir=str(corpus)))
    path.write_bytes(before)
    after_the_first_pass(path, before)
    prepare(**options(mini, unit_model, tmp_path, data_dir=str(corpus)))
    assert content(tmp_path / "out") == undisturbed


def test_a_process_that_dies_is_named_and_its_work_is_not_lost(
    mini, unit_model, tmp_path, two_processes, undisturbed, monkeypatch
):
    killer = tmp_path / "sitecustomize.py"  # runs in every process that is started from here
    killer.write_text(
        "import os, sys\n"
        "if 'spawn_main' in ' '.join(sys.orig_argv):\n"
        "    import threading, time, glob\n"
        "    def kill():\n"
        f"        while not glob.glob({str(tmp_path / 'cache' / 'units' / '*.arrow')!r}):\n"
        "            time.sleep(0.001)\n"
        "        os.kill(os.getpid(), 9)\n"
        "    threading.Thread(target=kill, daemon=True).start()\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
        with pytest.raises(RuntimeError, match=r"the process on cpu.* died \(exit code -9\): start the run again"):
            prepare(**options(mini, unit_model, tmp_path))
    finished = {path: path.stat().st_ino for path in (tmp_path / "cache" / "units").glob("*.arrow")}
    assert finished
    prepare(**options(mini, unit_model, tmp_path))
    assert {path: path.stat().st_ino for path in finished} == finished
    assert content(tmp_path / "out") == undisturbed


KILL_POINTS = [
    ("first unit shard", "cache/units/*.arrow", 1),
    ("fourth unit shard", "cache/units/*.arrow", 4),
    ("last unit shard", "cache/units/*.arrow", 6),
    ("second token shard", "cache/tokens/*.arrow", 2),
    ("fifth output file", "out/.unfinished/single_turn/*.parquet", 5),
]


@pytest.mark.parametrize(("name", "pattern", "number"), KILL_POINTS, ids=[point[0] for point in KILL_POINTS])
def test_kill_9_and_run_again(mini, unit_model, tmp_path, undisturbed, name, pattern, number):
    run = subprocess.Popen(command(mini, unit_model, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob(pattern))) < number:
        assert run.poll() is None, "ended before it could be killed"
        time.sleep(0.0005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "out" / "counts.json").exists()
    finished = {path: path.stat().st_ino for path in tmp_path.glob("cache/*/*.arrow")}
    assert len(finished) >= (number if "cache" in pattern else 12)
    subprocess.run(command(mini, unit_model, tmp_path), check=True, capture_output=True)
    assert {path: path.stat().st_ino for path in finished} == finished  # not one finished file was written again
    assert content(tmp_path / "out") == undisturbed
    assert not list(tmp_path.rglob("*.unfinished"))


def test_two_runs_at_once_on_one_cache(mini, unit_model, tmp_path, undisturbed):
    first = subprocess.Popen(command(mini, unit_model, tmp_path), stderr=subprocess.PIPE)
    second = subprocess.Popen(command(mini, unit_model, tmp_path, "--output_path", str(tmp_path / "second")))
    assert [first.wait(), second.wait()] == [0, 0]
    assert content(tmp_path / "out") == content(tmp_path / "second") == undisturbed
    assert len(list((tmp_path / "cache" / "units").glob("*.arrow"))) == 6


def test_agreement_is_measured_once_counted_and_logged(mini, unit_model, tmp_path, caplog, monkeypatch):
    counts = prepare(**options(mini, unit_model, tmp_path, precision="bf16"))
    agreement = counts["agreement"]
    assert agreement["utterances"] == 19
    assert 0.9 < agreement["share"] == round(agreement["equal_units"] / agreement["units"], 6) < 1
    assert (
        f"bf16, soxr: {100 * agreement['share']:.2f} % of the units are those of fp32 and soxr (19 utterances)"
        in caplog.text
    )
    monkeypatch.setattr(UnitModel, "forward", None)
    again = prepare(**options(mini, unit_model, tmp_path, precision="bf16", output_path=str(tmp_path / "again")))
    assert again["agreement"] == agreement


@pytest.mark.parametrize("damage", [lambda text: text[:-5], lambda text: text.replace("19", "18"), lambda text: "5"])
def test_damaged_agreement_is_measured_anew(unit_model, mini, tmp_path, damage):
    paths = [str(path) for path in sorted(mini.glob("corpus/data/*/*.wav"))][:19]
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu", precision="bf16")
    audio = audio_digests(paths, tmp_path)
    first = measure_agreement(tokenizer, audio, tmp_path)
    [file] = (tmp_path / "agreement").glob("*.json")
    file.write_text(damage(file.read_text()))
    assert measure_agreement(tokenizer, audio, tmp_path) == first


def test_no_agreement_to_measure_for_the_reference_setting(mini, unit_model, tmp_path):
    assert prepare(**options(mini, unit_model, tmp_path))["agreement"] is None


def test_sample_is_spread_over_the_corpus(mini, unit_model, tmp_path, monkeypatch):
    paths = [str(path) for path in sorted(mini.glob("corpus/data/*/*.wav"))]
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu", precision="bf16")
    read = []
    tokenize = UnitTokenizer.tokenize_files
    monkeypatch.setattr(
        UnitTokenizer, "tokenize_files", lambda self, sources: read.append(sources) or tokenize(self, sources)
    )
    found = measure_agreement(tokenizer, audio_digests(paths, tmp_path), tmp_path, num_utterances=3)
    assert found["utterances"] == 3
    assert read == [[paths[0], paths[11], paths[22]]] * 2


def test_more_gpus_than_there_are(mini, unit_model, tmp_path):
    with pytest.raises(ValueError, match="num_gpus is 99: this machine has"):
        prepare(**options(mini, unit_model, tmp_path, num_gpus=99))


class TwoArguments(Exception):
    def __init__(self, one, two):
        super().__init__(one)


@pytest.mark.parametrize(
    "error", [TwoArguments("what was wrong", 2), type("Local", (ValueError,), {})("what was wrong")]
)
def test_error_that_cannot_be_sent_keeps_its_words(error):
    sent = workers._sendable(error)
    assert type(sent) is RuntimeError and str(sent) == f"{type(error).__name__}: what was wrong"


def test_error_that_can_be_sent_is_sent():
    assert isinstance(workers._sendable(AudioError("bad")), AudioError)


class Queue:
    """Stands in for the queue of results: calls `turns` one after the other; None means that nothing came in time."""

    def __init__(self, *turns):
        self.turns = list(turns)

    def get(self, timeout):
        result = self.turns.pop(0)()
        if result is None:
            raise queue.Empty
        return result


def test_processes_that_end_too_early_are_noticed():
    ended, running = SimpleNamespace(exitcode=0), SimpleNamespace(exitcode=None)
    results = Queue(lambda: None, lambda: (0, "a"))
    assert list(workers._receive(results, {"cuda:0": ended, "cuda:1": running}, 1)) == [(0, "a")]
    with pytest.raises(RuntimeError, match="the processes ended before their work was done"):
        next(workers._receive(Queue(lambda: None), {"cuda:0": ended, "cuda:1": ended}, 1))


def test_last_result_that_comes_right_before_a_clean_exit_is_received():
    process = SimpleNamespace(exitcode=None)
    late = Queue(
        lambda: setattr(process, "exitcode", 0), lambda: (0, "a")
    )  # it sends and ends just after the time is up
    assert list(workers._receive(late, {"cuda:0": process}, 1)) == [(0, "a")]


SCRIPT = """
import os
from usdm_sft import prepare as pipeline
from usdm_sft.utils import processes

pipeline._find_devices = lambda num_gpus: ["cpu", "cpu:0"]
print("the script runs")
"""


def script(folder, *lines):
    """A script whose first lines make it compute on two processes; no guard keeps them from running it again."""
    (folder / "script.py").write_text("\n".join([SCRIPT, *lines]) + "\n")
    return [sys.executable, str(folder / "script.py")]


@pytest.mark.parametrize("executor", [{}, {"executor": "local", "tasks": 2}], ids=["processes", "tasks"])
def test_script_without_a_main_guard(mini, unit_model, tmp_path, undisturbed, executor):
    given = options(mini, unit_model, tmp_path, **executor)
    run = script(tmp_path, f"pipeline.prepare(**{given!r})")
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the script runs\n", "")
    assert content(tmp_path / "out") == undisturbed


def test_starting_a_process_leaves_main_in_place():
    main = sys.modules["__main__"]
    process = start_process(time.sleep, (0,))
    process.join()
    assert process.exitcode == 0
    assert sys.modules["__main__"] is main
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# When the Ctrl-C comes: while the second process starts, or when the first unit shard is finished.
AT_THE_START = """
import time
start = processes.SpawnProcess.start
def start_and_tell(process):
    start(process)
    if process.name == "units on cpu:0":
        time.sleep(0.5)  # it imports by then
        open({started!r}, "w").close()
processes.SpawnProcess.start = start_and_tell
"""


@pytest.mark.parametrize(
    ("lines", "pattern"), [(AT_THE_START, "started"), ("", "cache/units/*.arrow")], ids=["start", "units"]
)
def test_ctrl_c_with_several_processes_is_one_line(mini, unit_model, tmp_path, undisturbed, lines, pattern):
    arguments = command(mini, unit_model, tmp_path)[3:]
    lines = lines.format(started=str(tmp_path / "started"))
    run = script(tmp_path, lines, "from usdm_sft.cli import main", f"main({arguments!r})")
    run = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.glob(pattern)):
        assert run.poll() is None, "ended before it could be interrupted"
        time.sleep(0.0005)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does it
    assert run.communicate(timeout=60)[1] == (
        "dailytalk-usdm prepare: interrupted; start it again, finished work is kept\n"
    )
    assert run.returncode == 130
    subprocess.run(command(mini, unit_model, tmp_path), check=True, capture_output=True)
    assert content(tmp_path / "out") == undisturbed


def test_processes_end_when_their_parent_is_killed(mini, unit_model, tmp_path):
    """No orphan goes on with the work, beside the run that is started next."""
    code = (
        "from usdm_sft import pipeline\n"
        "pipeline._find_devices = lambda num_gpus: ['cpu', 'cpu:0']\n"
        "from usdm_sft.cli import main\n"
        "if __name__ == '__main__':\n"
        f"    main({command(mini, unit_model, tmp_path)[3:]!r})\n"
    )
    (tmp_path / "run.py").write_text(code)
    run = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")], stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not list(tmp_path.glob("cache/units/*.arrow")):
        assert run.poll() is None, "ended before it could be killed"
        time.sleep(0.0005)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while True:
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a process outlives its parent"
        time.sleep(0.1)
