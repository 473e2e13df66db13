"""Units made in datatrove tasks: the output equals that of one process, and finished work survives the death of a task."""

import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dailytalk_usdm import DailyTalkUSDM
from tests.helpers import (
    LEFT_OUT,
    REPOSITORY,
    content,
    inodes,
    make_in_two_runs_at_once,
    options,
)
from usdm_sft.audio import digests
from usdm_sft.cli.main import main
from usdm_sft.executors import ray_tasks, tasks
from usdm_sft.folder import parquet
from usdm_sft.prepare import token_shards, unit_tasks
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units.model import UnitModel
from usdm_sft.units.tokenizer import UnitTokenizer

# Runs in every process that this one starts: if the file `armed` exists, the first process that finishes a file whose path
# contains its text removes it and dies.
KILLER = """
import os, signal
real = os.replace
def replace(source, target):
    real(source, target)
    try:
        with open({armed!r}) as file:
            if file.read() not in str(target):
                return
        os.unlink({armed!r})
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
"""


@pytest.fixture(scope="module")
def armed(tmp_path_factory):
    """The path of a file; the process that finishes the next file with the text of this one in its path dies."""
    folder = tmp_path_factory.mktemp("killer")
    (folder / "sitecustomize.py").write_text(KILLER.format(armed=str(folder / "armed")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPOSITORY)]))
        yield folder / "armed"


@pytest.fixture
def elsewhere(monkeypatch):
    """Let this process read few recordings, and make no units, token shards and Parquet files."""
    monkeypatch.setattr(UnitModel, "forward_pack", None)
    monkeypatch.setattr(token_shards, "write_shard", None)
    monkeypatch.setattr(parquet, "_with_trainer_columns", None)
    monkeypatch.setattr(digests, "FEW", 1)
    monkeypatch.setattr(digests, "BATCH", 6)
    monkeypatch.setattr(digests, "digest_recording", None)


def times(folder, pattern):
    """The time of the last change of every matching file."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def make_until_a_task_dies(arguments, armed, path):
    """Run until the first task that finishes a file with `path` in its path dies; return the folder of its stage."""
    armed.write_text(path)
    with pytest.raises(
        RuntimeError, match=r"1 of 4 tasks failed \([0123]\): see .*/logs; start the run again"
    ) as error:
        prepare(**arguments)
    stage = Path(re.search("see (.*)/logs", str(error.value))[1])
    assert len(list(stage.glob("completions/*"))) == 3
    return stage


def make_task(unit_model, folder, **changes):
    unit_tokenizer = UnitTokenizer.from_pretrained(unit_model, device="cpu")
    task = unit_tasks.UnitTask(str(unit_model), unit_tokenizer.key, unit_tokenizer.settings, folder / "cache", {})
    return dataclasses.replace(task, **changes)


def test_task_refuses_a_unit_model_that_changed_after_the_plan(unit_model, tmp_path):
    task = make_task(unit_model, tmp_path, key=("1", "another digest", {}))
    with pytest.raises(ValueError, match="changed after the tasks were planned: run again"):
        task(iter([]), 3)


def test_task_chooses_a_gpu_by_its_rank(unit_model, tmp_path, monkeypatch):
    settings = {"device": "cuda", "precision": "fp32", "resampler": "soxr", "batch_seconds": 160.0}
    task = make_task(unit_model, tmp_path, settings=settings)
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def stop(folder, device, *args, **kwargs):
        chosen.append(device)
        raise InterruptedError

    monkeypatch.setattr(UnitTokenizer, "from_pretrained", stop)
    with pytest.raises(InterruptedError):
        task(iter([]), 3)
    assert chosen == ["cuda:1", "cuda:1"]


# Ray

NO_GPU = r"the Ray cluster has no GPU: compute on its CPUs with --num_gpus 0 \(Python: num_gpus=0\)"


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray")


@pytest.mark.slow
def test_own_ray_cluster_restarts_a_killed_task_on_the_cpu(ray, tmp_path, armed, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ray_tasks.find_ray_device() == "cpu"
    armed.write_text("/results/")
    with tasks.TaskPool("ray", 2, tmp_path) as pool:
        assert list(pool.map(str, range(4), name="numbers", keys="abcd")) == [(i, str(i)) for i in range(4)]
        assert ray.is_initialized()  # for the next stage
    assert not armed.exists()
    assert len(inodes(tmp_path, "executor/*/completions/*")) == 2
    assert not ray.is_initialized()


@pytest.fixture(scope="class")
def ray_cluster(ray, armed):
    """A cluster of the user, which this process is connected to and others find by its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, num_gpus=0, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield
    assert ray.is_initialized()  # it is left running
    ray.shutdown()


@pytest.mark.slow
class TestUsersRayCluster:
    def test_killed_tasks_are_resumed_and_vanished_files_made_again(
        self, mini, unit_model, tmp_path, armed, undisturbed, elsewhere, ray_cluster, monkeypatch, caplog
    ):
        """Kill a task of each stage once, and remove a file of a task that has finished; a rerun makes no more than these again."""
        monkeypatch.setenv("RAY_TASK_MAX_RETRIES", "0")
        arguments = options(mini, unit_model, tmp_path, executor="ray", tasks=4, num_gpus=0)
        kept = {}  # inodes
        for level in ("units", "tokens"):
            make_until_a_task_dies(arguments, armed, f"cache/{level}/")
            made = sorted(tmp_path.glob(f"cache/{level}/*.arrow"))
            # The killed task had no time to remove the folder of its unfinished shard.
            vanished, *others = [
                file for file in made if not file.with_name(f"{file.stem.partition('.')[0]}.unfinished").exists()
            ]
            vanished.unlink()
            kept |= {path: path.stat().st_ino for path in others}
        stage = make_until_a_task_dies(arguments, armed, "/single_turn/")
        without_a_file, without_results, whole = sorted(int(path.name) for path in stage.glob("completions/*"))
        next(tasks.read_results(stage, without_a_file)).path.unlink()
        kept |= inodes(tmp_path, "cache/*/*.arrow")
        parts = {part.path.name: part.path.stat().st_ino for part in tasks.read_results(stage, whole)}
        (stage / "results" / f"{without_results:05d}.pickle").unlink()
        logs = times(tmp_path, "cache/executor/*/logs/*")
        prepare(**arguments)
        assert content(tmp_path / "out") == undisturbed
        assert {path: path.stat().st_ino for path in kept} == kept
        assert len(inodes(tmp_path, "cache/*/*.arrow")) == 12
        assert {name: (tmp_path / "out" / "single_turn" / name).stat().st_ino for name in parts} == parts
        after = times(tmp_path, "cache/executor/*/logs/*")
        changed = {path.relative_to(tmp_path / "cache" / "executor") for path in after if after[path] != logs.get(path)}
        assert changed == {Path(stage.name, "logs", f"task_{rank:05d}.log") for rank in range(4) if rank != whole}
        assert not [path for path in tmp_path.rglob("*.unfinished") if "executor" not in path.parts]
        assert {record.message for record in caplog.records} <= {LEFT_OUT.rstrip()}

    def test_two_runs_at_once_with_different_lengths(
        self, mini, unit_model, tmp_path, undisturbed, elsewhere, ray_cluster, monkeypatch
    ):
        tasks = {"executor": "ray", "tasks": 2, "num_gpus": 0}
        make_in_two_runs_at_once(mini, unit_model, tmp_path, monkeypatch, other={"max_length": 300}, **tasks)
        assert content(tmp_path / "out") == undisturbed
        monkeypatch.undo()
        prepare(**options(mini, unit_model, tmp_path, max_length=300, output_path=str(tmp_path / "alone")))
        assert content(tmp_path / "other") == content(tmp_path / "alone")
        assert content(tmp_path / "other").keys() != undisturbed.keys()

    def test_agreement_is_measured_in_a_task(self, mini, unit_model, tmp_path, ray_cluster, monkeypatch):
        alone, few = tmp_path / "alone", {"precision": "bf16", "test_metadata_path": str(mini / "corpus" / "test.txt")}
        prepare(**options(mini, unit_model, alone, **few))
        monkeypatch.setattr(UnitModel, "forward_pack", None)
        arguments = options(mini, unit_model, tmp_path, **few, executor="ray", tasks=1, num_gpus=0)
        prepare(**arguments)
        assert content(tmp_path / "out") == content(alone / "out")
        assert b"executor" not in content(tmp_path / "out")["counts.json"]
        (measured,) = tmp_path.glob("cache/agreement/*.json")
        measured.unlink()
        prepare(**arguments | {"output_path": str(tmp_path / "again")})
        assert measured.is_file()
        assert content(tmp_path / "again") == content(alone / "out")

    def test_error_in_a_task_is_in_its_log(self, mini, unit_model, tmp_path, ray_cluster, monkeypatch, capfd):
        corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
        recording, load = corpus / "data" / "3" / "0_0_d3.wav", DailyTalkUSDM.as_dataset
        monkeypatch.setattr(
            DailyTalkUSDM, "as_dataset", lambda self, split: recording.write_bytes(b"RIFF") and load(self, split=split)
        )
        arguments = options(mini, unit_model, tmp_path, executor="ray", tasks=2, num_gpus=0, data_dir=str(corpus))
        with pytest.raises(
            RuntimeError, match=r"1 of 2 tasks failed \(0\): see .*/logs; start the run again, finished"
        ):
            prepare(**arguments)
        (log,) = tmp_path.glob("cache/executor/*/logs/task_00000.log")
        assert "0_0_d3.wav was changed during the run" in log.read_text()
        assert "Traceback" not in capfd.readouterr().err

    def test_cluster_without_a_gpu_is_refused_before_any_work(self, ray_cluster, tmp_path):
        with pytest.raises(ValueError, match=NO_GPU):
            prepare(data_dir="no data", output_path="no output", executor="ray", tasks=2)
        with pytest.raises(ValueError, match=NO_GPU):  # the cluster lost its GPUs later: no task waits for one
            ray_tasks.run_on_ray(print, tmp_path, 1, [0], "cuda")


@pytest.mark.parametrize(("gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_own_ray_cluster_takes_the_device_of_this_machine(ray, monkeypatch, gpu, device):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert ray_tasks.find_ray_device() == device


def test_unreachable_ray_cluster(ray, monkeypatch):
    def refuse(address, **options):
        raise ConnectionError("no answer")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConnectionError, match="no answer"):
        ray_tasks.find_ray_device()


SLURM = {"partition": "gpu", "time": "24:00:00", "sbatch_args": {"account": "speech"}}

# Errors

BAD_OPTIONS = [
    ({"executor": "kubernetes"}, "executor 'kubernetes' is unknown: choose one of slurm, ray"),
    ({"executor": "ray", "tasks": 0}, "tasks is 0: give a positive number"),
    ({"tasks": 2}, "tasks and slurm are options of an executor: name one with --executor"),
    ({"slurm": SLURM}, "tasks and slurm are options of an executor"),
    (
        {"executor": "ray", "num_gpus": 4},
        "num_gpus is 4, but with --executor ray each task has one GPU: set their number with --tasks",
    ),
    ({"executor": "ray", "slurm": SLURM}, "slurm is given, but the executor is ray"),
    ({"executor": "slurm"}, "slurm lacks partition and time: give --slurm"),
    ({"executor": "slurm", "slurm": {"time": "1:00:00"}}, "slurm lacks partition: give --slurm"),
    ({"executor": "slurm", "slurm": SLURM | {"time": 86400}}, "slurm.time is 86400, a number: quote it"),
    (
        {"executor": "slurm", "slurm": SLURM | {"requeue": "[no"}},
        "slurm.requeue is '[no': give a whole number, or true or",
    ),
    (
        {"executor": "slurm", "slurm": SLURM | {"cpus_per_task": "many"}},
        "slurm.cpus_per_task is 'many': give a whole numb",
    ),
    ({"executor": "slurm", "slurm": SLURM | {"tasks": 2, "node": 1}}, "slurm has node, tasks, but takes only cond"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_OPTIONS)
def test_options_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(data_dir="no data", output_path="no output", **changes)


def test_machine_without_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sbatch is not found: use --executor slurm on a machine that"):
        prepare(data_dir="no data", output_path="no output", executor="slurm", slurm=SLURM)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--slurm", "{partition: gpu, time: 24:00:00}"],
            "slurm.time is 86400, a number: quote it",
        ),  # YAML reads it so
        (["--slurm.time", "24:00:00"], "slurm lacks partition:"),
        (["--slurm.time", "24:00:00", "--slurm.partition", "gpu", "--slurm.nodes", "2"], "slurm has nodes, but takes"),
    ],
)
def test_bad_slurm_options_on_the_command_line(mini, capsys, given, message):
    with pytest.raises(SystemExit, match="1"):
        main(["prepare", "--data_dir", str(mini / "corpus"), "--output_path", "o", "--executor", "slurm", *given])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["datatrove.executor.local", "datatrove.executor.slurm"])
def test_without_datatrove(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith("usdm_sft.executors")]:  # to be imported again
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("usdm_sft.executors")
    monkeypatch.delitem(sys.modules, "usdm_sft.prepare.unit_tasks")
    monkeypatch.delattr("usdm_sft.prepare.unit_tasks")
    with pytest.raises(ImportError, match=r"--executor needs datatrove .*pip install 'dailytalk-usdm\[executors\]'"):
        prepare(data_dir="no data", output_path="no output", executor="ray")


def test_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"--executor ray needs Ray .*pip install 'dailytalk-usdm\[executors\]'"):
        ray_tasks.run_on_ray(print, tmp_path, 1, [0], "cpu")
