import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import edit_counts, edit_rows, options, replace_file, replace_table
from usdm_sft.cli.main import main
from usdm_sft.folder.export import export
from usdm_sft.folder.layout import read_counts
from usdm_sft.folder.verify import VerificationError, verify
from usdm_sft.prepare.prepare import prepare

FILE = "single_turn/train-00003-of-00010.parquet"


def relabel(row, position, label):
    row["labels"][position] = label


def test_untouched_folder_passes(dataset_folder, capsys):
    assert verify(dataset_folder) == {"train": 10, "test": 3}
    main(["verify", str(dataset_folder)])
    assert "train: 10 rows are correct\n" in capsys.readouterr().out


def test_flipped_byte_is_found(folder_copy, capsys):
    path = folder_copy / FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(folder_copy)])
    assert f"{path} was changed: its sha256 is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["README.md", "single_turn/test-00000-of-00003.parquet", "tokenizer/tokenizer.json", "pictures/units.png"]
)
def test_missing_file_is_found(folder_copy, name):
    (folder_copy / name).unlink()
    with pytest.raises(VerificationError, match=f"{name} is missing"):
        verify(folder_copy)


@pytest.mark.parametrize("name", ["single_turn/train-00099-of-00100.parquet", "tokenizer/special.json"])
def test_extra_file_is_found(folder_copy, name):
    (folder_copy / name).write_bytes(b"")
    with pytest.raises(VerificationError, match=f"{name} does not belong to the folder: remove it"):
        verify(folder_copy)


FORGED = [
    (lambda row: relabel(row, -3, 7), r"label 7 of token \d+ is neither -100 nor the token's id"),
    (lambda row: relabel(row, 0, 1), "labels differ from the encoded columns: token 0 is 1, not -100"),
    (lambda row: relabel(row, -3, -100), r"labels differ from the encoded columns: token \d+ is -100, not 28705"),
    (lambda row: row["labels"].pop(), r"\d+ input_ids, but \d+ labels"),
    (lambda row: row["attention_mask"].pop(), r"attention_mask is not \d+ ones, one per token"),
    (lambda row: row["attention_mask"].__setitem__(5, 0), r"attention_mask is not \d+ ones, one per token"),
    (lambda row: row.update(length=7), r"length is 7, but the row has \d+ tokens"),
    (lambda row: row.update(agent_text="other"), "input_ids differ from the encoded columns: token"),
    (lambda row: row.update(user_units=[60_000]), "user_units contains unit 60000"),
    (lambda row: row.update(user_text="<|correspond|>"), "part of a special token"),
]  # fmt: skip


def test_forged_rows_with_new_digests_are_found(folder_copy):
    """Each file of train has one row, and each of them another forgery."""
    for number, (change, _) in enumerate(FORGED):
        edit_rows(folder_copy, f"single_turn/train-{number:05d}-of-00010.parquet", lambda rows, to=change: to(rows[0]))
    with pytest.raises(VerificationError) as raised:
        verify(folder_copy)
    for number, (_, message) in enumerate(FORGED):
        assert re.search(rf"train-{number:05d}-of-00010\.parquet: row 0 .*{message}", str(raised.value))


def test_same_id_in_two_files_is_found(folder_copy):
    edit_rows(folder_copy, FILE, lambda rows: rows[0].update(id="d3_0"))
    message = rf"{FILE}: row 0 .*the same id is at .*train-00000-of-00010.parquet: row 0 \(d3_0\)"
    with pytest.raises(VerificationError, match=message):
        verify(folder_copy)


@pytest.fixture(scope="module")
def one_file(mini, unit_model, dataset_folder, tmp_path_factory):
    """The rows of `dataset_folder` in one file for each split, so that a batch has several of them."""
    root = tmp_path_factory.mktemp("one_file")
    shutil.copytree(dataset_folder.parent / "cache", root / "cache")
    prepare(**options(mini, unit_model, root, shard_dialogs=64, num_output_shards=1))
    return root / "out"


def test_bad_rows_are_found_after_good_ones_in_a_batch(one_file, tmp_path):
    assert verify(one_file) == {"train": 10, "test": 3}
    folder, name = shutil.copytree(one_file, tmp_path / "out"), "single_turn/train-00000-of-00001.parquet"
    ids = [row["id"] for row in pq.read_table(folder / name, columns=["id"]).to_pylist()]
    edit_rows(folder, name, lambda rows: (relabel(rows[4], -3, 7), rows[9].update(agent_text="other")))
    with pytest.raises(VerificationError) as raised:
        verify(folder)
    found = [re.search(r"parquet: row (\d+) \((\w+)\)", problem) for problem in raised.value.problems]
    assert [match.groups() for match in found if match] == [("4", ids[4]), ("9", ids[9])]


def test_lost_row_with_a_new_digest_is_found(folder_copy):
    edit_rows(folder_copy, FILE, lambda rows: rows.clear())
    with pytest.raises(VerificationError, match=r"counts\.json: train has 9 rows, not 10") as raised:
        verify(folder_copy)
    assert "README.md: its YAML does not say that train has 9 rows" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda table: table.append_column("more", pa.array([1])), "more"),
        (
            lambda table: table.select(table.column_names[::-1]),
            "their order is length, attention_mask, labels, input_ids, ",
        ),
    ],
)
def test_other_columns_are_found(folder_copy, change, what):
    replace_table(folder_copy, FILE, change)
    message = f"{FILE} has other columns than the README.md beside it says: {what}"
    with pytest.raises(VerificationError, match=message):
        verify(folder_copy)


def set_column(name, values, kind=None):
    column = pa.array(values, type=kind)
    return lambda table: table.set_column(table.schema.get_field_index(name), pa.field(name, column.type), column)


INT32S = pa.list_(pa.int32())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop_columns(["labels"]), "has no column labels"),
        # a folder of an earlier version
        (lambda table: table.drop_columns(["attention_mask", "length"]), "has no column attention_mask"),
        (set_column("attention_mask", [[1]]), r"column attention_mask is of type list<\w+: int64>"),
        (lambda table: pa.table({"x": [1]}), "has no column id"),
        (set_column("input_ids", [5]), "column input_ids is of type int64"),
        (set_column("input_ids", [["a"]]), r"column input_ids is of type list<\w+: string>"),
        (set_column("user_units", [[1.5]]), r"column user_units is of type list<\w+: double>"),
        (set_column("user_text", [["a"]]), r"column user_text is of type list<\w+: string>|column user_speaker is of type"),
        (set_column("input_ids", [None], INT32S), "a value of column input_ids is missing"),
        (set_column("labels", [[None]], INT32S), "a value of column labels is missing"),
        (set_column("user_emotion", [None], pa.string()), "a value of column user_emotion is missing"),
        (set_column("user_units", [[None]], pa.list_(pa.uint16())), "a value of column user_units is missing"),
    ],
)  # fmt: skip
def test_rows_of_other_types_give_one_line_in_every_command(folder_copy, capsys, change, message):
    replace_table(folder_copy, FILE, change)
    for args in (["verify"], ["stats"], ["show", "--index", "3"]):
        with pytest.raises(SystemExit, match="1"):
            main([args[0], str(folder_copy), *args[1:]])
        error = capsys.readouterr().err
        assert re.search(f"{FILE}:? ({message})", error) and error.count("\n") == 1
        assert error.endswith("run prepare again and pass --overwrite (Python: overwrite=True)\n")


def test_export_refuses_rows_of_other_types(folder_copy, tmp_path):
    replace_table(folder_copy, FILE, set_column("labels", [None], INT32S))
    with pytest.raises(ValueError, match=f"{FILE}: a value of column labels is missing: run"):
        export(folder_copy, tmp_path / "text")
    assert not (tmp_path / "text" / "train.txt").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "is not a Parquet file"),
        (lambda content: b"PAR1" + b"x" * 5000 + b"PAR1", "is not a Parquet file"),
        (lambda content: content[:-50], "is not a Parquet file"),
        (lambda content: content[:200] + bytes(300) + content[500:], "is damaged"),
    ],
)
def test_damaged_rows_give_one_line(folder_copy, tmp_path, capsys, damage, message):
    replace_file(folder_copy, FILE, damage((folder_copy / FILE).read_bytes()))
    for args in (["verify"], ["stats"], ["show", "--index", "3"]):
        with pytest.raises(SystemExit, match="1"):
            main([args[0], str(folder_copy), *args[1:]])
        error = capsys.readouterr().err
        assert f"{FILE} {message} (" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: counts["splits"]["train"].update(labelled_tokens=5), "train has 1301 labelled_tokens, not 5"),
        (lambda counts: counts["statistics"]["test"].update(distinct_units=5), "statistics of test differ from those of its rows"),
        (lambda counts: counts["settings"].update(max_length=300), r"\d+ tokens, more than max_length 300"),
        (lambda counts: counts["digests"].update(tokenizer="0" * 64), r"tokenizer is not the tokenizer that counts\.json names"),
        (lambda counts: counts["files"].update({"README.md": 5}), r"'README\.md' has 5 instead of a sha256"),
        (lambda counts: counts["digests"].clear(), r"tokenizer is not the tokenizer that counts\.json names"),
        (lambda counts: counts["splits"].update(dev={}), "names no file of split dev"),
    ],
)  # fmt: skip
def test_counts_that_differ_from_the_rows_are_found(folder_copy, change, message):
    edit_counts(folder_copy, change)
    with pytest.raises(VerificationError, match=message):
        verify(folder_copy)


NO_COUNTS = "is not the counts of a dataset folder: run prepare again and pass --overwrite (Python: overwrite=True)"
NAMES = ["../secret", "/etc/passwd", "a/../b", "..", "", "a//b", "a\\b", "a\0b", "a\nb", "a\ud800", "\x1b[2J"]


def as_config(counts, name):
    counts["config"] = name


@pytest.mark.parametrize(
    "place",
    [
        as_config,
        lambda counts, name: counts["splits"].update({name: counts["splits"]["train"]}),
        lambda counts, name: counts["files"].update({name: "0" * 64}),
    ],
    ids=["config", "splits", "files"],
)
@pytest.mark.parametrize("name", NAMES)
def test_names_outside_the_folder_are_refused(dataset_folder, tmp_path, place, name):
    shutil.copy(dataset_folder / "counts.json", tmp_path)
    edit_counts(tmp_path, lambda counts: place(counts, name))
    message = f"counts.json: {name!r} is not a name in a dataset folder: run prepare again"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_counts(tmp_path)


@pytest.mark.parametrize("part", ["config", "splits"])
def test_names_of_config_and_splits_have_no_slash(dataset_folder, tmp_path, part):
    shutil.copy(dataset_folder / "counts.json", tmp_path)
    edit_counts(tmp_path, lambda counts: counts.update({part: "a/b" if part == "config" else {"a/b": {}}}))
    with pytest.raises(ValueError, match="'a/b' is not a name in a dataset folder"):
        read_counts(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("key", "config") for value in (None, 5)),
        *({name: value} for name in ("settings", "digests", "splits", "statistics", "files") for value in (None, [], "x", 5)),
        *({"num_units": value} for value in (None, "x", 0, -1, 65_537, 10**400)),
        {"splits": {}}, {"splits": {"train": None}}, {"splits": {"train": []}}, {"settings": {}},
        {"settings": {"template": None, "history": 0, "max_length": 5}},
        {"settings": {"template": {}, "history": "x", "max_length": 5}},
        {"settings": {"template": {}, "history": 0, "max_length": None}},
    ],
    ids=str,
)  # fmt: skip
def test_counts_of_other_types_are_refused(dataset_folder, tmp_path, change):
    shutil.copy(dataset_folder / "counts.json", tmp_path)
    edit_counts(tmp_path, lambda counts: counts.update(change))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'counts.json'} {NO_COUNTS}")):
        read_counts(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"), [(5, f" {NO_COUNTS}"), ("../secret", ": '../secret' is not a name in a dataset folder: run prep")]
)  # fmt: skip
def test_every_command_refuses_bad_counts_in_one_line(folder_copy, tmp_path, capsys, config, message):
    edit_counts(folder_copy, lambda counts: counts.update(config=config))
    for args in (["verify"], ["stats"], ["show"], ["export", str(tmp_path / "text")], ["push", "user/name"]):
        with pytest.raises(SystemExit, match="1"):
            main([args[0], str(folder_copy), *args[1:]])
        error = capsys.readouterr().err
        assert error.startswith(f"dailytalk-usdm {args[0]}: {folder_copy / 'counts.json'}{message}")
        assert error.count("\n") == 1
    assert not (tmp_path / "text").exists()


def test_deeply_nested_counts_are_refused(folder_copy):
    (folder_copy / "counts.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"counts\.json is not JSON .*: run prepare again and pass --overwrite"):
        verify(folder_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evil": 1}, r"settings\.template is not a template \(.*evil.*\): run prepare again"),
        ({"instruction": 5}, r"template\.instruction is 5: give a text"),
        ({"user_role": None}, r"template\.user_role is None: give a text"),
        ({"loss": 5}, r"template\.loss is 5: give a list of one or more of"),
    ],
)
def test_malformed_template_is_refused(folder_copy, change, message):
    edit_counts(folder_copy, lambda counts: counts["settings"]["template"].update(change))
    with pytest.raises(ValueError, match=message):
        verify(folder_copy)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"# no YAML",
        b"---\na: [\n---\n",
        b"---\na: b: c\n---\n",
        b"---\n- a\n---\n",
        b"---\nconfigs: 5\n---\n",
        b"\xff\xfe\0",
        b'---\nconfigs: !!python/object/apply:os.system ["touch pwned"]\n---\n',
        b"---\nconfigs:\n- config_name: single_turn\n  data_files: '../../**'\n---\n",
        b"---\nconfigs:\n- config_name: single_turn\n  data_files: http://127.0.0.1:9/x.parquet\n---\n",
    ],
)
def test_malformed_card_is_refused(folder_copy, tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    replace_file(folder_copy, "README.md", text)
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(folder_copy)])
    error = capsys.readouterr().err
    assert "README.md does not have the YAML of this folder (" in error and error.count("\n") == 1
    assert not (tmp_path / "pwned").exists()


def test_card_that_names_other_data_files_is_refused(folder_copy):
    """`load_dataset` would read files that were not verified."""
    card = (folder_copy / "README.md").read_text()
    replace_file(folder_copy, "README.md", card.replace("path: single_turn/test-*", "path: other/test-*").encode())
    with pytest.raises(
        ValueError, match=r"README\.md does not have .*its configs are not the data files of counts\.json"
    ):
        verify(folder_copy)


@pytest.mark.parametrize("change", [lambda line: "", lambda line: line.replace(line.split()[-1], "0" * 64)])
def test_card_without_the_digest_of_the_data_is_refused(folder_copy, change):
    """`load_dataset` would give rows of its cache that another folder has."""
    card = (folder_copy / "README.md").read_text()
    [line] = re.findall(r"^  description: data files with sha256 [0-9a-f]{64}\n", card, re.MULTILINE)
    replace_file(folder_copy, "README.md", card.replace(line, change(line)).encode())
    with pytest.raises(VerificationError, match=r"README\.md is not .* does not hold the digest of its data files"):
        verify(folder_copy)


def test_card_without_features_is_refused(folder_copy):
    head, _, _ = (folder_copy / "README.md").read_text().partition("dataset_info:")
    replace_file(folder_copy, "README.md", f"{head}---\n".encode())
    with pytest.raises(ValueError, match=r"README\.md does not have .*its dataset_info names no features or splits"):
        verify(folder_copy)


def test_control_sequences_are_escaped(folder_copy, capsys):
    edit_rows(folder_copy, FILE, lambda rows: rows[0].update(id="\x1b]0;x\x07", user_text="", user_emotion="\x1b[2J"))
    for args in (["verify"], ["show", "--index", "3"], ["stats"]):
        try:
            main([args[0], str(folder_copy), *args[1:]])
        except SystemExit as error:
            assert error.code == 1
        captured = capsys.readouterr()
        shown = captured.out + captured.err
        assert "\x1b" not in shown and "\x07" not in shown
        assert "\\x1b" in shown


def test_number_of_reported_problems_is_limited(folder_copy):
    for path in (folder_copy / "single_turn").iterdir():
        path.unlink()
    for path in (folder_copy / "tokenizer").iterdir():
        path.unlink()
    for number in range(20):
        (folder_copy / "tokenizer" / f"{number}").touch()
    with pytest.raises(VerificationError, match="and more problems") as raised:
        verify(folder_copy)
    assert len(raised.value.problems) == 20


def test_other_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no counts\.json"):
        verify(tmp_path)


def test_rows_equal_the_reference(dataset_folder, mini):
    assert verify(dataset_folder, mini / "expected") == {"train": 10, "test": 3}


def test_command_line_mentions_the_comparison_with_the_reference(dataset_folder, mini, capsys):
    main(["verify", str(dataset_folder), "--against", str(mini / "expected")])
    assert capsys.readouterr().out == (
        f"train: 10 rows are correct and identical to {mini / 'expected' / 'train.txt'} (any order)\n"
        f"test: 3 rows are correct and identical to {mini / 'expected' / 'test.txt'} (any order)\n"
    )


@pytest.fixture
def text(mini, tmp_path):
    shutil.copytree(mini / "expected", tmp_path / "text")
    return tmp_path / "text"


def change_line(path, number, change):
    lines = path.read_text().split("\n")
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines))


def test_first_difference_is_described(dataset_folder, text, capsys):
    line = (text / "test.txt").read_text().split("\n")[1]
    ids = line.split("|")[0].split()
    at = len(ids) - 3
    changed = " ".join([*ids[:at], "13", *ids[at + 1 :]])
    change_line(text / "test.txt", 2, lambda line: f"{changed}|{line.split('|')[1]}")
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(dataset_folder), "--against", str(text)])
    error = capsys.readouterr().err
    assert f"{text / 'test.txt'}:2 is not a row of test: the nearest row is d" in error
    assert f"token {at} is 13 ('<0x0A>'), not 28705 ('▁')" in error
    assert "train" not in error


def test_difference_in_a_label_is_described(dataset_folder, text):
    change_line(text / "train.txt", 1, lambda line: line.rsplit(" ", 1)[0] + " 2")
    with pytest.raises(VerificationError, match=r"train.txt:1 .* of the labels, token \d+ is 2 \('</s>'\), not -100"):
        verify(dataset_folder, text)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[1:], r"row \d+ \(d\w+\) is not a line of .*test\.txt"),
        (
            lambda lines: [*lines, lines[0]],
            r"test\.txt:4 stands more often in the file than in test, which has it 1 time$",
        ),
        (lambda lines: [*lines, ""], r"test\.txt:4 is not a row of test: it is not input_ids, '\|' and labels"),
        (lambda lines: [*lines, "1 2|x"], "it is not input_ids"),
        (lambda lines: [*lines, f"{10**20}|1"], "it is not input_ids"),
    ],
)
def test_extra_missing_and_malformed_lines_are_found(dataset_folder, text, edit, message):
    lines = (text / "test.txt").read_text().split("\n")
    (text / "test.txt").write_text("\n".join(edit(lines)))
    if lines and edit(lines)[-1] == "":
        (text / "test.txt").write_text("\n".join(edit(lines)) + "\n")
    with pytest.raises(VerificationError, match=message):
        verify(dataset_folder, text)


def test_missing_text_file_is_refused(dataset_folder, text):
    (text / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.txt is not a file: name the folder with the reference's"):
        verify(dataset_folder, text)


def test_other_tokenizer_ends_verify_before_rows_are_read(folder_copy, monkeypatch):
    """Its rows could decode to any amount of text."""
    edit_counts(folder_copy, lambda counts: counts["digests"].update(tokenizer="0" * 64))
    read = []
    monkeypatch.setattr("usdm_sft.folder.verify.check_rows", lambda *args, **options: read.append(args) or [])
    with pytest.raises(VerificationError, match=r"tokenizer is not the tokenizer that counts\.json names"):
        verify(folder_copy)
    assert read == []
