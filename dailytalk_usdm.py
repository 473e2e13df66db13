"""The public names of the package, and the loading script of the dataset builder.

After `import dailytalk_usdm`, `load_dataset("dailytalk_usdm", "single_turn", data_dir=..., data_files=...)` works on every
version of datasets. datasets 3 also takes the path of this file, and `DailyTalkUSDM` can be used directly.
"""

import importlib
from typing import TYPE_CHECKING

import datasets.packaged_modules

from usdm_sft import __version__ as __version__
from usdm_sft.corpus.builder import DailyTalkUSDM as DailyTalkUSDM
from usdm_sft.corpus.builder import DailyTalkUSDMConfig as DailyTalkUSDMConfig
from usdm_sft.corpus.builder import code_digest
from usdm_sft.corpus.builder import load_dataset as load_dataset

if TYPE_CHECKING:
    from usdm_sft.folder.export import export as export
    from usdm_sft.folder.own_parts import Card as Card
    from usdm_sft.folder.push import push as push
    from usdm_sft.folder.verify import verify as verify
    from usdm_sft.prepare.config import PrepareConfig as PrepareConfig
    from usdm_sft.prepare.fit_unit_model import fit_unit_model as fit_unit_model
    from usdm_sft.prepare.prepare import Submission as Submission
    from usdm_sft.prepare.prepare import prepare as prepare
    from usdm_sft.template.config import Template as Template
    from usdm_sft.template.encoder import TemplateEncoder as TemplateEncoder
    from usdm_sft.template.repetition import collapse_units as collapse_units
    from usdm_sft.template.repetition import expand_units as expand_units
    from usdm_sft.template.streams import flatten_units as flatten_units
    from usdm_sft.template.streams import unflatten_units as unflatten_units
    from usdm_sft.template.tokenizer import build_tokenizer as build_tokenizer
    from usdm_sft.template.tokenizer import load_tokenizer as load_tokenizer
    from usdm_sft.training import REFERENCE_STAGES as REFERENCE_STAGES
    from usdm_sft.training import STEPS as STEPS
    from usdm_sft.training import PaddingCollator as PaddingCollator
    from usdm_sft.training import PaddingFreeCollator as PaddingFreeCollator
    from usdm_sft.training import ShiftedLabels as ShiftedLabels
    from usdm_sft.training import StepLogitsProcessor as StepLogitsProcessor
    from usdm_sft.training import next_prompt as next_prompt
    from usdm_sft.units.convert import convert as convert
    from usdm_sft.units.tokenizer import UnitTokenizer as UnitTokenizer

# Public name -> module, imported at the first use: torch is slow. The same names as under TYPE_CHECKING above.
_LAZY = {
    "PrepareConfig": "usdm_sft.prepare.config",
    "convert": "usdm_sft.units.convert",
    "fit_unit_model": "usdm_sft.prepare.fit_unit_model",
    "Card": "usdm_sft.folder.own_parts",
    "export": "usdm_sft.folder.export",
    "push": "usdm_sft.folder.push",
    "verify": "usdm_sft.folder.verify",
    "Submission": "usdm_sft.prepare.prepare",
    "prepare": "usdm_sft.prepare.prepare",
    "Template": "usdm_sft.template.config",
    "TemplateEncoder": "usdm_sft.template.encoder",
    "collapse_units": "usdm_sft.template.repetition",
    "expand_units": "usdm_sft.template.repetition",
    "flatten_units": "usdm_sft.template.streams",
    "unflatten_units": "usdm_sft.template.streams",
    "build_tokenizer": "usdm_sft.template.tokenizer",
    "load_tokenizer": "usdm_sft.template.tokenizer",
    "PaddingCollator": "usdm_sft.training",
    "PaddingFreeCollator": "usdm_sft.training",
    "REFERENCE_STAGES": "usdm_sft.training",
    "STEPS": "usdm_sft.training",
    "StepLogitsProcessor": "usdm_sft.training",
    "next_prompt": "usdm_sft.training",
    "ShiftedLabels": "usdm_sft.training",
    "UnitTokenizer": "usdm_sft.units.tokenizer",
}
__all__ = [*_LAZY, "DailyTalkUSDM", "DailyTalkUSDMConfig", "__version__", "load_dataset"]


if not TYPE_CHECKING:  # a type checker takes a module with `__getattr__` to have every name

    def __getattr__(name):
        if name in _LAZY:
            return getattr(importlib.import_module(_LAZY[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# Let `datasets.load_dataset` find the builder by name. This private dict is the only one that is touched; if it ever goes, the
# builder class still works. The copy of this file that datasets 3 makes has another name and stays out of it.
if __name__ == "dailytalk_usdm" and hasattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES"):
    datasets.packaged_modules._PACKAGED_DATASETS_MODULES["dailytalk_usdm"] = (__name__, code_digest())
