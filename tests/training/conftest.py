import datasets
import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_wait_after_streams():
    """datasets sleeps five seconds after a pass over a stream of several files, until the threads of Arrow have ended."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield
