"""Tasks as an array job of Slurm, and a job that goes on with the run when they have ended.

datatrove's `depends` would need the pipelines of all stages before the first one runs. Here each stage is planned with the
results of the one before, so that the job that follows it plans and submits the next one.
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from loguru import logger as datatrove_logger

from usdm_sft.executors import SlurmPipelineExecutor
from usdm_sft.utils.pool import Submission

_OURS = {"pipeline", "tasks", "logging_dir", "skip_completed", "depends"}  # options of datatrove that we set
_GPU_ARGUMENTS = {"gres", "gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task"}  # of sbatch


class _Slurm(SlurmPipelineExecutor):  # type: ignore[misc]  # datatrove has no type hints
    """Keeps the id of every job, of which there are several if the tasks exceed an array."""

    @property
    def job_id(self) -> str | None:
        return self.job_ids[-1] if self.job_ids else None

    @job_id.setter
    def job_id(self, job_id: str | None) -> None:
        self.job_ids = [*getattr(self, "job_ids", []), job_id] if job_id is not None else []

    def launch_merge_stats(self) -> None:
        """Submit no job that merges statistics: the tasks have none, and the job would wait for a GPU."""


def check_options(options: Mapping[str, Any]) -> None:
    """Check the options of a job against datatrove and this machine.

    Raises:
        ValueError: An option is missing, unknown or of another type.
        FileNotFoundError: This machine has no sbatch.
    """
    if missing := [name for name in ("partition", "time") if name not in options]:
        raise ValueError(f"slurm lacks {' and '.join(missing)}: give --slurm '{{partition: NAME, time: \"04:00:00\"}}'")
    if not isinstance(options["time"], str):
        raise ValueError(f'slurm.time is {options["time"]!r}, a number: quote it, such as "24:00:00"')
    possible = inspect.signature(SlurmPipelineExecutor).parameters.keys() - _OURS
    if unknown := sorted(map(str, options.keys() - possible)):
        raise ValueError(f"slurm has {', '.join(unknown)}, but takes only {', '.join(sorted(possible))}")
    _convert_text(options)
    if shutil.which("sbatch") is None:
        raise FileNotFoundError("sbatch is not found: use --executor slurm on a machine that submits Slurm jobs")


def submit(
    step: Callable[..., None],
    folder: Path,
    name: str,
    tasks: int,
    ranks: Sequence[int],
    device: str | None,
    options: Mapping[str, Any],
    go_on: Callable[..., None] | None = None,
) -> Submission:
    """Submit the unfinished tasks to Slurm as one array job, and a job that goes on with the run after them.

    datatrove pickles the pipeline and the list of unfinished tasks into the folder; the job reads them there.

    Args:
        step: What a task does: a function of data, rank and world_size.
        folder: Folder of the task files, marks and logs.
        name: Name of the work.
        tasks: Number of all tasks.
        ranks: The unfinished tasks.
        device: "cuda" (each task has one GPU by default), "cpu", or None for one core.
        options: Options of datatrove's SlurmPipelineExecutor.
        go_on: What the other job does: a step of a pipeline. It starts only if all tasks succeed, or else is cancelled.

    Raises:
        RuntimeError: sbatch failed.
    """
    common = {"job_name": "dailytalk-usdm", "cpus_per_task": 4, "mem_per_cpu_gb": 4, **_convert_text(options)}
    if not common.keys() & {"env_command", "condaenv", "venv_path"}:  # by default the environment of this process
        common["env_command"] = f'export PATH="{Path(sys.executable).parent}:$PATH"'
    without_gpu = common | {"gpus_per_task": 0, "sbatch_args": _without_gpus(common.get("sbatch_args"))}
    if device is None:
        own = without_gpu | {"cpus_per_task": 1}
    else:
        own = {"gpus_per_task": int(device == "cuda")} | common
    job = _Slurm([step], tasks=tasks, logging_dir=str(folder), **own)
    _launch(job)
    submission = Submission(name, len(ranks), tasks, str(job.job_id), str(job.slurm_logs_folder))
    if go_on is None:
        return submission
    without_gpu["sbatch_args"]["kill-on-invalid-dep"] = "yes"  # it would wait forever if a task fails
    next_job = _Slurm(
        [go_on],
        tasks=1,
        logging_dir=str(folder / "next"),
        skip_completed=False,  # it may have followed the same tasks in an earlier run
        depends_job_id=":".join(job.job_ids),
        **without_gpu,
    )
    _launch(next_job)
    return replace(submission, next_job_id=str(next_job.job_id))


def _without_gpus(sbatch_args: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (sbatch_args or {}).items() if name not in _GPU_ARGUMENTS}


def _launch(job: _Slurm) -> None:
    """Submit a job. The variables that Slurm sets in a job are hidden: sbatch and srun would take them for options of the new job."""
    hidden = {
        name: os.environ.pop(name) for name in list(os.environ) if name.startswith("SLURM_") and name != "SLURM_CONF"
    }
    datatrove_logger.disable("datatrove")
    try:
        job.launch_job()
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"sbatch ended with exit status {error.returncode}: read its message above and correct --slurm"
        ) from error
    finally:
        datatrove_logger.enable("datatrove")
        os.environ.update(hidden)


def _convert_text(options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert numbers and truth values that are given as text, as in `--slurm.requeue false`.

    An option that is text for datatrove, such as `time`, stays text.

    Raises:
        ValueError: The text is neither.
    """
    parameters = inspect.signature(SlurmPipelineExecutor).parameters
    converted = dict(options)
    for name, text in options.items():
        if isinstance(text, str) and isinstance(parameters[name].default, int):
            with suppress(yaml.YAMLError):
                converted[name] = yaml.safe_load(text)
            if not isinstance(converted[name], int):
                raise ValueError(f"slurm.{name} is {text!r}: give a whole number, or true or false")
    return converted
