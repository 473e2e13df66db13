"""Make once what the tests of a process would make hundreds of times: the parser, USTM's tokenizer, opened tokenizers and pictures.

Each is made as in a run, and kept by all that it is made from. New processes that a test starts make their own; those of `tests/forked.py` begin with some.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import pickle
import shutil
import sys
from pathlib import Path


def _keep_ustm(build_tokenizer):
    ustm = functools.cache(build_tokenizer)

    @functools.wraps(build_tokenizer)
    def build(*args, **options):
        return build_tokenizer(*args, **options) if args or options else ustm()

    return build


def _keep_opened(load_tokenizer):
    opened = {}

    @functools.wraps(load_tokenizer)
    def load(folder):
        files = pickle.dumps([(path.name, path.read_bytes()) for path in sorted(folder.iterdir())])
        if files not in opened:
            opened[files] = load_tokenizer(folder)
        opened[files].name_or_path = str(folder)
        return opened[files]

    return load


def _keep_pictures(draw_pictures):
    """In files, which the processes of `tests/forked.py` find as well."""

    @functools.wraps(draw_pictures)
    def draw(statistics, counts, folder):
        about = [counts[name] for name in ("num_units", "settings", "unit_model")]
        given = hashlib.sha256(pickle.dumps((statistics, about))).hexdigest()
        drawn = Path(os.environ["HF_HOME"], "pictures", given)
        if not drawn.exists():
            draw_pictures(statistics, counts, folder)
            shutil.copytree(folder, f"{drawn}-{os.getpid()}")
            with contextlib.suppress(OSError):  # another process has just drawn them
                os.rename(f"{drawn}-{os.getpid()}", drawn)
        shutil.copytree(drawn, folder, dirs_exist_ok=True)

    return draw


_keep_a_few = functools.lru_cache(maxsize=8)
_KEPT = [
    ("usdm_sft.cli.main", "make_parser", functools.cache),
    ("usdm_sft.template.tokenizer", "build_tokenizer", _keep_ustm),
    ("usdm_sft.prepare.open_run", "TemplateEncoder", _keep_a_few),
    ("usdm_sft.folder.verify", "TemplateEncoder", _keep_a_few),
    ("usdm_sft.folder.verify", "load_tokenizer", _keep_opened),
    ("usdm_sft.folder.edit", "load_tokenizer", _keep_opened),
    ("usdm_sft.folder.serve", "load_tokenizer", _keep_opened),
    ("usdm_sft.folder.writer", "draw_pictures", _keep_pictures),
    ("jinja2", "Template", _keep_a_few),
]


def keep_what_is_made():
    """Replace the functions that make these, in the modules that are imported by now."""
    if "usdm_sft.prepare.prepare" in sys.modules:
        importlib.import_module("usdm_sft.folder.writer")  # which `prepare` imports when it needs it
    for kept in [kept for kept in _KEPT if kept[0] in sys.modules]:
        _KEPT.remove(kept)
        name, function, keep = kept
        setattr(sys.modules[name], function, keep(getattr(sys.modules[name], function)))
