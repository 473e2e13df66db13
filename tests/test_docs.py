"""README.md and docs/: the code blocks run, the commands exist, and generated files are current."""

import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest

import dailytalk_usdm
from tests.code_blocks import MARKER, PAGES, find_blocks, find_code, small_environment
from tests.forked import Fork
from tests.helpers import REPOSITORY
from tests.test_cli import COMMANDS
from usdm_sft.cli.main import main, make_parser
from usdm_sft.folder.example_picture import split_sections
from usdm_sft.prepare.config import PrepareConfig

DOCS = REPOSITORY / "docs"
PYTHON_BLOCKS = find_blocks("python")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
# One training step in float32 on the CPU.
SMALL = "max_steps=1, use_cpu=True, report_to='none', save_strategy='no', "


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shrink(code):
    code = re.sub(r"max_steps=1000,\s*", "", code).replace("bf16=True", "bf16=False")
    return re.sub(r"(SFTConfig|TrainingArguments)\(", rf"\g<1>({SMALL}", code)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [block for block in PYTHON_BLOCKS if not MARKER.match(block.marker)], ids=lambda block: block.place
)
def test_python_block_runs(workplace, block):
    """Run the block with the training arguments `SMALL`, in a process in which nobody has imported `dailytalk_usdm`."""
    if re.search(r"\b(trl|peft|Trainer)\b", block.code):
        pytest.importorskip("trl", reason="needs the extra 'train'")
    place = f"import os\nos.chdir({str(workplace)!r})\nos.environ.update({small_environment()!r})\ndel os\n"
    run = Fork(place + shrink(block.code))
    _, output = run.communicate()
    assert run.returncode == 0, block.code + output[-3000:]


def test_pages_with_blocks_that_are_not_run():
    marked = {block.place.split(":")[0]: block.marker for block in PYTHON_BLOCKS if MARKER.match(block.marker)}
    pages = [
        "given-units",
        "hub",
        "performance",
        "training/evaluation",
        "training/mixing",
        "training/other-models",
        "training/tools",
        "unit-models",
    ]
    assert sorted(marked) == [f"docs/{page}.md" for page in pages]
    assert len(PYTHON_BLOCKS) >= 15


def test_cost_of_training_follows_from_the_code():
    """Mistral-7B has 7.24 billion parameters, norms included, with its own 32,000 tokens."""
    code, gigabytes, hours = find_code("full_bytes ="), 1e9, 3600
    names, mistral = {}, {}
    exec(code, names)
    exec(code.replace("42_003", "32_000"), mistral)
    assert round(mistral["parameters"] / 1e9, 2) == 7.24
    assert [round(names[name] / gigabytes) for name in ("full_bytes", "lora_bytes", "activations")] == [124, 22, 7]
    assert round((2 * names["parameters"] + names["activations"]) / gigabytes) == 22  # 16 bytes on 8 GPUs
    rows = {}
    for tokens, peak in (("7.5e6", "989e12"), ("7.5e6", "312e12"), ("790e6", "989e12")):
        exec(code.replace("7.5e6", tokens).replace("989e12", peak, 1), names)
        for kind in ("full", "lora"):
            rows.setdefault(kind, []).append(round(names[f"{kind}_seconds"] / hours, 2))
    assert rows == {"full": [0.3, 0.96, 31.74], "lora": [0.23, 0.72, 23.8]}


def test_readme_and_index_link_every_page():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"index.md"}
    for path, prefix in ((REPOSITORY / "README.md", "docs/"), (DOCS / "index.md", "")):
        links = {link.removeprefix(prefix) for link in LINK.findall(path.read_text(encoding="utf-8"))}
        assert pages - links == set(), path


def test_screenshot_is_small():
    """docs/page.png is made by hand (CONTRIBUTING.md); README and index load it."""
    assert 20_000 < (DOCS / "page.png").stat().st_size < 150_000


def test_commands_of_bash_blocks_are_accepted_by_the_parser(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    parser, seen = make_parser(), []
    for block in find_blocks("bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removesuffix("&&"), comments=True)
            names = [word.rpartition("/")[2] for word in words]
            if "dailytalk-usdm" in names:
                arguments = words[names.index("dailytalk-usdm") + 1 :]
                if arguments[0] == "--print_completion":  # prints and exits; tests/test_cli.py runs it
                    continue
                seen.append(parser.parse_args(arguments).command)
    assert set(COMMANDS) == set(seen)


def test_commands_that_show_a_folder_run_on_that_of_the_demo(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    lines = {line.strip() for block in find_blocks("bash") for line in block.code.splitlines()}
    shows = [shlex.split(line)[1:] for line in lines if line.startswith("dailytalk-usdm show dailytalk-usdm-data")]
    shows = [words for words in shows if not {"--serve", "--space"} & {*words}]
    for words in shows:
        main(words)
    assert len(shows) > 2 and "d2001_0:" in capsys.readouterr().out


def test_command_line_reference_is_current():
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert text == load_script("make_cli").make_cli(), "run: python docs/make_cli.py"
    for option in ("--data_dir", "--template.loss", "--on_bad_audio", "--final_norm", "--against", "--private"):
        assert f"| `{option}` |" in text


def test_picture_is_current_and_marks_the_labelled_tokens():
    script = load_script("make_picture")
    svg = (DOCS / "example.svg").read_text(encoding="utf-8")
    assert svg == script.make_picture(), "run: python docs/make_picture.py"
    tokenizer = script.build_tokenizer().backend_tokenizer
    input_ids, labels = script.read_row(script.LINES, script.WORDS, tokenizer)
    sections = {section.name: section for section in split_sections(input_ids, labels)}
    counted = {name for name, section in sections.items() if section.labels == section.input_ids}
    assert counted == {"transcript", "answer", "agent's speech"}
    assert all(set(section.labels) == {-100} for name, section in sections.items() if name not in counted)
    assert sum((section.input_ids for section in sections.values()), []) == input_ids  # noqa: RUF017
    assert len(re.findall('class="mark"', svg)) == len(re.findall('class="loss"', svg)) == 5  # lines
    message = r"train\.txt has no line with 'zebra crossing': name words of one of its dial"
    with pytest.raises(ValueError, match=message):
        script.read_row(script.LINES, "zebra crossing", tokenizer)


def test_api_page_has_each_public_name():
    """Each directive names the object that its heading names in `dailytalk_usdm`."""
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    found = {}
    for path, heading in re.findall(r'^::: ([\w.]+)\n    options: \{heading: "dailytalk_usdm\.(\w+)"', page, re.M):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name) is getattr(dailytalk_usdm, heading), path
        found[heading] = path
    own = set(re.findall(r"^::: dailytalk_usdm\.(\w+)", page, re.M))
    assert {*found, *own} == set(dailytalk_usdm.__all__) - {"__version__"}


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    sources = [*(REPOSITORY / "usdm_sft").rglob("*.py"), REPOSITORY / "dailytalk_usdm.py"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 20
    assert [message for message in messages if message not in code] == []


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_to_files_exist(page):
    targets = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra 'docs'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "dailytalk_usdm.TemplateEncoder" in api and "instance-attribute" not in api
    found = dict.fromkeys(re.findall(r'id="usdm_sft\.prepare\.config\.\w+Options\.(\w+)"', api))
    assert [*found] == [field.name for group in PrepareConfig.__bases__ for field in fields(group)]
    assert (
        "corpus/test_bad_audio.py::test_path_without_content"
        in (tmp_path / "site" / "reliability" / "index.html").read_text()
    )
