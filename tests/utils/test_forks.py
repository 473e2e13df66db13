"""Processes that are forked while another thread holds a lock."""

import io
import multiprocessing
import sys
import threading

import pytest
import soundfile

from tests.helpers import DEMO
from usdm_sft.audio.reading import read_audio
from usdm_sft.template import chat_render
from usdm_sft.units import cpu
from usdm_sft.utils import processes

RECORDING = DEMO / "corpus" / "data" / "3" / "0_0_d3.wav"


def call_in_a_fork(function):
    """Call `function` in a forked process, which must end within a minute."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    if hangs := process.is_alive():
        process.kill()
        process.join()
    assert not hangs and process.exitcode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_audio_is_read_in_a_process_that_is_forked_while_a_thread_opens_a_file():
    begun, held = threading.Event(), threading.Event()

    class SlowFile(io.BytesIO):
        def read(self, size=-1):
            begun.set()
            held.wait(60)
            return super().read(size)

        def readinto(self, buffer):
            begun.set()
            held.wait(60)
            return super().readinto(buffer)

    thread = threading.Thread(target=lambda: soundfile.SoundFile(SlowFile(RECORDING.read_bytes())).close())
    thread.start()
    try:
        assert begun.wait(60)
        call_in_a_fork(lambda: read_audio(RECORDING))
    finally:
        held.set()
        thread.join()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("module, name", [(processes, "_lock"), (chat_render, "_lock"), (cpu, "_TURN")])
def test_lock_that_a_thread_holds_is_free_in_a_forked_process(module, name):
    def take():
        assert getattr(module, name).acquire(timeout=5)

    with getattr(module, name):
        call_in_a_fork(take)
