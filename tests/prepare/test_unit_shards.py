import errno
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from dailytalk_usdm import DailyTalkUSDM
from tests.forked import run_command
from tests.helpers import (
    command,
    content,
    inodes,
    make_in_two_runs_at_once,
    options,
    wait_for,
)
from usdm_sft.audio.reading import AudioError
from usdm_sft.folder.layout import read_counts
from usdm_sft.prepare import open_run, unit_shards
from usdm_sft.prepare.prepare import prepare
from usdm_sft.units import reading
from usdm_sft.units import tokenizer as tokenizer_module
from usdm_sft.units.model import UnitModel
from usdm_sft.utils.shard_cache import ShardCache


@pytest.fixture
def two_processes(monkeypatch):
    """Two processes on the CPU in place of two GPUs."""
    monkeypatch.setattr(open_run, "find_devices", lambda num_gpus: ["cpu", "cpu:0"])


@pytest.fixture
def two_readers(monkeypatch):
    """For each device, two processes read the audio, as for a GPU and a larger corpus."""
    monkeypatch.setattr(unit_shards, "count_readers", lambda shards, devices: 2)


def test_processes_that_read_audio_give_the_bytes_of_threads(
    mini, unit_model, tmp_path, two_readers, forked_processes, undisturbed, monkeypatch
):
    monkeypatch.setattr(reading, "_read_here", None)  # this process reads nothing
    prepare(**options(mini, unit_model, tmp_path))
    assert content(tmp_path / "out") == undisturbed
    assert multiprocessing.active_children() == []


KILLED = "0_1_d8.wav"  # the process that reads it


def read_or_be_killed(source, contents):
    if source.endswith(KILLED):
        os.kill(os.getpid(), signal.SIGKILL)
    return reading.read_resampled(source, contents)


def is_killed(shard):
    return any(source.endswith(KILLED) for source in shard.audio)


@pytest.mark.slow
def test_killed_reader_ends_the_run_and_finished_work_is_kept(
    mini, unit_model, tmp_path, two_readers, forked_processes, undisturbed, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "choose_read", lambda resampler, sample_rate: read_or_be_killed)
        patch.setattr(unit_shards, "order_shards", lambda shards: sorted(shards, key=is_killed))  # it comes last
        with pytest.raises(
            RuntimeError, match=r"a process died \(reads audio, process \d, exit code -9\): start the run"
        ):
            prepare(**options(mini, unit_model, tmp_path))
    assert multiprocessing.active_children() == []
    finished = inodes(tmp_path, "cache/units/*.arrow")
    assert 0 < len(finished) < 6
    prepare(**options(mini, unit_model, tmp_path))
    assert inodes(tmp_path, "cache/units/*.arrow").items() >= finished.items()
    assert content(tmp_path / "out") == undisturbed


def test_number_of_readers(monkeypatch):
    def count(num_files, devices):
        return unit_shards.count_readers(
            [unit_shards.UnitShard("", [], dict.fromkeys(map(str, range(num_files)), ""))], devices
        )

    monkeypatch.setattr(unit_shards, "num_cores", lambda: 24)
    gpus = [f"cuda:{index}" for index in range(4)]
    assert [count(num_files, gpus[:1]) for num_files in (0, 255, 256, 1_000, 100_000)] == [0, 0, 1, 3, 8]
    assert [count(100_000, gpus), count(2_100, gpus), count(100_000, ["cpu"])] == [6, 2, 0]
    monkeypatch.setattr(unit_shards, "num_cores", lambda: 2)
    assert [count(100_000, gpus[:1]), count(100_000, gpus)] == [2, 1]
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # which may not start processes
    assert count(100_000, gpus) == 0


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(
    mini, unit_model, tmp_path, two_processes, two_readers, forked_processes, undisturbed, monkeypatch
):
    monkeypatch.setattr(UnitModel, "forward_pack", None)  # this process computes no units
    prepare(**options(mini, unit_model, tmp_path))
    assert content(tmp_path / "out") == undisturbed


@pytest.fixture
def after_the_first_pass(monkeypatch):
    """A function that makes a file of the corpus change between the first pass over the audio and the units."""
    load = DailyTalkUSDM.as_dataset

    def write(path, data):
        monkeypatch.setattr(
            DailyTalkUSDM, "as_dataset", lambda self, split: path.write_bytes(data) and load(self, split=split)
        )

    return write


@pytest.mark.slow
def test_error_in_a_process_reaches_the_caller(
    mini, unit_model, tmp_path, two_processes, after_the_first_pass, monkeypatch, capfd
):
    monkeypatch.setattr(unit_shards, "count_readers", lambda shards, devices: 1)
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    path = corpus / "data" / "8" / "0_1_d8.wav"
    after_the_first_pass(path, path.read_bytes()[:244])
    with pytest.raises(AudioError, match=r"0_1_d8\.wav was changed during the run") as caught:
        prepare(**options(mini, unit_model, tmp_path, data_dir=str(corpus)))
    assert "in read_unchanged" in caught.value.__notes__[0]  # the traceback in the process that reads
    assert "in _serve_device" in caught.value.__notes__[1]  # and in that of the device
    assert capfd.readouterr().err == ""


def test_audio_that_changes_during_the_run_is_refused(mini, unit_model, tmp_path, after_the_first_pass, undisturbed):
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    path = corpus / "data" / "8" / "0_1_d8.wav"
    before = path.read_bytes()
    after_the_first_pass(path, (corpus / "data" / "3" / "0_0_d3.wav").read_bytes())
    with pytest.raises(AudioError, match=r"0_1_d8\.wav was changed during the run"):
        prepare(**options(mini, unit_model, tmp_path, data_dir=str(corpus)))
    path.write_bytes(before)
    after_the_first_pass(path, before)
    prepare(**options(mini, unit_model, tmp_path, data_dir=str(corpus)))
    assert content(tmp_path / "out") == undisturbed


def test_audio_swapped_while_decoded_has_units_of_its_digest(mini, unit_model, tmp_path, undisturbed, monkeypatch):
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    path, other = corpus / "data" / "8" / "0_1_d8.wav", corpus / "data" / "3" / "0_0_d3.wav"
    check, swapped = reading.read_unchanged, []

    def swap_after_the_check(address, *rest):
        contents = check(address, *rest)
        if address == str(path):
            swapped.append(path.write_bytes(other.read_bytes()))
        return contents

    monkeypatch.setattr(reading, "read_unchanged", swap_after_the_check)
    prepare(**options(mini, unit_model, tmp_path, data_dir=str(corpus)))
    assert len(swapped) == 1  # read once
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_process_that_dies_is_named_and_finished_work_is_kept(
    mini, unit_model, tmp_path, two_processes, forked_processes, undisturbed
):
    def kill():
        while not [*tmp_path.glob("cache/units/*.arrow")]:
            time.sleep(0.001)
        for process in multiprocessing.active_children():
            process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(RuntimeError, match=r"a process died \(units on cpu.*, exit code -9\): start the run again"):
        prepare(**options(mini, unit_model, tmp_path))
    killer.join()
    finished = inodes(tmp_path, "cache/units/*.arrow")
    assert finished
    prepare(**options(mini, unit_model, tmp_path))
    assert inodes(tmp_path, "cache/units/*.arrow").items() >= finished.items()
    assert content(tmp_path / "out") == undisturbed


KILL_POINTS = (  # when the fourth unit shard, the second token shard, and the fifth output file are finished
    ("cache/units/*.arrow", 4),
    ("cache/tokens/*.arrow", 2),
    ("out/.unfinished/*/single_turn/*.parquet", 5),
)


@pytest.mark.slow
def test_killed_run_is_resumed(mini, unit_model, tmp_path, undisturbed):
    """One run after the other is killed, and each goes on where the one before it was killed."""
    arguments, finished = command(mini, unit_model, tmp_path)[3:], {}
    for pattern, number in KILL_POINTS:
        run = run_command(arguments)
        wait_for(lambda pattern=pattern, number=number: len(list(tmp_path.glob(pattern))) >= number, run)
        run.kill()
        run.wait()
        assert not (tmp_path / "out" / "counts.json").exists()
        before, finished = finished, inodes(tmp_path, "cache/*/*.arrow")
        assert finished.items() >= before.items()  # no finished file was written again
        assert len(finished) >= (number if "cache" in pattern else 12)
    prepare(**options(mini, unit_model, tmp_path))
    assert inodes(tmp_path, "cache/*/*.arrow") == finished
    assert content(tmp_path / "out") == undisturbed
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.slow
def test_two_runs_share_one_cache(mini, unit_model, tmp_path, undisturbed, monkeypatch):
    make_in_two_runs_at_once(mini, unit_model, tmp_path, monkeypatch)
    assert content(tmp_path / "out") == undisturbed
    assert content(tmp_path / "other") == undisturbed


@pytest.mark.slow
def test_agreement_is_measured_once_and_is_in_counts_and_log(mini, unit_model, tmp_path, caplog, monkeypatch):
    counts = prepare(**options(mini, unit_model, tmp_path, precision="bf16"))
    agreement = counts["agreement"]
    assert agreement["utterances"] == 19
    assert 0.9 < agreement["share"] == round(agreement["equal_units"] / agreement["units"], 6) < 1
    assert (
        f"bf16, soxr: {100 * agreement['share']:.2f} % of the units equal those of fp32 and soxr (19 utterances)"
        in caplog.text
    )
    monkeypatch.setattr(UnitModel, "forward_pack", None)
    again = prepare(**options(mini, unit_model, tmp_path, precision="bf16", output_path=str(tmp_path / "again")))
    assert again["agreement"] == agreement


def test_agreement_is_none_for_the_settings_of_the_reference(finished):
    assert read_counts(finished / "out")["agreement"] is None


def test_more_gpus_than_this_machine_has(mini, unit_model, tmp_path):
    with pytest.raises(ValueError, match="num_gpus is 99: this machine has"):
        prepare(**options(mini, unit_model, tmp_path, num_gpus=99))


def test_order_of_work_shards_and_overlap_change_no_byte(mini, unit_model, tmp_path, undisturbed, monkeypatch):
    order = unit_shards.order_shards
    monkeypatch.setitem(unit_shards._DEVICE_AHEAD, "cpu", 1)
    monkeypatch.setattr(unit_shards, "order_shards", lambda shards: order(shards)[::-1])
    prepare(**options(mini, unit_model, tmp_path))
    assert content(tmp_path / "out") == undisturbed
    assert not list(tmp_path.rglob("*.unfinished"))


def test_each_run_makes_work_shards_in_its_own_order():
    shards = [unit_shards.UnitShard(str(number), [], {}, longest=number) for number in range(100)]
    state = random.getstate()
    one, other = unit_shards.order_shards(shards), unit_shards.order_shards(shards)
    assert random.getstate() == state  # which the calling script may have seeded
    assert one != other
    for made in (one, other):
        assert sorted(shard.longest for shard in made[:64]) == list(range(36, 100))  # the longest come first
        assert sorted(made, key=lambda shard: shard.longest) == shards


class Device:
    """A `UnitTokenizer` that writes down what is asked of it."""

    def __init__(self, done):
        self.settings, self.fp32_fallback = {"device": "cuda"}, set()
        self.done = done

    def start_reader(self, num_processes):
        self.reading = True

    def end_reader(self):
        self.reading = False

    def read_ahead(self, sources, digests):
        self.done.append(f"read {sources[0]}")

    def forget(self, sources):
        self.done.append(f"forget {sources[0]}")

    def start_files(self, sources, digests):
        self.done.append(f"start {sources[0]}")

        def finish():
            self.done.append(f"finish {sources[0]}")
            if "bad" in sources:
                raise ValueError("bad")
            return [[1, 2]] * len(sources), [0.5] * len(sources)

        return finish


def make_shards(*names):
    """Work shards of one file each; their keys begin with the name and therefore have different locks."""
    return [unit_shards.UnitShard(name * 16, [name], {name: "0" * 64}) for name in names]


def test_device_gets_next_shard_before_this_one_is_written(tmp_path):
    done = []
    device = Device(done)
    shards = make_shards("a", "b", "c", "d")
    for key, path in unit_shards.make_unit_shards(shards, device, ["cuda"], ShardCache(tmp_path)):
        assert device.reading
        assert path.name.startswith(key)
        done.append(f"yield {key[0]}")
    assert done == [
        "read a", "read b", "start a", "read c", "start b", "finish a", "read d", "start c", "finish b", "yield a",
        "start d", "finish c", "yield b", "finish d", "yield c", "yield d",
    ]  # fmt: skip
    assert len(list(tmp_path.glob("*.arrow"))) == 4
    assert not device.reading


@pytest.mark.parametrize(("names", "error", "kept"), [("ab", OSError, ""), (("a", "b", "bad", "c"), ValueError, "ab")])
def test_errors_of_device_and_writer_hold_no_lock(tmp_path, monkeypatch, names, error, kept):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    level, shards = ShardCache(tmp_path), make_shards(*names)
    with monkeypatch.context() as patch:
        if error is OSError:
            patch.setattr(unit_shards, "write_shard", full)
        with pytest.raises(error, match=r"No space left on device|bad"):
            list(unit_shards.make_unit_shards(shards, Device([]), ["cuda"], level))
    assert sorted(path.name[0] for path in tmp_path.glob("*.arrow")) == list(kept)
    for shard in shards:
        with level.claim(shard.key, wait=False) as claim:  # None would mean that a lock is still held
            assert (claim.finished is not None) == (shard.audio[0] in kept)


def test_run_finishes_its_shards_before_it_waits(tmp_path):
    level, done = ShardCache(tmp_path), []
    shards = make_shards("a", "b", "c")
    other = level.claim(shards[1].key)
    made = unit_shards.make_unit_shards(shards, Device(done), ["cuda"], level)
    assert next(made)[0] == shards[0].key  # written although the second work shard is not available
    with level.claim(shards[0].key, wait=False) as claim:
        assert claim.finished is not None
    path = other.write(lambda path: Path(path).write_bytes(b"of the other run"))
    other.release()
    assert [key[0] for key, _ in made] == ["b", "c"]
    assert path.read_bytes() == b"of the other run"
    assert "start b" not in done and "forget b" in done
