"""Bars, lines of the log, and the stages of a run, on a clock that the test turns."""

import io
import sys
from contextlib import redirect_stderr

import datasets
import pytest
from tqdm import std

from usdm_sft.utils import progress
from usdm_sft.utils.progress import AUDIO, Stages, format_seconds, progress_bar, quiet


class Stderr(io.StringIO):
    terminal = False

    def isatty(self):
        return self.terminal


@pytest.fixture
def stderr(monkeypatch):
    # conftest.py switches bars off by a variable of the environment, which has priority.
    monkeypatch.setattr(sys.modules["datasets.utils.tqdm"], "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    datasets.enable_progress_bars()
    yield Stderr()
    datasets.disable_progress_bars()


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(std, "time", lambda: Clock.now)
    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def run_stages(clock, stderr):
    """Two stages: one of 5 seconds without a bar, and one with 2 hours of audio in four steps of 20 seconds."""
    with redirect_stderr(stderr), Stages(("corpus", "units")) as stages:
        stages.start("corpus")
        clock.now += 5
        stages.start("units")
        with progress_bar(7200, "units", AUDIO) as bar:
            for _ in range(4):
                clock.now += 20
                bar.update(1800)
    return stages


def test_lines_of_the_log_at_intervals(stderr, clock, caplog):
    caplog.set_level("INFO")
    run_stages(clock, stderr)
    # Steps end after 20, 40, 60 and 80 seconds; lines have 30 seconds between them at least.
    assert caplog.messages == [
        "[2/2] units: 50 %, 1.0 of 2.0 h of audio, 90 s of audio per second, 40 s left",
        "[2/2] units: 100 %, 2.0 of 2.0 h of audio, 90 s of audio per second, 0 s left",
    ]
    assert stderr.getvalue() == ""


def test_bars_in_a_terminal(stderr, clock, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(Stderr, "terminal", True)
    run_stages(clock, stderr)
    frames = [frame.strip() for frame in stderr.getvalue().split("\r") if frame.strip()]
    assert frames[:2] == ["[1/2] corpus ...", "[2/2] units ..."]
    assert frames[2].startswith("[2/2] units:   0%|") and frames[2].endswith("| 0.0 of 2.0 h of audio")
    assert frames[3].startswith("[2/2] units:  25%|")
    assert frames[3].endswith("| 0.5 of 2.0 h of audio, 90 s of audio per second, 1 min 0 s left")
    assert [frame[12:17] for frame in frames[2:]] == ["   0%", "  25%", "  50%", "  75%", " 100%"]
    assert caplog.messages == []


def test_summary_has_the_time_of_each_stage(stderr, clock):
    assert (
        run_stages(clock, stderr).summary()
        == "corpus 5 s, units 1 min 20 s (90 s of audio per second): 1 min 25 s in all"
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_while_bars_are_off(stderr, clock, caplog, monkeypatch, terminal):
    caplog.set_level("INFO")
    monkeypatch.setattr(Stderr, "terminal", terminal)
    datasets.disable_progress_bars()
    stages = run_stages(clock, stderr)
    assert (stderr.getvalue(), caplog.messages, stages.shown) == ("", [], False)


def test_bars_of_datasets_may_be_hidden_within_a_stage(stderr, clock, caplog):
    caplog.set_level("INFO")
    with redirect_stderr(stderr), Stages(("folder",)) as stages:
        stages.start("folder")
        with quiet(), progress_bar(2, "files", "files") as bar:
            clock.now += 40
            bar.update()
    assert caplog.messages == ["[1/1] folder, files: 50 %, 1 of 2 files, 0.025 files per second, 40 s left"]


def test_stages_end_with_their_context(stderr, clock, caplog):
    caplog.set_level("INFO")
    with redirect_stderr(stderr), Stages(("outer",)) as outer:
        outer.start("outer")
        with pytest.raises(KeyboardInterrupt), Stages(("inner",)) as inner:
            inner.start("inner")
            raise KeyboardInterrupt
        assert progress._current.get() is outer
    assert progress._current.get() is None
    with redirect_stderr(stderr), progress_bar(3_000_000_000, "model.pt", "B", initial=500_000_000) as bar:
        clock.now += 50
        bar.update(1_000_000_000)
    assert caplog.messages == ["model.pt: 50 %, 1.5 of 3.0 GB, 20 MB per second, 1 min 15 s left"]


def test_bar_without_a_total(stderr, clock, caplog, monkeypatch):
    caplog.set_level("INFO")
    with redirect_stderr(stderr), progress_bar(None, "model.pt", "B") as bar:
        clock.now += 50
        bar.update(1_500_000)
    assert caplog.messages == ["model.pt: 1.5 MB, 0.03 MB per second"]
    monkeypatch.setattr(Stderr, "terminal", True)
    with redirect_stderr(stderr), progress_bar(None, "model.pt", "B") as bar:
        clock.now += 50
        bar.update(1_500_000)
    assert "\rmodel.pt: 1.5 MB, 0.03 MB per second" in stderr.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (42_755, "11 h 52 min"), (10**7, "2,777 h 46 min")],
)
def test_times_in_words(seconds, text):
    assert format_seconds(seconds) == text
