"""datasets 3 and later versions read what either of them wrote: folders, exports, the cache, and cards."""

import json
import os
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers import REPOSITORY, content, options
from usdm_sft.folder.export import export
from usdm_sft.prepare.prepare import prepare

DATASETS_3 = os.environ.get("USDM_DATASETS_3")
needs_datasets_3 = pytest.mark.skipif(
    DATASETS_3 is None, reason="needs a Python with datasets 3.6 in USDM_DATASETS_3 (.ci/run)"
)
COLUMNS = ["input_ids", "labels", "attention_mask"]


def types_written(described):
    """Every `_type` in a description of columns."""
    if isinstance(described, dict):
        found = {described["_type"]} if isinstance(described.get("_type"), str) else set()
        return found.union(*map(types_written, described.values()))
    return set().union(*map(types_written, described)) if isinstance(described, list) else set()


@pytest.fixture(scope="module")
def written(mini, unit_model, tmp_path_factory):
    """A folder of conversations with its recordings, its cache, and its export for LLaMA-Factory."""
    root = tmp_path_factory.mktemp("written")
    prepare(**options(mini, unit_model, root, config_name="multi_turn", keep_audio=True))
    export(root / "out", root / "arrow", format="arrow")
    return root


def test_described_lists_are_sequences(written):
    described = [pq.read_schema(path).metadata[b"huggingface"] for path in written.glob("out/*/*.parquet")]
    for path in written.glob("arrow/*/*.arrow"):
        described.append(pa.ipc.open_stream(path.read_bytes()).schema.metadata[b"huggingface"])
    infos = [path.read_bytes() for path in written.glob("arrow/*/dataset_info.json")]
    assert (len(described), len(infos)) == (7 + 3 + 2 + 2, 2)  # rows, utterances, exported splits
    assert set().union(*(types_written(json.loads(each)) for each in described)) == {"Value", "Sequence", "Audio"}
    assert set().union(*(types_written(json.loads(each)) for each in infos)) == {"Value", "Sequence"}


def test_lists_of_the_card_are_sequences(written):
    """datasets 3 takes `list` for another type than `sequence`, and would not interleave folders of two versions."""
    entries = yaml.safe_load((written / "out" / "README.md").read_text().split("---")[1])["dataset_info"]
    features = {entry["config_name"]: {each.pop("name"): each for each in entry["features"]} for entry in entries}
    assert features["multi_turn"]["user_units"] == {"sequence": {"sequence": "uint16"}}
    assert features["multi_turn"]["labels"] == {"sequence": "int32"}
    assert features["utterances"]["units"] == {"sequence": "uint16"}
    loaded = datasets.load_dataset(str(written / "out"), "multi_turn", split="test")
    assert loaded.features == datasets.Features.from_arrow_schema(loaded.data.schema.remove_metadata())


READ = """
import datasets, glob, json, os, sys
root, *columns = sys.argv[1:]
os.chdir(root)
loaded = {
    "by name": datasets.load_dataset("out", "multi_turn", split="train"),
    "streamed": datasets.load_dataset("out", "multi_turn", split="train", streaming=True),
    "without card": datasets.load_dataset("parquet", data_files="out/multi_turn/train-*.parquet", split="train"),
    "saved": datasets.load_from_disk("arrow")["train"],
}
recordings = datasets.load_dataset("parquet", data_files="out/utterances/*.parquet", split="train")
recordings = recordings.cast_column("audio", datasets.Audio(decode=False))
shards = [datasets.Dataset.from_file(path) for path in sorted(glob.glob("cache/*/*.arrow"))]
found = {name: [{column: row[column] for column in columns} for row in rows] for name, rows in loaded.items()}
found["recordings"] = [[row["dialog"], row["turn"], len(row["audio"]["bytes"]), row["units"]] for row in recordings]
found["shards"] = [rows["units" if "units" in rows.column_names else "input_ids"][:] for rows in shards]
print(datasets.__version__, json.dumps(found), sep="\\n")
"""


def run(python, code, *arguments):
    """The version of datasets and what the code printed."""
    done = subprocess.run(
        [python, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *_, version, found = done.stdout.splitlines()
    return version, json.loads(found)


PREPARE = """
import datasets, json, sys
from usdm_sft.folder.export import export
from usdm_sft.prepare.prepare import prepare
options = json.loads(sys.argv[1])
prepare(**options)
export(options["output_path"], sys.argv[2], format="arrow")
print(datasets.__version__, "null", sep="\\n")
"""


def read_here(root):
    """What `READ` prints, read from the files without datasets."""
    paths = sorted(root.glob("out/multi_turn/train-*.parquet"))
    rows = [{name: row[name] for name in COLUMNS} for path in paths for row in pq.read_table(path).to_pylist()]
    utterances = [
        row for path in sorted(root.glob("out/utterances/*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    tables = [pa.ipc.open_stream(path.read_bytes()).read_all() for path in sorted(root.glob("cache/*/*.arrow"))]
    return {
        **dict.fromkeys(["by name", "streamed", "without card", "saved"], rows),
        "recordings": [[row["dialog"], row["turn"], len(row["audio"]["bytes"]), row["units"]] for row in utterances],
        "shards": [each["units" if "units" in each.column_names else "input_ids"].to_pylist() for each in tables],
    }


@needs_datasets_3
@pytest.mark.slow
def test_datasets_3_reads_what_this_version_wrote(written, mini, unit_model, tmp_path):
    version, found = run(DATASETS_3, READ, written, *COLUMNS)
    assert version.startswith("3.") and found == read_here(written)
    again = options(mini, unit_model, tmp_path, config_name="multi_turn", keep_audio=True)
    again["cache_dir"] = str(written / "cache")
    before = content(written / "cache" / "units"), content(written / "cache" / "tokens")
    run(DATASETS_3, PREPARE, json.dumps(again), tmp_path / "arrow")
    assert (content(written / "cache" / "units"), content(written / "cache" / "tokens")) == before
    assert parquet_files(tmp_path) == parquet_files(written)


@needs_datasets_3
@pytest.mark.slow
def test_this_version_reads_what_datasets_3_wrote(written, mini, unit_model, tmp_path):
    arguments = options(mini, unit_model, tmp_path, config_name="multi_turn", keep_audio=True)
    version, _ = run(DATASETS_3, PREPARE, json.dumps(arguments), tmp_path / "arrow")
    assert version.startswith("3.") and parquet_files(tmp_path) == parquet_files(written)
    assert content(tmp_path / "arrow") == content(written / "arrow")
    assert run(sys.executable, READ, tmp_path, *COLUMNS)[1] == read_here(tmp_path)


def parquet_files(root):
    return {name: data for name, data in content(root / "out").items() if name.endswith(".parquet")}
