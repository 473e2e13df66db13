import functools
import math
import multiprocessing
import operator
import os
import pickle
import signal
import sys
import threading
import time

import pytest

from usdm_sft.audio.reading import AudioError
from usdm_sft.utils.processes import PipedProcess, ProcessPool, num_cores, sendable, serve, share_out, start_process


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


def work(item):
    """Return the item and the process that deals with it; at least one item is left for each process."""
    time.sleep(0.01)
    return item, os.getpid()


def test_pool_shares_out_calls_of_several_maps():
    with ProcessPool(3) as pool:
        found = dict(pool.map(work, range(20), name="calls"))
        assert {index: item for index, (item, _) in found.items()} == {index: index for index in range(20)}
        children = multiprocessing.active_children()
        assert len(children) == 2
        processes = {process for _, process in found.values()}
        assert os.getpid() in processes
        assert len(processes) > 1
        assert processes <= {os.getpid(), *(child.pid for child in children)}
        assert dict(pool.map(math.sqrt, [4.0, 9.0, 16.0], name="roots")) == {0: 2.0, 1: 3.0, 2: 4.0}
        assert dict(pool.map(functools.partial(operator.mul, 3), [5], name="products")) == {0: 15}
        assert multiprocessing.active_children() == children
    assert multiprocessing.active_children() == []


def test_errors_of_a_call_here_and_in_a_process():
    """The first two items are for the process."""
    with ProcessPool(2) as pool, pytest.raises(ValueError, match=r"math domain error|nonnegative input") as caught:
        list(pool.map(math.sqrt, [-1.0, 4.0, 9.0], name="roots"))
    assert "In the process:" in caught.value.__notes__[0]
    with ProcessPool(2) as pool, pytest.raises(ValueError, match=r"math domain error|nonnegative input") as caught:
        list(pool.map(math.sqrt, [4.0, 9.0, -1.0], name="roots"))
    assert not hasattr(caught.value, "__notes__")
    assert multiprocessing.active_children() == []


def test_processes_start_ahead_of_the_calls():
    with ProcessPool(4, ["math"]) as pool:
        pool.start(3)
        assert len(multiprocessing.active_children()) == 2
        assert dict(pool.map(math.sqrt, [4.0, 9.0, 16.0, 25.0], name="roots")) == {0: 2.0, 1: 3.0, 2: 4.0, 3: 5.0}
        assert len(multiprocessing.active_children()) == 2
    with ProcessPool(4) as pool:
        pool.start(0)  # too little work
        list(pool.map(math.sqrt, [4.0, 9.0], name="roots"))
        assert multiprocessing.active_children() == []


def die(parent):
    if os.getpid() != parent:
        os._exit(3)
    time.sleep(0.05)


def test_death_of_a_process_of_a_pool_is_an_error():
    with (
        ProcessPool(2) as pool,
        pytest.raises(RuntimeError, match=r"a process died \(exits, process 1, exit code 3\): start the run again"),
    ):
        list(pool.map(die, [os.getpid()] * 4, name="exits"))
    assert multiprocessing.active_children() == []


def add_up(connection, start):
    """Answer numbers with their sum so far; die of a negative one."""
    while True:
        number = connection.recv()
        if number < 0:
            os._exit(7)
        start += number
        connection.send(start)


def ask(connection, number):
    connection.send(number)
    return connection.recv()


def test_piped_process_serves_until_it_dies():
    process = PipedProcess(add_up, (10,), name="sums")
    assert [process.call(functools.partial(ask, number=number)) for number in (1, 2)] == [11, 13]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"a process died \(sums, exit code 7\): start the run again; finished"):
            process.call(functools.partial(ask, number=-1))
    process.close()
    assert multiprocessing.active_children() == []


def test_piped_process_is_not_used_after_half_an_answer():
    process = PipedProcess(add_up, (10,), name="sums")
    with pytest.raises(ZeroDivisionError):
        process.call(lambda connection: connection.send(1) or 1 / 0)
    with pytest.raises(RuntimeError, match=r"a process died \(sums, exit code -15\)"):
        process.call(lambda connection: connection.recv() + connection.recv())
    process.close()


def test_piped_process_ends_when_its_pipe_is_closed(capfd):
    process = PipedProcess(add_up, (0,), name="sums")
    assert process.call(functools.partial(ask, number=1)) == 1
    process.connection.close()  # as when the parent is killed
    process._process.join(60)
    assert process._process.exitcode == 0
    assert capfd.readouterr().err == ""


def test_thread_that_waits_for_a_terminated_process_goes_on():
    process, caught = PipedProcess(add_up, (0,), name="sums"), []

    def wait():
        with pytest.raises(RuntimeError, match="exit code -15") as error:
            process.call(lambda connection: connection.recv())
        caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    process.terminate()
    thread.join(60)
    assert len(caught) == 1
    process.close()


def start_another():
    another = start_process(time.sleep, (0,))
    another.join()
    sys.exit(another.exitcode)


def test_started_process_may_start_others():
    process = start_process(start_another, ())
    process.join()
    assert process.daemon  # it ends when this process exits
    assert process.exitcode == 0


def die_within_a_message(connection):
    connection.recv()
    os.write(connection.fileno(), (100).to_bytes(4, "big") + b"half")  # the length of a message, and its beginning
    os._exit(9)


def test_death_within_a_message_is_named():
    process = PipedProcess(die_within_a_message, (), name="half")
    with pytest.raises(RuntimeError, match=r"a process died \(half, exit code 9\)"):
        process.call(functools.partial(ask, number=1))
    process.close()


def double(item):
    return item + item


def test_large_items_and_results_pass_each_other():
    """Neither end waits until the other one has read."""
    items = [bytes([number]) * 3_000_000 for number in range(8)]
    with ProcessPool(2) as pool:
        assert dict(pool.map(double, items, name="calls")) == {index: item * 2 for index, item in enumerate(items)}


def hold_back(items):
    """Finish an item when three later ones have come, as a device does."""
    held = []
    for item in iter(lambda: pickle.loads(items.get()), None):
        held.append(item)
        if len(held) == 4:
            yield held.pop(0)
    yield from held


@pytest.mark.parametrize("num_items", [0, 1, 5, 30])
def test_streams_of_processes_answer_every_item(num_items):
    processes = [PipedProcess(serve, (hold_back,), name=f"process {number}") for number in range(2)]
    assert sorted(share_out(range(num_items), processes, ahead=4)) == list(range(num_items))
    for process in processes:
        process.close()
    assert multiprocessing.active_children() == []


class Unreadable:
    def __reduce__(self):
        raise FileNotFoundError("no such recording")


def test_error_of_pickling_an_item_is_not_one_of_the_process():
    with ProcessPool(2) as pool, pytest.raises(FileNotFoundError, match="no such recording"):
        list(pool.map(str, [Unreadable()] * 4, name="items"))


def test_processes_learn_of_the_end_if_it_is_made_here():
    """The pool would take the function of its next map for an item."""
    process = PipedProcess(serve, (hold_back,), name="stream")
    assert list(share_out([1, 2], [process], ahead=0, here=operator.neg)) == [-1, -2]
    process._process.join(60)
    assert process._process.exitcode == 0
    process.close()


class TwoArguments(Exception):
    def __init__(self, one, two):
        super().__init__(one)


@pytest.mark.parametrize("error", [TwoArguments("wrong", 2), type("Local", (ValueError,), {})("wrong")])
def test_error_that_cannot_be_pickled_keeps_its_message(error):
    sent = sendable(error)
    assert type(sent) is RuntimeError and str(sent) == f"{type(error).__name__}: wrong"
    assert isinstance(sendable(AudioError("bad")), AudioError)
