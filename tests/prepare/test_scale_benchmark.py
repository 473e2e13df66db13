"""The benchmark of scale runs on a small corpus, and opens each recording as often as it must."""

import json
from collections import Counter

import pytest

from tests.benchmarks import scale


@pytest.mark.slow
def test_small_run_measures_every_stage(tmp_path, capsys):
    turns = Counter(turn["dialog"] for turn in scale.make_turns(300))
    recordings = scale.write_inputs(tmp_path, 300, ".jsonl")
    assert recordings == 2  # 300 turns of 3 s, ten minutes in each
    found = json.loads(json.dumps(scale.run_prepare(tmp_path)))
    found["stages"] |= scale.run_verify(tmp_path)["stages"]
    assert found["rows"] == sum(number - 1 for number in turns.values())
    stages = found["stages"]
    assert stages.keys() == {*(stage for _, _, stage in scale.STAGES), scale.OTHER, scale.VERIFY}
    assert all(spent["seconds"] > 0 and spent["anonymous"] > 10 * scale.MEGABYTE for spent in stages.values())
    assert stages["audio digests"]["opens"] == recordings  # the header and the digest at once, not once for each turn
    result = {"utterances": 300, "recordings": recordings, **found}
    slow = {"stages": {stage: dict.fromkeys(spent, 9000000000.0) for stage, spent in stages.items()}}
    assert scale.merge_rounds([result, result | slow, result]) == result
    scale.report([result] * 2)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| audio digests")]
    assert rows[0][1:] == [f"{stages['audio digests']['seconds'] * 1e6 / 300:.1f}"] * 2 + ["1.00 |"]
    assert rows[3][1:] == ["2", "2 |"]


def test_open_of_a_stage_within_a_stage_counts_for_the_inner_one(tmp_path):
    meter = scale.Meter()
    path = tmp_path / "file"
    inner = meter.watch(path.read_bytes, "inner")

    def work():
        path.write_text("a")
        inner()
        path.read_text()

    with meter.measure():
        meter.watch(work, "outer")()
    assert {stage: spent.opens for stage, spent in meter.stages.items()} == {scale.OTHER: 0, "outer": 2, "inner": 1}
