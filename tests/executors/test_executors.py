"""Units made in tasks of datatrove: the bytes are those of one process, and what is finished stands whatever dies."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

import usdm_sft
from tests.helpers import REPOSITORY, command, content, options
from usdm_sft.cli import main
from usdm_sft.executors import launchers, tasks
from usdm_sft.prepare import Submitted, prepare
from usdm_sft.shards import make as shards
from usdm_sft.units.model import UnitModel
from usdm_sft.units.tokenizer import UnitTokenizer

# In every process started from here: where the file `armed` lies, the first to finish a shard takes it away and dies.
KILLER = """
import os, signal
real = os.replace
def replace(source, target):
    real(source, target)
    if str(target).endswith(".arrow"):
        try:
            os.unlink({armed!r})
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
"""


@pytest.fixture(scope="module")
def undisturbed(mini, unit_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    prepare(**options(mini, unit_model, folder))
    return content(folder / "out")


@pytest.fixture(scope="module")
def armed(tmp_path_factory):
    """A file that, where it is made, kills the process that finishes the next shard."""
    folder = tmp_path_factory.mktemp("killer")
    (folder / "sitecustomize.py").write_text(KILLER.format(armed=str(folder / "armed")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPOSITORY)]))
        yield folder / "armed"


@pytest.fixture
def elsewhere(monkeypatch):
    """This process makes no units."""
    monkeypatch.setattr(UnitModel, "forward", None)


def inodes(folder, pattern):
    """What shows that a file was written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob(pattern)}


def kill_one_task_and_run_again(mini, unit_model, folder, armed, undisturbed, executor):
    its_options = options(mini, unit_model, folder, executor=executor, tasks=2, num_gpus=0)
    armed.touch()
    with pytest.raises(RuntimeError, match=r"1 of 2 tasks failed \([01]\): see .*/logs; start the run again"):
        prepare(**its_options)
    finished = inodes(folder, "cache/units/*.arrow")
    assert len(finished) == 4  # one of the task that died, three of the other
    (mark,) = folder.glob("cache/executor/*/completions/*")
    log = inodes(folder, f"cache/executor/*/logs/task_{mark.name}.log")
    assert len(log) == 1
    prepare(**its_options)
    assert content(folder / "out") == undisturbed
    assert inodes(folder, "cache/units/*.arrow").items() > finished.items()
    assert inodes(folder, f"cache/executor/*/logs/task_{mark.name}.log") == log  # the finished task was skipped
    assert sorted(path.name for path in mark.parent.iterdir()) == ["00000", "00001"]
    assert not list(folder.rglob("*.unfinished"))


def test_local_task_that_is_killed(mini, unit_model, tmp_path, armed, undisturbed, elsewhere):
    kill_one_task_and_run_again(mini, unit_model, tmp_path, armed, undisturbed, "local")


def test_vanished_shard_of_a_finished_task_is_made_by_that_task(mini, unit_model, tmp_path, undisturbed, elsewhere):
    its_options = options(mini, unit_model, tmp_path, executor="local", tasks=2, num_gpus=0)
    prepare(**its_options)
    before = inodes(tmp_path, "cache/executor/*/logs/*")
    gone, *rest = sorted(tmp_path.glob("cache/units/*.arrow"))
    kept = inodes(tmp_path, "cache/units/*.arrow")
    gone.unlink()
    prepare(**its_options | {"output_path": str(tmp_path / "again")})
    assert content(tmp_path / "again") == undisturbed
    after = inodes(tmp_path, "cache/executor/*/logs/*")
    assert sum(after[path] != written for path, written in before.items()) == 1
    assert gone.is_file()
    assert all(inodes(tmp_path, "cache/units/*.arrow")[path] == kept[path] for path in rest)


def test_agreement_is_measured_in_a_task(mini, unit_model, tmp_path, monkeypatch):
    alone = tmp_path / "alone"
    prepare(**options(mini, unit_model, alone, precision="bf16"))
    monkeypatch.setattr(UnitModel, "forward", None)
    its_options = options(mini, unit_model, tmp_path, precision="bf16", executor="local", tasks=2, num_gpus=0)
    prepare(**its_options)
    assert content(tmp_path / "out") == content(alone / "out")
    assert b"executor" not in content(tmp_path / "out")["counts.json"]
    (measured,) = tmp_path.glob("cache/agreement/*.json")
    measured.unlink()
    prepare(**its_options | {"output_path": str(tmp_path / "again")})
    assert measured.is_file()
    assert content(tmp_path / "again") == content(alone / "out")


def test_local_tasks_end_when_their_parent_is_killed(mini, unit_model, tmp_path):
    arguments = command(mini, unit_model, tmp_path, "--executor", "local", "--tasks", "2", "--num_gpus", "0")
    run = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.glob("cache/executor/*/logs/*.log")):
        assert run.poll() is None, "ended before it could be killed"
        time.sleep(0.001)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(run.pid, 0)
            assert time.monotonic() < deadline, "a task outlives its parent"
            time.sleep(0.05)
    assert not list(tmp_path.glob("cache/units/*.arrow"))  # they did not live to make one


def test_error_in_a_task_is_in_its_log(mini, unit_model, tmp_path, monkeypatch, capfd):
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    recording, load_rows = corpus / "data" / "3" / "0_0_d3.wav", shards.load_rows
    monkeypatch.setattr(shards, "load_rows", lambda builder: recording.write_bytes(b"RIFF") and load_rows(builder))
    its_options = options(mini, unit_model, tmp_path, executor="local", tasks=2, num_gpus=0, data_dir=str(corpus))
    with pytest.raises(RuntimeError, match=r"1 of 2 tasks failed \(0\): see .*/logs; start the run again, finished"):
        prepare(**its_options)
    (log,) = tmp_path.glob("cache/executor/*/logs/task_00000.log")
    assert "0_0_d3.wav is not audio that soundfile can read" in log.read_text()
    assert "Traceback" not in capfd.readouterr().err


def task_file(mini, unit_model, folder, **changes):
    """A finished run's first task, with some of what it says changed."""
    prepare(**options(mini, unit_model, folder))
    tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu")
    tasks.write_task(folder / "plan", 3, [], tokenizer, folder / "cache", {})
    path = folder / "plan" / "tasks" / "00003.json"
    work = json.loads(path.read_text())
    path.write_text(json.dumps(work | changes))
    return str(folder / "plan")


def test_unit_model_that_changed_since_the_plan(mini, unit_model, tmp_path):
    folder = task_file(mini, unit_model, tmp_path, key=["1", "another digest", {}])
    with pytest.raises(ValueError, match="changed after the tasks were planned: run again"):
        tasks.run_task(None, 3, 4, folder=folder)


@pytest.mark.parametrize(("given", "expected"), [(None, "cuda:1"), ("cuda:0", "cuda:0")])
def test_gpu_of_a_task(mini, unit_model, tmp_path, monkeypatch, given, expected):
    import torch

    settings = {"device": "cuda", "precision": "fp32", "resampler": "soxr", "batch_seconds": 160.0}
    folder = task_file(mini, unit_model, tmp_path, settings=settings)
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def stop(folder, device, *args, **kwargs):
        chosen.append(device)
        raise InterruptedError

    monkeypatch.setattr(UnitTokenizer, "from_pretrained", stop)
    with pytest.raises(InterruptedError):
        tasks.run_task(None, 3, 4, folder=folder, device=given)
    assert chosen == [expected, expected]


# Ray

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@needs_ray
def test_ray_of_our_own_starts_a_killed_task_again(
    mini, unit_model, tmp_path, armed, undisturbed, elsewhere, monkeypatch
):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    armed.touch()
    prepare(**options(mini, unit_model, tmp_path, executor="ray", tasks=2, num_gpus=0))
    assert not armed.exists()
    assert content(tmp_path / "out") == undisturbed
    assert len(inodes(tmp_path, "cache/executor/*/completions/*")) == 2
    assert not ray.is_initialized()


@pytest.fixture
def ray_cluster(monkeypatch, armed):
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, num_gpus=0, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    assert ray.is_initialized()  # a cluster that was there is left alone
    ray.shutdown()


@needs_ray
def test_ray_task_that_is_killed(
    mini, unit_model, tmp_path, armed, undisturbed, elsewhere, ray_cluster, monkeypatch, caplog
):
    monkeypatch.setenv("RAY_TASK_MAX_RETRIES", "0")
    kill_one_task_and_run_again(mini, unit_model, tmp_path, armed, undisturbed, "ray")
    assert not caplog.text


NO_GPU = r"the Ray cluster has no GPU: compute on its CPUs with --num_gpus 0 \(Python: num_gpus=0\)"


@needs_ray
def test_users_ray_cluster_without_a_gpu_is_told_before_any_work(ray_cluster, tmp_path):
    with pytest.raises(ValueError, match=NO_GPU):
        prepare(data_dir="no data", output_path="no output", executor="ray", tasks=2)
    with pytest.raises(ValueError, match=NO_GPU):  # nor does anything wait where the cluster lost its GPUs
        launchers.run_on_ray(tmp_path, 1, [0], "cuda")


@needs_ray
def test_ray_of_our_own_without_a_gpu_computes_on_the_cpu(
    mini, unit_model, tmp_path, undisturbed, elsewhere, monkeypatch
):
    import ray
    import torch

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    prepare(**options(mini, unit_model, tmp_path, executor="ray", tasks=2))
    assert content(tmp_path / "out") == undisturbed
    assert not ray.is_initialized()


@needs_ray
@pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_ray_of_our_own_takes_the_device_of_this_machine(monkeypatch, gpu, device):
    import torch

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert launchers.find_ray_device() == device


@needs_ray
def test_ray_cluster_that_cannot_be_reached(monkeypatch):
    import ray

    def refuse(address, **options):
        raise ConnectionError("nobody answers")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConnectionError, match="nobody answers"):
        launchers.find_ray_device()


# Slurm

SLURM = {"partition": "gpu", "time": "24:00:00", "sbatch_args": {"account": "speech"}}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """An sbatch that keeps what it is given, and the folder where it does."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/sh\nfor script; do :; done\ncp "$script" "{folder}/script.$(ls {folder} | grep -c script)"\n'
        "echo Submitted batch job 4711\n"
    )
    (folder / "scontrol").write_text("#!/bin/sh\necho node1\n")
    for name in ("sbatch", "scontrol"):
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    return folder


def directives(script):
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE))


def run_job(script):
    """The array job as Slurm would run it."""
    (pickled,) = re.findall(r"^srun .* launch_pickled_pipeline (.*)$", script, re.MULTILINE)
    launch = [sys.executable, "-m", "datatrove.tools.launch_pickled_pipeline", pickled]
    first, last = map(int, directives(script)["array"].split("-"))
    its_environment = os.environ | {"SLURM_NODELIST": "node1", "RUN_OFFSET": "0"}
    for number in range(first, last + 1):
        environment = its_environment | {"SLURM_ARRAY_TASK_ID": str(number)}
        yield subprocess.run(launch, env=environment, capture_output=True, text=True)


def test_slurm(mini, unit_model, tmp_path, slurm, undisturbed, elsewhere, capfd):
    arguments = command(mini, unit_model, tmp_path, "--executor", "slurm", "--tasks", "2", "--num_gpus", "0")[3:]
    arguments += ["--slurm", json.dumps(SLURM)]
    main(arguments)
    printed = capfd.readouterr()
    assert re.fullmatch(
        r"2 of 2 tasks were submitted to Slurm \(job 4711; logs in .*/slurm_logs\): "
        r"run the same command again when it has ended\n",
        printed.out,
    )
    assert "datatrove" not in printed.err
    (script,) = slurm.glob("script.*")  # and no job to add up statistics
    script = script.read_text()
    said = directives(script)
    expected = {
        "partition": "gpu",
        "time": "24:00:00",
        "account": "speech",
        "array": "0-1",
        "job-name": "dailytalk-usdm",
    }
    expected |= {"cpus-per-task": "4", "mem-per-cpu": "4G"}
    assert said.items() >= expected.items()
    assert "gpus" not in said
    assert f'export PATH="{os.path.dirname(sys.executable)}:$PATH"' in script
    first = next(run_job(script))
    assert first.returncode == 0, first.stderr
    assert len(inodes(tmp_path, "cache/units/*.arrow")) == 3

    main(arguments)
    assert capfd.readouterr().out.startswith("1 of 2 tasks were submitted to Slurm")
    script = (slurm / "script.1").read_text()
    assert directives(script)["array"] == "0-0"
    (second,) = run_job(script)
    assert second.returncode == 0, second.stderr
    main(arguments)
    assert content(tmp_path / "out") == undisturbed
    assert len(list(slurm.glob("script.*"))) == 2


def test_slurm_tasks_have_a_gpu_where_this_machine_has_none(mini, unit_model, tmp_path, slurm, elsewhere):
    with pytest.raises(Submitted, match="6 of 6 tasks were submitted"):
        prepare(**options(mini, unit_model, tmp_path, executor="slurm", tasks=9, slurm=SLURM, precision="tf32"))
    assert directives((slurm / "script.0").read_text())["gpus"] == "1"
    (task,) = tmp_path.glob("cache/executor/*/tasks/00000.json")
    assert json.loads(task.read_text())["settings"]["device"] == "cuda"


def test_own_environment_for_slurm(tmp_path, slurm):
    launchers.submit(tmp_path / "plan", 1, [0], "cpu", SLURM | {"venv_path": "/opt/venv/bin/activate"})
    script = (slurm / "script.0").read_text()
    assert "source /opt/venv/bin/activate" in script
    assert "export PATH" not in script


def test_slurm_options_given_as_text(tmp_path, slurm):
    text = {"partition": "gpu", "time": "2:00:00", "gpus_per_task": "2", "requeue": "false", "mem_per_cpu_gb": "8"}
    launchers.submit(tmp_path / "plan", 1, [0], "cpu", text)
    said = directives((slurm / "script.0").read_text())
    assert (said["gpus"], said["mem-per-cpu"], said["time"]) == ("2", "8G", "2:00:00")
    assert "requeue" not in said


def test_sbatch_that_refuses(tmp_path, slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(RuntimeError, match="sbatch ended with exit status 3: mind --slurm"):
        launchers.submit(tmp_path / "plan", 1, [0], "cpu", SLURM)


# Errors

BAD_OPTIONS = [
    ({"executor": "kubernetes"}, "executor 'kubernetes' is unknown: choose one of local, slurm, ray"),
    ({"executor": "local", "tasks": 0}, "tasks is 0: give a positive number"),
    ({"tasks": 2}, "tasks and slurm are options of an executor: name one with --executor"),
    ({"slurm": SLURM}, "tasks and slurm are options of an executor"),
    ({"executor": "ray", "num_gpus": 4}, "num_gpus is 4: with --executor ray each task has one GPU; say with --tasks"),
    ({"executor": "local", "slurm": SLURM}, "slurm is given, but the executor is local"),
    ({"executor": "slurm"}, "slurm lacks partition and time: give --slurm"),
    ({"executor": "slurm", "slurm": {"time": "1:00:00"}}, "slurm lacks partition: give --slurm"),
    ({"executor": "slurm", "slurm": SLURM | {"time": 86400}}, "slurm.time is 86400, a number: quote it"),
    ({"executor": "slurm", "slurm": SLURM | {"tasks": 2, "node": 1}}, "slurm has node, tasks, but takes only cond"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(data_dir="no data", output_path="no output", **changes)


def test_no_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sbatch is not found: start --executor slurm where"):
        prepare(data_dir="no data", output_path="no output", executor="slurm", slurm=SLURM)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--slurm", "{partition: gpu, time: 24:00:00}"], "slurm.time is 86400, a number: quote it"),  # as YAML has it
        (["--slurm.time", "24:00:00"], "slurm lacks partition:"),
        (["--slurm.time", "24:00:00", "--slurm.partition", "gpu", "--slurm.nodes", "2"], "slurm has nodes, but takes"),
    ],
)
def test_slurm_options_of_the_command_line(capsys, given, message):
    with pytest.raises(SystemExit, match="1"):
        main(["prepare", "--data_dir", "d", "--output_path", "o", "--executor", "slurm", *given])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["datatrove.executor.local", "datatrove.executor.slurm"])
def test_without_datatrove(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("executors", "launchers"):
        monkeypatch.delitem(sys.modules, f"usdm_sft.{name}", raising=False)
        monkeypatch.delattr(usdm_sft, name, raising=False)
    with pytest.raises(ImportError, match=r"--executor needs datatrove .*pip install 'dailytalk-usdm\[executors\]'"):
        prepare(data_dir="no data", output_path="no output", executor="local")


def test_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"--executor ray needs Ray .*pip install 'dailytalk-usdm\[executors\]'"):
        launchers.run_on_ray(tmp_path, 1, [0], "cpu")
