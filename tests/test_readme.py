"""README.md, tests/README.md and docs/dependencies.md agree with the code."""

import ast
import configparser
import re
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

TESTS = Path(__file__).parent
REFERENCE = re.compile(r"`((?:\w+/)?test_\w+\.py::[\w:]+)`")


def names_of_tests(path):
    """Yield the tests of a file; a test of a class is Class::test."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield from (f"{node.name}::{each.name}" for each in node.body if isinstance(each, ast.FunctionDef))


def test_every_test_of_the_table_exists():
    existing = {
        f"{path.relative_to(TESTS).as_posix()}::{name}"
        for path in TESTS.rglob("test_*.py")
        for name in names_of_tests(path)
    }
    table = (TESTS / "README.md").read_text(encoding="utf-8").partition("[start:faults]")[2]
    rows = [line.split(" | ") for line in table.splitlines() if " | " in line]
    rows = [row for row in rows if not row[0].startswith(("| fault", "| **"))]
    assert len(rows) > 70
    for row in rows:
        assert len(row) == 3, row
        references = REFERENCE.findall(row[2])
        assert references and len(references) == row[2].count("::test_") == row[2].count("`") // 2, row
        assert not set(references) - existing, row


@pytest.fixture
def setup():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    return setup


def test_every_dependency_is_explained(setup):
    names = [
        re.match(r"[\w-]+", line).group() for line in setup["options"]["install_requires"].split("\n") if line.strip()
    ]
    text = (REPOSITORY / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert len(names) > 10
    assert [name for name in names if not re.search(rf"\b{name}\b", text, re.IGNORECASE)] == []


def test_every_extra_is_explained(setup):
    text = (REPOSITORY / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert [name for name in setup["options.extras_require"] if f"| `{name}` |" not in text] == []


def test_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_names_the_cpu_build_of_torch_first():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert 0 < text.index("export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu") < text.index("pip install")


def test_readme_has_the_two_commands_that_ci_runs():
    """.ci/run takes the block that follows each marker."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^<!-- (demo|test) -->\n```bash\n", text, re.MULTILINE) == ["demo", "test"]
