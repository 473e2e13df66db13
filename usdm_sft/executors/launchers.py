"""The three ways to start tasks: processes on this machine, Ray, and Slurm. datatrove's marks record the finished tasks.

On this machine and on Ray we start one process per task ourselves: the pools of datatrove's local and Ray executors never
return when one of their processes is killed (datatrove 0.10).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from loguru import logger as datatrove_logger

from usdm_sft.executors.extras import LocalPipelineExecutor, SlurmPipelineExecutor, import_ray
from usdm_sft.executors.tasks import run_task
from usdm_sft.utils.processes import start_process
from usdm_sft.utils.progress import progress_bar


def _make_executor(folder: str, tasks: int, device: str | None = None) -> LocalPipelineExecutor:
    return LocalPipelineExecutor([partial(run_task, folder=folder, device=device)], tasks=tasks, logging_dir=folder)


def _run_rank(executor: LocalPipelineExecutor, rank: int) -> None:
    with (
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stderr(devnull),
    ):  # the log of the task has the same lines
        executor._run_for_rank(rank)


def _run_process(folder: str, tasks: int, rank: int, device: str) -> None:
    executor = _make_executor(folder, tasks, device)
    try:
        _run_rank(executor, rank)
    except Exception:  # any error of a task: datatrove has logged it, and the exit status tells the parent
        sys.exit(1)


def _run_ray_task(folder: str, tasks: int, rank: int) -> None:
    _run_rank(_make_executor(folder, tasks), rank)


def run_here(folder: Path, tasks: int, ranks: Sequence[int], devices: Sequence[str]) -> None:
    """Run tasks on this machine, each in a spawned process, one at a time on each device.

    Args:
        folder: Folder of the task files, marks and logs.
        tasks: Number of all tasks.
        ranks: The tasks to run.
        devices: Such as ["cuda:0", "cuda:1"].
    """
    waiting, free = deque(ranks), deque(devices)
    running: dict[Any, tuple[SpawnProcess, str]] = {}
    try:
        with progress_bar(len(ranks), "tasks", "tasks") as bar:
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


def find_ray_device() -> str:
    """Find the kind of device for tasks on Ray.

    Returns:
        "cuda"; or "cpu" if there is no cluster yet, so that `run_on_ray` starts one on this machine, and torch finds no GPU.

    Raises:
        ValueError: The user's cluster has no GPU.
        ConnectionError: There is no cluster at RAY_ADDRESS.
    """
    ray = import_ray()
    connected, address = ray.is_initialized(), os.environ.get("RAY_ADDRESS") or "auto"
    if not connected:
        try:
            if address == "local":  # Ray starts a cluster then
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
    """Run tasks on Ray, each as one Ray task.

    Args:
        folder: Folder of the task files, marks and logs.
        tasks: Number of all tasks.
        ranks: The tasks to run.
        device: "cuda" (each task has one GPU) or "cpu".

    Raises:
        ValueError: The device is "cuda", and the cluster has no GPU that the tasks could wait for.
    """
    ray = import_ray()
    ours = not ray.is_initialized()
    if ours:
        # Connects to the user's cluster (RAY_ADDRESS, or one on this machine), or else starts one.
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    waiting = []
    try:
        num_gpus = int(device == "cuda")
        if num_gpus:
            _check_gpus(ray)
        run = ray.remote(num_cpus=1, num_gpus=num_gpus)(_run_ray_task)  # Ray retries it 3 times if its process dies
        waiting = [run.remote(str(folder), tasks, rank) for rank in ranks]
        with progress_bar(len(ranks), "tasks", "tasks") as bar:
            while waiting:
                (done,), waiting = ray.wait(waiting)
                with contextlib.suppress(ray.exceptions.RayError):  # a failed task has no mark, which the caller checks
                    ray.get(done)
                bar.update()
    finally:
        for each in waiting:
            ray.cancel(each, force=True)
        if ours:
            ray.shutdown()


class _Slurm(SlurmPipelineExecutor):  # type: ignore[misc]  # datatrove has no type hints
    def launch_merge_stats(self) -> None:
        """Submit no job that merges statistics: the tasks have none, and the job would wait for a GPU."""


def submit(folder: Path, tasks: int, ranks: Sequence[int], device: str, options: Mapping[str, Any]) -> str:
    """Submit the unfinished tasks to Slurm as one array job.

    datatrove pickles the pipeline and the list of unfinished tasks into the folder; the job reads them there.

    Args:
        folder: Folder of the task files, marks and logs.
        tasks: Number of all tasks.
        ranks: The unfinished tasks.
        device: "cuda" (each task has one GPU by default) or "cpu".
        options: Options of datatrove's SlurmPipelineExecutor.

    Returns:
        A sentence on what was submitted.

    Raises:
        RuntimeError: sbatch failed.
    """
    options = {
        "job_name": "dailytalk-usdm",
        "cpus_per_task": 4,
        "mem_per_cpu_gb": 4,
        "gpus_per_task": int(device == "cuda"),
        **convert_text(options),
    }
    if not options.keys() & {"env_command", "condaenv", "venv_path"}:  # by default the environment of this process
        options["env_command"] = f'export PATH="{Path(sys.executable).parent}:$PATH"'
    job = _Slurm([partial(run_task, folder=str(folder))], tasks=tasks, logging_dir=str(folder), **options)
    datatrove_logger.disable("datatrove")
    try:
        job.launch_job()
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"sbatch ended with exit status {error.returncode}: read its message above and correct --slurm"
        ) from error
    finally:
        datatrove_logger.enable("datatrove")
    return f"{len(ranks)} of {tasks} tasks were submitted to Slurm (job {job.job_id}; logs in {job.slurm_logs_folder})"


def convert_text(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert numbers and truth values that are given as text, as in `--slurm.requeue false`.

    An option that is text for datatrove, such as `time`, stays text.

    Raises:
        ValueError: The text is neither.
    """
    parameters = inspect.signature(SlurmPipelineExecutor).parameters
    return {
        name: _read_number(name, value)
        if isinstance(value, str) and isinstance(parameters[name].default, int)
        else value
        for name, value in options.items()
    }


def _read_number(name: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, int):
        raise ValueError(f"slurm.{name} is {text!r}: give a whole number, or true or false")
    return value
