"""No output contains a secret or a path, and no command opens a connection that the user did not ask for."""

import os
import subprocess
import sys

import pytest

from tests.helpers import REPOSITORY, command

SECRET = "hf_aVerySecretToken"
# sitecustomize.py of every process: it logs and refuses each connection.
NO_NETWORK = """
import socket
def refuse(self, address, *args):
    if self.family != socket.AF_UNIX:
        with open({log!r}, "a") as log:
            log.write(repr(address) + chr(10))
        raise OSError("no network")
    return connect(self, address, *args)
connect = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = refuse
def lookup(host, *args, **kwargs):
    with open({log!r}, "a") as log:
        log.write(repr(host) + chr(10))
    raise OSError("no network")
socket.getaddrinfo = lookup
"""


@pytest.fixture
def offline(tmp_path):
    """The environment of a process that logs and refuses every connection; HF_HUB_OFFLINE is not set."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK.format(log=str(tmp_path / "connections")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return environment | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(REPOSITORY)]),
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_TOKEN": SECRET,
        "USDM_PRIVATE_VARIABLE": "aVeryPrivateValue",
    }


def test_guard_logs_a_connection(offline, tmp_path):
    code = (
        "import urllib.request\ntry: urllib.request.urlopen('http://huggingface.co', timeout=5)\nexcept OSError: pass"
    )
    subprocess.run([sys.executable, "-c", code], env=offline, check=True)
    assert "huggingface.co" in (tmp_path / "connections").read_text()


@pytest.mark.slow
def test_no_command_connects_or_reveals_secrets_and_paths(offline, mini, unit_model, tmp_path):
    folder = tmp_path / "someones-private-folder"
    folder.mkdir()
    secrets = [SECRET, "aVeryPrivateValue"]
    runs = [command(mini, unit_model, folder, "--precision", "bf16")]
    source, recording = mini / "unit_model", next(mini.glob("corpus/data/3/*.wav"))
    model = [str(source / name) for name in ("checkpoint.pt", "kmeans.npy")]
    model += [str(folder / "model"), "--model_config", str(source / "config.json")]
    other_commands = (
        "from usdm_sft.cli.main import main\n"
        f"for name in ('stats', 'verify', 'show'): main([name, {str(folder / 'out')!r}])\n"
        f"main(['convert', *{model!r}])\n"
        f"main(['units', {model[2]!r}, {str(recording)!r}])\n"
        f"main(['export', {str(folder / 'out')!r}, {str(folder / 'text')!r}])\n"
        f"main(['show', {str(folder / 'out')!r}, '--html', {str(folder / 'page.html')!r}])\n"
        "import dailytalk_usdm\n"
        f"print(dailytalk_usdm.load_dataset({str(mini / 'corpus')!r}, split='train')[0]['id'])\n"
    )
    runs.append([sys.executable, "-c", other_commands])
    for run in runs:
        done = subprocess.run(run, env=offline, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not any(secret in done.stdout + done.stderr for secret in secrets)
    assert not (tmp_path / "connections").exists()
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        content = path.read_bytes()
        for secret in [*secrets, str(tmp_path), str(mini), os.path.expanduser("~") + "/"]:
            assert secret.encode() not in content, (path, secret)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pretrained_model_name_or_path", "naver-ai/USTM"], "offline mode (HF_HUB_OFFLINE) forbids fetching"),
        (["--unit_model", "xlsr2_1b_v2"], "offline mode (HF_HUB_OFFLINE) forbids fetching"),
    ],
)
def test_offline_mode_forbids_downloads(mini, unit_model, no_network, tmp_path, monkeypatch, refused, change, message):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    error = refused(*command(mini, unit_model, tmp_path, *change)[3:])
    assert message in error and SECRET not in error


@pytest.mark.slow
def test_nothing_is_written_outside_output_and_cache(offline, mini, unit_model, tmp_path):
    home, temporary, work = (tmp_path / name for name in ("home", "temporary", "work"))
    for folder in (home, temporary, work):
        folder.mkdir()
    environment = offline | {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command(mini, unit_model, work), env=environment, cwd=work, check=True, capture_output=True)
    assert sorted(path.name for path in work.iterdir()) == ["cache", "out"]
    written = {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()}
    assert written <= {(".cache", "matplotlib"), (".config", "matplotlib")}, written  # its font cache
    assert not [path for path in temporary.rglob("*") if path.is_file()]
