"""`--unit_repetition collapse`: folders with one unit per run of equal units."""

import shutil
from itertools import groupby

import datasets
import pyarrow.parquet as pq
import pytest

from tests.helpers import REPOSITORY, content, edit_counts, edit_rows, options, page_data
from usdm_sft.cli.main import main
from usdm_sft.corpus.features import utterance_features
from usdm_sft.folder.export import export
from usdm_sft.folder.layout import read_counts
from usdm_sft.folder.page import write_page
from usdm_sft.folder.verify import VerificationError, verify
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.dry_run import dry_run
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.repetition import expand_units
from usdm_sft.units.model import UnitModel

ROLES = ("user", "agent")


def refuse(*args):
    raise AssertionError("a forward pass")


@pytest.fixture(scope="module")
def root(mini, unit_model, finished, tmp_path_factory):
    """The mini corpus as `keep`, and with its audio as `collapse` and, in conversations that are split, `talk`; only `keep` computes units."""
    root = tmp_path_factory.mktemp("repetition")
    shutil.copytree(finished / "out", root / "keep")
    shutil.copytree(finished / "cache", root / "cache")
    before = content(root / "cache" / "tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitModel, "forward_pack", refuse)
        more = {"unit_repetition": "collapse", "keep_audio": True}
        prepare(**options(mini, unit_model, root, output_path=root / "collapse", **more))
        talk = {"config_name": "multi_turn", "max_length": 400, "overflow": "split"}
        prepare(**options(mini, unit_model, root, output_path=root / "talk", **more, **talk))
    assert before.items() <= content(root / "cache" / "tokens").items()  # those of keep stay
    return root


def load(folder, split="train"):
    return datasets.load_dataset(str(folder), read_counts(folder)["config"], split=split)


def test_expanded_units_are_those_of_keep(root):
    for split in ("train", "test"):
        kept, rows = load(root / "keep", split), load(root / "collapse", split)
        assert rows.features["user_durations"].feature.dtype == "uint16"
        for before, row in zip(kept, rows, strict=True):
            for role in ROLES:
                units, durations = row[f"{role}_units"], row[f"{role}_durations"]
                assert expand_units(units, durations).tolist() == before[f"{role}_units"]
                assert units == [unit for unit, _ in groupby(before[f"{role}_units"])]
            assert {name: row[name] for name in ("id", "user_text", "agent_seconds")}.items() <= before.items()


def test_ids_hold_the_collapsed_units(root, encoder):
    rows = load(root / "collapse")
    encoded = encoder({name: rows[name][:] for name in ("user_units", "user_text", "agent_text", "agent_units")})
    for name in ("input_ids", "labels"):
        assert rows[name][:] == [values.tolist() for values in encoded[name]]
    assert rows["length"][:] == [len(ids) for ids in rows["input_ids"]]


def test_counts_and_statistics_are_those_of_the_collapsed_units(root):
    kept, counts = read_counts(root / "keep"), read_counts(root / "collapse")
    assert "unit_repetition" not in kept["settings"] and counts["settings"]["unit_repetition"] == "collapse"
    for split in ("train", "test"):
        rows = load(root / "collapse", split)
        runs = sum(len(units) for role in ROLES for units in rows[f"{role}_units"])
        frames = sum(sum(durations) for role in ROLES for durations in rows[f"{role}_durations"])
        saved = kept["splits"][split]["tokens"] - counts["splits"][split]["tokens"]
        assert counts["splits"][split]["units"] == counts["statistics"][split]["units"] == runs
        assert saved == frames - runs > 0 and kept["splits"][split]["units"] == frames
        # How long units repeat is still known.
        assert (
            counts["statistics"][split]["distributions"]["units in a run"]
            == kept["statistics"][split]["distributions"]["units in a run"]
        )


def test_documentation_has_the_numbers_of_the_demo(root):
    kept, rows = (
        [read_counts(root / name)["splits"][split] for split in ("train", "test")] for name in ("keep", "collapse")
    )
    before, after = (sum(counts["tokens"] for counts in each) for each in (kept, rows))
    units, runs = (sum(counts["units"] for counts in each) for each in (kept, rows))
    page = (REPOSITORY / "docs" / "repeated-units.md").read_text()
    assert f"| default | {before:,} | {after:,} | {(before - after) / before:.1%} |".replace("% |", " % |") in page
    assert f"{units - runs} of the {units:,} units ({(units - runs) / units:.1%})".replace("%)", " %)") in page


def test_verify_passes_with_recordings_and_in_conversations(root):
    assert verify(root / "collapse") == {"train": 10, "test": 3}
    verify(root / "talk")
    counts = read_counts(root / "talk")["splits"]["train"]
    kept = load(root / "talk")
    assert counts["rows_cut"] and max(kept["length"]) <= 400
    lists = kept.features["agent_durations"].feature
    assert lists.feature.dtype == "uint16" and all(
        len(row["agent_units"]) == len(row["agent_durations"]) for row in kept
    )


def test_recordings_keep_all_units(root):
    table = pq.read_table(root / "collapse" / "utterances" / "train-00000-of-00001.parquet")
    assert table.schema.names == list(utterance_features())
    units = {(row["dialog"], row["turn"]): row["units"] for row in table.drop_columns("audio").to_pylist()}
    for row in load(root / "keep"):
        assert units[row["dialog_id"], row["turn"]] == row["user_units"]
        assert units[row["dialog_id"], row["turn"] + 1] == row["agent_units"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_durations": lambda each: [each[0] + 1, *each[1:]]}, r"d3_0\): user_durations add up to \d+ frames, which is not the"),
        ({"agent_durations": lambda each: [0, *each[1:]]}, r"d3_0\): agent_units: the duration at position 0 is 0"),
        ({"agent_durations": lambda each: each[1:]}, r"d3_0\): agent_units: \d+ units, but \d+ durations"),
        ({"user_seconds": lambda each: float("nan")}, r"d3_0\): user_durations add up to \d+ frames, .* recording of nan s"),
        ({"user_units": lambda each: [each[0], *each], "user_durations": lambda each: [1, each[0] - 1, *each[1:]]},
         r"user_units: unit \d+ at position 1 equals the one before, but the units are collapsed"),
    ],
)  # fmt: skip
def test_verify_finds_durations_that_are_wrong(root, tmp_path, changes, message):
    folder = shutil.copytree(root / "collapse", tmp_path / "collapse")
    path = "single_turn/train-00000-of-00010.parquet"
    edit_rows(folder, path, lambda rows: rows[0].update({name: to(rows[0][name]) for name, to in changes.items()}))
    with pytest.raises(VerificationError, match=message):
        verify(folder)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("keep", "collapse", "it has no durations, but counts.json says unit_repetition collapse"),
    ("collapse", "keep", "it has durations, but counts.json says unit_repetition keep"),
])  # fmt: skip
def test_verify_finds_columns_that_do_not_fit_the_setting(root, tmp_path, name, value, message):
    folder = shutil.copytree(root / name, tmp_path / name)
    edit_counts(folder, lambda counts: counts["settings"].update(unit_repetition=value))
    with pytest.raises(VerificationError, match=message):
        verify(folder)


def test_verify_finds_uneven_exchanges(root, tmp_path):
    folder = shutil.copytree(root / "talk", tmp_path / "talk")
    name = min(name for name in content(folder) if name.startswith("multi_turn/train"))
    edit_rows(folder, name, lambda rows: rows[0]["user_durations"].pop())
    with pytest.raises(
        VerificationError, match=r"different numbers of exchanges \(user_speaker \d+, .*user_durations \d+"
    ):
        verify(folder)


def test_show_expands_the_units(root, capsys):
    main(["show", str(root / "keep"), "--ids", "--num_examples", "10"])
    kept = capsys.readouterr().out
    main(["show", str(root / "collapse"), "--ids", "--num_examples", "10", "--expand"])
    assert capsys.readouterr().out == kept
    main(["show", str(root / "collapse"), "--ids", "--num_examples", "10"])
    assert len(capsys.readouterr().out) < len(kept)
    main(["show", str(root / "talk"), "--expand"])
    row = load(root / "talk")[0]
    repeated = sum(sum(map(sum, row[f"{role}_durations"])) - sum(map(len, row[f"{role}_units"])) for role in ROLES)
    assert f"{row['id']}: {row['length'] + repeated} tokens, " in capsys.readouterr().out


def test_expand_is_refused_where_it_means_nothing(root, refused, tmp_path):
    for arguments, message in (
        (["keep", "--expand"], "the units of this folder are not collapsed: leave out --expand"),
        (
            ["collapse", "--expand", "--html", str(tmp_path / "page.html")],
            "expand is for the terminal: leave out --html",
        ),
    ):
        assert message in refused("show", root / arguments[0], *arguments[1:])
    folder = shutil.copytree(root / "collapse", tmp_path / "collapse")
    edit_rows(folder, "single_turn/train-00000-of-00010.parquet", lambda rows: rows[0]["user_durations"].pop(0))
    assert "durations: verify its folder" in refused("show", folder, "--expand")


def test_page_has_the_units_of_every_frame(root, tmp_path):
    pages = []
    for name in ("keep", "collapse"):
        write_page(root / name, tmp_path / f"{name}.html")
        pages.append(page_data(tmp_path / f"{name}.html"))
    kept, collapsed = ([example["turns"] for example in page["examples"]] for page in pages)
    assert kept == collapsed and pages[0]["examples"][0]["ids"] != pages[1]["examples"][0]["ids"]


def test_card_says_that_units_are_collapsed(root):
    card = (root / "collapse" / "README.md").read_text()
    assert "their speech as discrete units (one for each run of equal units, with its duration)" in card
    assert "| `user_durations` | list of uint16 | number of 20 ms frames of each unit; repeating" in card
    assert "| unit_repetition | collapse |" in card
    assert "durations" not in (root / "keep" / "README.md").read_text()


def test_export_writes_the_collapsed_rows(root, tmp_path):
    export(root / "collapse", tmp_path / "arrow", format="arrow")
    saved, rows = datasets.load_from_disk(str(tmp_path / "arrow"))["train"], load(root / "collapse")
    assert saved["input_ids"][:] == rows["input_ids"][:] and saved["labels"][:] == rows["labels"][:]


def test_a_run_too_long_for_a_duration_names_the_recording(monkeypatch, mini, unit_model, root, tmp_path):
    monkeypatch.setattr("usdm_sft.template.repetition.MAX_DURATION", 1)
    message = r"data/\d+/\w+\.wav: unit \d+ follows itself \d+ times, but a duration is at most 1: leave the recording out, or use"
    shutil.copytree(root / "cache" / "units", tmp_path / "cache" / "units")
    with pytest.raises(ValueError, match=message):
        prepare(**options(mini, unit_model, tmp_path, unit_repetition="collapse"))


def test_dry_run_gives_an_upper_limit(mini, unit_model, root, tmp_path, capsys):
    config = PrepareConfig(
        **options(mini, unit_model, tmp_path, cache_dir=str(root / "cache"), unit_repetition="collapse")
    )
    found = dry_run(config)
    kept = read_counts(root / "keep")["splits"]
    assert {split: counts["tokens"] for split, counts in found.splits.items()} == {
        split: kept[split]["tokens"] for split in kept
    }
    assert found.num_cached_units == found.num_shards and found.missing_seconds == 0
