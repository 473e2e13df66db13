"""`prepare --dry_run`: what a run would do, without a forward pass and without a file."""

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest

from tests.helpers import options, reuse_units
from usdm_sft.cli.main import main
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.dry_run import DryRun, check_dry_run, describe_dry_run, dry_run
from usdm_sft.prepare.prepare import prepare


def state_of(folder):
    """Every file and folder with its time of change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def shorter(mini, unit_model, finished, tmp_path_factory):
    """A run whose work is in the cache, and its counts; copy it to change it."""
    root = tmp_path_factory.mktemp("shorter")
    reuse_units(finished, root)
    return root, prepare(**options(mini, unit_model, root, max_length=300))


def test_dry_run_counts_what_the_run_counts(shorter, mini, unit_model, tmp_path):
    _, counts = shorter
    config = PrepareConfig(**options(mini, unit_model, tmp_path, max_length=300))
    found = dry_run(config)
    assert found.splits == counts["splits"]
    assert 0 < len(found.splits["train"]["pairs_left_out"]) < 10
    assert (found.num_shards, found.num_cached_units, found.num_cached_tokens) == (6, 0, 0)  # one dialog in each
    assert (
        found.missing_seconds
        == found.seconds
        == pytest.approx(3600 * sum(s["hours"] for s in counts["splits"].values()), abs=0.01)
    )
    used = [path for path in (mini / "corpus" / "data").rglob("*.wav") if path.parent.name not in ("11", "42")]
    assert found.audio_bytes == sum(path.stat().st_size for path in used)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes", [{"config_name": "multi_turn", "overflow": "split", "max_length": 400}, {"history": 1}]
)
def test_dry_run_of_other_rows(shorter, mini, unit_model, tmp_path, changes):
    root, _ = shorter
    before = state_of(root)
    config = options(mini, unit_model, root, **changes, output_path=str(tmp_path / "out"))
    found = dry_run(PrepareConfig(**config))
    assert (found.num_cached_units, found.num_cached_tokens, found.missing_seconds) == (6, 0, 0)
    assert state_of(root) == before and not list(tmp_path.iterdir())
    assert found.splits == prepare(**config)["splits"]


def test_dry_run_needs_no_unit_model_and_makes_no_forward_pass(shorter, mini, tmp_path, monkeypatch):
    _, counts = shorter
    monkeypatch.setattr("usdm_sft.units.model.UnitModel.from_pretrained", None)
    given = options(mini, "xlsr2_1b_v2", tmp_path, max_length=300, model_cache_dir=str(tmp_path / "models"))
    found = dry_run(PrepareConfig(**given))
    assert found.splits == counts["splits"] and not found.has_model
    assert not list(tmp_path.iterdir())


def test_dry_run_refuses_what_the_run_refuses(mini, unit_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        dry_run(PrepareConfig(**options(mini, unit_model, tmp_path)))
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    (corpus / "data" / "8" / "2_1_d8.wav").unlink()
    given = options(mini, unit_model, tmp_path, data_dir=str(corpus), output_path=str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match=r"utterance 2_1_d8: audio file .*2_1_d8\.wav does not exist"):
        dry_run(PrepareConfig(**given))
    found = dry_run(PrepareConfig(**given, on_bad_audio="skip"))
    assert set(found.splits["train"]["pairs_left_out"]) == {"d8_1", "d8_2"}


def test_command_prints_the_rows_that_would_be_left_out(shorter, mini, unit_model, tmp_path, capsys):
    root, counts = shorter
    given = options(mini, unit_model, root, max_length=300, output_path=str(tmp_path / "out"))
    main(["prepare", "--dry-run", *(f"--{name}={value}" for name, value in given.items())])
    out = capsys.readouterr().out.splitlines()
    left_out = counts["splits"]["train"]["pairs_left_out"]
    assert [line for line in out if line.startswith("  ")] == [f"  {name}: {why}" for name, why in left_out.items()]
    assert "cache: it has the units of 6 of 6 work shards, and the tokens of 6" in out
    assert "time: no audio is left to compute" in out
    assert out[-1] == "nothing was written" and not list(tmp_path.iterdir())


def test_long_lists_are_cut_and_a_full_disk_is_an_error(mini, monkeypatch, capsys):
    split = {"rows": 1, "dialogs": 1, "hours": 0, "tokens": 9, "labelled_tokens": 2, "pairs_with_bad_audio": 0}
    split |= {"rows_cut": {}, "dialogs_left_out": {}}
    split |= {"pairs_left_out": {f"d{i}_0": "9 tokens, more than max_length 8" for i in range(1234)}}
    found = DryRun({"train": split}, 1, 0, 0, 3600.0, 3600.0, 0, True, "cpu")
    monkeypatch.setattr("usdm_sft.prepare.dry_run.dry_run", lambda config: found)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(SystemExit, match="1"):
        main(["prepare", "--data_dir", str(mini / "corpus"), "--output_path", "o", "--dry_run"])
    out = capsys.readouterr().out.splitlines()
    assert out[20:22] == ["  d19_0: 9 tokens, more than max_length 8", "  1,214 more: counts.json will list them all"]
    assert out[-2].startswith("error    disk: 1.0 MB are free at ") and out[-1] == "nothing was written"


@pytest.mark.parametrize(
    ("device", "precision", "unit_model", "expected"),
    [
        ("cpu", "fp32", "xlsr2_1b_v2", "time: 20.00 h of audio take about 7.7 h at 2.6 s of audio per second, measured on two CPU"),
        ("cpu", "bf16", "xlsr2_1b_v2", "time: 20.00 h of audio take about 2.7 h at 7.4 s of audio per second, measured on two CPU"),
        ("cuda", "fp32", "xlsr2_1b_v2", "time: 20.00 h of audio are to be computed; no rate was measured for this unit model, cuda and"),
        ("cpu", "fp32", "mine", "time: 20.00 h of audio are to be computed; no rate was measured for this unit model, cpu and fp32"),
    ],
)  # fmt: skip
def test_time_is_told_where_a_rate_is_known(device, precision, unit_model, expected):
    config = PrepareConfig(data_dir="d", output_path="o", precision=precision, unit_model=unit_model)
    found = DryRun({}, 400, 0, 0, 72_000.0, 72_000.0, 6_300_000_000, True, device)
    lines = describe_dry_run(found, config)
    assert any(line.startswith(expected) for line in lines), lines


def test_dry_run_checks_the_disks_with_its_sizes(tmp_path, monkeypatch):
    places = {name: str(tmp_path / name) for name in ("output_path", "cache_dir", "model_cache_dir")}
    config = PrepareConfig(data_dir="d", **places, keep_audio=True, unit_model="user/model")
    found = DryRun({}, 400, 200, 200, 36_000.0, 72_000.0, 6_000_000_000, True, "cpu")
    [disk] = check_dry_run(found, config)
    # Audio, 600 bytes for each of 72,000 seconds and 1,400 for each of 36,000, and 10 MB (usdm_sft/prepare/checks.py): 6,103.6 MB.
    assert disk.subject == "disk" and disk.message.endswith("the dataset folder, which take about 6.1 GB")
    missing = check_dry_run(replace(found, has_model=False), config)
    assert [finding.subject for finding in missing] == ["Hub", "unit model", "disk"]
