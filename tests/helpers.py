"""Paths and functions that several test modules share."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.forked import Fork

REPOSITORY = Path(__file__).resolve().parents[1]
FIXTURES = REPOSITORY / "tests" / "fixtures"
DEMO = REPOSITORY / "usdm_sft" / "cli" / "demo_files"
SHARED = Path(os.environ.get("USDM_SHARED", REPOSITORY.parent / "shared"))


def content(folder):
    """The bytes of every file below a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def inodes(folder, pattern):
    """The inode of every matching file; a file that is written again gets another one."""
    return {path: path.stat().st_ino for path in folder.glob(pattern)}


@contextlib.contextmanager
def record_states(folder, states):
    """Copy a folder before each change of a name: the copies `states/000` and so on are what a run leaves if it is killed there."""
    states.mkdir()

    def recorded(change):
        def wrapper(*args, **options):
            if folder.is_dir():
                shutil.copytree(folder, states / f"{len(list(states.iterdir())):03d}", symlinks=True)
            return change(*args, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, recorded(getattr(os, name)))
        yield


def edit_counts(folder, change):
    """Change the counts.json of a dataset folder: `change` gets its content."""
    counts = json.loads((folder / "counts.json").read_text())
    change(counts)
    (folder / "counts.json").write_text(json.dumps(counts))


def replace_file(folder, name, data):
    """Replace a file of a dataset folder and record its new digest, as a careful forger does."""
    (folder / name).write_bytes(data)
    edit_counts(folder, lambda counts: counts["files"].update({name: hashlib.sha256(data).hexdigest()}))


def replace_table(folder, name, change, row_group_size=None):
    """Replace a Parquet file: `change` gets its table and returns another one."""
    table = change(pq.read_table(folder / name))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size)
    replace_file(folder, name, sink.getvalue().to_pybytes())


def edit_rows(folder, name, change):
    """Change the rows of a Parquet file: `change` gets them as a list."""

    def edit(table):
        rows = table.to_pylist()
        change(rows)
        return pa.Table.from_pylist(rows, schema=table.schema)

    replace_table(folder, name, edit)


def find_problems(folder, **options):
    """The problems for which `verify` refuses a folder."""
    from usdm_sft.folder.verify import VerificationError, verify

    with pytest.raises(VerificationError) as raised:
        verify(folder, **options)
    return raised.value.problems


def page_data(page):
    """The data of a page of examples."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text())[1])


def wait_for(happened, run, seconds=300):
    """Wait until `happened()` is true while the process `run` is alive. A busy machine may need minutes to start it."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert run.poll() is None, "the process ended too early"
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.0005)


def wait_for_end_of_group(group, seconds=30):
    """Wait until no process of a process group is left."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < deadline, "a process outlives its parent"
            time.sleep(0.05)


# What a run says of the mini corpus, of which more than a tenth is left out.
LEFT_OUT = (
    "train: 2 of 6 dialogs are left out (d11: one speaker speaks twice in a row, d42: a single turn makes no pair): join neighbouring turns "
    "with --merge_speaker_turns, which keeps 1 of them\n"
)


def stop_run(run, folder, pattern, signal_number):
    """Send a signal to a run, which has its own session, when a file of the folder matches `pattern`; all its processes end.

    SIGINT goes to all of them, as from a terminal, and gives one line.
    """
    wait_for(lambda: list(folder.glob(pattern)), run)
    if signal_number == signal.SIGINT:
        os.killpg(run.pid, signal_number)
        line = "dailytalk-usdm prepare: interrupted; start it again, finished work is kept\n"
        assert run.communicate(timeout=60)[1].removeprefix(LEFT_OUT) == line
        assert run.returncode == 130
    else:
        run.send_signal(signal_number)
        run.wait()
    wait_for_end_of_group(run.pid)


def options(mini, unit_model, folder, **changes):
    """Options of `prepare` for the mini corpus, one dialog per work shard."""
    return {
        "data_dir": str(mini / "corpus"),
        "pretrained_model_name_or_path": "mistral-common",
        "unit_model": str(unit_model),
        "shard_dialogs": 1,
        "cache_dir": str(folder / "cache"),
        "output_path": str(folder / "out"),
    } | changes


def reuse_units(finished, folder):
    """Give a run in a folder the units of the finished run, so that it makes no forward pass."""
    shutil.copytree(finished / "cache" / "units", folder / "cache" / "units")


def command(mini, unit_model, folder, *more):
    """The command line of `prepare` with these options."""
    pairs = options(mini, unit_model, folder).items()
    arguments = [part for name, value in pairs for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "usdm_sft.cli", "prepare", *arguments, *more]


# A run that makes a file when it has found that there is work.
OTHER_RUN = """
from pathlib import Path
from usdm_sft.prepare import prepare
from usdm_sft.cli.main import main
load_rows = prepare.load_rows
def start(builder):
    Path({started!r}).touch()
    return load_rows(builder)
prepare.load_rows = start
main({arguments!r})
"""


def make_in_two_runs_at_once(mini, unit_model, folder, monkeypatch, *, other=None, **changes):
    """Run twice over one cache: in this process into `out`, and in another one into `other`, with the options `other`."""
    from usdm_sft.prepare.open_run import load_rows
    from usdm_sft.prepare.prepare import prepare

    given = {**changes, "output_path": folder / "other", **(other or {})}
    arguments = command(mini, unit_model, folder, *(f"--{name}={value}" for name, value in given.items()))[3:]
    code = OTHER_RUN.format(started=str(folder / "started"), arguments=arguments)
    run = Fork(code)
    met = []

    def meet(builder):
        wait_for((folder / "started").exists, run)
        met.append(builder)
        return load_rows(builder)

    monkeypatch.setattr("usdm_sft.prepare.prepare.load_rows", meet)
    prepare(**options(mini, unit_model, folder, **changes))
    _, error = run.communicate(timeout=300)
    assert run.returncode == 0, error[-2000:]
    assert len(met) == 1
    for level in ("units", "tokens"):
        assert len(list(folder.glob(f"cache/{level}/*.arrow"))) == 6
    assert not [*folder.rglob("*.unfinished"), *folder.rglob(".unfinished")]


def run_task_here(step, folder, tasks, rank):
    """Run one task in this process, as `ray_tasks._run_ray_task` does in one of Ray."""
    from usdm_sft.executors import ray_tasks

    ray_tasks._run_ray_task(step, str(folder), tasks, rank)


def run_tasks_here(monkeypatch, run=None):
    """Let tasks of Ray run in this process; return the list to which the numbers of the tasks are added.

    Args:
        monkeypatch: Undoes it.
        run: Takes the place of `run_task_here`, with the same arguments; returns False if the task failed.
    """
    from usdm_sft.executors import tasks as executor_tasks

    ranks_run = []

    def run_on_ray(step, folder, tasks, ranks, device):
        ranks_run.extend(ranks)
        return [rank for rank in ranks if (run or run_task_here)(step, folder, tasks, rank) is False]

    monkeypatch.setattr(executor_tasks, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(executor_tasks, "run_on_ray", run_on_ray)
    return ranks_run


def tiny_mistral(**changes):
    """A Mistral model with random weights and the vocabulary of USTM."""
    from transformers import MistralConfig, MistralForCausalLM  # a second that most tests do without

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 42_003, "num_key_value_heads": 2, "pad_token_id": 42_002, "max_position_embeddings": 4096}
    return MistralForCausalLM(MistralConfig(**shape | changes))


def loss_by_hand(model, rows):
    """Mean over all labelled tokens, each row on its own."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


def ids_and_labels(encoder, batch):
    """The ids and the labels of the first row of a batch, as lists."""
    encoded = encoder(batch)
    return encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist()


class LastFirst:
    """Takes the place of `ProcessPool`: one process makes the calls and finishes the last item first."""

    def __init__(self, num_proc):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def map(self, function, items, *, name, keys=(), is_valid=None):
        for index in reversed(range(len(items))):
            yield index, function(items[index])
