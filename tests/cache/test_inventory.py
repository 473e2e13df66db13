import hashlib
import logging
import os
import shutil
import threading
import time

import pytest

from tests.helpers import content, options
from usdm_sft import prepare as pipeline
from usdm_sft.cache.inventory import LEVELS, list_cache, remove, select
from usdm_sft.cache.keys import cache_key
from usdm_sft.cache.runs import KEY_LENGTH, RunRecord, find_running, read_records, registry_lock, running
from usdm_sft.cache.shard_cache import ShardCache
from usdm_sft.prepare import prepare

DAY = 86_400


def make_shard(cache, level, name, days=0.0):
    """A work shard of 5 bytes -> its key."""
    key = cache_key(name)

    def write(path):
        with open(path, "wb") as file:
            file.write(b"shard")

    path = ShardCache(cache / level).make(key, write)
    os.utime(path, (time.time() - days * DAY,) * 2)
    return key


def make_record(cache, corpus, model, keys, folders=(), days=0.0):
    """Leave the record of a finished run."""
    digest = hashlib.sha256(model.encode()).hexdigest()
    record = RunRecord(corpus, model, digest, tuple(key[:KEY_LENGTH] for key in keys), tuple(folders))
    with running(cache, record):
        pass
    os.utime(cache / "runs" / f"{record.digest}.json", (time.time() - days * DAY,) * 2)
    return record


def names(entries):
    return [entry.path.name.partition(".")[0][:KEY_LENGTH] for entry in entries]


@pytest.fixture
def cache(tmp_path):
    """Units of corpora a and b that share one shard, tokens of a, and a unit shard that no run is known to use."""
    root = tmp_path / "cache"
    keys = {name: make_shard(root, "units", name, days=50) for name in ("a", "shared", "b", "old")}
    keys["tokens"] = make_shard(root, "tokens", "tokens", days=50)
    (root / "hub" / "f00").mkdir(parents=True)
    (root / "hub" / "f00" / "manifest.jsonl").write_text("{}")
    make_record(root, "/data/a", "/models/one", [keys["a"], keys["shared"], keys["tokens"]], days=40)
    make_record(root, "hub:user/b", "user/two", [keys["b"], keys["shared"]], ["hub/f00"], days=10)
    return root, {name: key[:KEY_LENGTH] for name, key in keys.items()}


def test_each_entry_has_its_corpora_unit_models_and_time_of_use(cache):
    root, keys = cache
    found = {entry.path.name[:KEY_LENGTH]: entry for entry in list_cache(root)}
    assert {key: found[keys[key]].corpora for key in keys} == {
        "a": ("/data/a",),
        "shared": ("/data/a", "hub:user/b"),
        "b": ("hub:user/b",),
        "old": (),
        "tokens": ("/data/a",),
    }
    one, two = (hashlib.sha256(name.encode()).hexdigest()[:8] for name in ("/models/one", "user/two"))
    assert found[keys["shared"]].unit_models == (f"/models/one ({one})", f"user/two ({two})")
    assert (found["f00"].level, found["f00"].corpora, found["f00"].unit_models) == ("hub", ("hub:user/b",), ())
    assert found["f00"].size == 2 and found[keys["a"]].size == 5
    days = {key: round((time.time() - found[keys[key]].used) / DAY) for key in keys}
    assert days == {"a": 40, "shared": 10, "b": 10, "old": 50, "tokens": 40}


def test_files_of_every_level_are_listed_and_lock_files_are_not(tmp_path):
    for name in (
        "builder/dailytalk_usdm/single_turn-1/1.0.0/x/rows.arrow", "builder/a.lock", "hub/1/manifest.jsonl",
        "split_lists/train_phone.txt", "agreement/1.json", "executor/1/tasks/00000.json", "unit_models/m/config.json",
        "unit_models/m.lock", "digests.sqlite", "digests.sqlite-wal", "note.txt", "mine/deep/file", "units/note.txt",
        f"tokens/{'0' * 64}.unfinished/shard.arrow", "locks/00", "runs/.probe",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    make_shard(tmp_path, "units", "a")
    found = [(entry.level, entry.path.relative_to(tmp_path).as_posix()) for entry in list_cache(tmp_path)]
    assert found[0][0] == "units" and found[1:] == [
        ("builder", "builder/dailytalk_usdm/single_turn-1"), ("hub", "hub/1"), ("split_lists", "split_lists"),
        ("digests", "digests.sqlite"), ("digests", "digests.sqlite-wal"), ("agreement", "agreement"),
        ("executor", "executor/1"), ("unit_models", "unit_models/m"), ("unfinished", f"tokens/{'0' * 64}.unfinished"),
        ("other", "units/note.txt"), ("other", "mine"), ("other", "note.txt"),
    ]  # fmt: skip
    assert {level for level, _ in found} == {*LEVELS} - {"tokens", "damaged"}
    assert [entry.size for entry in list_cache(tmp_path) if entry.path.name == "mine"] == [len("mine/deep/file")]


def test_damaged_shard_is_found_when_shards_are_read(cache):
    root, keys = cache
    [path] = (root / "units").glob(f"{keys['a']}*")
    path.write_bytes(b"shard!")
    assert "damaged" not in {entry.level for entry in list_cache(root)}
    [damaged] = select(list_cache(root, check=True), level="damaged")
    assert (damaged.path, damaged.corpora) == (path, ("/data/a",))
    remove(root, [damaged])
    assert not path.exists()


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({"level": "tokens"}, ["tokens"]),
        ({"corpus": "/data/a"}, ["a", "tokens"]),  # not what b uses as well
        ({"corpus": "a"}, ["a", "tokens"]),
        ({"corpus": "hub:user/b", "level": "units"}, ["b"]),
        ({"corpus": "unknown"}, ["old"]),
        ({"unit_model": "one"}, ["a", "tokens"]),
        ({"unit_model": hashlib.sha256(b"user/two").hexdigest()[:6], "level": "units"}, ["b"]),
        ({"unit_model": hashlib.sha256(b"user/two").hexdigest()[:5]}, []),
        ({"older_than": 39, "level": "units"}, ["a", "old"]),
        ({"older_than": 39, "unit_model": "unknown"}, ["old"]),
        ({"older_than": 51}, []),
        ({"corpus": "c"}, []),
    ],
    ids=str,
)
def test_conditions_apply_to_every_run_that_uses_an_entry(cache, conditions, expected):
    root, keys = cache
    assert sorted(names(select(list_cache(root), **conditions))) == sorted(keys[name] for name in expected)


def test_removal_and_records_of_runs_of_which_nothing_is_left(cache):
    root, keys = cache
    entries = select(list_cache(root), corpus="a")
    before = content(root)
    assert remove(root, entries, dry_run=True) == (entries, []) and content(root) == before
    assert remove(root, entries) == (entries, [])
    assert {record.corpus for record in read_records(root).values()} == {"/data/a", "hub:user/b"}  # they share a shard
    removed, _ = remove(root, list_cache(root))
    assert sorted(names(removed)) == sorted([keys["shared"], keys["b"], keys["old"], "f00"])
    assert read_records(root) == {} and list_cache(root) == []


def test_what_a_running_run_uses_is_kept(cache):
    root, keys = cache
    (root / "unit_models" / "m").mkdir(parents=True)  # of any run
    [record] = [each for each in read_records(root).values() if each.corpus == "/data/a"]
    with running(root, record), running(root, record):  # two equal runs at once
        pass
    with running(root, record):
        removed, kept = remove(root, list_cache(root))
        assert {each.reason for each in kept} == {"a run of prepare uses it"}
        assert sorted(names(each.entry for each in kept)) == sorted([keys["a"], keys["shared"], keys["tokens"], "m"])
        assert sorted(names(removed)) == sorted([keys["b"], keys["old"], "f00"])
    assert len(remove(root, list_cache(root))[0]) == 4 and list_cache(root) == []


def test_shard_that_a_process_makes_is_kept(tmp_path):
    level, key = ShardCache(tmp_path / "units"), cache_key("a")
    (tmp_path / "units").mkdir()
    with level.claim(key):
        (tmp_path / "units" / f"{key}.unfinished").mkdir()
        removed, [kept] = remove(tmp_path, list_cache(tmp_path))
        assert removed == [] and kept.reason.startswith("a process makes it")
    [removed], kept = remove(tmp_path, list_cache(tmp_path))
    assert removed.level == "unfinished" and kept == [] and not removed.path.exists()


def test_lock_of_a_killed_run_does_not_keep_anything(cache):
    root, _ = cache
    [record, _] = read_records(root).values()
    stale = root / "runs" / f"{record.digest}.0.lock"
    stale.write_bytes(b"")
    assert remove(root, list_cache(root))[1] == []
    stale.write_bytes(b"")
    with running(root, record):
        assert not stale.exists()
        assert find_running(root) == {record.digest}


def test_run_starts_after_a_removal_is_done(tmp_path):
    record, started = RunRecord("c", "m", "0", (), ()), threading.Event()

    def run():
        with running(tmp_path, record):
            started.set()

    thread = threading.Thread(target=run)
    with registry_lock(tmp_path):
        thread.start()
        assert not started.wait(0.3)
    thread.join(30)
    assert started.is_set()


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-5], lambda text: text.replace("/data/a", "/data/c"), lambda text: "{}"]
)
def test_damaged_record_is_told_and_its_shards_are_unknown(cache, caplog, damage):
    root, keys = cache
    [path] = [path for path, record in read_records(root).items() if record.corpus == "/data/a"]
    path.write_text(damage(path.read_text()))
    caplog.set_level(logging.WARNING)
    assert sorted(names(select(list_cache(root), corpus="unknown"))) == sorted(keys[k] for k in ("a", "old", "tokens"))
    assert f"{path} is damaged (" in caplog.text and "the next run of prepare writes it again" in caplog.text


def test_links_are_removed_and_not_what_they_point_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("content")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "mine", target_is_directory=True)
    [removed], _ = remove(tmp_path / "cache", list_cache(tmp_path / "cache"))
    assert removed.level == "other" and not removed.path.is_symlink()
    assert (tmp_path / "mine" / "file").read_text() == "content"


def test_prepare_records_itself_and_keeps_its_work_while_it_runs(
    mini, unit_model, tmp_path, dataset_folder, monkeypatch
):
    cache, seen = shutil.copytree(dataset_folder.parent / "cache", tmp_path / "cache"), []
    entries = list_cache(cache)
    assert [entry.level for entry in entries] == ["units"] * 2 + ["tokens"] * 2 + ["builder", "digests"]
    assert {entry.corpora for entry in entries[:-1]} == {(str(mini / "corpus"),)}
    assert {entry.unit_models[0].partition(" ")[0] for entry in entries[:4]} == {str(unit_model)}

    def remove_and_stop(builder):
        seen.append(remove(cache, list_cache(cache)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load_rows", remove_and_stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(**options(mini, unit_model, tmp_path, shard_dialogs=64))
    [(removed, kept)] = seen
    assert removed == [] and [each.entry.path for each in kept] == [entry.path for entry in entries]
    assert len(remove(cache, list_cache(cache))[0]) == len(entries)
    prepare(**options(mini, unit_model, tmp_path, shard_dialogs=64))
    assert content(tmp_path / "out") == content(dataset_folder)
