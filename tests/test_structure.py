"""The size of modules and functions stays readable, and the packages are the documented ones."""

import ast
from configparser import ConfigParser

import pytest

from tests.forked import Fork
from tests.helpers import REPOSITORY

PACKAGES = [
    "audio",
    "cli",
    "corpus",
    "executors",
    "folder",
    "prepare",
    "template",
    "units",
    "utils",
]
MODULES = [REPOSITORY / "dailytalk_usdm.py", *sorted((REPOSITORY / "usdm_sft").rglob("*.py"))]


def test_packages():
    names = {path.name for path in (REPOSITORY / "usdm_sft").iterdir()} - {"__pycache__"}
    assert names == {*PACKAGES, "__init__.py", "py.typed", "training.py"}
    setup = ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    folders = {path.parent for path in (REPOSITORY / "usdm_sft").rglob("__init__.py")}
    found = {".".join(folder.relative_to(REPOSITORY).parts) for folder in folders}
    assert found <= set(setup["options"]["packages"].split())  # the wheel has them


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_modules_and_functions_are_not_too_long(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 500
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 80] == []


def test_benchmarks_can_be_imported():
    """Nothing else runs them. In a process of their own, because one of them adds precisions."""
    modules = [
        f"tests.benchmarks.{path.stem}" for path in sorted((REPOSITORY / "tests" / "benchmarks").glob("[!_]*.py"))
    ]
    assert len(modules) >= 10
    run = Fork(f"import {', '.join(modules)}")
    _, output = run.communicate()
    assert run.returncode == 0, output
