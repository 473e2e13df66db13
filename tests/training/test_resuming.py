"""Which runs go on at the next row after a checkpoint: each line of the table "Resuming" in docs/training/index.md."""

import itertools
import json

import datasets
import pytest
import torch

NUM_FILES, NUM_ROWS = 8, 80  # 20 batches of 4
BUFFER = 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = [str(folder / f"{number}.parquet") for number in range(NUM_FILES)]
    size = NUM_ROWS // NUM_FILES
    for number, path in enumerate(paths):
        rows = range(number * size, (number + 1) * size)
        datasets.Dataset.from_dict({"row": list(rows), "length": [row * 7 % 13 + 1 for row in rows]}).to_parquet(path)
    return paths


def stream(files, shuffled):
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    return rows.shuffle(seed=3, buffer_size=BUFFER) if shuffled else rows


def numbers(rows):
    return [row["row"] for row in rows]


def interrupt(rows, after):
    """The rows of a pass up to a checkpoint, and the state in it."""
    seen = []
    for row in rows:
        seen.append(row["row"])
        if len(seen) == after:
            return seen, json.loads(json.dumps(rows.state_dict()))
    raise AssertionError("the pass was too short")


@pytest.mark.parametrize("later_pass", [False, True])
def test_state_of_a_stream_resumes_exactly(files, later_pass):
    rows, rest = stream(files, shuffled=False), stream(files, shuffled=False)
    if later_pass:
        assert numbers(rows) == list(range(NUM_ROWS))
    seen, state = interrupt(rows, 33)
    rest.load_state_dict(state)
    assert seen + numbers(rest) == list(range(NUM_ROWS))


def test_state_of_a_shuffled_stream_loses_rows(files):
    rows, rest = stream(files, shuffled=True), stream(files, shuffled=True)
    seen, state = interrupt(rows, 33)
    rest.load_state_dict(state)
    lost = set(range(NUM_ROWS)) - {*seen, *numbers(rest)}
    assert 0 < len(lost) <= BUFFER


def resume_loader(files, shuffled, workers, workers_after):
    """The rows before and after a checkpoint, and those of a pass without one."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata (the extra 'train')")

    def make(num_workers):
        rows = stream(files, shuffled)
        return stateful.StatefulDataLoader(rows, batch_size=4, num_workers=num_workers, collate_fn=numbers)

    loader, seen = make(workers), []
    for batch in loader:
        seen += batch
        if len(seen) == 20:
            state = loader.state_dict()
            break
    rest = make(workers_after)
    rest.load_state_dict(state)
    return [*seen, *itertools.chain(*rest)], [*itertools.chain(*make(workers))]


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_loader_resumes_a_stream_exactly(files, workers):
    resumed, whole = resume_loader(files, False, workers, workers)
    assert resumed == whole and sorted(whole) == list(range(NUM_ROWS))


def test_stateful_loader_refuses_another_number_of_workers(files):
    with pytest.raises(AssertionError) as caught:
        resume_loader(files, False, 2, 1)
    assert str(caught.value) == ""


def test_stateful_loader_loses_rows_of_a_shuffled_stream(files):
    resumed, whole = resume_loader(files, True, 0, 0)
    assert 0 < len({*whole} - {*resumed}) <= BUFFER
    with pytest.raises(IndexError):
        resume_loader(files, True, 2, 2)


class Recorder(torch.nn.Module):
    """A model that learns nothing and records the rows of each step."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.steps = []

    def forward(self, row):
        self.steps.append(row.tolist())
        return {"loss": self.layer.weight.sum() * 0}


def collate(rows):
    return {"row": torch.tensor(numbers(rows))}


def train(rows, folder, num_steps, checkpoint, *, resume=False, **options):
    """The rows of each step of a run, or of what follows its checkpoint."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="needs the extra 'train'")
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        save_steps=checkpoint,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    model = Recorder()
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows, data_collator=collate)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{checkpoint}") if resume else None)
    return model.steps


BY_LENGTH = {"train_sampling_strategy": "group_by_length"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "checkpoint", "options", "exact"),
    [
        ("map-style", 7, {}, True),
        ("map-style", 25, {}, True),
        ("map-style", 7, BY_LENGTH, True),
        ("map-style", 25, BY_LENGTH, False),
        ("stream", 7, {}, True),
        ("stream", 25, {}, False),
        ("shuffled", 7, {}, True),
        ("shuffled", 25, {}, False),
        ("shuffled", 7, {"ignore_data_skip": True}, False),
    ],
)
def test_trainer_resumes(files, tmp_path, kind, checkpoint, options, exact):
    """A pass has 20 steps."""
    if kind == "map-style":
        rows = datasets.load_dataset("parquet", data_files=files, split="train")
    else:
        rows = stream(files, kind == "shuffled")
    whole = train(rows, tmp_path, checkpoint + 6, checkpoint, **options)
    rest = train(rows, tmp_path, checkpoint + 6, checkpoint, resume=True, **options)
    assert len(rest) == 6 and (rest == whole[checkpoint:]) is exact
