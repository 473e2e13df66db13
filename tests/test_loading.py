"""Each way to load a corpus gives the same rows; caches, digests and public names. Also run on datasets 3.6."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from packaging.version import Version

import dailytalk_usdm
import usdm_sft
from dailytalk_usdm import DailyTalkUSDM
from tests.helpers import REPOSITORY
from usdm_sft.audio import addresses
from usdm_sft.audio.reading import AudioError
from usdm_sft.corpus import dailytalk
from usdm_sft.corpus.builder import code_digest
from usdm_sft.corpus.problems import CorpusError
from usdm_sft.utils import download

pytestmark = pytest.mark.loading

LISTS = {"train": "train.txt", "test": "test.txt"}
SCRIPTS = Version(datasets.__version__) < Version("4")
IDS = {
    "train": ["d3_0", "d3_1", "d3_2", "d8_0", "d8_1", "d8_2", "d8_3", "d20_0", "d77_0", "d77_1"],
    "test": ["d105_0", "d105_1", "d2001_0"],
}


def by_name(data_dir, name="single_turn", **options):
    return datasets.load_dataset("dailytalk_usdm", name, data_dir=str(data_dir), data_files=LISTS, **options)


def by_name_without_files(data_dir, name="single_turn", **options):
    return datasets.load_dataset("dailytalk_usdm", name, data_dir=str(data_dir), **options)


def by_helper(data_dir, name="single_turn", **options):
    return dailytalk_usdm.load_dataset(data_dir, name, **options)


def by_script(data_dir, name="single_turn", **options):
    script = str(REPOSITORY / "dailytalk_usdm.py")
    return datasets.load_dataset(script, name, data_dir=str(data_dir), trust_remote_code=True, **options)


def by_builder(data_dir, name="single_turn", streaming=False, num_proc=None, **options):
    builder = DailyTalkUSDM(config_name=name, data_dir=str(data_dir), **options)
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset()


WAYS = [by_name, by_name_without_files, by_helper, by_builder, *([by_script] if SCRIPTS else [])]


@pytest.fixture
def corpus(tmp_path, mini):
    return shutil.copytree(mini / "corpus", tmp_path / "corpus")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"num_proc": 2}], ids=["plain", "streaming", "num_proc"])
def test_every_way_gives_the_same_rows(way, options, corpus, tmp_path):
    loaded = way(corpus, cache_dir=str(tmp_path / "cache"), **options)
    rows = {split: list(loaded[split]) for split in loaded}
    assert {split: [row["id"] for row in split_rows] for split, split_rows in rows.items()} == IDS
    assert rows["test"][2] == {
        "id": "d2001_0",
        "dialog_id": "d2001",
        "turn": 0,
        "user_speaker": "0",
        "user_text": "The Café on Main Street is closed.",
        "user_emotion": "none",
        "user_audio": {"bytes": None, "path": str(corpus / "data" / "2001" / "0_0_d2001.wav")},
        "agent_speaker": "1",
        "agent_text": "oh no. where do we go now?",
        "agent_emotion": "surprise",
        "agent_audio": {"bytes": None, "path": str(corpus / "data" / "2001" / "1_1_d2001.wav")},
    }
    assert "torchcodec" not in sys.modules


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_way_gives_the_same_conversations(way, streaming, corpus, tmp_path):
    loaded = way(corpus, "multi_turn", cache_dir=str(tmp_path / "cache"), streaming=streaming)
    rows = {row["id"]: row for row in loaded["train"]}
    assert list(rows) == ["d3_0", "d3_1", "d8_0", "d8_1", "d20_0", "d77_0", "d77_1"]
    audio = {turn: str(corpus / "data" / "8" / f"{turn}_{(turn + 1) % 2}_d8.wav") for turn in range(5)}
    assert rows["d8_1"] == {
        "id": "d8_1",
        "dialog_id": "d8",
        "turn": 1,
        "user_speaker": ["0", "0"],
        "user_text": ["seven forty five? i thought it was eight!", "then we'd better call a taxi now."],
        "user_emotion": ["surprise", "none"],
        "user_audio": [{"bytes": None, "path": audio[1]}, {"bytes": None, "path": audio[3]}],
        "agent_speaker": ["1", "1"],
        "agent_text": ["they changed the timetable last week.", "already done. it's waiting downstairs."],
        "agent_emotion": ["none", "happiness"],
        "agent_audio": [{"bytes": None, "path": audio[2]}, {"bytes": None, "path": audio[4]}],
    }
    assert "torchcodec" not in sys.modules


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_pairs_with_history(way, corpus, tmp_path):
    loaded = way(corpus, cache_dir=str(tmp_path / "cache"), history=1)
    assert {split: loaded[split]["id"][:] for split in loaded} == IDS
    [row] = [row for row in loaded["train"] if row["id"] == "d8_3"]
    assert row["turn"] == 3
    assert row["agent_text"] == ["they changed the timetable last week.", "already done. it's waiting downstairs."]
    assert [len(row["user_text"]) for row in loaded["train"]] == [1, 1, 2, 1, 1, 2, 2, 1, 1, 1]


def test_each_config_has_its_own_cache(corpus):
    configs = {}, {"config_name": "multi_turn"}, {"history": 1}, {"history": 2}
    caches = [cache_of(corpus, **config) for config in configs]
    assert len(set(caches)) == 4
    assert cache_of(corpus, config_name="single_turn") == caches[0]


def test_history_is_refused_for_conversations(corpus):
    with pytest.raises(ValueError, match="history is 1, but multi_turn holds whole conversations"):
        DailyTalkUSDM(config_name="multi_turn", history=1, data_dir=corpus)


def test_units_of_conversations_equal_those_of_pairs(corpus, unit_model, tmp_path):
    """`.map` adds the same units to the turns of conversations and of pairs."""
    tokenizer = dailytalk_usdm.UnitTokenizer.from_pretrained(unit_model, device="cpu")
    options = {"cache_dir": str(tmp_path / "cache")}
    pairs = by_helper(corpus, **options)["train"].map(tokenizer, batched=True)
    units = {row["id"]: row["agent_units"] for row in pairs}
    rows = by_helper(corpus, "multi_turn", **options)["train"].map(tokenizer, batched=True)
    assert {row["id"]: row["agent_units"] for row in rows if row["dialog_id"] == "d8"} == {
        "d8_0": [units["d8_0"], units["d8_2"]],
        "d8_1": [units["d8_1"], units["d8_3"]],
    }
    assert str(rows.data.schema.field("agent_units").type.value_type.value_type) == "uint16"


@pytest.mark.parametrize("way", WAYS)
def test_data_dir_may_be_the_data_folder(way, corpus, tmp_path):
    if way is by_name:  # the lists lie beside the data folder

        def way(data_dir, **options):
            lists = {split: f"../{name}" for split, name in LISTS.items()}
            return datasets.load_dataset("dailytalk_usdm", data_dir=str(data_dir), data_files=lists, **options)

    loaded = way(corpus / "data", cache_dir=str(tmp_path / "cache"))
    assert {split: loaded[split]["id"][:] for split in loaded} == IDS


@pytest.mark.parametrize("way", WAYS[1:])
def test_original_list_names_of_dailytalk_are_found(way, corpus, tmp_path):
    (corpus / "train.txt").rename(corpus / "train_phone.txt")
    (corpus / "test.txt").rename(corpus / "val_phone.txt")
    loaded = way(corpus, cache_dir=str(tmp_path / "cache"))
    assert {split: loaded[split]["id"][:] for split in loaded} == IDS


def test_datasets_4_and_later_refuse_the_script(corpus):
    if SCRIPTS:
        pytest.skip("datasets 3 runs loading scripts")
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        by_script(corpus)


def test_one_split_alone(corpus, tmp_path):
    builder = DailyTalkUSDM(data_dir=corpus, data_files={"test": "test.txt"}, cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    assert {split: rows["id"][:] for split, rows in builder.as_dataset().items()} == {"test": IDS["test"]}


def test_lists_are_used_under_the_names_that_the_user_gives(corpus, tmp_path):
    swapped = {"train": "test.txt", "validation": "train.txt"}
    options = {"data_dir": str(corpus), "data_files": swapped, "cache_dir": str(tmp_path / "cache")}
    builder = DailyTalkUSDM(**options)
    builder.download_and_prepare()
    for loaded in (builder.as_dataset(), datasets.load_dataset("dailytalk_usdm", **options)):
        assert {split: rows["id"][:] for split, rows in loaded.items()} == {
            "train": IDS["test"],
            "validation": IDS["train"],
        }
    for one in ("test.txt", ["test.txt"], str(corpus / "test.txt")):
        assert list(DailyTalkUSDM(data_dir=corpus, data_files=one).corpus) == ["train"]
    with pytest.raises(ValueError, match="data_files names 2 split lists for train: name one"):
        DailyTalkUSDM(data_dir=corpus, data_files=["train.txt", "test.txt"])


def test_one_builder_prepares_twice_and_then_streams(corpus, tmp_path):
    builder = DailyTalkUSDM(data_dir=corpus, cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    builder.download_and_prepare()
    assert [row["id"] for row in builder.as_streaming_dataset(split="train")] == IDS["train"]
    again = DailyTalkUSDM(data_dir=corpus, cache_dir=str(tmp_path / "cache"))
    assert [row["id"] for row in again.as_streaming_dataset(split="test")] == IDS["test"]
    assert "torchcodec" not in sys.modules


def cache_of(data_dir, **options):
    return DailyTalkUSDM(data_dir=data_dir, **options).cache_dir


def test_cache_does_not_depend_on_the_spelling_of_a_path(corpus, tmp_path, monkeypatch):
    first = cache_of(corpus)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in ("corpus", f"{corpus}/../corpus/", corpus / "data", "~/corpus"):
        assert cache_of(spelling) == first
    files = {"test": "~/corpus/test.txt"}
    assert cache_of(corpus, data_files=files) == cache_of(corpus, data_files={"test": "test.txt"})
    (tmp_path / "link").symlink_to(corpus)
    assert cache_of(tmp_path / "link") == first
    (corpus / "train.txt").touch()
    assert cache_of(corpus) == first


def test_cache_depends_on_split_lists_audio_code_and_folder(corpus, tmp_path, monkeypatch):
    caches = [cache_of(corpus)]
    text = (corpus / "test.txt").read_text()
    (corpus / "test.txt").write_text(text.replace("oh no.", "oh yes."))
    caches.append(cache_of(corpus))
    audio = corpus / "data" / "3" / "0_0_d3.wav"
    audio.write_bytes((corpus / "data" / "3" / "1_1_d3.wav").read_bytes())
    caches.append(cache_of(corpus))
    os.utime(audio)
    caches.append(cache_of(corpus))
    audio.chmod(0o600)  # what is left out may be readable now
    caches.append(cache_of(corpus))
    monkeypatch.setattr("usdm_sft.corpus.builder.code_digest", lambda: "another")
    caches.append(cache_of(corpus))
    caches.append(cache_of(shutil.copytree(corpus, tmp_path / "moved")))  # rows contain paths
    assert len(set(caches)) == 7


def test_changed_list_is_seen_by_load_dataset(corpus, tmp_path):
    options = {"cache_dir": str(tmp_path / "cache")}
    assert by_name(corpus, **options)["test"][2]["agent_text"] == "oh no. where do we go now?"
    text = (corpus / "test.txt").read_text()
    (corpus / "test.txt").write_text(text.replace("oh no.", "oh yes."))
    assert by_name(corpus, **options)["test"][2]["agent_text"] == "oh yes. where do we go now?"


def test_digests_are_exposed(corpus):
    builder = DailyTalkUSDM(data_dir=corpus)
    assert len(builder.audio_digests) == 4 + 5 + 2 + 3 + 3 + 2
    assert set(builder.list_digests) == {"train", "test"}
    assert len(builder.config.corpus_digest) == len(builder.content_digest) == 64


@pytest.mark.parametrize("kind", ["fifo", "missing", "not audio"])
def test_constructor_opens_no_recording(corpus, tmp_path, monkeypatch, kind):
    path = corpus / "data" / "3" / "0_0_d3.wav"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "not audio":
        path.write_text("not audio")
    with monkeypatch.context() as patch:
        patch.setattr(addresses, "open_file", None)
        patch.setattr(addresses, "open", None, raising=False)
        builder = DailyTalkUSDM(data_dir=corpus, cache_dir=str(tmp_path / "cache"))
    error = FileNotFoundError if kind == "missing" else AudioError
    with pytest.raises(
        error, match=r"utterance 0_0_d3: audio file .*0_0_d3\.wav .*: (replace the file|put it there, .*), or leave out"
    ):
        builder.download_and_prepare()
    with pytest.raises(error, match=r"utterance 0_0_d3: audio file"):
        builder.as_streaming_dataset()


@pytest.mark.parametrize("screened", [False, True])
def test_audio_changed_before_rows_is_refused(corpus, tmp_path, screened):
    """The rows would lie in the cache under the name of the earlier audio."""
    path = corpus / "data" / "3" / "0_0_d3.wav"
    content = path.read_bytes()
    builder = DailyTalkUSDM(data_dir=corpus, cache_dir=str(tmp_path / "cache"), on_bad_audio="skip")
    if screened:
        builder.screen_audio()
    path.write_bytes(b"")
    with pytest.raises(
        AudioError, match="recordings were changed after the corpus was opened: let nothing write to them"
    ):
        builder.download_and_prepare()
    path.write_bytes(content)
    again = DailyTalkUSDM(data_dir=corpus, cache_dir=str(tmp_path / "cache"), on_bad_audio="skip")
    again.download_and_prepare()
    assert again.cache_dir != builder.cache_dir and again.as_dataset(split="train")["id"][:] == IDS["train"]


def test_errors_name_value_and_place(corpus, tmp_path):
    with pytest.raises(ValueError, match="data_dir is missing"):
        DailyTalkUSDM()
    with pytest.raises(FileNotFoundError, match=r"data_dir .*nowhere does not exist"):
        DailyTalkUSDM(data_dir=tmp_path / "nowhere")
    (corpus / "data" / "3" / "0_0_d3.wav").write_text("not audio")
    (corpus / "test.txt").write_text("bad\n")
    with pytest.raises(CorpusError, match=r"test\.txt:1: 1 fields instead of 5"):
        DailyTalkUSDM(data_dir=corpus)
    (corpus / "test.txt").write_text("0_0_d2|0|{P}|alone|none\n")
    with pytest.raises(CorpusError, match=r"test\.txt: not one pair: d2: a single turn makes no pair"):
        DailyTalkUSDM(data_dir=corpus)


def test_registration_leaves_the_rest_of_datasets_alone():
    modules = datasets.packaged_modules._PACKAGED_DATASETS_MODULES
    assert modules["dailytalk_usdm"][0] == "dailytalk_usdm"
    assert {"csv", "parquet", "audiofolder"} <= set(modules)


def test_public_names():
    assert set(dailytalk_usdm.__all__) <= set(dir(dailytalk_usdm))
    for name in dailytalk_usdm.__all__:
        value = getattr(dailytalk_usdm, name)
        assert getattr(value, "__name__", name) == name
    assert dailytalk_usdm.__version__ == usdm_sft.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dailytalk_usdm.nothing  # noqa: B018


def test_names_for_type_checkers_equal_the_lazy_names():
    """The imports under TYPE_CHECKING are those that `__getattr__` makes."""
    module = ast.parse((REPOSITORY / "dailytalk_usdm.py").read_text())
    [block] = [node for node in module.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    typed = {}
    for imported in block.body:
        [alias] = imported.names
        original = "" if alias.name == alias.asname else f":{alias.name}"
        typed[alias.asname] = imported.module + original
    assert typed == dailytalk_usdm._LAZY
    defined_here = {"DailyTalkUSDM", "DailyTalkUSDMConfig", "__version__", "load_dataset"}
    assert set(dailytalk_usdm.__all__) == {*typed, *defined_here}


def test_code_digest_covers_the_modules_that_the_builder_imports():
    """The exceptions are modules that cannot change a row."""
    code = "import sys, dailytalk_usdm; print(*(m for m in sys.modules if m.startswith('usdm_sft.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    covered = {"usdm_sft.audio", "usdm_sft.corpus", "usdm_sft.template.streams", "usdm_sft.utils.texts"}
    others = {name for name in done.stdout.split() if name not in covered and name.rpartition(".")[0] not in covered}
    assert others <= {
        "usdm_sft.template",
        "usdm_sft.template.config",  # for the largest number of units, above which they are refused
        "usdm_sft.utils",
        *(f"usdm_sft.utils.{n}" for n in ("cache_keys", "download", "files", "forks", "locks", "once", "progress")),
    }


@pytest.mark.parametrize("module", ["corpus/read.py", "audio/digests.py", "template/streams.py", "utils/texts.py"])
def test_code_digest_changes_with_the_code(monkeypatch, module):
    before = code_digest()
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: real(path) + b"#" * path.as_posix().endswith(module))
    assert code_digest() != before


def test_builder_names_dailytalk_for_its_published_lists_only(mini, tmp_path, monkeypatch):
    other = DailyTalkUSDM(data_dir=mini / "corpus", cache_dir=str(tmp_path / "other")).info
    assert (other.homepage, other.license, other.citation) == ("", "", "")
    assert other.description.startswith(
        "Spoken dialogs as examples for spoken-dialog language models. A row of single_turn is"
    )
    lists = {split: ("", download.sha256_file(mini / "corpus" / f"{split}.txt")) for split in ("train", "test")}
    monkeypatch.setattr(dailytalk, "SPLIT_LISTS", lists)
    published = DailyTalkUSDM(data_dir=mini / "corpus", cache_dir=str(tmp_path / "published")).info
    assert published.description.startswith(
        "DailyTalk, 20 hours of English dialogs read by two speakers, as examples for"
    )
    assert published.homepage == "https://github.com/keonlee9420/DailyTalk"
    assert "CC BY-SA 4.0" in published.license and "CC BY-NC-SA 4.0" in published.license
    assert "arXiv:2207.01063" in published.citation
