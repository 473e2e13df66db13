"""The scripts and the notebook in examples/ run on the files of the demo."""

import json
import re
import runpy

import pytest

from tests.helpers import REPOSITORY
from tests.test_docs import load_script

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def workplace(mini, unit_model, dataset_folder, tmp_path, monkeypatch):
    """The current folder with the folder of the demo, as the command `demo` makes it."""
    demo = tmp_path / "dailytalk-usdm-demo"
    demo.mkdir()
    for name, made in (("corpus", mini / "corpus"), ("unit_model", unit_model), ("dataset", dataset_folder)):
        (demo / name).symlink_to(made)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_steps_by_hand_give_the_dataset_of_the_demo(workplace, capsys):
    run("steps")
    printed = capsys.readouterr().out
    assert (
        "user:  did you water the plants on the balcony?\nagent: i did, but the basil doesn't look happy.\n" in printed
    )
    assert printed.endswith("identical to prepare: True\n")


@pytest.mark.slow
def test_tiny_model_learns_and_answers_in_three_steps(workplace, capsys):
    run("train_and_answer")
    lines = capsys.readouterr().out.splitlines()
    losses = [float(re.fullmatch(r"epoch \d: loss ([\d.]+)", line)[1]) for line in lines[:3]]
    assert losses[2] < losses[0]
    answers = [line for line in lines if re.match(r"(transcript|answer|speech), \d+ tokens: ", line)]
    assert [line.partition(",")[0] for line in answers] == ["transcript", "answer", "speech"]


def test_two_workers_stream_every_row_once(workplace, capsys):
    run("stream")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "10 files for 2 workers"
    assert lines[-1] == "10 rows"


def test_notebook_is_current():
    script = (EXAMPLES / "steps.py").read_text(encoding="utf-8")
    message = "run: python docs/make_notebook.py"
    assert (EXAMPLES / "steps.ipynb").read_text(encoding="utf-8") == load_script("make_notebook").make_notebook(
        script
    ), message


def test_notebook_has_the_code_of_the_script():
    cells = json.loads((EXAMPLES / "steps.ipynb").read_text(encoding="utf-8"))["cells"]
    script = (EXAMPLES / "steps.py").read_text(encoding="utf-8").splitlines()
    code = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
    assert [line for line in code if line] == [line for line in script if line and not line.startswith("#")]
    text = [line for cell in cells if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).splitlines()]
    assert text[0] == "# From recordings to `input_ids` and `labels`, step by step"


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(workplace):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'test'")
    import nbformat

    notebook = nbformat.read(EXAMPLES / "steps.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(workplace)}}).execute()
    [output] = notebook.cells[-1].outputs[-1:]
    assert output["text"] == "identical to prepare: True\n"
