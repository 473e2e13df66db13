"""Token shards and Parquet files that several processes make, and scripts and signals in runs with processes for all stages."""

import signal
import subprocess
import sys

import pytest

from tests.helpers import LEFT_OUT, command, content, options, reuse_units, stop_run
from usdm_sft.folder import parquet
from usdm_sft.prepare import open_run, token_shards
from usdm_sft.prepare import prepare as pipeline
from usdm_sft.prepare.prepare import prepare

SCRIPT = """
from usdm_sft.prepare import open_run, unit_shards
from usdm_sft.utils import processes

open_run.find_devices = lambda num_gpus: ["cpu", "cpu:0"]  # two processes in place of two GPUs
unit_shards.count_readers = lambda shards, devices: 1
open_run.UTTERANCES_PER_PROCESS = 1  # so that a small corpus gets processes
print("the script runs")
"""


@pytest.fixture
def in_processes(monkeypatch, forked_processes):
    """Two processes make token shards and Parquet files."""
    monkeypatch.setattr(open_run, "UTTERANCES_PER_PROCESS", 1)
    monkeypatch.setattr(pipeline, "num_cores", lambda: 2)


def count_calls(monkeypatch, module, name):
    """Return a list that grows with each call of a function in this process."""
    function, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs))
    return calls


def write_script(folder, *lines):
    """Write a script that works in processes and has no main guard; return its command line."""
    (folder / "script.py").write_text("\n".join([SCRIPT, *lines]) + "\n")
    return [sys.executable, str(folder / "script.py")]


def test_files_do_not_depend_on_the_number_of_processes(
    mini, unit_model, tmp_path, forked_processes, finished, undisturbed, monkeypatch
):
    monkeypatch.setattr(open_run, "UTTERANCES_PER_PROCESS", 1)
    made_here = (
        count_calls(monkeypatch, token_shards, "write_shard"),
        count_calls(monkeypatch, parquet, "_with_trainer_columns"),
    )
    prepare(**options(mini, unit_model, tmp_path, num_proc=2))
    num_files = len(list((tmp_path / "out" / "single_turn").iterdir()))
    for made, number in zip(made_here, (6, num_files), strict=True):
        assert 1 <= len(made) <= number - 2  # two at least wait for the other process
    assert content(tmp_path / "out") == undisturbed
    one, two = (
        {name: data for name, data in content(root / "cache").items() if name.endswith(".arrow")}
        for root in (finished, tmp_path)
    )
    assert one == two and sum(name.startswith("tokens/") for name in two) == 6


@pytest.mark.slow
def test_cut_and_shuffled_rows_from_two_processes(mini, unit_model, tmp_path, finished, in_processes):
    reuse_units(finished, tmp_path)
    changes = {"config_name": "multi_turn", "max_length": 400, "overflow": "split", "shuffle_seed": 3}
    counts = prepare(**options(mini, unit_model, tmp_path, num_proc=1, **changes))
    assert counts["splits"]["train"]["rows_cut"]
    prepare(**options(mini, unit_model, tmp_path, output_path=str(tmp_path / "two"), **changes))
    assert content(tmp_path / "two") == content(tmp_path / "out")


def test_small_corpus_starts_no_process(mini, unit_model, tmp_path, finished, undisturbed, monkeypatch):
    reuse_units(finished, tmp_path)
    monkeypatch.setattr("usdm_sft.utils.processes.start_process", None)
    prepare(**options(mini, unit_model, tmp_path, num_proc=8))
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_script_without_a_main_guard(mini, unit_model, tmp_path, undisturbed):
    given = options(mini, unit_model, tmp_path, num_proc=2)
    run = write_script(tmp_path, "from usdm_sft.prepare.prepare import prepare", f"prepare(**{given!r})")
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the script runs\n", LEFT_OUT)
    assert content(tmp_path / "out") == undisturbed


# The Ctrl-C comes while the second process of the units starts.
AT_THE_START = """
import time
start = processes.SpawnProcess.start
def start_and_mark(process):
    start(process)
    if process.name == "units on cpu:0":
        time.sleep(0.5)  # the process is importing now
        open({started!r}, "w").close()
processes.SpawnProcess.start = start_and_mark
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "pattern", "signal_number"),
    [
        (AT_THE_START, "started", signal.SIGINT),
        ("", "cache/units/*.arrow", signal.SIGKILL),
        ("", "cache/tokens/*.arrow", signal.SIGINT),
        ("", "out/.unfinished/*/single_turn/*.parquet", signal.SIGKILL),
    ],
    ids=["start", "units", "tokens", "folder"],
)
def test_stopped_run_ends_its_processes_and_is_resumed(
    mini, unit_model, tmp_path, finished, undisturbed, lines, pattern, signal_number
):
    if pattern in ("cache/tokens/*.arrow", "out/.unfinished/*/single_turn/*.parquet"):
        reuse_units(finished, tmp_path)  # their processes have ended by then
    arguments = command(mini, unit_model, tmp_path, "--num_proc", "2")[3:]
    lines = lines.format(started=str(tmp_path / "started"))
    run = write_script(tmp_path, lines, "from usdm_sft.cli.main import main", f"main({arguments!r})")
    run = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    stop_run(run, tmp_path, pattern, signal_number)
    prepare(**options(mini, unit_model, tmp_path))
    assert content(tmp_path / "out") == undisturbed
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.slow
def test_full_disk_in_a_process_gives_one_line(mini, unit_model, tmp_path, finished, undisturbed):
    reuse_units(finished, tmp_path)
    arguments = command(mini, unit_model, tmp_path, "--num_proc", "2")[3:]
    limit = "import resource, sys; sys.dont_write_bytecode = True; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"  # EFBIG in place of ENOSPC
    run = write_script(tmp_path, "from usdm_sft.cli.main import main", limit, f"main({arguments!r})")
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "counts.json").exists()
    prepare(**options(mini, unit_model, tmp_path))
    assert content(tmp_path / "out") == undisturbed
