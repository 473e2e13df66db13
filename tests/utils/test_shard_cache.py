import os
import threading

import pytest

from usdm_sft.utils.cache_keys import cache_key
from usdm_sft.utils.shard_cache import ShardCache


def writer(content, calls=None):
    def write(path):
        if calls is not None:
            calls.append(content)
        with open(path, "wb") as file:
            file.write(content)

    return write


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "locks")


def test_file_is_made_once(tmp_path):
    level, calls = ShardCache(tmp_path / "level"), []
    assert level.find("key") is None
    made = level.make("key", writer(b"one", calls))
    assert made.read_bytes() == b"one"
    assert level.make("key", writer(b"two", calls)) == level.find("key") == made
    assert calls == [b"one"]


def test_find_all_returns_the_keys_that_have_a_file(tmp_path):
    level = ShardCache(tmp_path)
    made = level.make("one", writer(b"one"))
    assert level.find_all(["one", "two"]) == {"one": made}


def test_folder_is_listed_once(tmp_path, monkeypatch):
    level, listed, listdir = ShardCache(tmp_path), [], os.listdir
    made = {key: level.make(key, writer(key.encode())) for key in ("one", "two", "three")}
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    assert level.find_all([*made, "four"]) == made
    assert listed == [tmp_path]


def test_claim_sees_what_another_process_finished_meanwhile(tmp_path):
    level, other = ShardCache(tmp_path), ShardCache(tmp_path)
    assert level.find_all(["one", "two"]) == {}
    made = other.make("two", writer(b"two"))
    with level.claim("two") as claim:
        assert claim.finished == made


def test_run_killed_around_the_rename_is_resumed(tmp_path, monkeypatch):
    level, replace = ShardCache(tmp_path), os.replace

    def kill_before(*paths):
        raise KeyboardInterrupt

    def kill_after(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    for kill, left in ((kill_before, 0), (kill_after, 1)):
        monkeypatch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            level.make("key", writer(b"one"))
        assert len(list(tmp_path.glob("*.arrow"))) == left
    monkeypatch.setattr(os, "replace", replace)
    assert level.make("key", writer(b"two")).read_bytes() == b"one"
    assert len(files(tmp_path)) == 1


def test_claim_is_exclusive_until_it_is_released(tmp_path):
    level = ShardCache(tmp_path)
    claim = level.claim("key")
    assert claim.finished is None
    assert level.claim("key", wait=False) is None
    made = claim.write(writer(b"one"))
    thread = threading.Thread(target=claim.release)  # another thread than the one that claimed
    thread.start()
    thread.join()
    with level.claim("key", wait=False) as again:
        assert again.finished == made
    with level.claim("key", wait=False) as once_more:
        assert once_more is not None


def test_failed_write_is_removed_by_the_next(tmp_path):
    level = ShardCache(tmp_path)

    def fail(path):
        writer(b"half")(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        level.make("key", fail)
    assert level.find("key") is None
    assert files(tmp_path) == ["key.unfinished"]
    level.make("key", writer(b"whole"))
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: bytes([content[0] ^ 1]) + content[1:]]
)
def test_damaged_file_is_found_and_made_again(tmp_path, caplog, damage):
    level = ShardCache(tmp_path)
    path = level.make("key", writer(b"content"))
    path.write_bytes(damage(path.read_bytes()))
    assert level.make("key", writer(b"content")).read_bytes() == b"content"
    assert f"{path} was damaged after it was written: making it again" in caplog.text


def test_threads_that_make_one_key_take_turns(tmp_path):
    level, calls = ShardCache(tmp_path), []
    threads = [threading.Thread(target=level.make, args=("key", writer(b"x", calls))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [b"x"]


def test_keys_with_a_common_prefix_do_not_wait_for_each_other(tmp_path):
    level, made = ShardCache(tmp_path), []
    other = threading.Thread(target=lambda: made.append(level.make("ab2", writer(b"y"))), daemon=True)

    def write(path):
        other.start()
        other.join(30)
        assert made  # while the first file is being made
        writer(b"x")(path)

    level.make("ab1", write)


def test_key_depends_on_values_but_not_on_the_order_of_names():
    assert cache_key("a", {"x": 1, "y": 2}) == cache_key("a", {"y": 2, "x": 1}) != cache_key("a", {"x": 1})


def test_links_among_the_files_are_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    level = ShardCache(tmp_path / "level")
    (tmp_path / "level" / "locks").mkdir(parents=True)
    (tmp_path / "level" / "key.unfinished").symlink_to(tmp_path / "precious")
    made = level.make("key", writer(b"one"))
    assert level.find("key") == made and made.read_bytes() == b"one"
    assert [path.name for path in (tmp_path / "precious").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "mine"
    (tmp_path / "level" / "locks" / "lock").symlink_to(tmp_path / "precious" / "thesis.txt")
    with pytest.raises(
        OSError, match=r"locks/lock is a link, and the lock of one run must not change another file: rem"
    ):
        level.claim("lock")
