import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from usdm_sft.cli import main
from usdm_sft.download import sha256_file
from usdm_sft.verify import VerificationError, verify


def edit_counts(folder, change):
    counts = json.loads((folder / "counts.json").read_text())
    change(counts)
    (folder / "counts.json").write_text(json.dumps(counts))


def rewrite(folder, name, change):
    """Change the rows of a file and record its new digest, as someone does who knows how."""
    path = folder / "single_turn" / name
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    digest = sha256_file(path)
    edit_counts(folder, lambda counts: counts["files"].update({f"single_turn/{name}": digest}))


FILE = "train-00003-of-00010.parquet"


def relabel(row, position, label):
    row["labels"][position] = label


def test_folder_passes(dataset_folder, capsys):
    assert verify(dataset_folder) == {"train": 10, "test": 3}
    main(["verify", str(dataset_folder)])
    assert "train: 10 rows are what they should be" in capsys.readouterr().out


def test_flipped_byte(folder_copy, capsys):
    path = folder_copy / "single_turn" / FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(folder_copy)])
    assert f"{path} was changed: its sha256 is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["README.md", "single_turn/test-00000-of-00003.parquet", "tokenizer/tokenizer.json", "pictures/units.png"]
)
def test_missing_file(folder_copy, name):
    (folder_copy / name).unlink()
    with pytest.raises(VerificationError, match=f"{name} is missing"):
        verify(folder_copy)


@pytest.mark.parametrize("name", ["single_turn/train-00099-of-00100.parquet", "tokenizer/special.json"])
def test_file_too_many(folder_copy, name):
    (folder_copy / name).write_bytes(b"")
    with pytest.raises(VerificationError, match=f"{name} does not belong to the folder: remove it"):
        verify(folder_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: relabel(rows[0], -3, 7), r"label 7 of token \d+ is neither -100 nor its id"),
        (lambda rows: relabel(rows[0], 0, 1), "labels are not what its columns encode to: token 0 is 1, not -100"),
        (lambda rows: relabel(rows[0], -3, -100), r"labels are not what its columns encode to: token \d+ is -100, not 28705"),
        (lambda rows: rows[0]["labels"].pop(), r"\d+ input_ids, but \d+ labels"),
        (lambda rows: rows[0].update(agent_text="other"), "input_ids are not what its columns encode to"),
        (lambda rows: rows[0].update(user_units=[60_000]), "user_units holds unit 60000"),
        (lambda rows: rows[0].update(user_text="<|correspond|>"), "part of a special token"),
        (lambda rows: rows[0].update(id="d3_0"), r"the same id is at .*train-00000-of-00010.parquet: row 0 \(d3_0\)"),
    ],
)  # fmt: skip
def test_changed_row_with_a_fitting_digest(folder_copy, change, message):
    rewrite(folder_copy, FILE, change)
    with pytest.raises(VerificationError, match=f"{FILE}: row 0 .*{message}"):
        verify(folder_copy)


def test_lost_row_with_a_fitting_digest(folder_copy):
    rewrite(folder_copy, FILE, lambda rows: rows.clear())
    with pytest.raises(VerificationError, match=r"counts\.json: train has 9 rows, not 10") as raised:
        verify(folder_copy)
    assert "README.md: its YAML does not say that train has 9 rows" in str(raised.value)


def test_other_columns(folder_copy):
    path = folder_copy / "single_turn" / FILE
    pq.write_table(pq.read_table(path).drop_columns(["user_seconds"]), path)
    digest = sha256_file(path)
    edit_counts(folder_copy, lambda counts: counts["files"].update({f"single_turn/{FILE}": digest}))
    with pytest.raises(
        VerificationError, match=f"{FILE} has other columns than the README.md beside it says: .*user_seconds"
    ):
        verify(folder_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: counts["splits"]["train"].update(labelled_tokens=5), "train has 1301 labelled_tokens, not 5"),
        (lambda counts: counts["statistics"]["test"].update(distinct_units=5), "statistics of test are not those of its rows"),
        (lambda counts: counts["settings"].update(max_length=300), r"\d+ tokens, more than max_length 300"),
        (lambda counts: counts["digests"].update(tokenizer="0" * 64), r"tokenizer is not the tokenizer that counts\.json names"),
        (lambda counts: counts["files"].update({"../secret": "0" * 64}), "'../secret' is no file of a dataset folder"),
        (lambda counts: counts["files"].update({"/etc/passwd": "0" * 64}), "'/etc/passwd' is no file of a dataset folder"),
        (lambda counts: counts["splits"].update(dev={}), "names no file of split dev"),
    ],
)  # fmt: skip
def test_counts_that_are_not_those_of_the_rows(folder_copy, change, message):
    edit_counts(folder_copy, change)
    with pytest.raises(VerificationError, match=message):
        verify(folder_copy)


def test_many_problems_are_told_up_to_a_limit(folder_copy):
    for path in (folder_copy / "single_turn").iterdir():
        path.unlink()
    for path in (folder_copy / "tokenizer").iterdir():
        path.unlink()
    for number in range(20):
        (folder_copy / "tokenizer" / f"{number}").touch()
    with pytest.raises(VerificationError, match="and more problems") as raised:
        verify(folder_copy)
    assert len(raised.value.problems) == 20


def test_no_dataset_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no counts\.json"):
        verify(tmp_path)


def test_against_the_reference(dataset_folder, mini):
    assert verify(dataset_folder, mini / "expected") == {"train": 10, "test": 3}


@pytest.fixture
def text(mini, tmp_path):
    shutil.copytree(mini / "expected", tmp_path / "text")
    return tmp_path / "text"


def change_line(path, number, change):
    lines = path.read_text().split("\n")
    lines[number - 1] = change(lines[number - 1])
    path.write_text("\n".join(lines))


def test_first_difference_in_words(dataset_folder, text, capsys):
    line = (text / "test.txt").read_text().split("\n")[1]
    ids = line.split("|")[0].split()
    at = len(ids) - 3
    changed = " ".join([*ids[:at], "13", *ids[at + 1 :]])
    change_line(text / "test.txt", 2, lambda line: f"{changed}|{line.split('|')[1]}")
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(dataset_folder), "--against", str(text)])
    error = capsys.readouterr().err
    assert f"{text / 'test.txt'}:2 is no row of test: the nearest is d" in error
    assert f"token {at} is 13 ('<0x0A>'), not 28705 ('▁')" in error
    assert "train" not in error


def test_difference_in_a_label(dataset_folder, text):
    change_line(text / "train.txt", 1, lambda line: line.rsplit(" ", 1)[0] + " 2")
    with pytest.raises(VerificationError, match=r"train.txt:1 .* of the labels, token \d+ is 2 \('</s>'\), not -100"):
        verify(dataset_folder, text)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[1:], r"row \d+ \(d\w+\) is no line of .*test\.txt"),
        (lambda lines: [*lines, lines[0]], r"test\.txt:4 is no row of test$"),
        (lambda lines: [*lines, ""], r"test\.txt:4 is no row of test: it is not ids, '\|' and labels"),
        (lambda lines: [*lines, "1 2|x"], "it is not ids"),
    ],
)
def test_lines_too_many_and_too_few(dataset_folder, text, edit, message):
    lines = (text / "test.txt").read_text().split("\n")
    (text / "test.txt").write_text("\n".join(edit(lines)))
    if lines and edit(lines)[-1] == "":
        (text / "test.txt").write_text("\n".join(edit(lines)) + "\n")
    with pytest.raises(VerificationError, match=message):
        verify(dataset_folder, text)


def test_missing_text_file(dataset_folder, text):
    (text / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.txt is not a file: name the folder with the reference's"):
        verify(dataset_folder, text)
