import json
import subprocess
import sys

import pytest

from usdm_sft import cli
from usdm_sft.cli import main
from usdm_sft.template_config import Template

HEAVY = ("torch", "transformers", "datasets", "soundfile", "matplotlib", "pyarrow")
COMMANDS = ("prepare", "convert", "units", "export", "show", "stats", "verify", "push")


def command(*args):
    return subprocess.run([sys.executable, "-m", "usdm_sft.cli", *args], capture_output=True, text=True)


@pytest.mark.parametrize("args", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(args):
    code = f"""
import sys
from usdm_sft.cli import main
try:
    main({args!r})
except SystemExit as error:
    assert error.code == 0
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_whole_way(tmp_path, mini, capsys):
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
    assert f"train: {kept} examples from 4 dialogs" in out
    assert f"left out: {10 - kept} too long, 2 dialogs (d11: one speaker speaks twice in a row" in out
    assert f"train.txt: {kept} lines" in out
    assert json.loads((tmp_path / "out" / "counts.json").read_text())["settings"]["max_length"] == 300


def test_template_of_a_yaml_file_and_of_the_command_line(tmp_path, monkeypatch):
    given, parser = {}, cli.make_parser()
    monkeypatch.setattr(cli, "make_parser", lambda: parser)
    monkeypatch.setattr(cli, "prepare", lambda **options: given.update(options) or {"splits": {}})
    (tmp_path / "run.yaml").write_text("data_dir: d\ntemplate:\n  agent_role: Robot\n  loss: [user_text, agent_text]\n")
    arguments = ["prepare", "--config", str(tmp_path / "run.yaml"), "--output_path", "o"]
    main(arguments)
    assert given["template"] == Template(agent_role="Robot", loss=("user_text", "agent_text"))
    main([*arguments, "--template.loss", "[user_text]", "--template.user_role", "Caller"])
    assert given["template"] == Template(user_role="Caller", agent_role="Robot", loss=("user_text",))
    main(["prepare", "--data_dir", "d", "--output_path", "o"])
    assert given["template"] == Template()


def test_bad_template_is_one_line_on_stderr(capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["prepare", "--data_dir", "d", "--output_path", "o", "--template.loss", "[asr]"])
    assert capsys.readouterr().err == (
        "dailytalk-usdm prepare: template.loss holds 'asr', which is no part that can bear loss: "
        "name one or more of user_text, agent_text, agent_units\n"
    )


def test_null_in_a_yaml_file_is_the_default(tmp_path, monkeypatch):
    given, parser = {}, cli.make_parser()
    monkeypatch.setattr(cli, "make_parser", lambda: parser)
    monkeypatch.setattr(cli, "prepare", lambda **options: given.update(options) or {"splits": {}})
    (tmp_path / "run.yaml").write_text("data_dir: d\nmax_length: null\nprecision: null\n")
    main(["prepare", "--config", str(tmp_path / "run.yaml"), "--output_path", "o"])
    assert "max_length" not in given and "precision" not in given
    assert given["template"] == Template()


@pytest.mark.parametrize("spelling", ["{{class_path: {0}}}", "{{class_path: {0}, init_args: {{}}}}", "{0}"])
def test_a_yaml_file_imports_no_code(tmp_path, monkeypatch, capsys, spelling):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'code-ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "run.yaml").write_text(f"data_dir: d\noutput_path: o\ntemplate: {spelling.format('evil.Evil')}\n")
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "--config", str(tmp_path / "run.yaml")])
    assert not (tmp_path / "code-ran").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["prepare", "--data_dir", "d", "--output_path", "a\0b"],
        ["prepare", "--data_dir", "a\udcff", "--output_path", "o"],
        ["units", "m", "good.wav", "a\0b"],
        ["convert", "c", "k", "a\0b"],
        ["export", "d", "a\0b"],
        ["show", "d", "--html", "a\0b"],
    ],
)
def test_names_that_no_file_can_have(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        main(args)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "holds a NUL, or bytes that are not UTF-8: rename the file or folder" in error
    assert not list(tmp_path.iterdir())


def test_name_that_is_too_long(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for args in (
        ["verify", "a" * 5000],
        ["units", "a" * 5000, "x"],
        ["prepare", "--data_dir", "d", "--output_path", "a" * 5000],
    ):
        with pytest.raises(SystemExit, match="1"):
            main(args)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "File name too long" in error


def test_units(unit_model, mini, capsys):
    paths = [str(mini / "corpus" / "data" / "3" / name) for name in ("0_0_d3.wav", "1_1_d3.wav")]
    main(["units", str(unit_model), *paths])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = json.loads((mini / "expected" / "units.json").read_text())
    assert lines == [
        {"file": path, "units": expected[name]} for path, name in zip(paths, ["0_0_d3", "1_1_d3"], strict=True)
    ]


def test_bad_input_is_one_line_on_stderr(tmp_path):
    done = command("export", str(tmp_path), str(tmp_path / "text"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"dailytalk-usdm export: {tmp_path} holds no counts.json: name a folder that 'dailytalk-usdm prepare' finished\n"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["prepare", "--bach_seconds", "3"], "did you mean batch_seconds?"),
        (["prepare", "--data_dir", "d"], "output_path"),
        (["prepare", "--data_dir", "d", "--output_path", "o", "--max_length", "long"], "max_length"),
        (["perpare"], "invalid choice"),
        (["prepare", "--config", "{unknown}"], "did you mean max_length?"),
        (["prepare", "--config", "{nested}"], "did you mean template.user_role?"),
        (["prepare", "--config", "{tag}"], "could not determine a constructor for the tag"),
        (["prepare", "--config", "/nowhere.yaml"], "nowhere.yaml"),
        (["prepare", "--config", "{binary}"], "can't decode byte 0xff"),
        (["prepare", "--config", "{nul}"], "control characters are not allowed"),
        (["prepare", "--config", "a\0b"], "embedded null byte"),
        (["prepare", "--batch_seconds", "1" * 400], "too large"),
    ],
)
def test_wrong_usage(tmp_path, capsys, args, message):
    (tmp_path / "unknown.yaml").write_text("max_lenght: 3\n")
    (tmp_path / "tag.yaml").write_text('max_length: !!python/object/apply:os.system ["echo hello"]\n')
    (tmp_path / "nested.yaml").write_text("template:\n  user_rol: Q\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "nul.yaml").write_bytes(b"max_length: 3\0\n")
    files = {f"{{{name}}}": str(tmp_path / f"{name}.yaml") for name in ("binary", "nul")}
    files |= {"{nested}": str(tmp_path / "nested.yaml")}
    files |= {"{unknown}": str(tmp_path / "unknown.yaml"), "{tag}": str(tmp_path / "tag.yaml")}
    with pytest.raises(SystemExit, match="2"):
        main([files.get(arg, arg) for arg in args])
    captured = capsys.readouterr()
    assert message in captured.err
    assert "hello" not in captured.out
