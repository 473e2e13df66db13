import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import termios
import zipfile
import zlib
from unittest.mock import Mock

import datasets
import huggingface_hub.errors
import pyarrow as pa
import pytest
import safetensors

from dailytalk_usdm import load_dataset
from tests.forked import Fork
from tests.helpers import DEMO, LEFT_OUT
from tests.helpers import command as prepare_command
from usdm_sft.cli.main import main, make_parser
from usdm_sft.cli.parser import _use_underscores
from usdm_sft.folder.export import export
from usdm_sft.folder.statistics import summarize_split
from usdm_sft.folder.verify import verify
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.template.config import Template
from usdm_sft.template.tokenizer import load_tokenizer

HEAVY = ("torch", "transformers", "datasets", "soundfile", "matplotlib", "pyarrow")
COMMANDS = (
    "demo",
    "doctor",
    "prepare",
    "convert",
    "fit",
    "units",
    "tokenizer",
    "export",
    "show",
    "edit",
    "stats",
    "verify",
    "push",
)
SHTAB = importlib.util.find_spec("shtab") is not None  # extra completion

# conftest.py switches progress bars off; these processes show them.
WITH_BARS = {name: value for name, value in os.environ.items() if name != "HF_DATASETS_DISABLE_PROGRESS_BARS"}


def run(command):
    return subprocess.run(command, capture_output=True, text=True, env=WITH_BARS)


@pytest.fixture
def configured(monkeypatch):
    """Run `prepare` up to its options, and return them."""
    given = []
    monkeypatch.setattr("usdm_sft.prepare.prepare.prepare", lambda config: given.append(config) or {"splits": {}})
    monkeypatch.setattr(
        "usdm_sft.prepare.config.PrepareConfig.check_kinds", lambda config: None
    )  # data_dir is a letter

    def run(*args):
        main(["prepare", "--output_path", "o", *args])
        return given[-1]

    return run


REFUSED_AT_ONCE = {
    "--max_gap 1": "max_gap says how turns are joined: add --merge_speaker_turns, or leave it out",
    "--overflow split": "overflow is split, but a row of single_turn is one pair and cannot be cut: use drop",
    "--on_bad_rows clip": "train.txt is a split list, and on_bad_rows clip is for manifests and files of other tools: leave it out",
    "--agent channel=1": "train.txt is a split list, and agent channel=1 is for manifests and files of other tools: leave it out",
    "--unit_rate 50 --num_units 9": "train.txt is a split list, which has no units: leave out unit_rate, or name a manifest",
    "--streams first --num_streams 2": "streams and num_streams are given, but the unit model is not a codec: leave them out",
    "--corpus kaldi": "holds no corpus of the kind kaldi: give its folder or file as data_dir",
}


def test_options_that_do_not_fit_are_refused_before_heavy_imports(mini):
    """All in one process, as below."""
    lines = [f"prepare --data_dir {mini / 'corpus'} --output_path out {options}" for options in REFUSED_AT_ONCE]
    code = f"""
import sys
from usdm_sft.cli.main import main
for line in {lines!r}:
    try:
        main(line.split())
    except SystemExit as error:
        assert error.code == 1
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("dailytalk-usdm prepare: ")]
    for message, line in zip(REFUSED_AT_ONCE.values(), errors, strict=True):
        assert message in line


def test_help_imports_nothing_heavy():
    """All in one process: what one of them imported would be seen after the last one."""
    code = f"""
import sys
from usdm_sft.cli.main import main
for args in {[["--help"], *([command, "--help"] for command in COMMANDS)]!r}:
    try:
        main(args)
    except SystemExit as error:
        assert error.code == 0
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_convert_prepare_and_export_work_together(tmp_path, mini, capsys):
    source = mini / "unit_model"
    config = tmp_path / "run.yaml"
    config.write_text(f"data_dir: {mini / 'corpus'}\npretrained_model_name_or_path: mistral-common\nmax_length: 300\n")
    checkpoint = [str(source / "checkpoint.pt"), str(source / "kmeans.npy"), str(tmp_path / "model")]
    main(["convert", *checkpoint, "--model_config", str(source / "config.json")])
    cache, output = ["--cache_dir", str(tmp_path / "cache")], ["--output_path", str(tmp_path / "out")]
    main(["prepare", "--config", str(config), "--unit_model", str(tmp_path / "model"), *cache, *output])
    main(["export", str(tmp_path / "out"), str(tmp_path / "text")])
    out = capsys.readouterr().out
    lengths = [line.split("|")[0].count(" ") + 1 for line in (mini / "expected" / "train.txt").read_text().split("\n")]
    kept = sum(length <= 300 for length in lengths)
    assert 0 < kept < 10
    assert f"train: {kept} rows from 4 dialogs" in out
    assert f"left out: {10 - kept} rows too long, 2 dialogs (d11: one speaker speaks twice in a row" in out
    assert (
        f"{tmp_path / 'out' / 'counts.json'} lists every row that was left out or shortened, with numbers and digests\n"
        in out
    )
    assert f"train.txt: {kept} lines" in out
    assert json.loads((tmp_path / "out" / "counts.json").read_text())["settings"]["max_length"] == 300


@pytest.mark.parametrize(
    ("number", "bad", "expected"),
    [
        (1, 0, "1 row from 1 dialog (0.50 h), 1 token, 1 labelled; left out: 1 row too long, 1 dialog (d1: a reason); shortened: 1 row"),
        (2000, 0, "2,000 rows from 2,000 dialogs (0.50 h), 2,000 tokens, 2,000 labelled; left out: 2,000 rows too long, "),
        (0, 0, "0 rows from 0 dialogs (0.50 h), 0 tokens, 0 labelled; left out: 0 rows too long, 0 dialogs"),
        (3, 1, "3 rows from 3 dialogs (0.50 h), 3 tokens, 3 labelled; left out: 2 rows too long, 1 pair with bad audio, 3 dialogs"),
    ],
)  # fmt: skip
def test_summary_agrees_with_its_numbers(number, bad, expected):
    split = dict.fromkeys(("rows", "dialogs", "tokens", "labelled_tokens"), number) | {"hours": 0.5}
    listed = {f"d{i + 1}": "a reason" for i in range(number)}
    pairs = dict.fromkeys(listed, "9 tokens, more than max_length 8") | dict.fromkeys([*listed][:bad], "bad")
    split |= {"pairs_with_bad_audio": bad, "pairs_left_out": pairs, "dialogs_left_out": listed, "rows_cut": listed}
    assert summarize_split(split).startswith(expected)


@pytest.mark.parametrize(
    ("number", "end"), [(5, "d5: reason 5)"), (1021, "reason 20: d20; 1,001 more for other reasons)")]
)
def test_summary_names_twenty_reasons(number, end):
    split = dict.fromkeys(("rows", "dialogs", "tokens", "labelled_tokens", "hours", "pairs_with_bad_audio"), 0)
    left_out = {f"d{i + 1}": f"reason {i + 1}" for i in range(number)}
    assert summarize_split(split | {"pairs_left_out": {}, "dialogs_left_out": left_out, "rows_cut": {}}).endswith(end)


@pytest.mark.slow
def test_second_run_says_that_everything_is_finished(mini, unit_model, tmp_path):
    first, second = (run(prepare_command(mini, unit_model, tmp_path)) for _ in range(2))
    assert first.returncode == 0
    stages = ["tokenizer", "corpus", "unit model", "rows", "units", "tokens", "folder"]
    times = ", ".join(rf"{name} \d+ s( \([\d.]+ s of audio per second\))?" for name in stages)
    assert re.fullmatch(rf"{times}: \d+ s in all", first.stderr.splitlines()[-1])
    assert "\r" not in first.stderr  # it is not a terminal: no progress bars
    assert (second.returncode, second.stdout) == (0, first.stdout)
    text = "is finished already, with the same settings and data: nothing was done"
    assert second.stderr == f"{LEFT_OUT}{tmp_path / 'out'} {text}\n"


@pytest.mark.slow
def test_quiet_shows_no_progress_bars_in_a_terminal(mini, unit_model, tmp_path):
    shown = {}
    for name, more in (("bars", []), ("quiet", ["--quiet", "--output_path", str(tmp_path / "quiet")])):
        arguments = prepare_command(mini, unit_model, tmp_path, *more)
        terminal, child_end = pty.openpty()
        termios.tcsetwinsize(child_end, (24, 80))
        with open(terminal, "rb", buffering=0) as terminal:
            run = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=child_end, env=WITH_BARS)
            os.close(child_end)
            shown[name] = b""
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while part := terminal.read(1 << 16):
                    shown[name] += part
            assert run.wait() == 0
    texts = b"[1/7] tokenizer ...", b"[2/7] corpus ...", b"[5/7] units:   0%|", b"[6/7] tokens:   0%|", b" in all\r\n"
    assert [text for text in texts if text not in shown["bars"]] == []
    assert shown["quiet"] == LEFT_OUT.replace("\n", "\r\n").encode()


def test_command_line_overrides_the_yaml_file(tmp_path, configured):
    file = tmp_path / "run.yaml"
    file.write_text("data_dir: d\ntemplate:\n  agent_role: Robot\n  loss: [user_text, agent_text]\n")
    assert configured("--config", str(file)).template == Template(agent_role="Robot", loss=("user_text", "agent_text"))
    changed = configured("--config", str(file), "--template.loss", "[user_text]", "--template.user_role", "Caller")
    assert changed.template == Template(user_role="Caller", agent_role="Robot", loss=("user_text",))
    assert configured("--data_dir", "d").template == Template()
    file.write_text("data_dir: d\nmax_length: null\nprecision: null\n")  # null means the default
    assert configured("--config", str(file)) == PrepareConfig(data_dir="d", output_path="o")


def test_bad_template_gives_one_line_on_stderr(refused):
    assert refused("prepare", "--data_dir", "d", "--output_path", "o", "--template.loss", "[asr]") == (
        "dailytalk-usdm prepare: template.loss contains 'asr', which cannot be labelled: "
        "name one or more of user_text, agent_text, agent_units"
    )


def test_template_may_be_a_preset_or_a_yaml_file(tmp_path, monkeypatch, configured):
    """The loss follows the parts."""
    (tmp_path / "run.yaml").write_text("data_dir: d\ntemplate: tts\n")
    (tmp_path / "template.yaml").write_text("user_role: Caller\n")
    monkeypatch.chdir(tmp_path)

    def template(*args):
        return configured("--data_dir", "d", *args).template

    assert template("--template", str(tmp_path / "template.yaml")) == Template(user_role="Caller")
    recognition = Template("Below is the user's speech and its transcript.\n", parts=("user_units", "user_text"))
    assert template("--template", "asr") == recognition and recognition.loss == ("user_text",)
    assert template("--config", "single_turn", "--template", "asr") == recognition
    changes = "--template.user_role", "Caller", "--template.tokenization", "separate"
    expected = dataclasses.replace(recognition, user_role="Caller", tokenization="separate")
    assert template("--template", "asr", *changes) == expected
    synthesis = configured("--config", "run.yaml").template
    assert (synthesis.parts, synthesis.loss) == (("agent_text", "agent_units"), ("agent_units",))
    expected = Template(parts=("user_text", "agent_text"), loss=("agent_text",))
    assert template("--template.parts", "[user_text, agent_text]") == expected
    (tmp_path / "asr").write_text("user_role: Robot\n")  # a file goes before a preset of its name
    assert template("--template", "asr") == Template(user_role="Robot")


@pytest.mark.parametrize("spelling", ["{{class_path: {0}}}", "{{class_path: {0}, init_args: {{}}}}", "{0}"])
def test_yaml_file_cannot_import_code(tmp_path, monkeypatch, capsys, spelling):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'code-ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "run.yaml").write_text(f"data_dir: d\noutput_path: o\ntemplate: {spelling.format('evil.Evil')}\n")
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "--config", str(tmp_path / "run.yaml")])
    assert not (tmp_path / "code-ran").exists()


IMPOSSIBLE = "holds a NUL, a newline, or bytes that are not UTF-8: rename the file or folder"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["prepare", "--data_dir", "d", "--output_path", "a\0b"], IMPOSSIBLE),
        (["prepare", "--data_dir", "a\udcff", "--output_path", "o"], IMPOSSIBLE),
        (["units", "m", "good.wav", "a\0b"], IMPOSSIBLE),
        (["units", "m", "good.wav", "a\nb"], IMPOSSIBLE),
        (["convert", "c", "k", "a\0b"], IMPOSSIBLE),
        (["export", "d", "a\0b"], IMPOSSIBLE),
        (["show", "d", "--html", "a\0b"], IMPOSSIBLE),
        (["verify", "a" * 5000], "File name too long"),
        (["units", "a" * 5000, "x"], "File name too long"),
        (["prepare", "--data_dir", str(DEMO / "corpus"), "--output_path", "a" * 5000], "File name too long"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_impossible_file_names_give_one_line(args, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*args)
    assert not list(tmp_path.iterdir())


def test_reader_that_ends_first_ends_the_command_quietly(folder_copy):
    """`head` closes the pipe after its last line. The error comes at the end or, without a buffer, with the first line."""
    for is_direct in (False, True):
        code = f"""
import os, sys
from usdm_sft.cli.main import main
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
sys.stdout.reconfigure(write_through={is_direct})
main(["show", {str(folder_copy)!r}])
"""
        run = Fork(code)
        assert run.communicate() == (None, "")
        assert run.returncode == 141


def test_output_without_its_characters_in_the_locale_is_escaped(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("usdm_sft.folder.verify.verify", lambda *args, **options: {"tr\xe4in": 1})
    monkeypatch.setattr(sys, "stdout", stdout)
    main(["verify", "d"])
    assert stdout.buffer.getvalue() == b"tr\\xe4in: 1 row is correct\n"


def test_home_folder_is_expanded_in_options_and_functions(folder_copy, monkeypatch, capsys):
    """A shell leaves `~` as it is in --option=~/folder."""
    monkeypatch.setenv("HOME", str(folder_copy.parent))
    main(["show", "~/dataset", "--html=~/page.html"])
    assert (
        capsys.readouterr().out
        == f"{folder_copy.parent}/page.html shows 10 examples without sound: add --data_dir and the corpus\n"
    )
    assert export("~/dataset", "~/text") == verify("~/dataset") == {"train": 10, "test": 3}
    assert sorted(path.name for path in folder_copy.parent.iterdir()) == ["dataset", "page.html", "text"]
    assert len(load_tokenizer("~/dataset/tokenizer")) == 42_003


def test_path_that_cannot_be_written_is_one_line(refused, folder_copy):
    (folder_copy.parent / "file").touch()
    (folder_copy.parent / "page").mkdir()
    for words, name, reason in (
        (["show", folder_copy, "--html", folder_copy.parent / "page"], "page", "Is a directory"),
        (["stats", folder_copy, "--out", folder_copy.parent / "file"], "file", "File exists"),
        (["export", folder_copy, folder_copy.parent / "file"], "file", "File exists"),
    ):
        expected = f"{folder_copy.parent}/{name} cannot be read or written ({reason}): name another path, or correct what is there"
        assert refused(*words) == f"dailytalk-usdm {words[0]}: {expected}"


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("more", [[], ["--html", "page.html"]])
def test_number_of_examples_is_positive(refused, number, more):
    expected = f"dailytalk-usdm show: num_examples is {number}: give a positive number"
    assert refused("show", "d", "--num_examples", number, *more) == expected


def test_units_prints_one_line_per_file(unit_model, mini, capsys):
    paths = [str(mini / "corpus" / "data" / "3" / name) for name in ("0_0_d3.wav", "1_1_d3.wav")]
    main(["units", str(unit_model), *paths])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = json.loads((mini / "expected" / "units.json").read_text())
    assert lines == [
        {"file": path, "units": expected[name]} for path, name in zip(paths, ["0_0_d3", "1_1_d3"], strict=True)
    ]


def test_bad_input_gives_one_line_on_stderr(tmp_path):
    done = run([sys.executable, "-m", "usdm_sft.cli", "export", str(tmp_path), str(tmp_path / "text")])
    assert (done.returncode, done.stdout) == (1, "")
    text = (
        f"{tmp_path} has no counts.json: name a folder that 'dailytalk-usdm prepare' finished, or run its command again"
    )
    assert done.stderr == f"dailytalk-usdm export: {text}\n"


def panic():
    class PanicException(BaseException):  # the class of pyo3, which cannot be imported
        pass

    return PanicException("no entry found for key")


@pytest.fixture
def fail(monkeypatch):
    """Let `verify` fail with an error."""

    def fail(error):
        monkeypatch.setattr("usdm_sft.folder.verify.verify", Mock(side_effect=error))

    return fail


def caused(error, cause):
    error.__cause__ = cause
    return error


GENERATION = datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetsError("wrong splits"), "DatasetsError: wrong splits"),
        (datasets.exceptions.NonMatchingSplitsSizesError([{"a": 1}]), "NonMatchingSplitsSizesError: [{'a': 1}]"),
        (caused(GENERATION, TypeError("no list\nin column text")), "DatasetGenerationError: no list"),
        (pa.ArrowTypeError("no list"), "ArrowTypeError: no list"),
        (pa.ArrowKeyError("no field"), "ArrowKeyError: no field"),
        (pa.ArrowCapacityError("array is full\nsecond line"), "ArrowCapacityError: array is full"),
        (safetensors.SafetensorError("header too large"), "SafetensorError: header too large"),
        (huggingface_hub.errors.HTTPError("no answer"), "HTTPError: no answer"),
        (zipfile.BadZipFile("no directory"), "BadZipFile: no directory"),
        (zlib.error("invalid block"), "error: invalid block"),
        (Exception("WordPiece error: Missing [UNK] token"), "WordPiece error: Missing [UNK] token"),
        (panic(), "PanicException: no entry found for key"),
        (MemoryError(), "MemoryError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_of_libraries_give_one_line(fail, refused, error, message):
    fail(error)
    assert refused("verify", "d") == f"dailytalk-usdm verify: {message}"


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), AttributeError("x"), AssertionError("x")], ids=repr)
def test_mistake_in_the_program_keeps_its_traceback(fail, error):
    fail(error)
    with pytest.raises(type(error), match="x"):
        main(["verify", "d"])


@pytest.mark.slow
def test_path_with_characters_of_patterns(mini, tmp_path, capsys):
    name = "calls #2 [1] a*b?"
    corpus, model, cache, out = (tmp_path / kind / name for kind in ("corpus", "unit_model", "cache", "out"))
    shutil.copytree(mini / "corpus", corpus)
    source = mini / "unit_model"
    main(["convert", str(source / "checkpoint.pt"), str(source / "kmeans.npy"), str(model), "--model_config", str(source / "config.json")])  # fmt: skip
    words = {"data_dir": corpus, "unit_model": model, "cache_dir": cache, "output_path": out}
    options = [f"--{option}={path}" for option, path in words.items()]
    main(["prepare", *options, "--pretrained_model_name_or_path", "mistral-common", "--keep_audio"])
    [call] = [
        line.removesuffix(" opens it") for line in capsys.readouterr().out.splitlines() if "load_dataset(" in line
    ]
    rows = eval(call, {"load_dataset": functools.partial(datasets.load_dataset, cache_dir=str(tmp_path / "datasets"))})
    assert {split: len(rows[split]) for split in rows} == {"train": 10, "test": 3}
    main(["verify", str(out)])
    assert "train: 10 rows are correct" in capsys.readouterr().out
    for args in (["stats"], ["show"], ["show", "--html", str(tmp_path / f"{name}.html"), "--data_dir", str(corpus)]):
        main([args[0], str(out), *args[1:]])
    for kind in ("usdm", "arrow", "megatron"):
        main(["export", str(out), str(tmp_path / kind / name), "--format", kind])
    capsys.readouterr()
    main(["units", str(model), str(corpus / "data" / "3" / "0_0_d3.wav")])
    assert len(json.loads(capsys.readouterr().out)["units"]) > 0
    pairs = load_dataset(corpus, cache_dir=str(tmp_path / "datasets"), digest_cache_dir=cache)
    assert {split: len(pairs[split]) for split in pairs} == {"train": 10, "test": 3}


FILES = {  # an argument "{name}" is the path of name.yaml
    "unknown": b"max_lenght: 3\n",
    "tag": b'max_length: !!python/object/apply:os.system ["echo hello"]\n',
    "nested": b"template:\n  user_rol: Q\n",
    "binary": b"\xff\xfe",
    "nul": b"max_length: 3\0\n",
    "number": b"max_length: big\n",
    "kebab": b"max-length: 3\n",
}
PREPARE = [
    ("--bach_seconds 3", "did you mean batch_seconds?"),
    ("--bach-seconds 3", "did you mean batch_seconds?"),
    ("--template.user-rule 3", "did you mean template.user_role?"),
    ("--data_dir d", "the following arguments are required: output_path"),
    ("--data_dir d --output_path o --max_length big", "max_length is 'big': give a whole number"),
    ("--num_gpus 1.5", "num_gpus is '1.5': give a whole number"),
    ("--val_dialogs many", "val_dialogs is 'many': give a whole number of dialogs, such as 100, or a share below 1"),
    ("--batch_seconds many", "batch_seconds is 'many': give a number"),
    (f"--batch_seconds {'1' * 400}", "111': give a number"),
    ("--executor k8s", "executor is 'k8s': give one of slurm, ray"),
    ("--slurm gpu", "slurm is 'gpu': give names and values, such as {partition: NAME, time: "),
    (
        "--template Robot",
        "template is 'Robot': give names and values, such as {user_role: Caller}, a YAML file such as ./template.yaml, "
        "or one of asr, s2t, t2t, tts",
    ),
    ("--card nosuch.yaml", "card is nosuch.yaml: give names and values, such as {license: cc-by-4.0}, or a YAML file"),
    (
        "--template.parts user_text",
        "template.parts is 'user_text': give a list of two or more of user_units, user_text, ",
    ),
    (
        "--template.loss user_text",
        "template.loss is 'user_text': give a list of one or more of user_text, agent_text, agent_units, ",
    ),
    ("--config {number}", "max_length is 'big': give a whole number"),
    ("--config {kebab}", "did you mean max_length?"),
    ("--config {unknown}", "did you mean max_length?"),
    ("--config {nested}", "did you mean template.user_role?"),
    ("--config {tag}", "could not determine a constructor for the tag"),
    ("--config {binary}", "can't decode byte 0xff"),
    ("--config {nul}", "control characters are not allowed"),
    ("--config /nowhere.yaml", "nowhere.yaml"),
    ("--config a\0b", "embedded null byte"),
]
OTHERS = [
    ("show d --index first", "index is 'first': give a whole number"),
    ("show d --dat-dir 3", "did you mean data_dir?"),
    ("perpare", "there is no command 'perpare' (did you mean prepare?): choose one of demo, doctor, prepare, "),
    ("xyz", "there is no command 'xyz': choose one of demo, doctor, prepare, "),
    ("", "the command is missing: name one of demo, doctor, prepare, "),
    (
        "--print_completion shtab-fish9",
        "choose from" if SHTAB else "completion needs shtab: pip install 'dailytalk-",
    ),
]


@pytest.mark.parametrize(
    ("line", "message"),
    [*((f"prepare {line}", message) for line, message in PREPARE), *OTHERS],
    ids=lambda value: value[:40].replace("\0", "NUL"),
)
def test_wrong_usage_gives_a_hint_and_a_reason(tmp_path, capsys, line, message):
    for name, content in FILES.items():
        (tmp_path / f"{name}.yaml").write_bytes(content)
    paths = {f"{{{name}}}": str(tmp_path / f"{name}.yaml") for name in FILES}
    with pytest.raises(SystemExit, match="2"):
        main([paths.get(word, word) for word in line.split()])
    captured = capsys.readouterr()
    hint, reason = captured.err.splitlines()
    assert re.fullmatch(r"usage: see dailytalk-usdm( [a-z]+)? --help", hint)
    assert reason.startswith(f"{hint.removeprefix('usage: see ').removesuffix(' --help')}: ") and message in reason
    assert "hello" not in captured.out


def test_every_option_of_every_command_has_two_spellings():
    [commands] = [action.choices for action in make_parser()._actions if isinstance(action.choices, dict)]
    names = {option for parser in commands.values() for option in parser._option_string_actions if "_" in option}
    assert len(names) > 25
    for name in names:
        assert _use_underscores([name.replace("_", "-")]) == [name]
        assert _use_underscores([name.replace("_", "-") + "=a-b_c"]) == [f"{name}=a-b_c"]


def test_options_may_be_written_with_hyphens():
    words = ["--data-dir", "my-corpus", "--output-path=my-out-put", "--template.user-role", "Call-er", "--keep-audio"]
    options = make_parser().parse_args(["prepare", *words, "--max-len", "300"]).prepare
    assert (options.data_dir, options.output_path, options.template.user_role) == ("my-corpus", "my-out-put", "Call-er")
    assert options.keep_audio is True and options.max_length == 300
    units = make_parser().parse_args(["units", "model-dir", "--device", "cpu", "--", "--odd-name.wav", "b-c.wav"]).units
    assert (units.unit_model_dir, units.file) == ("model-dir", ["--odd-name.wav", "b-c.wav"])
    assert _use_underscores(["a-b", "--c-d=e-f", "-g", "--", "--h-i"]) == ["a-b", "--c_d=e-f", "-g", "--", "--h-i"]


@pytest.fixture
def help_of(capsys):
    """Return what `--help` prints."""

    def run(*command):
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--help"])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_a_usage_and_good_examples(name, help_of):
    text = help_of(name)
    assert re.match(rf"usage: dailytalk-usdm {name}( [\[\]A-Za-z_.-]+)* \[options\]\n\n", text)
    assert "type: " not in text and "null" not in text
    _, _, examples = text.partition("\nexamples:\n")
    lines = [line for line in examples.splitlines() if line]
    assert lines and all(line.startswith(f"  dailytalk-usdm {name}") for line in lines)
    for line in lines:
        assert make_parser().parse_args(shlex.split(line)[1:]).command == name


def test_help_of_the_program_names_each_command(help_of):
    text = help_of()
    assert text.startswith("usage: dailytalk-usdm COMMAND [options]\n")
    assert [line.split()[0] for line in text.splitlines() if re.match(r"    [a-z]+ ", line)] == [*COMMANDS]
    assert "examples:\n  dailytalk-usdm demo  " in text


def test_defaults_are_shown_as_they_are_given(help_of):
    text = " ".join(help_of("prepare").split())
    units = "(default: [user_units, user_text, agent_text, agent_units])"
    for part in ("(default: 8192)", "without loss. (default: 0)", units, "(required)"):
        assert part in text
    assert "--overflow {drop,truncate,split}" in text and "--executor {slurm,ray}" in text


def test_stats_and_verify_print_json(folder_copy, capsys):
    counts = json.loads((folder_copy / "counts.json").read_text())
    main(["stats", str(folder_copy), "--json"])
    assert json.loads(capsys.readouterr().out) == {"num_units": 100, "splits": counts["statistics"]}
    main(["verify", str(folder_copy), "--json"])
    assert json.loads(capsys.readouterr().out) == {"correct": True, "rows": {"train": 10, "test": 3}}
    (folder_copy / "README.md").write_text("other")
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(folder_copy), "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["correct"] is False and len(found["problems"]) == 1
    assert captured.err == f"dailytalk-usdm verify: {found['problems'][0]}\n"
    assert found["problems"][0].startswith(
        f"{folder_copy / 'README.md'} was edited in its text: undo it, or run prepare again"
    )


def test_quiet_is_an_option_of_each_command_with_progress():
    [commands] = [action.choices for action in make_parser()._actions if isinstance(action.choices, dict)]
    quiet = {name for name, parser in commands.items() if "--quiet" in parser._option_string_actions}
    assert quiet == {"demo", "doctor", "prepare", "fit", "units", "show", "push"}


COMPLETE = """
source "$1"
COMP_WORDS=(dailytalk-usdm "${@:2}") COMP_CWORD=$(($# - 1)) COMPREPLY=()
_shtab_dailytalk_usdm dailytalk-usdm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
echo "${COMPREPLY[*]}"
"""


def test_completion_in_bash(tmp_path, monkeypatch, capsys):
    pytest.importorskip("shtab", reason="needs the extra 'completion'")
    monkeypatch.setattr("usdm_sft.cli.main.make_parser", make_parser)  # a parser that wrote the script is spent
    with pytest.raises(SystemExit, match="0"):
        main(["--print_completion", "shtab-bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    for words, expected in (
        (["pre"], "prepare"),
        (["prepare", "--max_l"], "--max_length"),
        (["prepare", "--on_bad_audio", "s"], "skip"),
    ):
        command = ["bash", "-c", COMPLETE, "bash", str(tmp_path / "script"), *words]
        assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == expected


def test_lines_of_libraries_appear_once():
    code = """
import logging
from usdm_sft.cli.main import main
try:
    main(["show", "nowhere"])
except SystemExit:
    import datasets, huggingface_hub.utils.logging
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).warning(f"a line of {name}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[1:] == ["a line of datasets", "a line of huggingface_hub"]
