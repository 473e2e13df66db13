"""The three ways to start tasks: processes here, Ray, Slurm. Which tasks are done is told by datatrove's marks, not here.

Here and on Ray each task is a process that we start ourselves: the pools of datatrove's local and Ray executors wait for
ever for a process that was killed (datatrove 0.10).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from usdm_sft.executors.tasks import run_task
from usdm_sft.utils.processes import start_process
from usdm_sft.utils.progress import progress_bar

_INSTALL = "pip install 'dailytalk-usdm[executors]'"
try:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.executor.slurm import SlurmPipelineExecutor
except ImportError as error:
    raise ImportError(f"--executor needs datatrove ({error}): {_INSTALL}") from error


def _make_executor(folder: str, tasks: int, device: str | None = None) -> LocalPipelineExecutor:
    return LocalPipelineExecutor([partial(run_task, folder=folder, device=device)], tasks=tasks, logging_dir=folder)


def _run_rank(executor: LocalPipelineExecutor, rank: int) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # the task's log has it all
        executor._run_for_rank(rank)


def _run_process(folder: str, tasks: int, rank: int, device: str) -> None:
    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    executor = _make_executor(folder, tasks, device)
    try:
        _run_rank(executor, rank)
    except Exception:  # datatrove has written it into the task's log and raised it again
        sys.exit(1)


def _run_ray_task(folder: str, tasks: int, rank: int) -> None:
    _run_rank(_make_executor(folder, tasks), rank)


def run_here(folder: Path, tasks: int, ranks: Sequence[int], devices: Sequence[str]) -> None:
    """A spawned process a task, one at a time on each device."""
    waiting, free, running = deque(ranks), deque(devices), {}
    try:
        with progress_bar(len(ranks), "tasks", "task") as bar:
            while waiting or running:
                while waiting and free:
                    rank, device = waiting.popleft(), free.popleft()
                    process = start_process(_run_process, (str(folder), tasks, rank, device))
                    running[process.sentinel] = process, device
                for sentinel in connection.wait(running):
                    process, device = running.pop(sentinel)
                    process.join()
                    free.append(device)
                    bar.update()
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we start tells nobody
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--executor ray needs Ray ({error}): {_INSTALL}") from error
    return ray


def find_ray_device() -> str:
    """Find the kind of device for tasks on Ray.

    Returns:
        "cuda"; or "cpu" where there is no cluster yet, so that `run_on_ray` starts one on this machine, and torch finds no GPU.

    Raises:
        ValueError: The user's cluster has no GPU.
        ConnectionError: There is no cluster at RAY_ADDRESS.
    """
    import torch

    ray = _import_ray()
    connected, address = ray.is_initialized(), os.environ.get("RAY_ADDRESS") or "auto"
    if not connected:
        try:
            if address == "local":  # for Ray: start a cluster
                raise ConnectionError
            ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError:
            if address not in ("auto", "local"):
                raise
            return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        _check_gpus(ray)
    finally:
        if not connected:
            ray.shutdown()
    return "cuda"


def _check_gpus(ray: ModuleType) -> None:
    if not ray.cluster_resources().get("GPU"):
        raise ValueError("the Ray cluster has no GPU: compute on its CPUs with --num_gpus 0 (Python: num_gpus=0)")


def run_on_ray(folder: Path, tasks: int, ranks: Sequence[int], device: str) -> None:
    """A Ray task a task, which has a GPU where the device is "cuda".

    Raises:
        ValueError: The device is "cuda", and the cluster has no GPU that the tasks could wait for.
    """
    ray = _import_ray()
    ours = not ray.is_initialized()
    if ours:
        # The user's cluster (RAY_ADDRESS, or one that was started on this machine), or else one of our own.
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    waiting = []
    try:
        num_gpus = int(device == "cuda")
        if num_gpus:
            _check_gpus(ray)
        run = ray.remote(num_cpus=1, num_gpus=num_gpus)(_run_ray_task)  # again, up to 3 times, when its process dies
        waiting = [run.remote(str(folder), tasks, rank) for rank in ranks]
        with progress_bar(len(ranks), "tasks", "task") as bar:
            while waiting:
                (done,), waiting = ray.wait(waiting)
                with contextlib.suppress(ray.exceptions.RayError):  # the task's mark is missing then
                    ray.get(done)
                bar.update()
    finally:
        for each in waiting:
            ray.cancel(each, force=True)
        if ours:
            ray.shutdown()


class _Slurm(SlurmPipelineExecutor):
    def launch_merge_stats(self) -> None:
        """No job that waits for a GPU to add up statistics: there are none."""


def submit(folder: Path, tasks: int, ranks: Sequence[int], device: str, options: Mapping[str, Any]) -> str:
    """One array job; says which. The job finds its tasks in what datatrove pickles into the folder."""
    from loguru import logger as its_logger

    options = {
        "job_name": "dailytalk-usdm",
        "cpus_per_task": 4,
        "mem_per_cpu_gb": 4,
        "gpus_per_task": int(device == "cuda"),
        **_typed(options),
    }
    if not options.keys() & {"env_command", "condaenv", "venv_path"}:  # the environment of this process
        options["env_command"] = f'export PATH="{Path(sys.executable).parent}:$PATH"'
    job = _Slurm([partial(run_task, folder=str(folder))], tasks=tasks, logging_dir=str(folder), **options)
    its_logger.disable("datatrove")
    try:
        job.launch_job()
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"sbatch ended with exit status {error.returncode}: mind --slurm and what it says above"
        ) from error
    finally:
        its_logger.enable("datatrove")
    return f"{len(ranks)} of {tasks} tasks were submitted to Slurm (job {job.job_id}; logs in {job.slurm_logs_folder})"


def _typed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and truth values as such: `--slurm.requeue false` gives text. What is text for datatrove (time) stays it."""
    parameters = inspect.signature(SlurmPipelineExecutor).parameters
    return {
        name: yaml.safe_load(value) if isinstance(value, str) and isinstance(parameters[name].default, int) else value
        for name, value in options.items()
    }
