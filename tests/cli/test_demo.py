"""The command `demo`, and the files that it needs."""

import io
import shutil
import sys
import webbrowser

import pytest
from datasets import load_dataset

from tests.helpers import DEMO, content
from usdm_sft.cli import demo as run
from usdm_sft.cli.demo import Demo, run_demo
from usdm_sft.cli.main import main, make_parser
from usdm_sft.folder.layout import read_counts
from usdm_sft.folder.verify import verify
from usdm_sft.template.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the command `demo` has run, and what the command printed."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        main(["demo", str(folder)])
        return folder, sys.stdout.getvalue()


def test_demo_ends_with_three_lines(made):
    folder, printed = made
    assert printed == (
        f"made: {folder}/dataset, 10 train and 3 test examples with units, input_ids and labels, from 6 of 8 spoken dialogs\n"
        f"load: from datasets import load_dataset; load_dataset('{folder}/dataset')\n"
        f"look: open {folder}/page.html in a browser, or run: dailytalk-usdm show {folder}/dataset\n"
    )


def test_lines_of_the_demo_are_true(made, capsys):
    folder, printed = made
    _, load, look = (line.partition(": ")[2] for line in printed.splitlines())
    rows = eval(load.partition("; ")[2], {"load_dataset": load_dataset})
    assert {split: len(rows[split]) for split in rows} == {"train": 10, "test": 3}
    assert "input_ids" in rows["train"].column_names and "labels" in rows["train"].column_names
    main(look.rpartition("dailytalk-usdm ")[2].split())
    assert "did you water the plants on the balcony?" in capsys.readouterr().out
    assert "did you water the plants on the balcony?" in (folder / "page.html").read_text(encoding="utf-8")


def test_demo_equals_the_output_of_the_reference(made):
    folder, _ = made
    assert verify(folder / "dataset", folder / "expected") == {"train": 10, "test": 3}


def test_page_of_the_demo_has_the_recordings(made):
    page = (made[0] / "page.html").read_text(encoding="utf-8")
    assert page.count('"audio":"') == 4 + 5 + 2 + 3  # the turns of the dialogs 3, 8, 20 and 77


def test_second_run_changes_nothing(made):
    folder, _ = made
    before = content(folder / "dataset")
    assert run_demo(folder).counts == read_counts(folder / "dataset")
    assert content(folder / "dataset") == before


def test_changed_corpus_is_kept_and_refused(tmp_path):
    shutil.copytree(DEMO / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / "train.txt").write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"train\.txt is not the file of the demo: name another folder, or prep"):
        run_demo(tmp_path)
    assert (tmp_path / "corpus" / "train.txt").read_text() == "mine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_copy_that_was_interrupted_is_made_again(tmp_path):
    (tmp_path / "corpus.unfinished" / "data").mkdir(parents=True)
    run._copy(DEMO / "corpus", tmp_path / "corpus")
    assert content(tmp_path / "corpus") == content(DEMO / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_missing_extra_is_named(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(
        "usdm_sft.template.tokenizer.build_tokenizer", build_tokenizer
    )  # conftest.py has built it before
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert refused("demo", tmp_path / "demo").endswith(": pip install 'dailytalk-usdm[demo]'")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("opened", [True, False])
def test_example_in_a_terminal_and_page_in_the_browser(dataset_folder, tmp_path, monkeypatch, capsys, opened):
    addresses = []
    made = Demo(dataset_folder, tmp_path / "page.html", read_counts(dataset_folder))
    monkeypatch.setattr(run, "run_demo", lambda folder: made)
    monkeypatch.setattr(webbrowser, "open", lambda address: addresses.append(address) or opened)
    monkeypatch.setattr(sys, "stdout", Terminal())
    main(["demo", "--open"])
    lines = sys.stdout.getvalue().splitlines()
    assert lines[0].startswith("d3_0: ") and any(line.startswith("loss  ") for line in lines)
    assert [line[:6] for line in lines[-4:]] == ["", "made: ", "load: ", "look: "]
    address = (tmp_path / "page.html").as_uri()
    assert addresses == [address]
    assert capsys.readouterr().err == ("" if opened else f"no browser was found: open {address} yourself\n")


def test_folder_of_the_demo_may_be_left_out():
    assert make_parser().parse_args(["demo"]).demo.demo_dir == "dailytalk-usdm-demo"
    assert make_parser().parse_args(["demo", "there"]).demo.demo_dir == "there"


def test_link_in_the_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "dataset").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=r"demo/dataset is a link, which the demo does not follow: name another"):
        run_demo(tmp_path / "demo")
    assert not list((tmp_path / "elsewhere").iterdir())
