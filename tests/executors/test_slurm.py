"""Jobs of Slurm: a fake sbatch stores their scripts, and the tests run them in the order of their dependencies."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import dill
import pytest

from tests.helpers import command, content, options
from usdm_sft.audio import digest_database, digests
from usdm_sft.cli.main import main
from usdm_sft.executors.slurm import submit
from usdm_sft.folder import parquet
from usdm_sft.prepare import token_shards, unit_tasks
from usdm_sft.prepare.prepare import Submission, prepare

SLURM = {"partition": "gpu", "time": "24:00:00", "sbatch_args": {"account": "speech", "gres": "gpu:1"}}

SBATCH = """#!/bin/sh
for script; do :; done
number=$(ls {folder} | grep -c script)
echo "$@" > "{folder}/arguments.$number"
env | grep ^SLURM_ > "{folder}/environment.$number"
cp "$script" "{folder}/script.$number"
echo Submitted batch job $((4711 + number))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder on PATH with an sbatch that copies each job script into it."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH.format(folder=folder))
    (folder / "scontrol").write_text("#!/bin/sh\necho node1\n")
    for name in ("sbatch", "scontrol"):
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return folder


def directives(script):
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE))


class Queue:
    """The jobs that a fake sbatch stored. A job runs in this process when those that it depends on have succeeded."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch, self.states = folder, monkeypatch, {}

    def scripts(self):
        return [self.folder / f"script.{number}" for number in range(len(list(self.folder.glob("script.*"))))]

    def dependencies(self, number):
        found = re.search(r"--dependency=afterok:([0-9:]+)", (self.folder / f"arguments.{number}").read_text())
        return [int(job) - 4711 for job in found[1].split(":")] if found else []

    def run(self, limit=20):
        """Run all jobs, also those that are submitted meanwhile; return which of them succeeded, by number."""
        while len(self.states) < len(self.scripts()):
            assert len(self.states) < limit, "the jobs submit each other without end"
            self.run_next()
        return self.states

    def run_next(self):
        number = len(self.states)
        started = all(self.states[job] for job in self.dependencies(number))
        self.states[number] = started and self._run(self.scripts()[number].read_text())

    def _run(self, script):
        (pickled,) = re.findall(r"^srun .* launch_pickled_pipeline (.*)$", script, re.MULTILINE)
        first, last = map(int, directives(script)["array"].split("-"))
        succeeded = True
        for number in range(first, last + 1):
            with self.monkeypatch.context() as job:
                job.setenv("SLURM_NODELIST", "node1")
                job.setenv("SLURM_CPUS_PER_TASK", "4")
                job.setenv("SLURM_ARRAY_TASK_ID", str(number))
                try:
                    dill.loads(Path(pickled).read_bytes()).run()
                except Exception:  # datatrove has logged it, and Slurm would see the exit status
                    succeeded = False
        return succeeded


@pytest.fixture
def queue(slurm, monkeypatch):
    return Queue(slurm, monkeypatch)


@pytest.fixture
def many_recordings(monkeypatch):
    """Let the recordings of the mini corpus be enough for tasks."""
    monkeypatch.setattr(digests, "FEW", 10)
    monkeypatch.setattr(digests, "BATCH", 8)
    monkeypatch.setattr(digest_database, "SETTLED_NS", -(10**18))


def slurm_command(mini, unit_model, folder, tasks):
    arguments = command(mini, unit_model, folder, "--executor", "slurm", "--tasks", str(tasks), "--num_gpus", "0")[3:]
    return [*arguments, "--slurm", json.dumps(SLURM)]


@pytest.mark.slow
def test_jobs_go_on_until_the_folder_is_finished(
    mini, unit_model, tmp_path, slurm, queue, undisturbed, many_recordings, capfd
):
    arguments = slurm_command(mini, unit_model, tmp_path, tasks=2)
    main(arguments)
    printed = capfd.readouterr()
    assert re.fullmatch(
        r"2 of 2 tasks \(recordings\) were submitted to Slurm \(job 4711; logs in .*/slurm_logs\); "
        r"job 4712 goes on with the run after them\n",
        printed.out,
    )
    assert "datatrove" not in printed.err
    assert (
        list(queue.run().values()) == [True] * 8
    )  # recordings, units, tokens, Parquet files, each with a job after it
    assert content(tmp_path / "out") == undisturbed
    assert [queue.dependencies(number) for number in range(8)] == [[], [0], [], [2], [], [4], [], [6]]
    found = [directives(script.read_text()) for script in queue.scripts()]
    common = {
        "partition": "gpu",
        "time": "24:00:00",
        "account": "speech",
        "job-name": "dailytalk-usdm",
        "mem-per-cpu": "4G",
    }
    for number, each in enumerate(found):
        follows, makes_units = number % 2, number == 2
        assert each.items() >= common.items()
        assert each["array"] == ("0-0" if follows else "0-1")
        assert each["cpus-per-task"] == ("4" if follows or makes_units else "1")
        assert ("gres" in each) == makes_units
        assert ("kill-on-invalid-dep" in each) == follows
        assert "gpus" not in each
        assert (slurm / f"environment.{number}").read_text() == ""  # sbatch does not see the job that it is called in
    assert f'export PATH="{os.path.dirname(sys.executable)}:$PATH"' in queue.scripts()[0].read_text()
    main(arguments)
    assert "finished" not in capfd.readouterr().out
    assert len(queue.scripts()) == 8


def fail_once(monkeypatch, module, name):
    """Let the first call of a function fail."""
    function, calls = getattr(module, name), []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the node failed")
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, fail)


@pytest.mark.slow
def test_failed_task_cancels_the_job_after_it(mini, unit_model, tmp_path, queue, undisturbed, monkeypatch):
    arguments = options(mini, unit_model, tmp_path, executor="slurm", tasks=2, num_gpus=0, slurm=SLURM)
    fail_once(monkeypatch, unit_tasks, "make_units")
    fail_once(monkeypatch, token_shards, "write_shard")
    fail_once(monkeypatch, parquet, "_with_trainer_columns")
    assert str(prepare(**arguments)).startswith("2 of 2 tasks (units) were submitted")
    assert list(queue.run().values()) == [False, False]
    assert str(prepare(**arguments)).startswith("1 of 2 tasks (units) were submitted")
    assert list(queue.run().values())[2:] == [True, True, False, False]
    assert str(prepare(**arguments)).startswith("1 of 2 tasks (token shards) were submitted")
    assert list(queue.run().values())[6:] == [True, True, False, False]
    assert str(prepare(**arguments)).startswith("1 of 2 tasks (Parquet files) were submitted")
    assert list(queue.run().values())[10:] == [True, True]
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_files_that_vanish_between_stages_are_made_again(
    mini, unit_model, tmp_path, queue, undisturbed, many_recordings
):
    arguments = options(mini, unit_model, tmp_path, executor="slurm", tasks=2, num_gpus=0, slurm=SLURM)
    assert isinstance(prepare(**arguments), Submission)
    patterns = [
        "cache/executor/*/results/00001.sha256",  # of recordings
        "cache/units/*.arrow",
        "cache/tokens/*.arrow",
        "out/.unfinished/*/single_turn/*.parquet",
    ]
    while len(queue.states) < len(queue.scripts()):
        queue.run_next()
        if patterns and (made := sorted(tmp_path.glob(patterns[0]))):
            made[-1].unlink()
            patterns.pop(0)
    assert not patterns
    assert len(queue.states) == 16  # every stage twice
    assert all(queue.states.values())
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_two_runs_at_once(mini, unit_model, tmp_path, queue, undisturbed):
    arguments = options(mini, unit_model, tmp_path, executor="slurm", tasks=3, num_gpus=0, slurm=SLURM)
    for _ in range(2):
        assert (prepare(**arguments).num_submitted) == 3
    assert all(queue.run().values())
    assert content(tmp_path / "out") == undisturbed


def test_tasks_get_a_gpu_although_this_machine_has_none(mini, unit_model, tmp_path, queue):
    given = options(mini, unit_model, tmp_path, executor="slurm", tasks=9, slurm=SLURM, precision="tf32")
    submission = prepare(**given)
    assert (submission.stage, submission.num_submitted, submission.num_tasks) == ("units", 6, 6)
    assert (submission.job_id, submission.next_job_id) == ("4711", "4712")
    units, following = (directives(script.read_text()) for script in queue.scripts())
    assert units["gpus"] == "1"
    assert "gpus" not in following
    (pickled,) = tmp_path.glob("cache/executor/*/function.pickle")
    task, _ = pickle.loads(pickled.read_bytes())
    assert task.settings["device"] == "cuda"


def test_job_that_goes_on_waits_for_every_array(tmp_path, queue):
    """More tasks than an array may have are several jobs."""
    (tmp_path / "plan").mkdir()
    options = SLURM | {"max_array_size": 2}
    submission = submit(print, tmp_path / "plan", "units", 5, range(5), "cpu", options, print)
    assert (submission.job_id, submission.next_job_id) == ("4713", "4714")
    assert [directives(script.read_text())["array"] for script in queue.scripts()] == ["0-1", "0-1", "0-1", "0-0"]
    assert queue.dependencies(3) == [0, 1, 2]


def submit_units(folder, options):
    assert submit(print, folder / "plan", "units", 1, [0], "cpu", options).next_job_id is None


def test_environment_can_be_chosen(tmp_path, queue):
    submit_units(tmp_path, SLURM | {"venv_path": "/opt/venv/bin/activate"})
    (script,) = queue.scripts()
    assert "source /opt/venv/bin/activate" in script.read_text()
    assert "export PATH" not in script.read_text()


def test_numbers_and_truth_values_given_as_text(tmp_path, queue):
    text = {"partition": "gpu", "time": "2:00:00", "gpus_per_task": "2", "requeue": "false", "mem_per_cpu_gb": "8"}
    submit_units(tmp_path, text)
    found = directives(queue.scripts()[0].read_text())
    assert (found["gpus"], found["mem-per-cpu"], found["time"]) == ("2", "8G", "2:00:00")
    assert "requeue" not in found


def test_sbatch_that_fails(tmp_path, slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(
        RuntimeError, match="sbatch ended with exit status 3: read its message above and correct --slurm"
    ):
        submit_units(tmp_path, SLURM)


@pytest.mark.slow
def test_job_in_a_process_of_its_own(mini, unit_model, tmp_path, queue):
    """As in a real job, the pickled pipeline is all that the process knows."""
    prepare(**options(mini, unit_model, tmp_path, executor="slurm", tasks=6, num_gpus=0, slurm=SLURM))
    (pickled,) = re.findall(r"launch_pickled_pipeline (.*)$", queue.scripts()[0].read_text(), re.MULTILINE)
    (goes_on,) = re.findall(r"launch_pickled_pipeline (.*)$", queue.scripts()[1].read_text(), re.MULTILINE)
    environment = os.environ | {"SLURM_NODELIST": "node1", "SLURM_ARRAY_TASK_ID": "0"}
    launch = [sys.executable, "-m", "datatrove.tools.launch_pickled_pipeline"]
    subprocess.run([*launch, pickled], env=environment, check=True, capture_output=True)
    assert len(list(tmp_path.glob("cache/units/*.arrow"))) == 1
    subprocess.run([*launch, goes_on], env=environment, check=True, capture_output=True)
    assert directives(queue.scripts()[2].read_text())["array"] == "0-4"
