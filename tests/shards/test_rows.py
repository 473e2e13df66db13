from types import SimpleNamespace

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from usdm_sft.shards import rows


@pytest.fixture
def builder(monkeypatch):
    """A builder whose first attempts raise the errors in `errors`; it writes down how it is asked."""
    made = SimpleNamespace(cache_dir="cache", corpus={"train": None}, errors=[], modes=[])

    def download_and_prepare(download_mode):
        made.modes.append(download_mode)
        if made.errors:
            raise DatasetGenerationError("An error occurred") from made.errors.pop(0)

    made.download_and_prepare = download_and_prepare
    made.as_dataset = lambda split: Dataset.from_dict({"id": ["d1_0"]})
    monkeypatch.setattr(rows, "_check_rows", lambda *args: None)
    return made


def test_examples_that_could_not_be_written_are_made_again(builder, caplog):
    builder.errors = [OSError(5, "Input/output error")]
    assert rows.load_rows(builder)["train"]["id"][:] == ["d1_0"]
    assert builder.modes == ["reuse_dataset_if_exists", "force_redownload"]
    assert "cache was damaged" in caplog.text


def test_examples_are_made_again_once(builder):
    builder.errors = [OSError(5, "Input/output error"), OSError(5, "Input/output error")]
    with pytest.raises(DatasetGenerationError, match="An error occurred"):
        rows.load_rows(builder)
    assert len(builder.modes) == 2


def test_other_errors_of_the_builder_are_not_tried_again(builder):
    builder.errors = [ValueError("bad")]
    with pytest.raises(DatasetGenerationError, match="An error occurred"):
        rows.load_rows(builder)
    assert builder.modes == ["reuse_dataset_if_exists"]
