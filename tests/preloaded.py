"""What the processes of `tests/forked.py` have from the start; nothing here starts a thread."""

import usdm_sft.cli.prepare
import usdm_sft.folder.writer
import usdm_sft.prepare.prepare
import usdm_sft.units.model  # noqa: F401
from tests.made_once import keep_what_is_made
from usdm_sft.template import tokenizer

keep_what_is_made()
tokenizer.build_tokenizer()
