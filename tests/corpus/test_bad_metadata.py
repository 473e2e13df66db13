"""Split lists as they come from editors, other systems and accidents: every one is read rightly or refused with file and line."""

import os
import re
import shutil
import string
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dailytalk_usdm import DailyTalkUSDM
from usdm_sft.corpus import dailytalk
from usdm_sft.corpus.problems import MAX_PROBLEMS, CorpusError
from usdm_sft.corpus.read import SAME_SPEAKER, SINGLE_TURN, read_corpus
from usdm_sft.utils import download
from usdm_sft.utils.texts import MAX_LINE, text_problem

GOOD = "0_0_d1|0|{P}|hello.|none\n1_1_d1|1|{P}|yes.|none\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "l.txt"


def read(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_corpus({"train": path})["train"]


def problems(path, content):
    with pytest.raises(CorpusError) as caught:
        read(path, content)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


# Encodings and ends of lines


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n"),
        GOOD.replace("\n", "\r"),
        GOOD.replace("\n", "\r\n", 1),
        GOOD.removesuffix("\n"),
    ],
    ids=["BOM", "CRLF", "CR", "mixed", "no last newline"],
)
def test_every_line_end_and_a_byte_order_mark_are_read_alike(path, content):
    assert read(path, content).dialogs == read(path, GOOD).dialogs
    assert read(path, content).dialogs[0].utterances[1].emotion == "none"


def test_blank_lines_are_reported(path):
    assert problems(path, "\n" + GOOD + "\n  \r\n\n") == [f"{n}: blank line: delete it" for n in (1, 4, 5, 6)]


FAR = "".join(f"0_0_d{number}|0|{{P}}|hello.|none\n" for number in range(2, 5001))


@pytest.mark.parametrize(("before", "line"), [("bad\n", 3), (FAR, 5001)], ids=["after a bad line", "far into the file"])
def test_latin_1_is_refused(path, before, line):
    content = GOOD.replace("yes", "café").encode("latin-1")
    assert problems(path, before.encode() + content) == [
        f"{line}: not UTF-8 (byte 0xE9 in '1_1_d1|1|{{P}}|caf\\udce9.|none'): save the file as UTF-8"
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_and_utf_32_are_refused(path, encoding):
    [problem] = problems(path, GOOD.encode(encoding))
    assert re.fullmatch(r"1: (not UTF-8 \(byte 0xF[EF] in .*\)|a NUL in .*): save the file as UTF-8", problem)


def test_surrogate_in_utf_8_is_refused(path):
    [problem] = problems(path, GOOD.encode() + b"0_0_d2|0|{P}|a\xed\xb2\x80|none\n")
    assert problem.startswith("3: not UTF-8 (byte 0xED in ")


def test_nul_is_refused(path):
    assert problems(path, GOOD.replace("yes", "y\0s")) == [
        "2: a NUL in '1_1_d1|1|{P}|y\\x00s.|none': save the file as UTF-8"
    ]


def test_control_character_in_an_emotion(path):
    assert problems(path, GOOD.replace("none", "no\x1bne")) == [
        f"{line}: emotion 'no\\x1bne' holds a control character: correct it" for line in (1, 2)
    ]


# What is far too much


def within(megabytes, call):
    """The result of `call`, that may take no more memory than that."""
    tracemalloc.start()
    try:
        return call()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < megabytes * 1e6


def test_line_of_100_megabytes_is_refused_in_little_memory(path):
    path.write_bytes(b"x" * 100_000_000)

    def call():
        with pytest.raises(
            CorpusError, match=r"l\.txt:1: line of more than 1,000,000 characters, 'x+\.\.\.': name a split"
        ):
            read_corpus({"train": path})

    within(5, call)


def test_sparse_file_is_refused_in_little_memory(path):
    path.touch()
    os.truncate(path, 50_000_000_000)

    def call():
        with pytest.raises(CorpusError, match=r"l\.txt:1: line of more than 1,000,000 characters"):
            read_corpus({"train": path})

    within(5, call)


@pytest.mark.parametrize("line", ["garbage\n", "\n", "0_0_d1|0|{P}|hello.|none\n"], ids=["garbage", "blank", "same"])
def test_reading_stops_at_the_thousandth_problem(path, line):
    path.write_text(line * 2_000_000)

    def call():
        with pytest.raises(CorpusError) as caught:
            read_corpus({"train": path})
        return caught.value

    error = within(5, call)
    assert len(error.problems) == MAX_PROBLEMS
    assert str(error).endswith("... and 980 more problems, where reading stopped")
    assert len(str(error)) < 10_000


def test_dialogs_without_a_first_turn_stop_the_reading(path):
    content = "".join(f"1_0_d{number}|0|{{P}}|hello.|none\n" for number in range(5000))
    assert len(problems(path, content)) == MAX_PROBLEMS


def test_longest_line(path):
    text = "a" * (MAX_LINE - len("1_1_d1|1|{P}||none"))
    assert read(path, GOOD.replace("yes.", text)).dialogs[0].utterances[1].text == text
    assert problems(path, GOOD.replace("yes.", text + "a"))[0].startswith("2: line of more than 1,000,000 characters")


# Ids become paths


@pytest.mark.parametrize(
    "utterance_id",
    [
        "../0_0_d1", "0_0_d1/../../x", "0_0_d../x", "/etc/passwd", "0_0_d/etc", "0_0_d1.wav", "0_0_d-1", "0_0_d1 ", " 0_0_d1",
        "0_0_d1234567890", "9999999999_0_d1", "0_0_d٣", "0_0_d²", "0_0_dx", "0_0_D1", "0-0-d1", "0_0_d1\\..", "~_0_d1", "",
        "0_0_d1\u2028", "0_0_d1\x0c", "0x0_0_d1", "1e3_0_d1", "_0_d1",
    ],
)  # fmt: skip
def test_malformed_id_is_refused_and_opens_no_file(path, utterance_id, monkeypatch):
    """Told with its line; nothing but the list is opened."""
    speaker = utterance_id.split("_")[1] if utterance_id.count("_") > 1 else "0"
    opened = []
    real = open
    monkeypatch.setattr(
        "builtins.open", lambda name, *args, **kwargs: opened.append(name) or real(name, *args, **kwargs)
    )
    path.write_text(f"{GOOD}{utterance_id}|{speaker}|{{P}}|hello.|none\n", newline="")
    opened.clear()
    with pytest.raises(CorpusError) as caught:
        read_corpus({"train": path})
    assert set(opened) == {path}
    first = caught.value.problems[0]
    assert first == f"{path}:3: id {utterance_id!r} is not <turn>_<speaker>_d<dialog>: correct the first field"


def test_largest_numbers(path):
    split = read(path, GOOD.replace("d1|", "d999999999|"))
    assert split.dialogs[0].utterances[0].audio == "999999999/0_0_d999999999.wav"


def test_numbers_with_leading_zeros_are_different_dialogs(path):
    """The names of the files have them as well."""
    split = read(path, GOOD + GOOD.replace("d1|", "d01|"))
    assert [dialog.utterances[0].audio for dialog in split.dialogs] == ["01/0_0_d01.wav", "1/0_0_d1.wav"]
    assert problems(path, GOOD + "01_0_d1|0|{P}|no.|none\n") == [
        "3: dialog d1 has turn 1 twice: delete one of the two lines"
    ]


# Lists in the wrong place, and what lies beside them


@pytest.fixture
def mini_corpus(tmp_path, mini):
    return shutil.copytree(mini / "corpus", tmp_path / "corpus")


@pytest.fixture
def known(mini, monkeypatch):
    """The lists of the mini corpus in the place of DailyTalk's."""
    lists = {split: ("", download.sha256_file(mini / "corpus" / f"{split}.txt")) for split in ("train", "test")}
    monkeypatch.setattr(dailytalk, "SPLIT_LISTS", lists)


def test_swapped_lists_of_dailytalk_are_refused(mini_corpus, known):
    assert list(DailyTalkUSDM(data_dir=mini_corpus).corpus) == ["train", "test"]
    swapped = {"train": "test.txt", "test": "train.txt"}
    with pytest.raises(ValueError, match=r"test\.txt is DailyTalk's test list, but is named as train: swap the lists"):
        DailyTalkUSDM(data_dir=mini_corpus, data_files=swapped)
    (mini_corpus / "mine.txt").write_text(GOOD)
    with pytest.raises(ValueError, match=r"train\.txt is DailyTalk's train list, but is named as test: swap the lists"):
        DailyTalkUSDM(data_dir=mini_corpus, data_files={"train": "mine.txt", "test": "train.txt"})


def test_one_list_alone_may_have_any_name(mini_corpus, known):
    """datasets calls it train."""
    assert list(DailyTalkUSDM(data_dir=mini_corpus, data_files="test.txt").corpus) == ["train"]


def test_other_lists_under_any_name(mini_corpus):
    swapped = {"train": "test.txt", "test": "train.txt"}
    assert len(DailyTalkUSDM(data_dir=mini_corpus, data_files=swapped).corpus["train"].dialogs) == 2


@pytest.mark.parametrize(
    "content", [None, b"", b"not JSON", b'{"3": {"0": {"text": "other words", "speaker": 1, "emotion": "anger"}}}']
)
def test_metadata_json_is_not_read(mini_corpus, content, tmp_path):
    def state(cache):
        builder = DailyTalkUSDM(data_dir=mini_corpus, cache_dir=str(tmp_path / cache))
        builder.download_and_prepare()
        rows = {split: its[:] for split, its in builder.as_dataset().items()}
        return rows, builder.content_digest, os.path.relpath(builder.cache_dir, tmp_path / cache)

    assert (mini_corpus / "metadata.json").is_file()
    before = state("before")
    (mini_corpus / "metadata.json").unlink()
    if content is not None:
        (mini_corpus / "metadata.json").write_bytes(content)
    assert state("after") == before


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: None], ids=["folder", "fifo", "missing"])
def test_list_that_is_not_a_file_is_refused(path, make):
    make(path)
    with pytest.raises(FileNotFoundError, match=r"the train split list .*l\.txt is not a file"):
        read_corpus({"train": path})


# Properties

NUMBERS = st.integers(0, 10**9 - 1).map(str)
TEXTS = st.text(max_size=40).filter(lambda text: "|" not in text and text_problem(text) is None)
FIELDS = st.text(string.ascii_letters + " {}'", max_size=10)
RELAXED = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def dialogs(draw):
    """dialog number -> [(speaker, text, emotion), ...] by turn."""
    turns = st.lists(st.tuples(NUMBERS, TEXTS, FIELDS), min_size=1, max_size=6)
    return draw(st.dictionaries(NUMBERS, turns, max_size=5))


@pytest.mark.slow
@RELAXED
@given(
    content=dialogs(), data=st.data(), end=st.sampled_from(["\n", "\r\n", "\r"]), last=st.booleans(), bom=st.booleans()
)
def test_any_list_of_valid_dialogs_comes_back(path, content, data, end, last, bom):
    lines = [
        f"{turn}_{speaker}_d{number}|{speaker}|{{P}}|{text}|{emotion}"
        for number, turns in content.items()
        for turn, (speaker, text, emotion) in enumerate(turns)
    ]
    lines = data.draw(st.permutations(lines))
    split = read(path, "\ufeff" * bom + end.join(lines) + end * (last and bool(lines)))
    expected, left_out = {}, {}
    for number, turns in content.items():
        speakers = [speaker for speaker, _, _ in turns]
        if len(turns) == 1:
            left_out[f"d{number}"] = SINGLE_TURN
        elif any(speakers[i] == speakers[i + 1] for i in range(len(turns) - 1)):
            left_out[f"d{number}"] = SAME_SPEAKER
        else:
            expected[f"d{number}"] = turns
    assert {d.id: [(u.speaker, u.text, u.emotion) for u in d.utterances] for d in split.dialogs} == expected
    assert [int(dialog.id[1:]) for dialog in split.dialogs] == sorted(int(dialog_id[1:]) for dialog_id in expected)
    assert split.left_out == left_out


PIECES = st.sampled_from(
    ["|", "\n", "\r", "_", "0", "1", "d", "0_0_d1", "1_1_d1", "|0|{P}|a|b", "<s>", "\0", "\ufeff", "٣"]
)


@RELAXED
@given(
    content=st.one_of(
        st.binary(), st.text().map(str.encode), st.lists(PIECES, max_size=60).map("".join).map(str.encode)
    )
)
def test_arbitrary_content_is_read_or_refused_with_file_and_line(path, content):
    path.write_bytes(content)
    try:
        read_corpus({"train": path})
    except CorpusError as error:
        last = content.count(b"\n") + content.count(b"\r") + 1
        for problem in error.problems:
            match = re.match(re.escape(str(path)) + r":([1-9][0-9]*): ", problem)
            assert match and int(match[1]) <= last, problem
            assert "\n" not in problem and "\r" not in problem
