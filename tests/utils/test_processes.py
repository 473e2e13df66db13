import signal
import sys
import time

from usdm_sft.utils.processes import start_process


def test_starting_a_process_restores_main_and_the_signal_mask():
    main = sys.modules["__main__"]
    process = start_process(time.sleep, (0,))
    process.join()
    assert process.exitcode == 0
    assert sys.modules["__main__"] is main
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
