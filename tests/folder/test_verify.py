import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import edit_rows, find_problems, options, replace_file, replace_table
from usdm_sft.cli.main import main
from usdm_sft.folder.export import export
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.prepare import prepare

FILE = "single_turn/train-00003-of-00010.parquet"


def relabel(row, position, label):
    row["labels"][position] = label


def test_untouched_folder_passes(dataset_folder, mini, capsys):
    main(["verify", str(dataset_folder)])
    assert capsys.readouterr().out == "train: 10 rows are correct\ntest: 3 rows are correct\n"
    main(["verify", str(dataset_folder), "--against", str(mini / "expected")])
    assert capsys.readouterr().out == (
        f"train: 10 rows are correct and identical to {mini / 'expected' / 'train.txt'} (any order)\n"
        f"test: 3 rows are correct and identical to {mini / 'expected' / 'test.txt'} (any order)\n"
    )


def test_changed_missing_and_extra_files_are_found(folder_copy):
    content = bytearray((folder_copy / FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder_copy / FILE).write_bytes(content)
    missing = {"README.md", "single_turn/test-00000-of-00003.parquet", "tokenizer/tokenizer.json", "pictures/units.png"}
    for name in missing:
        (folder_copy / name).unlink()
    extra = {"single_turn/train-00099-of-00100.parquet", "tokenizer/special.json"}
    for name in extra:
        (folder_copy / name).write_bytes(b"")
    found = find_problems(folder_copy)
    [changed] = [problem for problem in found if "its sha256 is" in problem]
    assert changed.startswith(f"{folder_copy / FILE} was changed: its sha256 is ")
    expected = {
        f"{folder_copy / name} is missing: put it back, or run prepare again and pass --overwrite (Python: overwrite=True)"
        for name in missing
    }
    expected |= {f"{folder_copy / name} does not belong to the folder: remove it" for name in extra}
    assert expected == {*found} - {changed}


def set_column(name, values, kind=None):
    column = pa.array(values, type=kind)
    return lambda table: table.set_column(table.schema.get_field_index(name), pa.field(name, column.type), column)


def change_row(change):
    """Return a change of a table of one row."""

    def edit(table):
        [row] = table.to_pylist()
        change(row)
        return pa.Table.from_pylist([row], schema=table.schema)

    return edit


INT32S = pa.list_(pa.int32())
FORGED_ROWS = [
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
CONTRADICTIONS = [
    (lambda row: row.update(id="d9_9"), r"\(d9_9\): the id of dialog_id and turn is d105_0"),
    (lambda row: row.update(turn=5), "the id of dialog_id and turn is d105_5"),
    (lambda row: row.update(dialog_id="d9"), "the id of dialog_id and turn is d9_0"),
    (lambda row: row.update(turn=-2, id=f"{row['dialog_id']}_-2"), "its first turn is -2"),
    (lambda row: row.update(user_seconds=1.0), r"user_units are of \d+ frames, which is not the length of a recording of 1 s"),
    (lambda row: row.update(agent_seconds=float("nan")), "agent_units are of .* a recording of nan s"),
]  # fmt: skip
OTHER_TYPES = [
    (lambda table: table.drop_columns(["labels"]), "has no column labels"),
    # a folder of an earlier version
    (lambda table: table.drop_columns(["attention_mask", "length"]), "has no column attention_mask"),
    (set_column("attention_mask", [[1]]), r"column attention_mask is of type list<\w+: int64>"),
    (lambda table: pa.table({"x": [1]}), "has no column id"),
    (set_column("input_ids", [5]), "column input_ids is of type int64"),
    (set_column("input_ids", [["a"]]), r"column input_ids is of type list<\w+: string>"),
    (set_column("user_units", [[1.5]]), r"column user_units is of type list<\w+: double>"),
    (set_column("user_text", [["a"]]), r"column user_(text is of type list<\w+: string>|speaker is of type)"),
    (set_column("input_ids", [None], INT32S), "a value of column input_ids is missing"),
    (set_column("labels", [[None]], INT32S), "a value of column labels is missing"),
    (set_column("user_emotion", [None], pa.string()), "a value of column user_emotion is missing"),
    (set_column("user_units", [[None]], pa.list_(pa.uint16())), "a value of column user_units is missing"),
]  # fmt: skip
OTHER_COLUMNS = [
    (lambda table: table.append_column("more", pa.array([1])), "has other columns than the README.md beside it says: more"),
    (lambda table: table.select(table.column_names[::-1]), "says: their order is length, attention_mask, labels, input_ids, "),
]  # fmt: skip


@pytest.mark.parametrize(
    "forgeries",
    [
        [(change_row(change), message) for change, message in FORGED_ROWS],
        [(change_row(change), message) for change, message in CONTRADICTIONS],
        OTHER_TYPES,
        OTHER_COLUMNS,
    ],
    ids=["rows", "contradictions", "types", "columns"],
)
def test_forged_rows_with_new_digests_are_found(folder_copy, forgeries):
    """Each file has one row, and each of them another forgery."""
    names = sorted(f"single_turn/{path.name}" for path in (folder_copy / "single_turn").iterdir())
    for name, (change, _) in zip(names, forgeries, strict=False):
        replace_table(folder_copy, name, change)
    problems = find_problems(folder_copy)
    for name, (_, message) in zip(names, forgeries, strict=False):
        assert any(re.search(f"{name}.* ?{message}", problem) for problem in problems), (name, message, problems)


DAMAGES = [
    (lambda content: b"", "is not a Parquet file"),
    (lambda content: b"PAR1" + b"x" * 5000 + b"PAR1", "is not a Parquet file"),
    (lambda content: content[:-50], "is not a Parquet file"),
    (lambda content: content[:200] + bytes(300) + content[500:], "is damaged"),
]


def test_damaged_files_are_found(folder_copy):
    names = [f"single_turn/train-{number:05d}-of-00010.parquet" for number in range(4)]
    for name, (damage, _) in zip(names, DAMAGES, strict=True):
        replace_file(folder_copy, name, damage((folder_copy / name).read_bytes()))
    problems = find_problems(folder_copy)
    for problem, name, (_, message) in zip(problems, names, DAMAGES, strict=True):
        assert problem.startswith(f"{folder_copy / name} {message} (")
        assert problem.endswith("run prepare again and pass --overwrite (Python: overwrite=True)")


@pytest.mark.parametrize("change", [OTHER_TYPES[0][0], OTHER_TYPES[-1][0], None], ids=["type", "value", "damage"])
def test_bad_rows_give_one_line_in_every_command(folder_copy, refused, change):
    if change is None:
        replace_file(folder_copy, FILE, DAMAGES[-1][0]((folder_copy / FILE).read_bytes()))
    else:
        replace_table(folder_copy, FILE, change)
    for args in (["verify"], ["stats"], ["show", "--index", "3"]):
        error = refused(args[0], folder_copy, *args[1:])
        assert FILE in error and error.endswith("run prepare again and pass --overwrite (Python: overwrite=True)")


def test_export_refuses_rows_of_other_types(folder_copy, tmp_path):
    replace_table(folder_copy, FILE, set_column("labels", [None], INT32S))
    with pytest.raises(ValueError, match=f"{FILE}: a value of column labels is missing: run"):
        export(folder_copy, tmp_path / "text")
    assert not (tmp_path / "text" / "train.txt").exists()


def test_same_id_in_two_files_is_found(folder_copy):
    edit_rows(folder_copy, FILE, lambda rows: rows[0].update(id="d3_0"))
    message = rf"{FILE}: row 0 .*the same id is at .*train-00000-of-00010.parquet: row 0 \(d3_0\)"
    assert any(re.search(message, problem) for problem in find_problems(folder_copy))


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
    found = [re.search(r"parquet: row (\d+) \((\w+)\)", problem) for problem in find_problems(folder)]
    assert [match.groups() for match in found if match] == [("4", ids[4]), ("9", ids[9])]


def test_lost_row_with_a_new_digest_is_found(folder_copy):
    edit_rows(folder_copy, FILE, lambda rows: rows.clear())
    problems = find_problems(folder_copy)
    assert f"{folder_copy / 'counts.json'}: train has 9 rows, not 10" in problems
    assert f"{folder_copy / 'README.md'}: its YAML does not say that train has 9 rows" in problems


def test_turns_that_differ_between_rows(folder_copy, encoder):
    """Of a text, the letters differ in case only, and have the same ids."""

    def forge_unit(row):
        """Another unit in the user's speech, in ids and labels as well."""
        row["user_units"][0] = (row["user_units"][0] + 1) % 50
        encoded = encoder({name: [row[name]] for name in encoder.template.parts})
        row.update({name: values[0].tolist() for name, values in encoded.items()})

    changes = {  # by the number of the file; its row shares a turn with the row of the file before
        1: ("d3", 1, "text", lambda row: row.update(user_text=row["user_text"].upper())),
        4: ("d8", 1, "speaker", lambda row: row.update(user_speaker="9")),
        6: ("d8", 3, "emotion", lambda row: row.update(user_emotion="fear")),
        9: ("d77", 1, "units", forge_unit),
    }
    expected = []
    for number, (dialog, turn, name, change) in changes.items():
        before, file = (f"single_turn/train-{each:05d}-of-00010.parquet" for each in (number - 1, number))
        edit_rows(folder_copy, file, lambda rows, change=change: change(rows[0]))
        first, place = f"{before}: row 0 ({dialog}_{turn - 1})", f"{file}: row 0 ({dialog}_{turn})"
        expected.append(f"{folder_copy / place}: turn {turn} has another {name} than in {folder_copy / first}")
    assert find_problems(folder_copy) == expected


def test_dialog_in_two_splits(folder_copy):
    name = "single_turn/test-00000-of-00003.parquet"
    edit_rows(folder_copy, name, lambda rows: rows[0].update(id="d8_90", dialog_id="d8", turn=90))
    place = f"{folder_copy / name}: row 0 (d8_90)"
    assert find_problems(folder_copy) == [f"{place}: dialog d8 is in train as well: a dialog belongs to one split"]


def test_turns_of_shuffled_rows_with_history(mini, unit_model, dataset_folder, tmp_path):
    """The turns of earlier exchanges are compared as well."""
    shutil.copytree(dataset_folder.parent / "cache", tmp_path / "cache")
    changes = {"history": 1, "shuffle_seed": 3, "num_output_shards": 1, "shard_dialogs": 64}
    prepare(**options(mini, unit_model, tmp_path, **changes))
    folder, name = tmp_path / "out", "single_turn/train-00000-of-00001.parquet"
    assert verify(folder) == {"train": 10, "test": 3}

    def forge(rows, speaker, turn):
        [row] = [row for row in rows if row["id"] == "d8_2"]
        row["agent_speaker"][0] = speaker  # of turn 1
        row.update(turn=turn, id=f"d8_{turn}")

    edit_rows(folder, name, lambda rows: forge(rows, "9", 2))
    message = r"turn 1 has another speaker than in .*parquet: row \d \(d8_\d\)"
    assert any(re.search(message, problem) for problem in find_problems(folder))
    edit_rows(folder, name, lambda rows: forge(rows, "9", 1))
    assert any(re.search(r"row \d \(d8_1\): its first turn is -1", problem) for problem in find_problems(folder))


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
    for path in (*(folder_copy / "single_turn").iterdir(), *(folder_copy / "tokenizer").iterdir()):
        path.unlink()
    for number in range(20):
        (folder_copy / "tokenizer" / f"{number}").touch()
    with pytest.raises(ValueError, match="and more problems") as raised:
        verify(folder_copy)
    assert len(raised.value.problems) == 20


def test_other_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no counts\.json"):
        verify(tmp_path)
