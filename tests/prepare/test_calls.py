"""The page on telephone calls: its commands, run on two-channel recordings of the mini corpus whose turns are cut into segments."""

import csv
import json
import shlex

import datasets
import numpy as np
import pytest
import soundfile

from tests.code_blocks import find_blocks
from tests.helpers import page_data
from usdm_sft.cli.main import main
from usdm_sft.corpus.read import read_corpus
from usdm_sft.folder.export import export
from usdm_sft.folder.page import write_page
from usdm_sft.folder.verify import verify

NAMES = ["dialog", "speaker", "text", "audio", "start", "end", "channel", "topic"]
SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def calls(mini, tmp_path_factory):
    """A folder with `calls`: speaker 0 left and 1 right, and each turn of two words or more as two segments."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "calls").mkdir()
    for split in SPLITS:
        rows = []
        for dialog in read_corpus({split: mini / "corpus" / f"{split}.txt"}, data_dir=mini / "corpus")[split].dialogs:
            sides, start = [], 0.0
            for utterance in dialog.utterances:
                samples, rate = soundfile.read(utterance.audio, dtype="int16", always_2d=True)
                side = np.zeros((len(samples) + rate // 4, 2), np.int16)
                side[: len(samples), int(utterance.speaker)] = samples[:, 0]
                end, words = start + len(samples) / rate, utterance.text.split(" ")
                row = [dialog.id, utterance.speaker, "", f"{dialog.id}.wav", start, end, utterance.speaker, split]
                if words[1:]:
                    rows.append([*row[:2], words[0], *row[3:5], start + 0.1, *row[6:]])
                    row[4], words = start + 0.12, words[1:]
                rows.append([*row[:2], " ".join(words), *row[3:]])
                start += len(side) / rate
                sides.append(side)
            sides[-1] = sides[-1][: len(samples)]
            soundfile.write(folder / "calls" / f"{dialog.id}.wav", np.concatenate(sides), rate)
        rows[-1][5] += 9  # past the end of its recording
        with open(folder / "calls" / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([NAMES, *rows])
    return folder


def run(command, folder, unit_model):
    arguments = shlex.split(command)[1:]
    if arguments[0] in ("prepare", "doctor"):
        arguments += [
            "--unit_model",
            str(unit_model),
            "--pretrained_model_name_or_path",
            "mistral-common",
            "--cache_dir",
            str(folder / "cache"),
        ]
    main(arguments)


@pytest.mark.slow
def test_commands_of_the_page(calls, mini, unit_model, monkeypatch, capsys, caplog, tmp_path):
    """Joined and clipped, the segments are the turns again: their rows are lines of the reference, those with speaker 1 as the agent."""
    monkeypatch.chdir(calls)
    commands, without_text = (block.code for block in find_blocks("bash") if block.page == "docs/telephone-calls.md")
    for command in commands.splitlines():
        run(command, calls, unit_model)
    counts = json.loads((calls / "calls-data" / "counts.json").read_text())
    assert {name: counts["settings"][name] for name in ("agent", "merge", "max_gap", "on_bad_rows", "min_seconds", "max_seconds", "keep_columns")} == {
        "agent": "channel=1", "merge": "span", "max_gap": 2, "on_bad_rows": "clip", "min_seconds": 0.1, "max_seconds": 30, "keep_columns": ["topic"],
    }  # fmt: skip
    export(calls / "calls-data", tmp_path / "text")
    for split in SPLITS:
        [(_, clipped)] = counts["splits"][split]["turns_clipped"].items()  # by 9 s, in the last line
        assert clipped.startswith(f"{split}.csv:") and "is to be cut up to" in clipped
        assert "turns_left_out" not in counts["splits"][split] and not counts["splits"][split]["pairs_left_out"]
        rows = datasets.load_dataset(str(calls / "calls-data"), split=split, cache_dir=str(tmp_path / "datasets"))
        assert set(rows["agent_speaker"]) == {"1"} and set(rows["user_topic"]) == {split} == set(rows["agent_topic"])
        found = (tmp_path / "text" / f"{split}.txt").read_text().split("\n")
        assert found and set(found) <= set((mini / "expected" / f"{split}.txt").read_text().split("\n"))
        dialogs = read_corpus({split: mini / "corpus" / f"{split}.txt"})[split].dialogs
        assert len(rows) == sum(agent.speaker == "1" for dialog in dialogs for _, agent in dialog.pairs())
    card = (calls / "calls-data" / "README.md").read_text()
    assert "if the later one is by the speaker on channel 1, who is always the agent" in card
    assert "merged into one, unless a pause of more than 2 s is between them" in card
    assert "| `user_topic` | string | as in the manifest |" in card
    write_page(calls / "calls-data", tmp_path / "page.html", split="test", data_dir="calls")
    assert all(
        "recording" in turn for example in page_data(tmp_path / "page.html")["examples"] for turn in example["turns"]
    )
    for split in SPLITS:  # without the column text
        path = calls / "calls" / f"{split}.csv"
        rows = list(csv.reader(path.open(encoding="utf-8")))
        path.write_text("\n".join(",".join(row[:2] + row[3:]) for row in rows))
    run(without_text.strip(), calls, unit_model)
    assert {split: number > 0 for split, number in verify(calls / "speech-only").items()} == {
        "train": True,
        "test": True,
    }
    rows = datasets.load_dataset(str(calls / "speech-only"), split="train", cache_dir=str(tmp_path / "datasets"))
    assert set(rows["user_text"]) == {""} == set(rows["agent_text"])
    write_page(calls / "speech-only", tmp_path / "page.html", split="test", data_dir="calls")
