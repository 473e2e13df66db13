import dataclasses
import re
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY
from usdm_sft.cli.main import make_parser
from usdm_sft.folder.own_parts import Card
from usdm_sft.prepare.config import PrepareConfig
from usdm_sft.prepare.prepare import prepare
from usdm_sft.template.config import Template

REQUIRED = {"data_dir": "d", "output_path": "o"}
PARSER = make_parser()  # takes longer to make than to use
[COMMANDS] = [action.choices for action in PARSER._actions if isinstance(action.choices, dict)]
WITH_CONFIG = [name for name, parser in COMMANDS.items() if "--config" in parser._option_string_actions]


def parse(*arguments, command="prepare", parser=PARSER):
    return parser.parse_args([command, *arguments])[command]


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PrepareConfig(**REQUIRED).max_length = 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (PrepareConfig, "missing 2 required keyword-only arguments: 'output_path' and 'data_dir'"),
        (
            lambda: prepare(PrepareConfig(**REQUIRED), max_length=1, tasks=2),
            "a config or fields, not both: put max_length, tasks",
        ),
        (lambda: prepare(**REQUIRED, max_lenght=1), "unexpected keyword argument 'max_lenght'"),
    ],
)
def test_wrong_fields_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


POSITIVE = (
    "max_length",
    "shard_dialogs",
    "num_output_shards",
    "agreement_utterances",
    "num_proc",
    "tasks",
    "batch_seconds",
)
WRONG = [
    *(({name: 0}, f"{name} is 0: give a positive number") for name in POSITIVE),
    *(({name: -1}, f"{name} is -1: give 0 or more") for name in ("shuffle_seed", "num_gpus")),
    ({"tasks": 2}, "tasks and slurm are options of an executor: name one with --executor"),
    ({"max_length": "8192"}, "max_length is '8192', a value of type str: give a whole number"),
    ({"max_length": True}, "max_length is True, a value of type bool: give a whole number"),
    ({"max_length": None}, "max_length is None: give a whole number"),
    ({"num_gpus": 1.0}, "num_gpus is 1.0, a value of type float: give a whole number"),
    ({"batch_seconds": "160"}, "batch_seconds is '160', a value of type str: give a number"),
    ({"batch_seconds": float("inf")}, "batch_seconds is inf: give a positive number"),
    ({"batch_seconds": float("nan")}, "batch_seconds is nan: give a positive number"),
    ({"overwrite": "yes"}, "overwrite is 'yes', a value of type str: give True or False"),
    ({"agent": 2.5}, "agent is 2.5, a value of type float: give a text"),
    ({"agent": True}, "agent is True, a value of type bool: give a text"),
    ({"data_dir": None}, "data_dir is None: give a text"),
    ({"on_bad_audio": "ignore"}, "on_bad_audio 'ignore' is unknown: choose one of error, skip"),
    ({"executor": 3}, "executor is 3, a value of type int: give one of slurm, ray"),
    ({"executor": "slurm", "slurm": "gpu"}, "slurm is 'gpu', a value of type str: give names and values, such as {"),
    (
        {"template": {"agent_role": "Robot"}},
        "template is {'agent_role': 'Robot'}, a value of type dict: "
        "give a dailytalk_usdm.Template, such as Template(loss=('user_text',))",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PrepareConfig(**REQUIRED | changes)


def test_paths_may_be_path_objects():
    assert PrepareConfig(data_dir=Path("d"), output_path=Path("o")).data_dir == Path("d")


def test_command_line_has_each_field_with_its_default():
    options = parse("--data_dir", "d", "--output_path", "o").as_dict()
    template, card = Template(**options.pop("template")), Card(**options.pop("card"))
    assert options.pop("config") is None and options.pop("quiet") is options.pop("dry_run") is False
    assert PrepareConfig(**options, template=template, card=card) == PrepareConfig(**REQUIRED)


def test_help_shows_each_field_in_its_group_with_its_docstring(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    help_text = capsys.readouterr().out
    titles = ["Corpus", "Tokenizer and template", "Unit model", "Compute and cache", "Output", "Executor"]
    places = [help_text.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    for field in dataclasses.fields(PrepareConfig):
        _, _, described = help_text[places[0] :].partition(f"\n  --{field.name}")
        assert len(described.split("\n  --")[0].split()) > 4, field.name


@pytest.mark.parametrize("name", ["single_turn", "multi_turn"])
def test_shipped_config_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = parse("--config", name, "--data_dir", "d", "--output_path", "o")
    by_path = parse("--config", str(REPOSITORY / "configs" / f"{name}.yaml"), "--data_dir", "d", "--output_path", "o")
    assert by_name.config_name == name
    by_name.pop("config")
    by_path.pop("config")
    assert by_name == by_path


def test_a_file_goes_before_a_shipped_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("multi_turn").write_text("max_length: 77\n")
    assert parse("--config", "multi_turn", "--data_dir", "d", "--output_path", "o").max_length == 77


def test_unknown_config_name_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--config", "no_such_config", "--data_dir", "d", "--output_path", "o")
    assert "no_such_config" in capsys.readouterr().err


def test_commands_with_config():
    assert WITH_CONFIG == ["doctor", "prepare"]


RUN = """
data_dir: d
output_path: o
max_length: 77
keep_audio: false
agent: B
template: tts
slurm: {partition: cpu, time: "1:00"}
"""


@pytest.mark.parametrize("command", WITH_CONFIG)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(
    ("option", "value", "name", "expected"),
    [
        ("--max_length", "300", "max_length", 300),
        ("--max-len", "300", "max_length", 300),  # argparse takes the beginning of a name
        ("--agent", "--config", "agent", "--config"),
        ("--template", "asr", "template.parts", ("user_units", "user_text")),
        ("--template", "asr", "template.instruction", "Below is the user's speech and its transcript.\n"),
        ("--template.user-role", "Caller", "template.user_role", "Caller"),
        ("--template.instruction", "--well-known words\n", "template.instruction", "--well-known words\n"),
        ("--slurm.partition", "gpu", "slurm", {"partition": "gpu", "time": "1:00"}),
        ("--slurm", "{qos: low}", "slurm", {"qos": "low"}),
        ("--keep_audio", None, "keep_audio", True),
    ],
)
def test_options_override_config_in_any_order(command, joined, option, value, name, expected, tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    if value is None:
        given = [option]
    elif joined or value == "--config":
        given = [f"{option}={value}"]
    else:
        given = [option, value]
    file = str(tmp_path / "run.yaml")
    config = [f"--config={file}"] if joined else ["--config", file]
    first, last = (parse(*words, command=command) for words in ([*config, *given], [*given, *config]))
    assert first[name] == last[name] == expected
    first.pop("config")
    last.pop("config")
    assert first == last
    assert first.data_dir == "d"


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_later_config_overrides_earlier_one(command, tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    file = str(tmp_path / "run.yaml")
    both = ("--config", file, "--agent", "A", "--config", "multi_turn")
    options = parse(*both, command=command)
    assert (options.max_length, options.config_name, options.agent) == (8192, "multi_turn", "A")
    options = parse("--config", "multi_turn", "--agent", "A", "--config", file, command=command)
    assert (options.max_length, options.config_name, options.agent) == (77, "multi_turn", "A")


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_fields_override_their_group_in_any_order(command):
    for words in (
        ("--template.user_role", "Caller", "--template", "asr"),
        ("--template", "asr", "--template.user_role", "Caller"),
    ):
        template = parse("--data_dir", "d", "--output_path", "o", *words, command=command).template
        assert (template.user_role, template.parts) == ("Caller", ("user_units", "user_text"))


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_options_override_environment_and_config_does(command, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv(f"DAILYTALK_USDM_{command.upper()}__MAX_LENGTH", "55")
    required, parser = ("--data_dir", "d", "--output_path", "o"), make_parser()  # which looks at the environment
    config = ("--config", str(tmp_path / "run.yaml"))
    for words, expected in ((), 55), (config, 77), (("--max_length", "300", *config), 300):
        assert parse(*required, *words, command=command, parser=parser).max_length == expected


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_config_without_a_value_takes_no_option(command, capsys):
    for words in (["--agent", "--config"], ["--config", "--agent", "A"]):
        with pytest.raises(SystemExit, match="2"):
            parse("--data_dir", "d", "--output_path", "o", *words, command=command)
        assert "argument --config: expected one argument" in capsys.readouterr().err


def test_agent_may_be_a_number(tmp_path):
    (tmp_path / "run.yaml").write_text("agent: 2\n")
    for words, expected in ((["--config", str(tmp_path / "run.yaml")], "2"), (["--agent", "02"], "02")):
        agent = parse("--data_dir", "d", "--output_path", "o", *words).agent
        assert PrepareConfig(**REQUIRED, agent=agent).agent == expected
