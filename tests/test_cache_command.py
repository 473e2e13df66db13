"""The command `cache` on the cache of the mini corpus."""

import json
import os
import shutil
import sys
import time

import pytest

from tests.helpers import content
from usdm_sft.cache.inventory import list_cache
from usdm_sft.cli.main import main


@pytest.fixture
def cache(dataset_folder, tmp_path):
    return shutil.copytree(dataset_folder.parent / "cache", tmp_path / "cache")


def run(cache, *words, capsys):
    main(["cache", *words, "--cache_dir", str(cache)])
    return capsys.readouterr().out.splitlines()


def shards(cache):
    return {name for name in content(cache) if name.endswith(".arrow") and not name.startswith("builder")}


def test_table_has_each_level_with_its_corpus_and_unit_model(cache, mini, unit_model, capsys):
    (cache / "note\x1b[31m.txt").write_text("mine")
    for path in (cache / "tokens").glob("*.arrow"):
        os.utime(path, (0, 0))  # the run used it later
    lines = run(cache, capsys=capsys)
    digest = json.loads(next((cache / "runs").glob("*.json")).read_text())["unit_model_digest"][:8]
    corpus, model = str(mini / "corpus"), f"{unit_model} ({digest})"
    sizes = {level: sum(e.size for e in list_cache(cache) if e.level == level) for level in ("units", "tokens")}
    assert lines[0].startswith(f"{cache}: 7 entries, ")
    rows = {line.split()[0]: line for line in lines[2:]}
    assert list(rows) == ["units", "tokens", "builder", "digests", "other", "other:"]
    for level, size in sizes.items():
        assert rows[level].split(corpus)[1].split() == [*model.split(), "2", f"{size / 1000:.0f}", "kB", "today"]
    assert corpus in rows["builder"] and model not in rows["builder"]
    assert rows["other:"] == f"other: {cache}/note\\x1b[31m.txt"


def test_json_has_the_same(cache, mini, capsys):
    found = json.loads("\n".join(run(cache, "--json", "--level", "units", capsys=capsys)))
    [group] = found.pop("entries")
    size = sum(path.stat().st_size for path in (cache / "units").glob("*.arrow"))
    assert found == {"cache_dir": str(cache), "bytes": size}
    assert (group["level"], group["corpora"], group["entries"], group["bytes"]) == (
        "units", [str(mini / "corpus")], 2, size,
    )  # fmt: skip


def test_removal_needs_a_condition_and_a_confirmation(cache, capsys, monkeypatch):
    before = content(cache)
    size = f"{sum(len(before[name]) for name in shards(cache) if name.startswith('units')) / 1000:.0f} kB"
    for words, message in (
        (["remove"], "name what to remove with --level, --corpus, --unit_model or --older_than"),
        (
            ["remove", "--level", "units"],
            f"nothing was removed (2 entries, {size}): pass --yes, or --dry_run to see what",
        ),
        (["remove", "--level", "units", "--json"], "pass --yes, or --dry_run to see what"),
    ):
        with pytest.raises(SystemExit, match="1"):
            run(cache, *words, capsys=capsys)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    for answer in ("", "n", "nein"):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert run(cache, "remove", "--level", "units", capsys=capsys)[-1] == "nothing was removed"

    def end(question):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert run(cache, "remove", "--level", "units", capsys=capsys)[-1] == "nothing was removed"
    assert run(cache, "remove", "--corpus", "other", capsys=capsys) == [
        "nothing in the cache fits: nothing was removed"
    ]
    assert content(cache) == before
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    assert run(cache, "remove", "--level", "units", capsys=capsys)[-1] == f"removed: 2 entries, {size}"
    assert asked == [f"remove 2 entries, {size} from {cache}? [y/N] "]
    assert {name.split("/")[0] for name in shards(cache)} == {"tokens"}


def test_dry_run_shows_what_would_be_removed(cache, capsys):
    before = content(cache)
    lines = run(cache, "remove", "--corpus", "corpus", "--dry_run", capsys=capsys)
    assert [line.split()[0] for line in lines] == ["level", "units", "tokens", "builder", "would"]
    found = json.loads("\n".join(run(cache, "remove", "--corpus", "corpus", "--dry_run", "--json", capsys=capsys)))
    assert [group["level"] for group in found["would_remove"]] == ["units", "tokens", "builder"]
    assert found["would_keep"] == [] and found["bytes"] > 0
    assert {name: data for name, data in content(cache).items() if name in before} == before


def test_removal_without_a_level_takes_only_what_was_made_for_corpora(cache, capsys):
    (cache / "note.txt").write_text("mine")
    long_ago = time.time() - 100 * 86_400
    for path in cache.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    for words, expected in ((["--older_than", "101"], "0 entries, 0 kB"), (["--older_than", "99"], "5 entries, ")):
        assert run(cache, "remove", *words, "--yes", capsys=capsys)[-1].startswith(f"removed: {expected}")
    assert [entry.level for entry in list_cache(cache)] == ["digests", "other"]
    assert run(cache, "remove", "--level", "other", "--yes", capsys=capsys)[-1] == "removed: 1 entry, 0 kB"


def test_damaged_shards_are_listed_with_check_and_removed_when_named(cache, capsys):
    path = min((cache / "units").glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:-1])
    assert f"damaged: {path}" not in run(cache, capsys=capsys)
    assert f"damaged: {path}" in run(cache, "--check", capsys=capsys)
    run(cache, "remove", "--level", "damaged", "--yes", capsys=capsys)
    assert not path.exists() and len(shards(cache)) == 3


def test_entries_in_use_are_named(cache, capsys):
    from usdm_sft.cache.runs import read_records, running

    [record] = read_records(cache).values()
    with running(cache, record):
        lines = run(cache, "remove", "--level", "tokens", "--yes", capsys=capsys)
    assert lines[0] == "removed: 0 entries, 0 kB"
    assert lines[1:] == [
        f"kept: {path} (a run of prepare uses it)" for path in sorted((cache / "tokens").glob("*.arrow"))
    ]


def test_cache_that_does_not_exist(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["cache", "--cache_dir", str(tmp_path / "no")])
    assert capsys.readouterr().err == (
        f"dailytalk-usdm cache: {tmp_path / 'no'} is not a folder: name the cache with --cache_dir\n"
    )
