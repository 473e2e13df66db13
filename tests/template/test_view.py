import re

from usdm_sft.cli.main import main
from usdm_sft.folder.rows import read_rows
from usdm_sft.template.view import BLUE, PLAIN, format_example, split_parts


def encode(encoder, **texts):
    row = {
        "id": "d1_0",
        "user_units": [5, 6, 7, 8, 9, 10],
        "user_text": "Hi",
        "agent_text": "Yes.",
        "agent_units": [1],
    } | texts
    encoded = encoder({name: [value] for name, value in row.items()})
    return row | {name: values[0].tolist() for name, values in encoded.items()}


def test_parts_follow_the_labels(encoder, tokenizer):
    row = encode(encoder)
    parts = split_parts(row["input_ids"], row["labels"], tokenizer.backend_tokenizer)
    assert [(part.labelled, part.text) for part in parts[1:]] == [
        (True, " hi⏎\n"),
        (False, "### Agent⏎\n"),
        (True, "yes.<|correspond|><|unit1|>▁"),
        (False, "⏎\n</s>"),
    ]
    assert parts[0].text.endswith("### User⏎\n<|unit5|><|unit6|> … 2 units … <|unit9|><|unit10|><|correspond|>")
    assert [token_id for part in parts for token_id in part.ids] == row["input_ids"]


def test_lines_for_the_terminal(encoder, tokenizer):
    row = encode(encoder)
    lines = format_example(row, tokenizer.backend_tokenizer, color=False).splitlines()
    assert lines[0] == f"d1_0: {len(row['input_ids'])} tokens, 7 labelled"
    assert [line for line in lines if line.startswith("loss")] == ["loss   hi⏎", "loss  yes.<|correspond|><|unit1|>▁"]
    colored = format_example(row, tokenizer.backend_tokenizer, color=True).splitlines()
    assert f"loss  {BLUE}yes.<|correspond|><|unit1|>▁{PLAIN}" in colored
    assert "      ### Agent⏎" in colored
    ids = format_example(row, tokenizer.backend_tokenizer, color=False, ids=True)
    numbers = [line for line in ids.splitlines() if line.startswith(" " * 8)]
    assert [int(number) for line in numbers for number in line.split()] == row["input_ids"]
    assert "        12014 13" in ids.splitlines()  # " hi" and the newline


def test_invisible_characters_are_escaped(encoder, tokenizer):
    row = encode(encoder, user_text="a\u202eb\u200bc 🙂")
    shown = format_example(row, tokenizer.backend_tokenizer, color=False)
    assert "loss   a\\u202eb\\u200bc 🙂⏎" in shown.splitlines()


def test_show_on_the_command_line(dataset_folder, capsys, refused):
    main(["show", str(dataset_folder), "--split", "test", "--index", "1", "--num_examples", "5"])
    out = capsys.readouterr().out
    assert re.findall(r"^(d\w+): ", out, re.MULTILINE) == ["d105_1", "d2001_0"]
    for args, message in (
        (["--split", "dev"], "has no split 'dev': name one of train, test"),
        (["--index", "10"], "has 10 rows and no row 10: name one from 0 to 9"),
        (["--index", "-1"], "and no row -1"),
        (["--data_dir", "."], "name the page with --html"),
    ):
        assert message in refused("show", dataset_folder, *args)


def test_rows_are_read_across_files(dataset_folder):
    everything = [row["id"] for row in read_rows(dataset_folder, "train", 0, 100)]
    assert [row["id"] for row in read_rows(dataset_folder, "train", 3, 4)] == everything[3:7]
    assert len(everything) == len(list((dataset_folder / "single_turn").glob("train-*.parquet"))) == 10


def test_long_runs_of_units_are_abbreviated(encoder, tokenizer):
    row = encode(encoder, agent_units=list(range(5000)))
    assert "<|unit0|><|unit1|> … 4996 units … <|unit4998|><|unit4999|>▁" in format_example(
        row, tokenizer.backend_tokenizer, color=False
    )
