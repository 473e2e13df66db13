"""Fixtures, and the skip of tests marked `oracle` where the reference's own output is not at hand."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(os.environ.get("USDM_SHARED", REPOSITORY.parent / "shared"))


def pytest_collection_modifyitems(items):
    if (SHARED / "oracle").is_dir():
        return
    skip = pytest.mark.skip(reason=f"the reference's output is not at {SHARED} (set USDM_SHARED)")
    for item in items:
        if "oracle" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def shared() -> Path:
    return SHARED


@pytest.fixture(scope="session")
def mini() -> Path:
    return FIXTURES / "mini"


@pytest.fixture(scope="session")
def tokenizer():
    from usdm_sft.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def encoder(tokenizer):
    from usdm_sft.template import TemplateEncoder

    return TemplateEncoder(tokenizer)
