"""counts.json names the versions that made the units, also if they come from the cache."""

import importlib.metadata
import json

import pyarrow as pa
import pytest

from tests.helpers import content, inodes, options
from usdm_sft.prepare.prepare import prepare
from usdm_sft.prepare.unit_shards import name_versions

OLD = {"torch": "0.4.1", "soxr": "0.0.1", "numpy": "0.9"}


@pytest.fixture
def installed(monkeypatch):
    """Return a function that pretends that these versions of packages are installed."""
    real = importlib.metadata.version

    def install(**versions):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))

    return install


def test_counts_name_the_versions_that_made_cached_units(mini, unit_model, tmp_path, installed, undisturbed):
    installed(**OLD)
    made = prepare(**options(mini, unit_model, tmp_path))
    shards = inodes(tmp_path, "cache/units/*.arrow")
    installed()
    counts = prepare(**options(mini, unit_model, tmp_path, output_path=str(tmp_path / "again")))
    assert inodes(tmp_path, "cache/units/*.arrow") == shards  # no version is in their key
    current = json.loads(undisturbed["counts.json"])["versions"]
    numpy = f"{OLD['numpy']}, {current['numpy']}"  # which made the rows of this run as well
    assert made["versions"] == current | OLD
    assert counts["versions"] == current | {"torch": OLD["torch"], "soxr": OLD["soxr"], "numpy": numpy}
    again = content(tmp_path / "again")
    assert {name for name, data in undisturbed.items() if again[name] != data} == {"README.md", "counts.json"}
    assert f"{OLD['torch']}" in again["README.md"].decode()
    for path in list(shards)[:2]:
        path.unlink()
    counts = prepare(**options(mini, unit_model, tmp_path, output_path=str(tmp_path / "third")))
    assert counts["versions"]["torch"] == f"{OLD['torch']}, {current['torch']}"


def test_folder_of_one_run_names_its_versions(undisturbed):
    versions = json.loads(undisturbed["counts.json"])["versions"]
    assert (
        versions.items()
        >= {name: importlib.metadata.version(name) for name in versions if name != "dailytalk-usdm"}.items()
    )


def test_unit_shard_without_versions_is_of_unknown_ones(tmp_path):
    table = pa.table({"units": [[1]], "seconds": [0.5]})
    with pa.OSFile(str(tmp_path / "old.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    versions = {"datasets": "5", "numpy": "2", "soundfile": "3", "soxr": "4", "torch": "6", "transformers": "7"}
    assert name_versions(versions, []) == versions
    assert name_versions(versions, [tmp_path / "old.arrow"]) == versions | {
        "numpy": "2, unknown", "soundfile": "3, unknown", "transformers": "7, unknown", "soxr": "unknown", "torch": "unknown"
    }  # fmt: skip
