import functools
import math
import multiprocessing
import operator
import os
import signal
import sys
import time

import pytest

from usdm_sft.utils.processes import ProcessPool, num_cores, start_process


def test_starting_a_process_restores_main_and_the_signal_mask():
    main = sys.modules["__main__"]
    process = start_process(time.sleep, (0,))
    process.join()
    assert process.exitcode == 0
    assert sys.modules["__main__"] is main
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_number_of_cores_is_that_of_the_affinity():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert num_cores() == len(before)


def test_pool_of_one_process_makes_the_calls_here():
    with ProcessPool(1) as pool:
        assert list(pool.map(lambda item: (item, os.getpid()), "ab", name="calls")) == [
            (0, ("a", os.getpid())),
            (1, ("b", os.getpid())),
        ]
    with ProcessPool(4) as pool:
        assert list(pool.map(lambda item: os.getpid(), "a", name="calls")) == [(0, os.getpid())]
        assert list(pool.map(os.getpid, [], name="calls")) == []
    assert multiprocessing.active_children() == []


def test_processes_of_a_pool_share_out_calls_and_serve_several_maps():
    with ProcessPool(2) as pool:
        found = dict(pool.map(functools.partial(operator.mul, 3), range(20), name="products"))
        assert found == {index: 3 * index for index in range(20)}
        children = multiprocessing.active_children()
        assert len(children) == 2
        assert dict(pool.map(math.sqrt, [4.0, 9.0, 16.0], name="roots")) == {0: 2.0, 1: 3.0, 2: 4.0}
        assert multiprocessing.active_children() == children
        with pytest.raises(ValueError, match="math domain error") as caught:
            list(pool.map(math.sqrt, [4.0, -1.0, 16.0], name="roots"))
        assert "In the process:" in caught.value.__notes__[0]
    assert multiprocessing.active_children() == []


def test_death_of_a_process_of_a_pool_is_an_error():
    with (
        ProcessPool(2) as pool,
        pytest.raises(RuntimeError, match=r"a process died \(exits, process \d, exit code 3\): start the run again"),
    ):
        list(pool.map(os._exit, [3, 3], name="exits"))
    assert multiprocessing.active_children() == []
