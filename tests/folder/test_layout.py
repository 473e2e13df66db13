"""What a run writes into its output folder, and what it leaves alone: locks, order of removal, links, versions."""

import fcntl
import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import Timeout

from tests.forked import run_command
from tests.helpers import command, content, edit_counts, find_problems, options, record_states, reuse_units
from usdm_sft.folder import layout, writer
from usdm_sft.folder.finished import find_finished
from usdm_sft.folder.layout import LOCK, UNFINISHED, check_output, lock_output
from usdm_sft.folder.verify import verify
from usdm_sft.prepare import prepare as preparing
from usdm_sft.prepare.prepare import prepare

ROUNDS = int(os.environ.get("USDM_ROUNDS", "1"))  # set it to 20 by hand; each takes seconds


@pytest.fixture
def arguments(mini, unit_model, finished, tmp_path):
    """Options of `prepare`, with the units of the mini corpus in the cache."""
    reuse_units(finished, tmp_path)
    return options(mini, unit_model, tmp_path)


@pytest.mark.slow
def test_two_runs_with_two_caches_take_turns(mini, unit_model, tmp_path):
    for number in range(ROUNDS):
        output = tmp_path / f"out{number}"
        runs = {}
        for seed in (1, 2):
            changes = ("--cache_dir", tmp_path / f"cache{seed}", "--shuffle_seed", seed, "--output_path", output)
            runs[seed] = run_command(command(mini, unit_model, tmp_path, *map(str, changes))[3:])
        errors = {seed: run.communicate(timeout=300)[1] for seed, run in runs.items()}
        [winner] = [seed for seed, run in runs.items() if run.returncode == 0]
        refused = errors[3 - winner].splitlines()[-1]
        seeds = f"shuffle_seed: {winner} -> {3 - winner}"
        assert f"{output} holds the result of other settings ({seeds}): name another output_path" in refused
        assert verify(output) == {"train": 10, "test": 3}
        assert json.loads((output / "counts.json").read_text())["settings"]["shuffle_seed"] == winner
        assert not (output / UNFINISHED).exists()


def finish_another_run_meanwhile(monkeypatch, arguments):
    """Let a run with another seed and another cache finish the output folder while the next call of `prepare` makes its rows."""
    fit = preparing.fit_splits

    def fit_late(*args):
        monkeypatch.setattr(preparing, "fit_splits", fit)
        other = {"shuffle_seed": 5, "cache_dir": f"{arguments['cache_dir']}-2", "overwrite": False}
        prepare(**arguments | other)
        return fit(*args)

    monkeypatch.setattr(preparing, "fit_splits", fit_late)


@pytest.mark.slow
def test_folder_that_another_run_finished_meanwhile_is_kept(arguments, tmp_path, monkeypatch):
    finish_another_run_meanwhile(monkeypatch, arguments)
    with pytest.raises(
        FileExistsError, match=r"of other settings \(shuffle_seed: 5 -> default\): name another output_path"
    ):
        prepare(**arguments)
    assert json.loads((tmp_path / "out" / "counts.json").read_text())["settings"]["shuffle_seed"] == 5
    assert verify(tmp_path / "out") == {"train": 10, "test": 3}


@pytest.mark.slow
def test_overwrite_replaces_a_folder_that_was_finished_meanwhile(arguments, tmp_path, monkeypatch, undisturbed):
    finish_another_run_meanwhile(monkeypatch, arguments)
    prepare(**arguments, overwrite=True)
    assert content(tmp_path / "out") == undisturbed


def test_lock_of_an_output_holds_for_every_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "new" / "out"
    with lock_output(output):
        (tmp_path / "link").symlink_to(output)
        for spelling in (tmp_path / "link", tmp_path / "new" / ".." / "new" / "out", output.relative_to(tmp_path)):
            with pytest.raises(Timeout):
                lock_output(spelling).acquire(timeout=0)
    check_output(output, overwrite=False, finished_too=True)  # the lock file alone is no content
    assert os.listdir(output) == [LOCK]


def test_output_without_working_locks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    message = r"without working file locks .*: name a folder on another file system with output_path$"
    with pytest.raises(OSError, match=f"^{tmp_path} is on a .*{message}"):
        check_output(tmp_path / "out", overwrite=False, finished_too=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=message):
        lock_output(tmp_path / "out")


def test_lock_that_is_a_link_is_refused(arguments, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=rf"out/{LOCK} is a link, .*: remove the link"):
        prepare(**arguments)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.slow
def test_kill_while_files_are_moved_never_leaves_a_mixture(arguments, tmp_path, undisturbed, monkeypatch):
    """The new folder has no recordings; those of the earlier one must not stay behind."""
    states = tmp_path / "states"
    prepare(**arguments, keep_audio=True, shuffle_seed=1)
    before = content(tmp_path / "out")
    move = writer._move_into_place

    def move_slowly(unfinished, folder):
        with record_states(folder, states):
            move(unfinished, folder)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_move_into_place", move_slowly)
        prepare(**arguments, overwrite=True)
    assert content(tmp_path / "out") == undisturbed
    by_names = {}  # without the states between which only files within a folder were removed
    for state in sorted(states.iterdir()):
        found = {name: data for name, data in content(state).items() if not name.startswith(UNFINISHED)}
        if "counts.json" in found:
            assert found in (before, undisturbed), state
        by_names[tuple(sorted(os.listdir(state)))] = state, found == before
    for state, overwrite in [*by_names.values()][::3]:
        prepare(**arguments | {"output_path": state, "overwrite": overwrite})
        assert content(state) == undisturbed


NAMES = ("single_turn", "utterances", "tokenizer", "pictures", "README.md", "counts.json", UNFINISHED)


@pytest.fixture
def precious(tmp_path):
    """A folder and a file that no run may change."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    return tmp_path / "precious"


def link(path, precious):
    path.symlink_to(precious / "thesis.txt" if path.suffix else precious)


@pytest.mark.slow
@pytest.mark.parametrize("keep_audio", [False, True])
def test_links_in_an_output_folder_are_replaced(arguments, tmp_path, precious, undisturbed, keep_audio):
    output = tmp_path / "out"
    output.mkdir()
    for name in NAMES:
        link(output / name, precious)
    arguments["keep_audio"] = keep_audio
    with pytest.raises(FileExistsError, match="holds something else"):
        prepare(**arguments)
    prepare(**arguments, overwrite=True)
    assert not any(path.is_symlink() for path in output.rglob("*"))
    assert verify(output) == {"train": 10, "test": 3}
    assert content(output) == undisturbed or keep_audio
    assert content(precious) == {"thesis.txt": b"mine"}


def test_link_to_unfinished_files_is_not_an_interrupted_run(tmp_path, precious):
    (tmp_path / "out").mkdir()
    link(tmp_path / "out" / UNFINISHED, precious)
    with pytest.raises(FileExistsError, match="holds something else"):
        check_output(tmp_path / "out", overwrite=False, finished_too=False)


def test_links_among_unfinished_files_are_removed(tmp_path, precious):
    output, key = tmp_path / "out", "0123456789abcdef" * 4
    unfinished = layout.open_unfinished(output, key, ("single_turn", "utterances"))
    assert unfinished == output / UNFINISHED / key[:16]
    (unfinished / "single_turn").mkdir()
    (unfinished / "single_turn" / "train-00000-of-00001.parquet").write_text("finished")
    link(unfinished / "single_turn" / "train-00001-of-00002.parquet", precious)
    for name in ("utterances", "tokenizer", "README.md"):
        link(unfinished / name, precious)
    (output / UNFINISHED / "another run" / "single_turn").mkdir(parents=True)
    link(output / UNFINISHED / "link", precious)
    assert layout.open_unfinished(output, key, ("single_turn", "utterances")) == unfinished
    assert content(output / UNFINISHED) == {f"{key[:16]}/single_turn/train-00000-of-00001.parquet": b"finished"}
    assert [path.name for path in unfinished.parent.iterdir()] == [key[:16]]
    shutil.rmtree(unfinished)
    link(unfinished, precious)
    layout.open_unfinished(output, key, ("single_turn",))
    assert not unfinished.is_symlink() and list(unfinished.iterdir()) == []
    assert content(precious) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"history": 3, "template.loss": ["user_text"]}}, "history: 0 -> 3, template.loss: ['user_text', 'agent_text', 'agent_units... -> ['user_text']"),
        ({"settings": {"keep_audio": True}, "config": "multi_turn"}, "keep_audio: default -> True, config: single_turn -> multi_turn"),
        ({"digests": {"unit model": "0" * 64}}, f"digests.unit model: {'3' * 40}... -> {'0' * 40}..."),
        ({"settings": {"agent": "B", "shards": (1, (2, "x"))}}, "agent: default -> B, shards: default -> [1, [2, 'x']]"),
        ({"settings": dict.fromkeys("abcdefg", 1)}, f"{', '.join(f'{name}: default -> 1' for name in 'abcde')}, and 2 more"),
    ],
    ids=["template", "config", "digests", "tuples", "many"],
)  # fmt: skip
def test_settings_that_differ_are_named_with_both_values(folder_copy, change, message):
    edit_counts(folder_copy, lambda counts: counts["digests"].update({"unit model": "3" * 64}))
    counts = json.loads((folder_copy / "counts.json").read_text())
    for place, values in ({"key": "0" * 64} | change).items():
        if not isinstance(values, dict):
            counts[place] = values
            continue
        for name, value in values.items():
            *groups, last = name.split(".")
            (counts[place][groups[0]] if groups else counts[place])[last] = value
    with pytest.raises(FileExistsError) as raised:
        find_finished(folder_copy, counts, overwrite=False)
    assert str(raised.value).startswith(
        f"{folder_copy} holds the result of other settings ({message}): name another output_path"
    )


def test_tuples_of_a_run_are_the_lists_of_its_folder(folder_copy):
    edit_counts(folder_copy, lambda counts: counts["tokenizer"].update({"chat": [[1, 2], [[3]]]}))
    counts = json.loads((folder_copy / "counts.json").read_text())
    counts["tokenizer"]["chat"] = ((1, 2), ((3,),))
    with pytest.raises(FileExistsError, match=r"holds the result of other settings \(max_length: 8192 -> 300\): name"):
        find_finished(
            folder_copy,
            counts | {"key": "0" * 64, "settings": counts["settings"] | {"max_length": 300}},
            overwrite=False,
        )


def test_folder_of_another_config_is_replaced_and_found(arguments, finished):
    output = shutil.copytree(finished / "out", Path(arguments["output_path"]))
    (output / "notes").mkdir()
    prepare(**arguments, config_name="multi_turn", overwrite=True)
    assert {path.name for path in output.iterdir() if path.is_dir()} == {"multi_turn", "notes", "pictures", "tokenizer"}
    old = output / "single_turn" / "train.parquet"
    old.parent.mkdir()
    old.write_bytes(b"")
    assert find_problems(output) == [f"{old} does not belong to the folder: remove it"]


@pytest.mark.parametrize(("name", "content", "holds"), [
    ("README.md", None, "the result of this run, but README.md was changed or is missing"),
    ("counts.json", b"{", "a counts.json that cannot be read"),
])  # fmt: skip
def test_finished_folder_without_its_card_or_counts(folder_copy, name, content, holds):
    counts = json.loads((folder_copy / "counts.json").read_text())
    (folder_copy / name).unlink()
    if content is not None:
        (folder_copy / name).write_bytes(content)
    with pytest.raises(FileExistsError, match=rf"{folder_copy} holds {holds}: name another output_path"):
        find_finished(folder_copy, counts, overwrite=False)


def test_file_of_a_finished_folder_that_was_changed_is_named(folder_copy):
    counts = json.loads((folder_copy / "counts.json").read_text())
    (folder_copy / "pictures" / "units.png").write_bytes(b"")
    with pytest.raises(
        FileExistsError,
        match=r"the result of this run, but pictures/units\.png was changed or is missing: name another",
    ):
        find_finished(folder_copy, counts, overwrite=False)
    counts["key"] = "0" * 64
    with pytest.raises(
        FileExistsError, match="holds other rows of the same settings, as 'dailytalk-usdm edit' or another version"
    ):
        find_finished(folder_copy, counts, overwrite=False)


def change_version(monkeypatch, package, new):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: new if name == package else version(name))


@pytest.mark.slow
def test_versions_that_change_no_row_leave_a_folder_finished(arguments, monkeypatch):
    counts = prepare(**arguments)
    for package in ("datasets", "matplotlib", "pyarrow"):
        change_version(monkeypatch, package, "99.1")
    assert prepare(**arguments) == counts


@pytest.mark.slow
def test_version_that_may_change_rows_is_named(arguments, monkeypatch):
    old = prepare(**arguments)["versions"]["torch"]
    change_version(monkeypatch, "torch", "99.1")
    for settings, changes in (
        ("the same settings", {}),
        ("other settings (max_length: 8192 -> 300)", {"max_length": 300}),
    ):
        message = f"out holds the result of {settings} with other versions (torch {old} -> 99.1): name another"
        with pytest.raises(FileExistsError) as raised:
            prepare(**arguments | changes)
        assert message in str(raised.value)
    assert prepare(**arguments, overwrite=True)["versions"]["torch"] == old  # which made the units in the cache
