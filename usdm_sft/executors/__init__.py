"""Tasks of datatrove on Ray and Slurm. Only `--executor` imports this package, because datatrove is an optional dependency."""

INSTALL = "pip install 'dailytalk-usdm[executors]'"

try:
    from datatrove.executor.local import LocalPipelineExecutor as LocalPipelineExecutor
    from datatrove.executor.slurm import SlurmPipelineExecutor as SlurmPipelineExecutor
except ImportError as error:
    raise ImportError(f"--executor needs datatrove ({error}): {INSTALL}") from error
