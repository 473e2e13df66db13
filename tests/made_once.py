"""Make once what the tests of a process would make hundreds of times: the parser, USTM's tokenizer, opened tokenizers and pictures.

Each is made as in a run, and kept by all that it is made from. Processes that a test starts make their own.
"""

import functools
import importlib
import pickle
import sys


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
    drawn = {}

    @functools.wraps(draw_pictures)
    def draw(statistics, counts, folder):
        given = pickle.dumps((statistics, [counts[name] for name in ("num_units", "settings", "unit_model")]))
        if given not in drawn:
            draw_pictures(statistics, counts, folder)
            drawn[given] = {path.name: path.read_bytes() for path in folder.iterdir()}
        folder.mkdir(exist_ok=True)
        for name, data in drawn[given].items():
            (folder / name).write_bytes(data)

    return draw


_KEPT = {
    "usdm_sft.cli.main": ("make_parser", functools.cache),
    "usdm_sft.template.tokenizer": ("build_tokenizer", _keep_ustm),
    "usdm_sft.folder.verify": ("load_tokenizer", _keep_opened),
    "usdm_sft.folder.edit": ("load_tokenizer", _keep_opened),
    "usdm_sft.folder.serve": ("load_tokenizer", _keep_opened),
    "usdm_sft.folder.writer": ("draw_pictures", _keep_pictures),
}


def keep_what_is_made():
    """Replace the functions that make these, in the modules that are imported by now."""
    if "usdm_sft.prepare.prepare" in sys.modules:
        importlib.import_module("usdm_sft.folder.writer")  # which `prepare` imports when it needs it
    for name in _KEPT.keys() & sys.modules.keys():
        function, keep = _KEPT.pop(name)
        setattr(sys.modules[name], function, keep(getattr(sys.modules[name], function)))
