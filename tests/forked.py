"""Processes as forks of one that has imported the package (`tests/preloaded.py`); a new interpreter takes five seconds for that."""

import multiprocessing
import os
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])


class Fork:
    """Code in a process of its own, as `subprocess.Popen([sys.executable, "-c", code], ...)`, of whose methods it has some.

    Args:
        code: Python code. Its stdout and stderr go into one text.
        start_new_session: Give it a process group of its own.
    """

    def __init__(self, code, *, start_new_session=False):
        handle, self._output = tempfile.mkstemp(dir=os.environ["HF_HOME"])  # which conftest.py removes
        os.close(handle)
        arguments = code, self._output, start_new_session
        self._process = FORKS.Process(target=_run, args=arguments, daemon=True)  # which ends with the tests
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        return self._process.exitcode

    def communicate(self, timeout=None):
        """Wait for the end; return None and the output."""
        self.wait(timeout)
        return None, Path(self._output).read_text()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self._process.kill()


def run_command(arguments, **options):
    """Start a command of the command line, such as ["prepare", "--data_dir", "corpus"], in a fork."""
    return Fork(f"from usdm_sft.cli.main import main\nmain({[*map(str, arguments)]!r})", **options)


def _run(code, output, start_new_session):
    if start_new_session:
        os.setsid()
    multiprocessing.current_process().daemon = False  # a daemon may not start processes
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    exec(compile(code, "<fork>", "exec"), {"__name__": "__main__"})
