import json
import shutil

import datasets
import pytest
from transformers import AutoTokenizer

from tests.helpers import DEMO, content, options
from usdm_sft.folder.export import export
from usdm_sft.folder.layout import read_counts
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.config import Template
from usdm_sft.template.encoder import TemplateEncoder
from usdm_sft.template.tokenizer import build_tokenizer, load_tokenizer
from usdm_sft.units import reading
from usdm_sft.units.model import UnitModel

COLUMNS = [
    "id", "dialog_id", "turn", "user_speaker", "user_text", "user_emotion", "user_units", "user_seconds", "agent_speaker",
    "agent_text", "agent_emotion", "agent_units", "agent_seconds", "input_ids", "labels",
    "attention_mask", "length",
]  # fmt: skip


@pytest.fixture
def run(mini, unit_model, tmp_path):
    """Return a function that prepares the mini corpus into a folder of tmp_path."""

    def run(output="out", **changes):
        given = options(mini, unit_model, tmp_path, output_path=str(tmp_path / output), **changes)
        return tmp_path / output, prepare(**given)

    return run


@pytest.fixture
def rerun(run, finished, tmp_path):
    """The same function where `out` is finished already, and the units of the mini corpus are in the cache."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return run


@pytest.fixture
def forward_passes(monkeypatch):
    passes = []
    forward = UnitModel.forward_pack
    monkeypatch.setattr(UnitModel, "forward_pack", lambda self, *args: passes.append(1) or forward(self, *args))
    return passes


@pytest.mark.loading
@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_opens_the_folder(finished, tmp_path, streaming):
    loaded = datasets.load_dataset(str(finished / "out"), streaming=streaming, cache_dir=str(tmp_path / "datasets"))
    rows = {split: list(loaded[split]) for split in loaded}
    assert {split: len(split_rows) for split, split_rows in rows.items()} == {"train": 10, "test": 3}
    assert list(rows["train"][0]) == COLUMNS
    assert [row["id"] for row in rows["test"]] == ["d105_0", "d105_1", "d2001_0"]
    for row in rows["train"]:
        assert {label for label, i in zip(row["labels"], row["input_ids"], strict=True) if label != i} == {-100}
    if streaming:
        assert loaded["train"].num_shards == 10
    else:
        schema = loaded["train"].data.schema
        assert str(schema.field("user_units").type.value_type) == "uint16"
        assert str(schema.field("labels").type.value_type) == str(schema.field("input_ids").type.value_type) == "int32"
        assert str(schema.field("user_seconds").type) == "float"


@pytest.mark.loading
@pytest.mark.slow
def test_load_dataset_reads_a_folder_again_when_rows_change(rerun, mini, tmp_path):
    """datasets finds rows in its cache by the last name of the folder and the YAML of the card."""

    def count(output, words):
        """The number of texts with these words, in the rows and in the utterances."""
        found = []
        for config, column in (("single_turn", "user_text"), ("utterances", "text")):
            loaded = datasets.load_dataset(str(output), config, split="train", cache_dir=str(tmp_path / "datasets"))
            found.append(sum(words in text for text in loaded.data[column].to_pylist()))
        return found

    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    first, _ = rerun("a/data", keep_audio=True, data_dir=str(corpus))
    assert count(first, "less sun") == [1, 1]
    text = (corpus / "train.txt").read_text()
    (corpus / "train.txt").write_text(text.replace("less sun", "more sun"))
    rerun("a/data", keep_audio=True, data_dir=str(corpus), overwrite=True)
    assert (count(first, "less sun"), count(first, "more sun")) == ([0, 0], [1, 1])
    (corpus / "train.txt").write_text(text.replace("less sun", "some sun"))
    second, _ = rerun("b/data", keep_audio=True, data_dir=str(corpus))
    assert count(second, "some sun") == [1, 1]


@pytest.mark.loading
def test_folder_is_enough_for_another_template_run(finished, encoder, tmp_path):
    rows = datasets.load_dataset(str(finished / "out"), split="train", cache_dir=str(tmp_path / "datasets"))
    again = rows.remove_columns(["input_ids", "labels"]).map(encoder, batched=True)
    assert again["input_ids"][:] == rows["input_ids"][:]


@pytest.mark.slow
def test_another_template_needs_no_forward_pass_and_is_recorded(rerun, finished, forward_passes, tokenizer):
    whole = datasets.load_dataset(str(finished / "out"), split="train")
    template = Template(agent_role="Robot", loss=["agent_units"])
    output, counts = rerun("synthesis", template=template)
    assert not forward_passes
    rows = datasets.load_dataset(str(output), split="train")
    assert rows["agent_units"][:] == whole["agent_units"][:] and rows["labels"][:] != whole["labels"][:]
    recorded = json.loads((output / "counts.json").read_text())["settings"]["template"]
    assert recorded == counts["settings"]["template"]
    encoder = TemplateEncoder(tokenizer, Template(**recorded))
    again = rows.remove_columns(["input_ids", "labels"]).map(encoder, batched=True)
    assert again["labels"][:] == rows["labels"][:]
    assert encoder.template == template


def test_counts_describe_the_splits(finished, mini):
    counts = read_counts(finished / "out")
    train = counts["splits"]["train"]
    lines = (mini / "expected" / "train.txt").read_text().split("\n")
    labels = [label for line in lines for label in line.split("|")[1].split()]
    assert (train["dialogs"], train["pairs"], train["rows"], train["utterances"]) == (4, 10, 10, 14)
    assert (train["tokens"], train["labelled_tokens"]) == (len(labels), sum(label != "-100" for label in labels))
    left_out = {"d11": "one speaker speaks twice in a row", "d42": "a single turn makes no pair"}
    assert (train["dialogs_left_out"], train["pairs_left_out"]) == (left_out, {})
    assert set(counts["digests"]) == {
        "train split list", "test split list", "lists and audio", "unit model", "tokenizer"
    }  # fmt: skip
    assert "torch" in counts["versions"]


def test_tokenizer_is_saved_beside_the_data(finished, tokenizer):
    folder = finished / "out" / "tokenizer"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "<|correspond|> yes.\n### Agent\n no<|unit5|>\n</s>"
    for loaded in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        assert loaded(text).input_ids == tokenizer(text).input_ids


@pytest.mark.slow
def test_too_long_pairs_are_left_out_counted_and_listed(rerun, finished):
    rows = datasets.load_dataset(str(finished / "out"), split="train")
    lengths = dict(zip(rows["id"], map(len, rows["input_ids"]), strict=True))
    limit = sorted(lengths.values())[6]  # a pair of exactly the limit is kept
    output, counts = rerun("short", max_length=limit)
    kept = [name for name, length in lengths.items() if length <= limit]
    assert datasets.load_dataset(str(output), split="train")["id"][:] == kept
    assert counts["splits"]["train"]["pairs_left_out"] == {
        name: f"{length} tokens, more than max_length {limit}" for name, length in lengths.items() if length > limit
    }
    assert counts["splits"]["train"]["rows"] == 7
    assert counts["key"] != read_counts(finished / "out")["key"]


@pytest.mark.slow
def test_second_run_makes_no_forward_pass(rerun, mini, forward_passes, tmp_path, undisturbed):
    """Nor does one with another tokenizer, or with a corpus that was moved and touched."""
    rerun()
    build_tokenizer(num_units=200).save_pretrained(tmp_path / "small-tokenizer")
    rerun("other-tokenizer", pretrained_model_name_or_path=str(tmp_path / "small-tokenizer"))
    shutil.copytree(mini / "corpus", tmp_path / "moved", copy_function=shutil.copyfile)
    second, _ = rerun("second", data_dir=str(tmp_path / "moved"))
    assert not forward_passes
    assert content(tmp_path / "out") == content(second) == undisturbed


def test_unit_shard_has_one_row_per_utterance(dataset_folder, mini):
    expected = json.loads((mini / "expected" / "units.json").read_text())
    shards = [
        datasets.Dataset.from_file(str(path)) for path in (dataset_folder.parent / "cache" / "units").glob("*.arrow")
    ]
    assert sorted(map(len, shards)) == [5, 14]  # test and train
    [test] = [shard for shard in shards if len(shard) == 5]
    names = ["0_1_d105", "1_0_d105", "2_1_d105", "0_0_d2001", "1_1_d2001"]
    assert [row["units"] for row in test] == [expected[name] for name in names]
    assert [str(test.data.schema.field(name).type) for name in test.column_names] == ["list<item: uint16>", "float"]
    assert test.column_names == ["units", "seconds"]


@pytest.mark.slow
def test_only_shards_whose_key_changes_are_made_again(run, mini, forward_passes, tmp_path):
    def made(output, **options):
        """Run prepare() and return the number of new unit shards."""
        level = tmp_path / "cache" / "units"
        before = set(level.glob("*.arrow"))
        run(output, **options)
        return len(set(level.glob("*.arrow")) - before)

    assert made("first") == 6
    corpus = shutil.copytree(mini / "corpus", tmp_path / "changed")
    shutil.copyfile(corpus / "data" / "3" / "1_1_d3.wav", corpus / "data" / "3" / "0_0_d3.wav")
    assert made("changed-audio", data_dir=str(corpus)) == 1  # one dialog has other audio
    text = (corpus / "train.txt").read_text()
    (corpus / "train.txt").write_text(text.replace("less sun", "more sun"))
    passes = len(forward_passes)
    assert made("changed-text", data_dir=str(corpus)) == 0
    assert len(forward_passes) == passes
    assert made("other-precision", precision="bf16", test_metadata_path=str(corpus / "test.txt")) == 2
    assert made("other-plan", batch_seconds=3) == 6


def cut(pattern, number):
    def damage(cache):
        path = sorted(cache.rglob(pattern))[0]
        path.write_bytes(path.read_bytes()[:-number])

    return damage


def delete(*names):
    def damage(cache):
        for path in (cache / name for name in names):
            path.unlink() if path.is_file() else shutil.rmtree(path)

    return damage


def change_text(cache):
    """The result is still a valid Arrow file."""
    [path] = (cache / "builder").rglob("dailytalk_usdm-train.arrow")
    before = path.read_bytes()
    path.write_bytes(before.replace(b"did you water", b"did you wader"))
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("damage", "computed", "message"),
    [
        pytest.param(cut("units/*.arrow", 100), True, "", marks=pytest.mark.slow),
        (cut("tokens/*.arrow", 100), False, ""),
        (delete("units"), True, ""),
        (delete("tokens", "builder", "locks", "digests.sqlite"), False, ""),
        pytest.param(cut("dailytalk_usdm-train.arrow", 700), False, "making it again", marks=pytest.mark.slow),
        (change_text, False, "was damaged (column user_text of train differs from the corpus): making it again"),
    ],
    ids=["units", "tokens", "no units", "units only", "builder", "text"],
)
def test_damaged_or_deleted_cache_is_made_again(
    rerun, tmp_path, forward_passes, undisturbed, caplog, damage, computed, message
):
    damage(tmp_path / "cache")
    assert content(rerun("second")[0]) == undisturbed
    assert bool(forward_passes) == computed and message in caplog.text


def test_each_audio_is_read_once_in_a_run(run, monkeypatch):
    read = []
    real = reading.read_waveform
    monkeypatch.setattr(reading, "read_waveform", lambda source, *more: read.append(source) or real(source, *more))
    run()
    assert len(read) == len(set(read)) == 19


@pytest.mark.slow
def test_output_does_not_depend_on_the_size_of_work_shards(run, tmp_path, mini):
    """Work shards of one dialog and of all dialogs have tests of their own."""
    export(run(shard_dialogs=2)[0], tmp_path / "text")
    exported = (tmp_path / "text" / "train.txt").read_text()
    assert sorted(exported.split("\n")) == sorted((mini / "expected" / "train.txt").read_text().split("\n"))


@pytest.mark.slow
def test_number_of_files_and_shuffling(rerun, finished):
    output, counts = rerun("two", num_output_shards=2, shuffle_seed=7)
    assert [name for name in counts["files"] if name.startswith("single_turn/train")] == [
        "single_turn/train-00000-of-00002.parquet",
        "single_turn/train-00001-of-00002.parquet",
    ]
    shuffled = datasets.load_dataset(str(output), split="train")["id"][:]
    plain = datasets.load_dataset(str(finished / "out"), split="train")["id"][:]
    assert shuffled != plain and sorted(shuffled) == sorted(plain)
    assert datasets.load_dataset(str(rerun("again", shuffle_seed=7)[0]), split="train")["id"][:] == shuffled


@pytest.mark.slow
def test_output_folder_with_other_content_is_refused(run, finished, tmp_path, forward_passes):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(
        FileExistsError,
        match=r"out holds something else, such as thesis\.txt: name another output_path, or pass --overwrite \(Python: ",
    ):
        run()
    assert not forward_passes
    shutil.copytree(finished / "cache", tmp_path / "cache", dirs_exist_ok=True)
    output, _ = run(overwrite=True)
    assert (output / "thesis.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match=r"the result of other settings \(max_length: 8192 -> 300\)"):
        run(max_length=300)
    _, counts = run(max_length=300, overwrite=True)
    assert counts["settings"]["max_length"] == 300


def test_output_that_cannot_be_a_folder_is_refused(run, tmp_path, forward_passes):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for output, name in (("file", "file"), ("file/below", "file"), ("dangling", "dangling"), ("loop/below", "loop")):
        with pytest.raises(FileExistsError, match=f"/{name} is not a folder: name another output_path"):
            run(output)
    assert not forward_passes


@pytest.mark.slow
def test_output_inside_corpus_or_cache_or_behind_a_link(rerun, mini, tmp_path, forward_passes, undisturbed):
    """A link is followed. Corpus and cache cannot be the output folder; a folder inside them can, and leaves them intact."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    rerun("link")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "elsewhere") == undisturbed
    corpus = shutil.copytree(mini / "corpus", tmp_path / "corpus")
    before = content(corpus)
    for place in ("corpus", "cache", "cache/units"):
        with pytest.raises(FileExistsError, match="holds something else"):
            rerun(place, data_dir=str(corpus))
    assert content(corpus) == before
    for place in ("corpus/data/out", "cache/out"):
        assert content(rerun(place, data_dir=str(corpus))[0]) == undisturbed
    rerun("again", data_dir=str(corpus))
    assert not forward_passes
    assert {name: data for name, data in content(corpus).items() if not name.startswith("data/out/")} == before


@pytest.mark.slow
def test_run_interrupted_while_writing_is_completed_by_a_rerun(rerun, monkeypatch, tmp_path, undisturbed):
    from usdm_sft.folder import writer

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "make_card", fail)
        rerun("second")
    assert not (tmp_path / "second" / "counts.json").exists()
    assert content(rerun("second")[0]) == undisturbed


@pytest.mark.slow
def test_damaged_output_is_written_again_with_overwrite(rerun, tmp_path, undisturbed):
    path = tmp_path / "out" / "single_turn" / "train-00003-of-00010.parquet"
    for damaged in (path, tmp_path / "out" / "counts.json"):
        damaged.write_bytes(b"PAR1")
        with pytest.raises(FileExistsError):
            rerun()
        rerun(overwrite=True)
        assert content(tmp_path / "out") == undisturbed


def test_export_reports_a_missing_file(folder_copy, tmp_path):
    (folder_copy / "single_turn" / "train-00003-of-00010.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00003-of-00010\.parquet is missing: run prepare again"):
        export(folder_copy, tmp_path / "text")


def test_dialog_whose_rows_are_all_too_long_is_not_counted(rerun):
    """Both pairs of d77 have more than 290 tokens. d3, d8 and d20 have 4, 5 and 2 turns, and at least one row each."""
    _, counts = rerun("short", max_length=290)
    train = counts["splits"]["train"]
    assert {"d77_0", "d77_1"} < set(train["pairs_left_out"])
    assert (train["dialogs"], train["utterances"], train["pairs"]) == (3, 11, 10)
    assert counts["statistics"]["train"]["dialogs"] == 3


def test_split_that_max_length_leaves_empty_is_refused(rerun):
    with pytest.raises(ValueError, match="max_length 220 leaves no row of test, whose shortest row has"):
        rerun("short", max_length=220)


def test_interrupted_run_does_not_free_a_finished_folder(rerun, tmp_path):
    (tmp_path / "out" / ".unfinished").mkdir()
    with pytest.raises(FileExistsError):
        rerun(max_length=300)


def test_unit_model_with_too_many_units_is_refused(run, tmp_path, forward_passes):
    build_tokenizer(num_units=50).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(
        ValueError,
        match="the unit model has 100 different units, the tokenizer only 50: use the tokenizer that belongs",
    ):
        run(pretrained_model_name_or_path=str(tmp_path / "tokenizer"))
    assert not forward_passes


def test_one_split_list_is_prepared_alone(rerun, mini, tmp_path):
    shutil.copy(mini / "corpus" / "test.txt", tmp_path / "elsewhere.txt")
    output, counts = rerun("test", test_metadata_path=str(tmp_path / "elsewhere.txt"))
    assert list(counts["splits"]) == ["test"]
    assert datasets.load_dataset(str(output), split="test")["id"][:] == ["d105_0", "d105_1", "d2001_0"]


def test_dataset_folder_contains_no_paths(finished):
    for name, data in content(finished / "out").items():
        assert str(finished).encode() not in data, name
        assert str(DEMO).encode() not in data, name


def test_metadata_paths_with_a_dataset_of_the_hub_are_refused(run):
    with pytest.raises(ValueError, match="a dataset of the Hub with splits of its own: leave out the metadata paths"):
        run(data_dir="hub:user/calls", train_metadata_path="train.jsonl")
