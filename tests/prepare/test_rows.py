from types import SimpleNamespace

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from dailytalk_usdm import DailyTalkUSDM
from usdm_sft.prepare import open_run


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
    monkeypatch.setattr(open_run, "_check_rows", lambda *args: None)
    return made


def test_examples_that_could_not_be_written_are_made_again(builder, caplog):
    builder.errors = [OSError(5, "Input/output error")]
    assert open_run.load_rows(builder)["train"]["id"][:] == ["d1_0"]
    assert builder.modes == ["reuse_dataset_if_exists", "force_redownload"]
    assert "cache was damaged" in caplog.text


def test_examples_are_made_again_once(builder):
    builder.errors = [OSError(5, "Input/output error"), OSError(5, "Input/output error")]
    with pytest.raises(DatasetGenerationError, match="An error occurred"):
        open_run.load_rows(builder)
    assert len(builder.modes) == 2


def test_other_errors_of_the_builder_are_not_tried_again(builder):
    builder.errors = [ValueError("bad")]
    with pytest.raises(DatasetGenerationError, match="An error occurred"):
        open_run.load_rows(builder)
    assert builder.modes == ["reuse_dataset_if_exists"]


@pytest.mark.parametrize("change", ["none", "text", "fewer", "more"])
def test_rows_are_compared_with_the_corpus_in_batches(mini, tmp_path, monkeypatch, change):
    builder = DailyTalkUSDM(data_dir=mini / "corpus", cache_dir=str(tmp_path / "b"), digest_cache_dir=tmp_path / "c")
    builder.download_and_prepare()
    made = builder.as_dataset(split="train")
    monkeypatch.setattr(open_run, "_BATCH", 4)  # ten rows: the last batch has two
    if change == "text":
        made = made.map(lambda row: {"agent_text": row["agent_text"] + "!" * (row["id"] == made[9]["id"])})
    elif change != "none":
        made = made.select(range(9)) if change == "fewer" else made.select([*range(10), 9])
    said = {
        "text": "column agent_text of train differs from the corpus",
        "fewer": "column id of train differs from the corpus",
        "more": "train has 11 rows, but the corpus makes 10",
    }
    if change == "none":
        open_run._check_rows(made, builder, "train")
    else:
        with pytest.raises(OSError, match=said[change]):
            open_run._check_rows(made, builder, "train")
