"""Tasks on Ray. datatrove's marks record the finished tasks.

Each task is one Ray task, which we start ourselves: the pool of datatrove's Ray executor never returns when one of its processes
is killed (datatrove 0.10).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from usdm_sft.executors import INSTALL, LocalPipelineExecutor
from usdm_sft.utils.progress import progress_bar


def import_ray() -> ModuleType:
    """Import Ray, which takes a second and which only `--executor ray` needs.

    Raises:
        ImportError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we start reports nothing to its makers
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--executor ray needs Ray ({error}): {INSTALL}") from error
    return ray


def _run_ray_task(step: Callable[..., None], folder: str, tasks: int, rank: int) -> None:
    executor = LocalPipelineExecutor([step], tasks=tasks, logging_dir=folder)
    with open(os.devnull, "w") as devnull, contextlib.redirect_stderr(devnull):
        executor._run_for_rank(rank)  # the log of the task has the lines of stderr


def find_ray_device() -> str:
    """Find the kind of device for tasks on Ray.

    Returns:
        "cuda"; or "cpu" if there is no cluster yet, so that `run_on_ray` starts one on this machine, and torch finds no GPU.

    Raises:
        ValueError: The user's cluster has no GPU.
        ConnectionError: There is no cluster at RAY_ADDRESS.
    """
    import torch

    ray, address = import_ray(), os.environ.get("RAY_ADDRESS") or "auto"
    with contextlib.ExitStack() as held:
        if not ray.is_initialized():
            try:
                if address == "local":  # Ray starts a cluster then
                    raise ConnectionError
                ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError:
                if address not in ("auto", "local"):
                    raise
                return "cuda" if torch.cuda.is_available() else "cpu"
            held.callback(ray.shutdown)
        _check_gpus(ray)
    return "cuda"


def _check_gpus(ray: ModuleType) -> None:
    if not ray.cluster_resources().get("GPU"):
        raise ValueError("the Ray cluster has no GPU: compute on its CPUs with --num_gpus 0 (Python: num_gpus=0)")


@contextlib.contextmanager
def ray_session() -> Iterator[ModuleType]:
    """Connect to the user's Ray cluster (RAY_ADDRESS, or one on this machine), or else start one, unless this process is connected."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def run_on_ray(step: Callable[..., None], folder: Path, tasks: int, ranks: Sequence[int], device: str) -> list[int]:
    """Run tasks on Ray, each as one Ray task.

    Args:
        step: What a task does: a function of data, rank and world_size.
        folder: Folder of the task files, marks and logs.
        tasks: Number of all tasks.
        ranks: The tasks to run.
        device: "cuda" (each task has one GPU) or "cpu".

    Returns:
        The tasks that failed.

    Raises:
        ValueError: The device is "cuda", and the cluster has no GPU that the tasks could wait for.
    """
    waiting: dict[Any, int] = {}
    failed = []
    with ray_session() as ray:
        try:
            if device == "cuda":
                _check_gpus(ray)
            # Ray retries a task 3 times if its process dies.
            run = ray.remote(num_cpus=1, num_gpus=int(device == "cuda"))(_run_ray_task)
            waiting = {run.remote(step, str(folder), tasks, rank): rank for rank in ranks}
            with progress_bar(len(ranks), "tasks", "tasks") as bar:
                while waiting:
                    (done,), _ = ray.wait([*waiting])
                    rank = waiting.pop(done)
                    try:
                        ray.get(done)
                    except ray.exceptions.RayError:  # its log has the error
                        failed.append(rank)
                    bar.update()
        finally:
            for each in waiting:
                ray.cancel(each, force=True)
    return failed
