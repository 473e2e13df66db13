"""The installed package is typed: a type checker finds mistakes in a user's script."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.helpers import REPOSITORY

SCRIPT = """\
from pathlib import Path

import dailytalk_usdm
from dailytalk_usdm import PrepareConfig, Template, TemplateEncoder, UnitTokenizer, load_tokenizer, prepare, verify

corpus = Path("DailyTalk")
pairs = dailytalk_usdm.load_dataset(corpus, split="train", data_files={"train": "train.txt"})
wrong_type = dailytalk_usdm.load_dataset(3)  # mistake
conversations = dailytalk_usdm.DailyTalkUSDM(config_name="multi_turn", data_dir=corpus)

encoder = TemplateEncoder(load_tokenizer("tokenizer"), Template(loss=("agent_text",)))
config = PrepareConfig(data_dir=corpus, output_path="out", history="1")  # mistake
misspelt = dailytalk_usdm.prepair  # mistake

tokenizer = UnitTokenizer.from_pretrained("unit_model", device="cpu")
rows: dict[str, int] = verify("out", against="reference")
lines: list[str] = dailytalk_usdm.export("out", "text")  # mistake
print(dailytalk_usdm.__version__.upper(), prepare, encoder, config, pairs, conversations, tokenizer, rows, lines)
"""

# mypy takes a minute to read these, whose types no line of the script depends on.
LARGE_PACKAGES = """\
[mypy-torch.*,transformers.*,datasets.*,huggingface_hub.*,pandas.*,matplotlib.*]
follow_imports = skip
"""


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with the built wheel in it, on top of the packages of this one."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("usdm_sft", "configs", "dataset_card", "dailytalk_usdm-stubs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "dailytalk_usdm.py"):
        shutil.copy(REPOSITORY / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    venv.create(tmp_path / "venv", with_pip=False)
    [packages] = (tmp_path / "venv").glob("lib/*/site-packages")
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    others = [path for path in sys.path if path.endswith("-packages")] or [sysconfig.get_path("purelib")]
    (packages / "others.pth").write_text("\n".join(others))
    return tmp_path / "venv"


@pytest.mark.slow
def test_mypy_finds_the_mistakes_of_a_user_script(environment, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "script.py").write_text(SCRIPT)
    (tmp_path / "work" / "mypy.ini").write_text(LARGE_PACKAGES)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", environment / "bin" / "python"]
    done = subprocess.run([*command, "script.py"], cwd=tmp_path / "work", capture_output=True, text=True)
    found = [int(number) for number in re.findall(r"^script\.py:(\d+): error:", done.stdout, re.M)]
    assert found == [n for n, line in enumerate(SCRIPT.splitlines(), 1) if "# mistake" in line], done.stdout
