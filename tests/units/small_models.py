"""A small unit model, converted from the fixtures, and changes to its files."""

import json

from safetensors.torch import load_file, save_file

from tests.helpers import FIXTURES
from usdm_sft.units.convert import convert
from usdm_sft.utils.files import sha256_file

UNITS = FIXTURES / "units"


def convert_small(folder, checkpoint=UNITS / "model_fairseq.pt", kmeans=UNITS / "kmeans.npy", **options):
    return convert(checkpoint, kmeans, folder, **{"model_config": UNITS / "config.json", "layer": 5} | options)


class Evil:
    """An object whose pickle runs code."""

    def __reduce__(self):
        return (print, ("code ran",))


def set_keys(**keys):
    """Return a function that changes keys of a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def edit_weights(change):
    """Return a function that changes the tensors of a safetensors file."""

    def edit(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def change_file(folder, name, change):
    """Change a file of a unit model folder and record its new digest, as an attacker can."""
    change(folder / name)
    description = folder / "unit_model.json"
    set_keys(files=json.loads(description.read_text())["files"] | {name: sha256_file(folder / name)})(description)
