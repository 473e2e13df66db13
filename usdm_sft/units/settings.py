"""Settings of the unit tokenizer that the command line shows: standard library only."""

from typing import Literal

BATCH_SECONDS = 160.0  # audio in one forward pass, padding included

PrecisionName = Literal["fp32", "tf32", "fp16", "bf16"]
ResamplerName = Literal["soxr", "torchaudio"]
