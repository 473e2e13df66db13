"""datatrove and Ray, the packages of the extra `executors`; an error names the extra where they are missing."""

from __future__ import annotations

import os
from types import ModuleType

_INSTALL = "pip install 'dailytalk-usdm[executors]'"
try:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.executor.slurm import SlurmPipelineExecutor
except ImportError as error:
    raise ImportError(f"--executor needs datatrove ({error}): {_INSTALL}") from error

__all__ = ["LocalPipelineExecutor", "SlurmPipelineExecutor", "import_ray"]


def import_ray() -> ModuleType:
    """Import Ray, which takes a second and which only `--executor ray` needs.

    Raises:
        ImportError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we start reports nothing to its makers
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--executor ray needs Ray ({error}): {_INSTALL}") from error
    return ray
